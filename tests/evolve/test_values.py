"""Values, the order of the ranking and the choice of a group, against numbers worked out by hand."""

import numpy as np
import pytest
from search_world import CONFIG, STOCK, milliseconds

from pocketfusion.evolve.actions import Action
from pocketfusion.evolve.values import ActionValue, action_value, choose_copies, choose_reductions, ranking


def value(block: str, drop: float, saved: float, kind: str = "remove") -> ActionValue:
    worth = drop / saved if saved > 0 else None
    return ActionValue(action=Action(kind=kind, block=block), drop=drop, error=0.1, saved_ms=saved, value=worth)


A, B, C, D = "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "mid_block.resnets.0"


def test_a_value_is_the_mean_paired_drop_per_millisecond():
    before, after = np.array([10.0, 20.0, 30.0, 40.0]), np.array([9.0, 17.0, 29.0, 37.0])
    found = action_value(Action(kind="remove", block=A), before, after, saved_ms=4.0)
    assert found.drop == pytest.approx(2.0) and found.value == pytest.approx(0.5)
    # differences 1, 3, 1, 3: standard deviation sqrt(4/3), over sqrt(4) pictures
    assert found.error == pytest.approx(np.sqrt(4 / 3) / 2)
    assert action_value(Action(kind="remove", block=A), before, after, saved_ms=0.0).value is None


def test_the_lowest_value_comes_first_and_what_saves_nothing_never():
    found = ranking([value(A, 6, 2), value(B, 2, 2), value(C, -1, 0.1), value(D, -0.5, 3), value(A, 0, 0)])
    assert [v.action.block for v in found] == [D, C, B, A]  # D and C cost nothing: the larger saving first


MS = {A: 4.0, B: 3.0, C: 2.0, D: 1.0}


def latency(architecture) -> float:
    return milliseconds(architecture, MS)  # 10 + 4 + 3 + 2 + 1 + 8 others = 28


def chosen(ranked, budget, group):
    taken = choose_reductions(ranked, STOCK, CONFIG, latency, budget, group)
    return [v.action.block for v in taken]


def test_a_group_stops_at_the_budget_and_leaves_out_what_it_does_not_need():
    ranked = [value(D, 1, 1), value(C, 3, 2), value(B, 6, 3), value(A, 12, 4)]
    assert chosen(ranked, budget=1.0, group=2) == [D, C]  # far away: a whole group
    assert chosen(ranked, budget=25.0, group=4) == [D, C]  # exactly met by 1 + 2
    assert chosen(ranked[::-1], budget=25.0, group=4) == [A]  # 4 alone is enough
    assert chosen(ranked, budget=26.0, group=8) == [C]  # 1 is too little, 2 alone is enough
    assert chosen(ranked, budget=28.0, group=4) == []


def test_groups_shrink_near_the_budget():
    others = [name for name in STOCK.names() if name not in MS]  # eight of 1 ms
    ranked = [value(name, 1, 1) for name in [D, *others]]
    assert len(chosen(ranked, budget=12.0, group=8)) == 8  # 16 ms are missing: half of them in one group
    assert len(chosen(ranked, budget=20.0, group=8)) == 4  # 8 are missing: a group of 4, then of 2
    assert len(chosen(ranked, budget=24.0, group=8)) == 2
    assert len(chosen(ranked, budget=26.5, group=8)) == 2  # a quarter of the group at least, if it needs it
    assert len(chosen(ranked, budget=27.0, group=8)) == 1


def test_actions_that_do_not_go_together_are_passed_over():
    level, pair = (value(what, 0, 9, "drop") for what in ("down_blocks.1", "down_blocks.1.0+up_blocks.0.0"))
    inside, beside = value(D, 0, 1), value(A, 0, 1)
    assert chosen([level, pair, inside, beside], budget=1.0, group=4) == [level.action.block, A]
    assert chosen([pair, level, inside], budget=1.0, group=4) == [pair.action.block, D]


def test_one_action_a_block_in_a_group():
    thin = value(A, 0.1, 0.8, "remove-self-attention")
    ranked = ranking([value(A, 4, 4), thin, value(B, 6, 3)])
    taken = choose_reductions(ranked, STOCK, CONFIG, latency, 1.0, 2)
    assert [v.action for v in taken] == [thin.action, Action(kind="remove", block=B)]


def test_copies_go_to_the_highest_value_that_fits():
    values = [value(A, 40, 4), value(B, 6, 3), value(C, 10, 2), value(D, -1, 1)]  # worth 10, 2, 5, less than nothing
    taken = choose_copies(values, STOCK, latency, 28 + 3.5, 4)
    assert [(v.action.kind, v.action.block) for v in taken] == [("duplicate", C)]  # A costs 4; then B costs 3 more
    assert taken[0].saved_ms == pytest.approx(-2.0) and taken[0].value == 5
    assert [v.action.block for v in choose_copies(values, STOCK, latency, 28 + 9, 4)] == [A, C, B]
    assert [v.action.block for v in choose_copies(values, STOCK, latency, 28 + 9, 1)] == [A]
    assert choose_copies(values, STOCK, latency, 28.5, 4) == []
