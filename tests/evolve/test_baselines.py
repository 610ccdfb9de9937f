"""What evolving is compared with: each meets its budget from below, runs on the base, and is what it says."""

import pytest
from search_world import CONFIG, milliseconds

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.actions import Action, apply_all, reductions
from pocketfusion.evolve.removal import bk_sdm, random_removal
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic.skips import check_architecture

#: Stable Diffusion's pattern: 38 blocks of 1 ms, and 10 ms
SD = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 128, 128),
}
STOCK = Architecture.stock(SD)


def latency(architecture: Architecture) -> float:
    return milliseconds(architecture, {})


def test_bk_sdm_follows_its_order_and_ends_at_the_budget():
    assert latency(STOCK) == 48
    architecture, steps = bk_sdm(SD, latency, 46.0)  # two blocks of the first pair's four
    assert steps == ["pair of stage 0"] and latency(architecture) == 46
    gone = set(STOCK.names()) - set(architecture.names())
    pair = {
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.1",
        "up_blocks.3.resnets.1",
        "up_blocks.3.attentions.1",
    }
    assert len(gone) == 2 and gone < pair
    architecture, steps = bk_sdm(SD, latency, 44.0)
    assert set(STOCK.names()) - set(architecture.names()) == pair and steps == ["pair of stage 0"]
    assert [layer.index for layer in architecture.stages["up_blocks.3"].layers] == [0, 2]  # its skip is gone too


def test_bk_sdm_base_small_and_tiny():
    # BK-SDM-Base: one layer a down stage, two an up stage; Small: no mid block; Tiny: no innermost stage
    base, _ = bk_sdm(SD, latency, 10.0 + 24)
    assert base.count("mid_block", "resnets") == 2
    for stage, count in (("down_blocks", 1), ("up_blocks", 2)):
        assert [base.count(f"{stage}.{i}", "resnets") for i in range(4)] == [count] * 4
    small, steps = bk_sdm(SD, latency, 10.0 + 21)
    assert small.stages["mid_block"].layers == () and steps[-1] == "mid block"
    tiny, steps = bk_sdm(SD, latency, 10.0 + 18)
    kept = [f"down_blocks.{i}.{kind}.0" for i in range(3) for kind in ("resnets", "attentions")]
    kept += [f"up_blocks.{i}.{kind}.{j}" for i in (1, 2, 3) for j in (0, 2) for kind in ("resnets", "attentions")]
    assert tiny.names() == kept and steps[-1] == "innermost stage"
    assert not tiny.stages["down_blocks.2"].sampler and not tiny.stages["up_blocks.0"].sampler


def test_beyond_tiny_the_innermost_stage_that_is_left_goes_on():
    architecture, steps = bk_sdm(SD, latency, 10.0 + 10)
    assert steps[-2:] == ["blocks of stage 2", "blocks of stage 1"] and latency(architecture) == 20
    assert architecture.count("down_blocks.2", "attentions") == architecture.count("up_blocks.1", "resnets") == 0


@pytest.mark.parametrize("budget", [47.5, 40.2, 33.0, 24.0, 17.7, 10.0])
def test_both_meet_any_budget_within_a_block_and_run_on_the_base(budget):
    for architecture in (bk_sdm(SD, latency, budget)[0], random_removal(SD, latency, budget, seed=1)[0]):
        check_architecture(architecture, SD)
        assert budget - 1 < latency(architecture) <= budget


def test_a_random_removal_is_the_seeds_and_brings_back_what_fits():
    costs = {"down_blocks.0.attentions.0": 9.0, "up_blocks.3.resnets.0": 7.5}

    def uneven(architecture: Architecture) -> float:
        return milliseconds(architecture, costs)

    seen = set()
    for seed in range(6):
        architecture, removed = random_removal(SD, uneven, 40.0, seed)
        assert (architecture, removed) == random_removal(SD, uneven, 40.0, seed)
        assert set(STOCK.names()) - set(architecture.names()) == set(removed)
        assert all(uneven(architecture) + costs.get(name, 1.0) > 40.0 for name in removed)
        seen.add(tuple(sorted(removed)))
    assert len(seen) == 6


def test_bases_of_one_layer_a_stage_and_impossible_budgets():
    architecture, steps = bk_sdm(CONFIG, latency, 19.0)
    assert latency(architecture) == 19 and steps == ["mid block"]
    for method in (lambda ms: bk_sdm(SD, latency, ms), lambda ms: random_removal(SD, latency, ms, 0)):
        with pytest.raises(PocketfusionError, match="below what these actions can reach, 10 ms"):
            method(9.0)
        with pytest.raises(PocketfusionError, match="nothing to remove"):
            method(48.0)


def test_the_search_may_drop_what_bk_sdm_does():
    found = {action.block: action.apply(STOCK) for action in reductions(STOCK, ["drop"], SD)}
    assert set(found) == {
        *("down_blocks.0.1+up_blocks.3.1", "down_blocks.0.0+up_blocks.3.1"),
        *("down_blocks.1.1+up_blocks.2.1", "down_blocks.2.1+up_blocks.1.0"),
        *("down_blocks.3.1+up_blocks.0.0", "down_blocks.3.0+up_blocks.0.1"),
        *("mid_block", "down_blocks.3"),
    }
    # BK-SDM-Tiny, but for its pair in stage 2, of which the search drops the up layer that takes that skip
    named = ["down_blocks.0.1+up_blocks.3.1", "down_blocks.1.1+up_blocks.2.1", "down_blocks.2.1+up_blocks.1.1"]
    now = apply_all([Action(kind="drop", block=what) for what in (*named, "mid_block", "down_blocks.3")], STOCK)
    asked = []
    bk_sdm(SD, lambda architecture: asked.append(architecture) or latency(architecture), 15.0)
    assert now in asked
    # 64 channels become 128 in level 2, so that it cannot go whole after level 3
    assert not [action for action in reductions(now, ["drop"], SD) if action.block == "down_blocks.2"]
