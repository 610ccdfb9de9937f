"""A network that is its architecture, a table of round numbers, and a scorer that adds up what each block is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketfusion.artefact import atomic_folder
from pocketfusion.evolve.algorithm import Tools
from pocketfusion.models.elastic.architecture import Architecture, BlockName

CONFIG = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 1,
    "block_out_channels": (32, 32),
}
#: 4 cross-attention and 8 ResNet blocks in all: down0 R CA, down1 R, mid R CA R, up0 R R, up1 R CA R CA
STOCK = Architecture.stock(CONFIG)
FIXED_MS = 10.0


@dataclass(frozen=True)
class Network:
    """An architecture, and by how much training has raised its score."""

    architecture: Architecture
    trained: float = 0.0


def milliseconds(architecture: Architecture, ms: Mapping[str, float]) -> float:
    """Fixed part + `ms` of each block's stock one (1 unless named); no self-attention -20 %, a share of FFN -40 %."""
    total = FIXED_MS
    for at, block in architecture.blocks():
        cost = ms.get(str(BlockName(at.stage, at.kind, at.index)), 1.0)
        total += cost * (1 - 0.2 * (not block.self_attention) - 0.4 * (1 - block.feed_forward))
    return total


class Scorer:
    """Four pictures; a block is worth `worth` (5 unless named), a copy `copy`; thinning one costs `thin` or so."""

    def __init__(self, worth: Mapping[str, float], thin: float = 1.0, copy: float = 0.0):
        self.worth, self.thin, self.copy = worth, thin, copy
        self.calls: list[Architecture] = []

    def score(self, network: Network) -> np.ndarray:
        self.calls.append(network.architecture)
        total = network.trained
        for at, block in network.architecture.blocks():
            worth = self.worth.get(str(BlockName(at.stage, at.kind, at.index)), 5.0)
            lost = self.thin * ((not block.self_attention) + 3 * (1 - block.feed_forward))
            total += (self.copy if at.number else worth) - lost
        return total + np.array([-1.5, -0.5, 0.5, 1.5])


class World:
    """The fake tools; `trained` and `evaluated` count what was really done. `gain`: what training adds."""

    def __init__(self, ms: Mapping[str, float] = {}, gain: float = 0.0, **scorer):
        self.scorer = Scorer(**{"worth": {}, **scorer})
        self.ms, self.gain, self.trained = ms, gain, []

    def latency(self, architecture: Architecture) -> float:
        """`milliseconds`, in whose fixed part each of the two samplers has 0.5."""
        dropped = 2 - sum(stage.sampler for stage in architecture.stages.values())
        return milliseconds(architecture, self.ms) - 0.5 * dropped

    def _train(self, network: Network, number: int) -> Network:
        self.trained.append(number)
        return Network(network.architecture, network.trained + self.gain)

    def tools(self) -> Tools:
        def rebuild(network: Network, architecture: Architecture) -> Network:
            return Network(architecture, network.trained)

        return Tools(self.scorer, self.latency, CONFIG, rebuild, self._train, _save, _load)


def _save(network: Network, folder: Path) -> None:
    with atomic_folder(folder) as partial:
        (partial / "network.json").write_text(network.architecture.model_dump_json())
        (partial / "trained").write_text(repr(network.trained))


def _load(folder: Path) -> Network:
    architecture = Architecture.model_validate_json((folder / "network.json").read_text())
    return Network(architecture, float((folder / "trained").read_text()))
