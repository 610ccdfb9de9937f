"""An untrained judge, and a latency table made up for the tiny folder."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def judge(tiny_folder, tmp_path_factory) -> Path:
    """A judge folder over the tiny text encoder."""
    from pocketfusion.models.dual_encoder import JudgeModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "judge"
    text = {"source": str(tiny_folder), "max_length": 32}
    JudgeModel(image_size=64, widths=(8, 16), text_width=32, embed_dim=16, text=text).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def table(tiny_folder, tmp_path_factory) -> Path:
    """latency.json: 2 ms a cross-attention block (1 thinned), 1 ms a ResNet, 0.1 ms anything else; no overhead."""
    from pocketfusion.latency.table import Entry, LatencyTable, Overhead, Timing, Whole
    from pocketfusion.latency.timing_backends import settings_here
    from pocketfusion.latency.unet_parts import action_architectures, bare, base_shapes, list_parts
    from pocketfusion.models.elastic.architecture import Architecture

    config = json.loads((tiny_folder / "unet" / "config.json").read_text())
    stock = Architecture.stock(config)

    def timing(ms: float) -> Timing:
        return Timing(median=ms, min=ms, max=ms, runs=1)

    def milliseconds(part) -> float:
        if part.kind == "attention":
            return 1.0 if "no-self" in part.key or ",ff" in part.key else 2.0
        return 1.0 if part.kind == "resnet" else 0.1

    parts = [part for architecture in action_architectures(config) for part in list_parts(config, architecture, 32)]

    def whole(architecture: Architecture) -> Whole:
        milli = [milliseconds(part) for part in list_parts(config, architecture, 32)]
        return Whole(whole=timing(sum(milli)), parts=sum(milli), count=len(milli))

    made = LatencyTable(
        settings=settings_here("litert-cpu", "float32", 1),
        base=base_shapes(config),
        text_length=32,
        parts={p.key: Entry(kind=p.kind, parameters=0, macs=0, ms={2: timing(milliseconds(p))}) for p in parts},
        overhead={2: Overhead.between(whole(stock), whole(bare(config)), empty=0.0, interleaved=True)},
    )
    path = tmp_path_factory.mktemp("latency") / "latency.json"
    made.save(path)
    return path
