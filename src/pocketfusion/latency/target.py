"""What is profiled: a model folder, or a named configuration of full size with random weights.

And the architectures to hold its table's predictions against: of every kind of change, the same for every base alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder
from pocketfusion.latency.timing_backends import Job
from pocketfusion.mobile import pipeline_specs
from pocketfusion.mobile.wrappers import StablePipeline, wrap
from pocketfusion.models.elastic.architecture import MID, Architecture, BlockName
from pocketfusion.models.elastic_unet import check_family
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sd_configs import CONFIGS, random_pipeline
from pocketfusion.quiet import quiet


class Target:
    """A pipeline's networks. `config`: the UNet's; `architecture`: the UNet's own, where it is an evolved one.

    `pipeline`: of which the UNet only gives its config.
    """

    def __init__(self, name: str, pipeline: StablePipeline):
        config = {key: value for key, value in pipeline.unet.config.items() if key != "architecture"}
        check_family({key: value for key, value in config.items() if key != "_class_name"}, f"the UNet of {name}")
        self.name = name
        self.config: Mapping[str, Any] = {key: value for key, value in config.items() if not key.startswith("_")}
        found = pipeline.unet.config.get("architecture")
        self.architecture = Architecture.model_validate(found) if found else Architecture.stock(config)
        self.evolved = self.architecture != Architecture.stock(config)
        self.text_length = pipeline_specs.tokenizer_spec(pipeline).max_length
        self._modules = {key: module for key, module in wrap(pipeline).items() if key != "unet"}
        self._samples = pipeline_specs.samples(pipeline, batch=1)

    def networks(self) -> tuple[dict[str, Job], dict[str, nn.Module]]:
        """Text encoder and decoder, batch 1: as jobs, and their modules."""
        jobs = {
            key: Job(f"{key}:{module}", lambda module=module: module, self._samples[key])  # type: ignore[misc]
            for key, module in self._modules.items()
        }
        return jobs, self._modules


def load_target(source: str) -> Target:
    """The target named `source`: a configuration of `sd_configs`, else a model folder.

    Raises PocketfusionError if it is neither, or not of Stable Diffusion's 1.x/2.x family.
    """
    if source in CONFIGS:
        return Target(source, random_pipeline(source))
    folder = Path(source)
    check_folder(folder)
    config = folder / "unet" / "config.json"
    try:  # before the weights are read: what another family's weights say when they do not fit helps nobody
        check_family(json.loads(config.read_text(encoding="utf-8")), f"{folder}/unet")
    except (OSError, ValueError, KeyError):
        raise PocketfusionError(f"{config} is missing or damaged: restore it from its source") from None
    with quiet():
        pipeline = load_pipeline(folder)
    return Target(source, pipeline)


def validation_architectures(config: Mapping[str, Any], number: int) -> dict[str, Architecture]:
    """The first `number` of an endless, fixed list by name: six hand-made ones, then random ones by seed."""
    return dict(islice(_all(config), number))


def _all(config: Mapping[str, Any]) -> Iterator[tuple[str, Architecture]]:
    base = Architecture.stock(config)
    names = [BlockName.parse(name) for name in base.names()]
    attentions = [name for name in names if name.kind == "attentions"]
    last_up = f"up_blocks.{len(config['block_out_channels']) - 1}"

    yield (
        "no cross-attention at full size",
        _without(base, [n for n in attentions if n.stage in ("down_blocks.0", last_up)]),
    )
    yield "a third of all blocks removed, seed 0", _random(base, share=1 / 3, seed=0)
    yield "no self-attention", _changed(base, attentions, Architecture.without_self_attention)
    # BK-SDM (arXiv 2305.15798) section 3.1: the second ResNet and attention of each stage go, and the mid stage.
    yield "BK-SDM's choice", _without(base, [n for n in names if n.index == 1 or n.stage == MID])
    yield "two thirds of all blocks removed, seed 1", _random(base, share=2 / 3, seed=1)
    deep = [n for n in attentions if n.stage == "up_blocks.1"]
    copied = _changed(base, deep, Architecture.duplicate)
    yield "up_blocks.1's cross-attention copied", copied
    yield "feed-forward halved", _changed(base, attentions, lambda a, name: a.narrow_feed_forward(name, 0.5))
    for seed in count(2):
        yield f"half of all blocks removed, seed {seed}", _random(base, share=0.5, seed=seed)


def _without(base: Architecture, names: list[BlockName]) -> Architecture:
    return _changed(base, names, Architecture.remove)


def _changed(base: Architecture, names: list[BlockName], change: Any) -> Architecture:
    for name in names:
        base = change(base, str(name))
    return base


def _random(base: Architecture, share: float, seed: int) -> Architecture:
    names = base.names()
    for name in random.Random(seed).sample(names, round(share * len(names))):
        base = base.remove(name)
    return base
