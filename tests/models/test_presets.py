"""SnapFusion's Table 3 on SD-1.5's shapes, and the command that shows and applies it."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from unets import ONE_LAYER, SD1, inputs, run, stock_unet

from pocketfusion.architecture_report import describe, open_base, table
from pocketfusion.cli import main
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.mobile.pipeline_specs import unet_cost
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic.presets import snapfusion, stage_counts
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import as_elastic
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sd_configs import CONFIGS

#: SnapFusion, Table 3: cross-attention blocks and ResNets per stage, original → ours.
PAPER = {
    "Down-1": (2, 0, 2, 2),
    "Down-2": (2, 2, 2, 2),
    "Down-3": (2, 2, 2, 1),
    "Mid": (1, 1, 7, 4),
    "Up-1": (3, 6, 3, 2),
    "Up-2": (3, 3, 3, 3),
    "Up-3": (3, 0, 3, 3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_the_papers(name):
    base = open_base(name)
    stock, ours = base.architecture, snapfusion(base.config)
    counts = zip(
        *(stage_counts(one, kind).items() for kind in ("attentions", "resnets") for one in (stock, ours)), strict=True
    )
    assert {row[0][0]: tuple(count for _, count in row) for row in counts} == PAPER


def test_costs_are_those_counted_elsewhere():
    """Parameters of SD's UNets as published; multiply-adds and the preset's figures as facts/papers.md 1.1 and 1.2."""
    report = describe(open_base("sd-1.5"), "snapfusion")
    stock, ours = report.costs["sd-1.5"], report.costs["snapfusion"]
    assert stock.parameters == 859_520_964 and round(stock.multiply_adds / 1e8) == 4016
    assert round(ours.parameters / 1e6) == 759 and round(ours.multiply_adds / 1e8) == 3045
    assert describe(open_base("sd-2.1")).costs["sd-2.1"].parameters == 865_910_724
    joined = " ".join(report.notes)
    for part in ("860 M → 848 M", "859.5 M → 759.3 M", "951.1 M", "191.7 M"):
        assert part in joined
    assert table(report).row_count == len(PAPER) + 3


def test_parameters_are_those_of_the_blocks_by_hand():
    """What the preset changes, added up from stock modules."""
    with torch.device("meta"):
        stock = UNet2DConditionModel(**CONFIGS["sd-1.5"]["unet"])

    def size(name: str) -> int:
        return sum(p.numel() for p in stock.get_submodule(name).parameters())

    gone = [f"{stage}.attentions.{i}" for stage, n in (("down_blocks.0", 2), ("up_blocks.3", 3)) for i in range(n)]
    gone += ["down_blocks.2.resnets.1", "down_blocks.3.resnets.1", "mid_block.resnets.1", "up_blocks.0.resnets.0"]
    gone += ["up_blocks.1.resnets.0"]
    added = 3 * size("up_blocks.1.attentions.0")
    expected = sum(p.numel() for p in stock.parameters()) - sum(map(size, gone)) + added
    base = open_base("sd-1.5")
    assert unet_cost(base.config, snapfusion(base.config), base.tokens).parameters == expected


def test_it_keeps_the_skips_that_layers_were_trained_with():
    """Each up layer that is left takes the output of the same module as in stock, followed by marking that module."""
    elastic = as_elastic(stock_unet(SD1))
    evolved = with_architecture(elastic, snapfusion(elastic.config))

    def takers(unet, giver: str, width: int) -> set[str]:
        """Up layers whose skip (their last `width` channels in) changes when the giver's output is marked."""

        def skips(mark: float) -> dict[str, torch.Tensor]:
            taken: dict[str, torch.Tensor] = {}
            with contextlib.ExitStack() as hooks:
                giving = unet.get_submodule(giver)
                hooks.callback(giving.register_forward_hook(lambda _m, _i, out: marked(out, mark)).remove)
                for name in unet.architecture.names():
                    if name.startswith("up") and ".resnets." in name:
                        keep = partial(lambda name, _, given: taken.update({name: given[0][:, -width:]}), name)
                        hooks.callback(unet.block(name).register_forward_pre_hook(keep).remove)
                run(unet, inputs(SD1))
            return taken

        plain, changed = skips(0.0), skips(1e3)
        return {name for name, value in plain.items() if (value - changed[name]).abs().min() > 100}

    def marked(out, mark):
        return (out[0] + mark,) if isinstance(out, tuple) else out + mark

    for giver, ours in (
        ("down_blocks.2.attentions.0", "down_blocks.2.attentions.0_1"),  # the layer's last block
        ("down_blocks.3.resnets.0", "down_blocks.3.resnets.0"),
        ("down_blocks.2.downsamplers.0", "down_blocks.2.downsamplers.0"),
    ):
        left = set(evolved.architecture.names())  # a dropped layer took the skip of another dropped one
        assert takers(evolved, ours, 24) == takers(elastic, giver, 24) & left != set()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ONE_LAYER, "the UNet's layers_per_block is 1"),
        (SD1 | {"mid_block_type": None}, "the UNet's mid_block_type is None"),
        (SD1 | {"down_block_types": ["CrossAttnDownBlock2D"] * 4}, "the UNet's down_block_types is"),
    ],
)
def test_another_block_pattern_is_refused(changed, message):
    config = {"mid_block_type": "UNetMidBlock2DCrossAttn"} | changed
    with pytest.raises(PocketfusionError, match=message):
        snapfusion(config)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `pocketfusion architecture ARGS` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketfusion", "architecture", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_applies_it_to_a_folder(command, tiny_folder, tmp_path):
    out = tmp_path / "efficient"
    code, printed, said = command(tiny_folder, "--preset", "snapfusion", "--out", out)
    assert code == 0, said
    assert "Up-1" in printed and "Paper (SD-v1.5)" in printed and "…" not in printed
    unet = load_pipeline(out).unet
    base = load_pipeline(tiny_folder).unet
    assert unet.architecture == snapfusion(base.config)
    kept = base.state_dict()["down_blocks.1.attentions.0.proj_in.weight"].half().float()
    assert torch.equal(unet.state_dict()["down_blocks.1.attentions.0.proj_in.weight"], kept)
    provenance = read_provenance(out)
    assert provenance.settings == {"preset": "snapfusion"} and provenance.parents == {"base": folder_hash(tiny_folder)}

    _, printed, _ = command(out, "--json")
    about = json.loads(printed)["variants"]["efficient"]
    assert Architecture.model_validate(about["architecture"]) == unet.architecture
    assert about["parameters"] == sum(p.numel() for p in unet.parameters())


def test_bad_input_is_one_sentence(command, cli, tiny_folder, tmp_path):
    for arguments, message in (
        ((tmp_path / "nowhere",), "there is no model folder at"),
        (("sd-1.5", "--preset", "fusion"), "there is no preset 'fusion': the presets are snapfusion"),
        (("sd-1.5", "--preset", "snapfusion", "--out", tmp_path / "x"), "a configuration without weights"),
        ((tiny_folder, "--out", tmp_path / "x"), "--out alone changes nothing"),
        ((tiny_folder, "--preset", "snapfusion", "--out", tmp_path), "exists already"),
    ):
        code, _, said = command(*arguments)
        assert code == 2 and message in said and "Traceback" not in said, arguments
    done = cli("architecture", tmp_path / "nowhere")
    assert done.returncode == 2 and "there is no model folder at" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
