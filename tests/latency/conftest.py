"""A table made by hand: its times are so chosen that sums can be told apart."""

from __future__ import annotations

import pytest

from pocketfusion.latency.profiling import distinct_parts
from pocketfusion.latency.table import Entry, LatencyTable, Overhead, Settings, Timing, Whole
from pocketfusion.latency.unet_parts import action_architectures, base_shapes, list_parts
from pocketfusion.models.elastic.architecture import Architecture
from tiny import MAX_LENGTH, tiny_pipeline


def timing(ms: float) -> Timing:
    return Timing(median=ms, min=ms, max=ms, runs=1)


def unet_config() -> dict:
    return {key: value for key, value in tiny_pipeline().unet.config.items() if not key.startswith("_")}


@pytest.fixture(scope="session")
def config() -> dict:
    return unet_config()


@pytest.fixture(scope="session")
def table(config: dict) -> LatencyTable:
    """ResNets 3 ms, attention 5, without self-attention 4, other parts 1; overhead 2 - 0.5 a part; batch 2."""
    parts = {}
    for key, (part, _) in distinct_parts(config, action_architectures(config), MAX_LENGTH).items():
        ms = {"resnet": 3.0, "attention": 4.0 if "no-self" in key else 5.0}.get(part.kind, 1.0)
        parts[key] = Entry(kind=part.kind, parameters=1000, macs=1_000_000, ms={2: timing(ms)})
    used = list_parts(config, Architecture.stock(config), MAX_LENGTH)
    total = sum(parts[part.key].ms[2].median for part in used)
    base = Whole(whole=timing(total - 0.5 * len(used) + 2), parts=total, count=len(used))
    less = Whole(whole=timing(20 - 0.5 * 10 + 2), parts=20, count=10)
    overhead = Overhead.between(base, less, empty=0.1, interleaved=True)
    network = Entry(kind="decoder", parameters=1, macs=1, ms={1: timing(7.0)})
    return LatencyTable(
        settings=Settings(device="a phone", backend="litert-cpu", runtime="r 1", weights="float32", threads=2),
        base=base_shapes(config),
        text_length=MAX_LENGTH,
        parts=parts,
        overhead={2: overhead},
        networks={"decoder": network},
    )
