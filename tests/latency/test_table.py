"""Predictions are sums that can be done by hand; tables that do not fit are refused with what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.breakdown import breakdown, plot_table, removal_savings
from pocketfusion.latency.table import LatencyTable
from pocketfusion.models.elastic.architecture import Architecture

# SD's pattern: 22 ResNets, 16 cross-attention blocks; 3 down- and 3 upsamplers, conv_in, time embedding, conv_out
PARTS = 22 + 16 + 6 + 3
BASE_MS = 22 * 3 + 16 * 5 + 9 * 1 + 2 - 0.5 * PARTS


def test_predict_is_the_sum_of_parts_and_overhead(table: LatencyTable, config: dict) -> None:
    base = Architecture.stock(config)
    assert table.predict(config, base) == pytest.approx(BASE_MS)
    # an attention block goes with its part's overhead
    assert table.predict(config, base.remove("mid_block.attentions.0")) == pytest.approx(BASE_MS - 5 + 0.5)
    # an up path's ResNet leaves its shortcut, a part of 1 ms; one that keeps its channels leaves nothing
    assert table.predict(config, base.remove("up_blocks.1.resnets.0")) == pytest.approx(BASE_MS - 3 + 1)
    assert table.predict(config, base.remove("down_blocks.0.resnets.1")) == pytest.approx(BASE_MS - 3 + 0.5)
    assert table.predict(config, base.duplicate("up_blocks.1.resnets.0")) == pytest.approx(BASE_MS + 3 - 0.5)
    assert table.predict(config, base.without_self_attention("mid_block.attentions.0")) == pytest.approx(BASE_MS - 1)


def test_a_part_that_is_not_there_is_named(table: LatencyTable, config: dict) -> None:
    base = Architecture.stock(config)
    odd = base.narrow_feed_forward("up_blocks.2.attentions.1", 0.125)
    with pytest.raises(PocketfusionError, match=r"no entry for up_blocks\.2\.attentions\.1 .*ff0\.125"):
        table.predict(config, odd)
    with pytest.raises(PocketfusionError, match="no batch size 1: profile again with --batch 1, or use 2"):
        table.predict(config, base, batch=1)


def test_a_table_of_something_else_is_refused(table: LatencyTable, config: dict) -> None:
    table.check(config, table.settings)
    with pytest.raises(PocketfusionError, match=r"base whose cross_attention_dim is 32, not 64"):
        table.check({**config, "cross_attention_dim": 64})
    for key, value in (
        ("device", "b phone"),
        ("runtime", "r 2"),
        ("threads", 4),
        ("weights", "int8"),
        ("backend", "x"),
    ):
        other = table.settings.model_copy(update={key: value})
        with pytest.raises(PocketfusionError, match=f"the {key} .*, not {value}: profile again, or pass --force"):
            table.check(config, other)
        table.check(config, other, force=True)
    with pytest.raises(PocketfusionError, match="no batch size 4"):
        table.check(config, batch=4)


def test_evolved_base_is_the_same_base(table: LatencyTable, config: dict) -> None:
    """A config read from a file has lists and an architecture: neither makes it another base."""
    evolved = json.loads(json.dumps({**config, "architecture": {}}))
    table.check(evolved)


def test_round_trip_and_damage(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    table.save(path)
    assert LatencyTable.load(path) == table
    with pytest.raises(PocketfusionError, match="cannot be read .No such file"):
        LatencyTable.load(tmp_path / "none.json")
    for text in ("{", "[]", path.read_text().replace('"version": 1', '"version": 2')):
        path.write_text(text)
        with pytest.raises(PocketfusionError, match="not a latency table of this version"):
            LatencyTable.load(path)


def test_breakdown_counts_the_papers_blocks(table: LatencyTable) -> None:
    """SnapFusion, Table 3, column of the original."""
    rows = {(row.stage, row.kind): row for row in breakdown(table, 2)}
    attention = {stage: row.blocks for (stage, kind), row in rows.items() if kind == "cross-attention"}
    resnets = {stage: row.blocks for (stage, kind), row in rows.items() if kind == "ResNet"}
    assert attention == {"Down-1": 2, "Down-2": 2, "Down-3": 2, "Mid": 1, "Up-1": 3, "Up-2": 3, "Up-3": 3}
    assert resnets == {"Down-1": 2, "Down-2": 2, "Down-3": 2, "Mid": 7, "Up-1": 3, "Up-2": 3, "Up-3": 3}
    assert rows["Mid", "ResNet"].ms == 21 and rows["", "other"].blocks == 9
    assert sum(row.ms for row in rows.values()) == table.overhead[2].parts


def test_savings_are_differences_of_predictions(table: LatencyTable) -> None:
    savings = dict(removal_savings(table, 2))
    assert len(savings) == 38
    assert savings["mid_block.attentions.0"] == pytest.approx(4.5)
    assert savings["up_blocks.1.resnets.0"] == pytest.approx(2)
    assert list(savings.values()) == sorted(savings.values(), reverse=True)


def test_figure(table: LatencyTable, tmp_path: Path) -> None:
    from PIL import Image

    plot_table(table, tmp_path / "latency.png")
    image = Image.open(tmp_path / "latency.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0xD1, 0x49, 0x5B), (0x30, 0x63, 0x8E)} <= colours
