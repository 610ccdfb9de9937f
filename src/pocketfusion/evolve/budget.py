"""The latency budget: from milliseconds or a share of the base, checked against what removal can reach."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.actions import applied, reductions
from pocketfusion.evolve.values import Latency
from pocketfusion.models.architecture import Architecture


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
