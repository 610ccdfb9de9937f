"""Algorithm 1 on a world where the right answer is known, and interrupted everywhere."""

import json

import pytest
from search_world import CONFIG, STOCK, Network, World

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.algorithm import Ledger, OutOfTime, Search, Settings, evolve
from pocketfusion.evolve.figures import frontier_points
from pocketfusion.evolve.values import budget_in_ms, check_reachable, smallest

A, B, C = "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"
MS = {A: 4.0, B: 3.0, C: 2.0}  # 10 + 4 + 3 + 2 + 9 others = 28
IDENTITY = {"settings": {"seed": 0}}


def settings(budget: float, rounds: int = 10, group: int = 1, kinds: tuple = ("remove",)) -> Settings:
    return Settings(budget_ms=budget, rounds=rounds, group=group, kinds=kinds)


def run(world: World, folder, wanted: Settings, deadline: float = float("inf")):
    return evolve(Search(world.tools(), Ledger(folder, IDENTITY), deadline), Network(STOCK), wanted)


def taken(outcome) -> list[list[str]]:
    return [[value.action.key for value in entry.taken] for entry in outcome.rounds]


def test_the_cheapest_quality_per_millisecond_goes_first(tmp_path):
    # worth per ms: A 2/4, B 3/3, C 8/2, others 5/1
    world = World(MS, worth={A: 2, B: 3, C: 8})
    outcome = run(world, tmp_path / "run", settings(21.0))
    assert taken(outcome) == [[f"remove:{A}"], [f"remove:{B}"], []]
    assert outcome.stopped == "budget met" and world.trained == [0, 1]
    assert [entry.latency_ms for entry in outcome.rounds] == [28, 24, 21]
    # 12 blocks worth 2 + 3 + 8 + 9 x 5 = 58
    assert [entry.score for entry in outcome.rounds] == [58, 56, 53]
    assert set(STOCK.names()) - set(outcome.network.architecture.names()) == {A, B}
    first = {value.action.block: value for value in outcome.rounds[0].values}
    assert (first[C].drop, first[C].saved_ms, first[C].value, first[C].error) == (8, 2, 4, 0)


def test_groups_take_several_and_rounds_are_limited(tmp_path):
    world = World(MS, worth={A: 2, B: 3, C: 8})
    outcome = run(world, tmp_path / "run", settings(12.0, rounds=1, group=3))
    assert taken(outcome) == [[f"remove:{A}", f"remove:{B}", f"remove:{C}"], []]
    assert outcome.stopped == "1 rounds done, still over the budget"


def test_thinning_competes_with_removal(tmp_path):
    # removing A costs 40 for 4 ms (10 a ms); its self-attention 1 for 0.8 (1.25), half its FFN 1.5 for 0.8
    world = World(MS, worth=dict.fromkeys(STOCK.names(), 40.0))
    kinds = ("remove", "remove-self-attention", "narrow-feed-forward")
    outcome = run(world, tmp_path / "run", settings(27.0, group=8, kinds=kinds))
    # after the first of A's, 0.2 ms are missing: B's self-attention saves 0.6 for 1 (1.67)
    assert taken(outcome)[0] == [f"remove-self-attention:{A}", f"remove-self-attention:{B}"]
    assert outcome.rounds[-1].latency_ms == pytest.approx(28 - 0.8 - 0.6)
    assert not outcome.network.architecture.get(A).self_attention and A in outcome.network.architecture.names()


def test_a_level_without_worth_goes_whole_with_its_samplers(tmp_path):
    """Removing its blocks would leave the two samplers, 1 ms of the 9 that it has."""
    level = dict.fromkeys(
        (name for name in STOCK.names() if name.startswith(("down_blocks.1", "mid", "up_blocks.0"))), 0.0
    )
    world = World(MS, worth=level)
    outcome = run(world, tmp_path / "run", settings(19.0, group=4, kinds=("remove", "drop")))
    assert taken(outcome)[0] == ["drop:down_blocks.1"] and len(outcome.rounds) == 2
    assert outcome.rounds[1].latency_ms == 28 - 8 - 2 * 0.5
    points = frontier_points([entry.model_dump(mode="json") for entry in outcome.rounds])
    assert [point["actions"] for point in points] == ["start", "1 dropped"]
    assert outcome.network.architecture.depth == 0 and outcome.rounds[1].score == outcome.rounds[0].score
    # the outer level's layers are a pair, and then the up stage has one layer of two blocks left, for conv_in's skip
    assert world.latency(smallest(STOCK, ["drop"], CONFIG, world.latency)) == 19 - 5 - 3


def test_a_run_folder_of_other_actions_is_refused(tmp_path):
    world, wanted = World(MS, worth={A: 2, B: 3, C: 8}), settings(21.0)
    run(world, tmp_path / "run", wanted)
    for line in (tmp_path / "run" / "round-01").iterdir():
        if line.name == "network.json":
            line.write_text(STOCK.remove(C).model_dump_json())
    with pytest.raises(PocketfusionError, match="round-01 is of other actions than round 1 takes: delete"):
        run(world, tmp_path / "run", wanted)


def test_copies_fill_the_budget_and_stay_if_they_help(tmp_path):
    world = World(MS, worth={C: 30.0}, copy=2.0)  # 15 a ms for C, 5 for the others
    outcome = run(world, tmp_path / "run", settings(30.5, kinds=("remove", "duplicate")))
    # 28 + 2 for C's copy; then 0.5 ms are left and nothing costs so little
    assert taken(outcome) == [[f"duplicate:{C}"], []]
    assert outcome.stopped == "budget met; no copy fits"
    assert f"{C}_1" in outcome.network.architecture.names()


def test_copies_that_do_not_help_are_undone(tmp_path):
    world = World(MS, worth={C: 30.0}, copy=-1.0)
    outcome = run(world, tmp_path / "run", settings(60.0, kinds=("remove", "duplicate")))
    assert outcome.network.architecture == STOCK and outcome.stopped.endswith("did not improve the score")
    assert [entry.undone for entry in outcome.rounds] == [False, True]


def test_only_copies_that_can_fit_are_evaluated(tmp_path):
    world = World(MS, copy=1.0)
    run(world, tmp_path / "run", settings(29.5, rounds=1, kinds=("remove", "duplicate")))
    # the network itself, removal of each of the nine blocks of 1 ms, and the network after the copy
    assert len(world.scorer.calls) == 1 + 9 + 1


class Interrupted(Exception):
    pass


def killing(world: World, after: int) -> World:
    """`world` whose scorer is killed at its `after`-th call."""
    score = world.scorer.score

    def wrapped(network):
        if len(world.scorer.calls) == after:
            raise Interrupted
        return score(network)

    world.scorer.score = wrapped
    return world


def test_killed_at_any_evaluation_it_goes_on_to_the_same_result(tmp_path):
    def world() -> World:
        return World(MS, worth={A: 2, B: 3, C: 8}, gain=0.25, copy=1.0)

    wanted = settings(22.0, group=2, kinds=("remove", "drop", "duplicate"))
    whole = world()
    expected = run(whole, tmp_path / "whole", wanted)
    log = (tmp_path / "whole" / "evaluations.jsonl").read_text().splitlines()
    count = len(whole.scorer.calls)
    assert len(log) == count > 20 and len(expected.rounds) >= 3
    for after in range(count):
        folder = tmp_path / f"killed-{after}"
        first, second = killing(world(), after), world()
        with pytest.raises(Interrupted):
            run(first, folder, wanted)
        outcome = run(second, folder, wanted)
        assert outcome == expected
        assert len(first.scorer.calls) + len(second.scorer.calls) == count
        assert len(first.trained) + len(second.trained) == len(whole.trained)


def test_killed_while_training_it_evaluates_nothing_again(tmp_path):
    world = World(MS, worth={A: 2})
    tools, wanted = world.tools(), settings(24.0)

    def killed(network, number):
        raise Interrupted

    object.__setattr__(tools, "train", killed)
    with pytest.raises(Interrupted):
        evolve(Search(tools, Ledger(tmp_path / "run", IDENTITY)), Network(STOCK), wanted)
    second = World(MS, worth={A: 2})
    outcome = run(second, tmp_path / "run", wanted)
    assert taken(outcome) == [[f"remove:{A}"], []] and len(second.scorer.calls) == 1


def test_a_line_cut_short_is_evaluated_again(tmp_path):
    world, wanted = World(MS, worth={A: 2}), settings(24.0)
    expected = run(world, tmp_path / "run", wanted)
    path = tmp_path / "run" / "evaluations.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    again = World(MS, worth={A: 2})
    assert run(again, tmp_path / "run", wanted) == expected and len(again.scorer.calls) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["action"] for line in lines] == [json.loads(line)["action"] for line in text.splitlines()]
    path.write_text("nonsense\n" + text)
    with pytest.raises(PocketfusionError, match="line 1 of .* is damaged"):
        run(again, tmp_path / "run", wanted)


def test_another_search_in_the_run_folder_is_refused(tmp_path):
    Ledger(tmp_path / "run", IDENTITY)
    with pytest.raises(PocketfusionError, match="begun with another seed"):
        Ledger(tmp_path / "run", {**IDENTITY, "seed": 1})


def test_time_over_stops_between_evaluations(tmp_path):
    world = World(MS)
    with pytest.raises(OutOfTime):
        run(world, tmp_path / "run", settings(20.0), deadline=0.0)
    assert world.scorer.calls == []


def test_budgets():
    world = World(MS)
    assert budget_in_ms(12.5, None, CONFIG, world.latency) == 12.5
    assert budget_in_ms(None, 0.5, CONFIG, world.latency) == 14.0
    for ms, ratio in ((None, None), (1.0, 0.5)):
        with pytest.raises(PocketfusionError, match="either --budget-ms or --budget-ratio"):
            budget_in_ms(ms, ratio, CONFIG, world.latency)
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PocketfusionError, match="--budget-ratio .* is no latency budget"):
            budget_in_ms(None, ratio, CONFIG, world.latency)


def test_a_budget_that_cannot_be_reached_names_the_least(tmp_path):
    world = World(MS)
    assert smallest(STOCK, ["remove"], CONFIG, world.latency).names() == []
    with pytest.raises(PocketfusionError, match="below what these actions can reach, 10 ms"):
        check_reachable(9.0, STOCK, ["remove"], CONFIG, world.latency)
    # self-attention saves a fifth of 4 + 3 + 2 + 1 ms
    with pytest.raises(PocketfusionError, match="can reach, 26 ms"):
        check_reachable(20.0, STOCK, ["remove-self-attention"], CONFIG, world.latency)
    # feed-forwards at a quarter: 30 % of 10 ms
    assert world.latency(smallest(STOCK, ["narrow-feed-forward"], CONFIG, world.latency)) == pytest.approx(25.0)
    check_reachable(10.0, STOCK, ["remove"], CONFIG, world.latency)
    with pytest.raises(PocketfusionError, match="nothing to remove"):
        check_reachable(28.0, STOCK, ["remove"], CONFIG, world.latency)
    check_reachable(28.0, STOCK, ["remove", "duplicate"], CONFIG, world.latency)
