"""What an action is worth: the score that it costs over the milliseconds that it saves, and which are taken.

The latency budget stands here too: milliseconds or a share of the base, checked against what removal can reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.actions import Action, applied, reductions
from pocketfusion.models.elastic.architecture import Architecture

Latency = Callable[[Architecture], float]  #: milliseconds of one guided step


class ActionValue(BaseModel):
    """An action with what it was measured to be worth.

    `drop`: mean over pictures of the CLIP score before minus after, and its standard `error` (paired: same captions,
    same noise). `saved_ms`: the table's latency before minus after. `value`: drop / saved_ms, SnapFusion's ΔCLIP /
    ΔLatency; None if nothing is saved. A copy carries the drop and the value of its block's removal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Action
    drop: float
    error: float
    saved_ms: float
    value: float | None


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of [N] values and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def action_value(action: Action, before: np.ndarray, after: np.ndarray, saved_ms: float) -> ActionValue:
    """The value from per-picture scores [N] without and with the action, in the same order."""
    drop, error = mean_and_error(before - after)
    return ActionValue(
        action=action,
        drop=drop,
        error=error,
        saved_ms=saved_ms,
        value=drop / saved_ms if saved_ms > 0 else None,
    )


def ranking(values: Iterable[ActionValue]) -> list[ActionValue]:
    """Those that save time, best to take first: lowest value first, as in SnapFusion's Algorithm 1.

    Departure: an action that costs nothing (drop <= 0) counts as value 0, and of several such the one that saves most
    goes first. The plain ratio would prefer, of two that cost nothing, the one that saves less.
    """
    useful = [value for value in values if value.saved_ms > 0]
    return sorted(useful, key=lambda v: (max(v.drop, 0.0) / v.saved_ms, -v.saved_ms))


def choose_reductions(
    ranked: Sequence[ActionValue],
    architecture: Architecture,
    config: Mapping[str, Any],
    latency: Latency,
    budget_ms: float,
    group: int,
) -> list[ActionValue]:
    """Up to `group` actions from the front of the ranking, one a block, and no more than the budget asks for.

    Groups shrink near the budget, which is ours (Algorithm 1 takes "a group"): one is over when half of the time that
    is missing is saved, but not with less than a quarter of `group`. Values are measured for actions alone, and what
    they cost together shows only after training, so the last milliseconds are taken in small groups. Actions that do
    not go together on `config`'s base are passed over. When the budget is met, those that it does not need after all
    are left out again, dearest first (a later one may have saved more than was missing).
    """

    def after(taken: Sequence[ActionValue]) -> float | None:
        made = applied([value.action for value in taken], architecture, config)
        return None if made is None else latency(made)

    now = latency(architecture)
    halfway, least = (now + budget_ms) / 2, math.ceil(group / 4)
    taken: list[ActionValue] = []
    for value in ranked:
        if len(taken) == group or now <= budget_ms or (now <= halfway and len(taken) >= least):
            break
        if any(value.action.touches(architecture) & other.action.touches(architecture) for other in taken):
            continue
        then = after([*taken, value])
        if then is not None:
            taken, now = [*taken, value], then
    if now <= budget_ms:
        for value in reversed(taken):
            rest = [other for other in taken if other is not value]
            then = after(rest)
            if then is not None and then <= budget_ms:
                taken = rest
    return taken


def choose_copies(
    values: Iterable[ActionValue], architecture: Architecture, latency: Latency, budget_ms: float, group: int
) -> list[ActionValue]:
    """Copies of up to `group` blocks of the highest removal value (SnapFusion's rule) that keep within the budget.

    `values` are removals; a block whose removal costs nothing is not copied.
    """
    before = latency(architecture)
    taken: list[ActionValue] = []
    useful = [value for value in values if value.value is not None and value.drop > 0]
    for removal in sorted(useful, key=lambda v: -(v.value or 0.0)):
        if len(taken) == group:
            break
        copy = Action(kind="duplicate", block=removal.action.block)
        try:
            larger = copy.apply(architecture)
        except PocketfusionError:  # its layer is full
            continue
        after = latency(larger)
        if after <= budget_ms:
            taken.append(removal.model_copy(update={"action": copy, "saved_ms": before - after}))
            architecture, before = larger, after
    return taken


def budget_in_ms(ms: float | None, ratio: float | None, config: Mapping[str, Any], latency: Latency) -> float:
    """Milliseconds of one guided step; `ratio` is of the base with all its stock blocks.

    Raises PocketfusionError unless exactly one of the two is given and above 0.
    """
    if (ms is None) == (ratio is None):
        raise PocketfusionError("give the latency budget, either --budget-ms or --budget-ratio, such as 0.5")
    name, value = ("--budget-ms", ms) if ratio is None else ("--budget-ratio", ratio)
    if value is None or not 0 < value < float("inf"):
        raise PocketfusionError(f"{name} {value} is no latency budget: give a number above 0")
    return value if ratio is None else value * latency(Architecture.stock(config))


def smallest(
    architecture: Architecture, kinds: Collection[str], config: Mapping[str, Any], latency: Latency
) -> Architecture:
    """What is left when every action of `kinds` that saves time is taken, removals first."""
    now, changed = latency(architecture), True
    while changed:
        changed = False
        for action in reductions(architecture, kinds, config):
            after = applied([action], architecture, config)
            if after is not None and (then := latency(after)) < now:
                architecture, now, changed = after, then, True
    return architecture


def check_reachable(
    budget_ms: float, architecture: Architecture, kinds: Collection[str], config: Mapping[str, Any], latency: Latency
) -> None:
    """Raises PocketfusionError if no set of actions of `kinds` meets the budget, or if there is nothing to do."""
    now = latency(architecture)
    if now <= budget_ms:
        if "duplicate" not in kinds:
            raise PocketfusionError(
                f"there is nothing to remove: the network's predicted {now:.4g} ms are within the budget of "
                f"{budget_ms:.4g} ms; lower the budget"
            )
        return
    least = latency(smallest(architecture, kinds, config, latency))
    if least > budget_ms:
        raise PocketfusionError(
            f"the budget of {budget_ms:.4g} ms is below what these actions can reach, {least:.4g} ms "
            f"({least / now:.0%} of now): raise the budget or allow more kinds of action"
        )
