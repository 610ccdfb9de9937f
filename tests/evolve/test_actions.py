"""Which actions an architecture has, and what they are called."""

import pytest
from search_world import CONFIG, STOCK

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.actions import KINDS, Action, apply_all, copies, parse_kinds, reductions
from pocketfusion.models.elastic.architecture import MOST_BLOCKS
from pocketfusion.models.elastic.skips import check_architecture

ALL = tuple(KINDS.values())


def test_every_block_can_go_and_attention_blocks_can_be_thinned():
    found = reductions(STOCK, ALL, CONFIG)
    kinds = [action.kind for action in found]
    attentions = sum(".attentions." in name for name in STOCK.names())
    assert (len(STOCK.names()), attentions) == (12, 4)
    assert kinds.count("remove") == 12
    assert kinds.count("remove-self-attention") == kinds.count("narrow-feed-forward") == 4
    assert len({action.key for action in found}) == len(found)
    for action in found:
        after = action.apply(STOCK)
        assert after != STOCK and action.touches(STOCK)
        check_architecture(after, CONFIG)
    assert [action.block for action in reductions(STOCK, ["remove"], CONFIG)] == STOCK.names()


def test_a_feed_forward_narrows_by_steps_and_self_attention_goes_once():
    block, kinds = "mid_block.attentions.0", ["narrow-feed-forward", "remove-self-attention"]
    architecture, shares = STOCK, []
    while steps := [a for a in reductions(architecture, kinds, CONFIG) if a.block == block and a.share]:
        shares.append(steps[0].share)
        architecture = steps[0].apply(architecture)
    assert shares == [0.5, 0.25]
    architecture = architecture.without_self_attention(block)
    assert not [a for a in reductions(architecture, kinds, CONFIG) if a.block == block]


def test_a_pruned_feed_forward_is_not_narrowed_by_shares():
    block = "mid_block.attentions.0"
    pruned = STOCK.keep_units(block, "feed_forward_units", 8)
    assert {a.block for a in reductions(STOCK, ["narrow-feed-forward"], CONFIG)} - {block} == {
        a.block for a in reductions(pruned, ["narrow-feed-forward"], CONFIG)
    }
    assert block in {a.block for a in reductions(pruned, ["remove"], CONFIG)}


def test_layers_the_mid_block_and_the_innermost_level_can_be_dropped():
    found = {action.block: action.apply(STOCK) for action in reductions(STOCK, ["drop"], CONFIG)}
    pairs = ["down_blocks.0.0+up_blocks.1.0", "down_blocks.1.0+up_blocks.0.0"]
    assert list(found) == [*pairs, "mid_block", "down_blocks.1"]
    assert found["mid_block"] == STOCK.drop_layer("mid_block", 0).drop_layer("mid_block", 1)
    level = found["down_blocks.1"]
    assert level.names() == [name for name in STOCK.names() if name.startswith(("down_blocks.0", "up_blocks.1"))]
    assert not any(stage.sampler for stage in level.stages.values()) and level.depth == 0
    # of what is left the level of the latents stays
    assert [action.block for action in reductions(level, ["drop"], CONFIG)] == [pairs[0]]
    with pytest.raises(PocketfusionError, match="level 0 cannot be dropped: the innermost is 0, and 0 stays"):
        level.drop_level(0)
    one = STOCK.remove("mid_block.resnets.0").remove("mid_block.resnets.1")
    assert "mid_block" not in [action.block for action in reductions(one, ["drop"], CONFIG)]  # that is a removal


def test_copies_stop_when_a_layer_is_full():
    block = Action(kind="duplicate", block="mid_block.attentions.0")
    full = apply_all([block] * (MOST_BLOCKS - 1), STOCK)
    assert full.count("mid_block", "attentions") == MOST_BLOCKS
    assert len(copies(STOCK)) == 12
    assert not [action for action in copies(full) if action.block.startswith("mid_block.attentions")]


def test_labels_are_short():
    up = "up_blocks.1.attentions.0"
    assert Action(kind="remove", block=up).label == "- up1.CA0"
    assert Action(kind="narrow-feed-forward", block=up, share=0.5).label == "up1.CA0 FFN x0.5"
    assert Action(kind="remove-self-attention", block=up).label == "- up1.CA0 self-attention"
    assert Action(kind="duplicate", block="mid_block.resnets.1_2").label == "+ mid.R1_2"
    assert Action(kind="drop", block="mid_block").label == "- mid"
    assert Action(kind="drop", block="down_blocks.3").label == "- level 3"
    assert Action(kind="drop", block="down_blocks.1.1+up_blocks.2.1").label == "- down1.layer 1 and up2.layer 1"


def test_kinds_are_read_and_unknown_ones_named():
    assert parse_kinds("duplicate, remove") == ("remove", "duplicate")
    for wrong in ("prune", "remove,prune", ""):
        with pytest.raises(PocketfusionError, match="names no kind of action: choose among remove, self-attention"):
            parse_kinds(wrong)
