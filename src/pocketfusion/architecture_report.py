"""Which blocks a UNet has and what it costs, beside a published architecture on the same base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from pocketfusion.artefact import atomic_folder, check_new
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, check_folder, folder_hash, write_provenance
from pocketfusion.mobile.pipeline_specs import Cost, unet_cost
from pocketfusion.models.elastic.architecture import KIND_NAMES, Architecture
from pocketfusion.models.elastic.presets import PRESETS, snapfusion_attention, stage_counts
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import ElasticUNet, check_family, load_elastic
from pocketfusion.models.sd_configs import CONFIGS
from pocketfusion.models.writing import copy_with_unet

#: SnapFusion, Table 1: parameters of SD-v1.5's UNet and of the efficient one. It gives no multiply-adds.
PAPER_PARAMETERS = {"stock": 860e6, "snapfusion": 848e6}


@dataclass(frozen=True)
class Base:
    """A UNet by its config; `tokens` is the length of its text states, `folder` where its weights are, if anywhere."""

    name: str
    config: Mapping[str, Any]
    architecture: Architecture
    tokens: int
    folder: Path | None = None


@dataclass(frozen=True)
class Report:
    """Architectures of one base by name, their costs, and remarks."""

    architectures: dict[str, Architecture]
    costs: dict[str, Cost]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        variants = {
            name: {
                "attentions": stage_counts(architecture, "attentions"),
                "resnets": stage_counts(architecture, "resnets"),
                **self.costs[name]._asdict(),
                "architecture": architecture.model_dump(mode="json"),
            }
            for name, architecture in self.architectures.items()
        }
        return {"variants": variants, "notes": self.notes}


def open_base(source: str) -> Base:
    """A model folder, or `sd-1.5` or `sd-2.1`; no weights are read.

    Raises PocketfusionError if there is no such folder, or its UNet is not of SD's 1.x/2.x family.
    """
    if source in CONFIGS:
        known = CONFIGS[source]
        with torch.device("meta"):
            unet = ElasticUNet(**known["unet"])
        return Base(source, unet.config, unet.architecture, known["text_encoder"]["max_position_embeddings"])
    folder = Path(source)
    if not folder.exists():
        raise PocketfusionError(
            f"there is no model folder at {source}: check the path, or name {' or '.join(CONFIGS)}"
        )
    check_folder(folder)
    from transformers import AutoConfig, AutoTokenizer

    try:
        given = ElasticUNet.load_config(folder, subfolder="unet")
        check_family(given, f"{folder}/unet")
        with torch.device("meta"):
            unet = ElasticUNet.from_config(given)
        length = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True).model_max_length
        text = AutoConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
    except PocketfusionError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PocketfusionError(f"{folder} could not be read ({reason[:200]}): restore it from its source") from None
    name = folder.resolve().name
    return Base(name, unet.config, unet.architecture, min(length, text.max_position_embeddings), folder)


def check_preset(preset: str) -> None:
    """Raises PocketfusionError unless there is a preset of that name."""
    if preset not in PRESETS:
        raise PocketfusionError(f"there is no preset {preset!r}: the presets are {', '.join(PRESETS)}")


def describe(base: Base, preset: str | None = None) -> Report:
    """The base's architecture and, if named, a preset's on it.

    Raises PocketfusionError if there is no such preset or the base has not the block pattern it needs.
    """
    architectures, notes = {base.name: base.architecture}, []
    if preset is not None:
        check_preset(preset)
        architectures[preset] = PRESETS[preset](base.config)
    costs = {name: unet_cost(base.config, one, base.tokens) for name, one in architectures.items()}
    if preset == "snapfusion":
        notes = snapfusion_notes(base, costs[preset])
    return Report(architectures, costs, notes)


def snapfusion_notes(base: Base, ours: Cost) -> list[str]:
    """How far this reading of SnapFusion's Table 3 is from the paper's parameter count, and why."""
    stock = unet_cost(base.config, Architecture.stock(base.config), base.tokens)
    attention = unet_cost(base.config, snapfusion_attention(base.config), base.tokens)
    before, after = PAPER_PARAMETERS["stock"], PAPER_PARAMETERS["snapfusion"]
    wanted = attention.parameters - stock.parameters * after / before
    removed = attention.parameters - ours.parameters
    return [
        f"Paper (SD-v1.5): {before / 1e6:.0f} M → {after / 1e6:.0f} M parameters, ratio {after / before:.3f}; no "
        f"multiply-adds are given. Here: {_millions(stock.parameters)} → {_millions(ours.parameters)}, ratio "
        f"{ours.parameters / stock.parameters:.3f}; multiply-adds ratio "
        f"{ours.multiply_adds / stock.multiply_adds:.3f}.",
        f"Why they differ: the table's changes of cross-attention alone give {_millions(attention.parameters)}. The "
        f"paper's ratio leaves room to remove {_millions(wanted)} of ResNets, but the five ResNets that its own table "
        f"removes are {_millions(removed)}. The table is followed here, not the total.",
    ]


def write_preset(base: Base, preset: str, out: Path, *, overwrite: bool = False) -> None:
    """Writes the base's folder to `out` with the preset's UNet; its weights are carried over, nothing is trained.

    Raises PocketfusionError if the base is no folder, lacks a weight, or `out` cannot be written.
    """
    check_preset(preset)
    if base.folder is None:
        raise PocketfusionError(f"{base.name} is a configuration without weights: --out needs a model folder")
    check_new(out, overwrite)
    unet = with_architecture(load_elastic(base.folder), PRESETS[preset](base.config))
    provenance = Provenance(
        stage="architecture", settings={"preset": preset}, parents={"base": folder_hash(base.folder)}
    )
    with atomic_folder(out, overwrite=overwrite) as partial:
        copy_with_unet(base.folder, partial, unet)
        write_provenance(partial, provenance)


def table(report: Report) -> Table:
    """Blocks per stage as in SnapFusion's Table 3, then parameters and multiply-adds; a column a kind and variant."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("stage")
    for name in report.architectures:
        for kind in KIND_NAMES.values():
            result.add_column(f"{name}\n{kind}", justify="right")
    counts = [stage_counts(one, kind) for one in report.architectures.values() for kind in KIND_NAMES]
    for stage in counts[0]:
        result.add_row(stage, *(str(column[stage]) for column in counts))
    result.add_row("blocks", *(str(sum(column.values())) for column in counts), style="bold")
    costs = list(report.costs.values())
    result.add_row("parameters", *(cell for cost in costs for cell in (_millions(cost.parameters), "")))
    result.add_row("multiply-adds", *(cell for cost in costs for cell in (_multiply_adds(cost.multiply_adds), "")))
    return result


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def _multiply_adds(count: int) -> str:
    return f"{count / 1e9:.1f} G" if count >= 10e9 else f"{count / 1e6:.1f} M"
