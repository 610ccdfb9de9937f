"""Forms of all layers under a budget of quality or of size, chosen greedily from their sensitivities.

The noises of single layers are taken to add up, which holds while they are small and independent; the choice is
measured as a whole afterwards (`quality`) and tightened where that was too hopeful.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.pack import Form, storable
from pocketfusion.mobile.quantize import KEPT
from pocketfusion.mobile.sensitivity import Layer
from pocketfusion.mobile.targets import TargetName

_BITS = {"float32": 32.0, "float16": 16.0, "int8": 8.0, "int8-dynamic": 8.0, "int4-dynamic": 4.0}


def decibels(noise: float) -> float:
    """SQNR in dB of a noise power over its signal's, at most 200."""
    return min(200.0, -10 * math.log10(noise)) if noise > 0 else 200.0


def stored_bytes(layer: Layer, form: Form) -> float:
    """Bytes of the layer's weight in `form`, with its float32 scales."""
    form = storable(form, layer.operation)
    scales = 4 * layer.channels if _BITS[form] <= 8 else 0
    return layer.parameters * _BITS[form] / 8 + scales


@dataclass(frozen=True)
class Choice:
    """A layer in a network with one of its forms: its cost and its noise."""

    key: tuple[str, str]
    form: Form
    bytes: float
    cost: float
    noise: float


def candidates(
    network: str, layers: Sequence[Layer], forms: Sequence[Form], target: TargetName
) -> dict[tuple[str, str], list[Choice]]:
    """For each layer its choices, cheapest first, without those that cost more and are no better.

    Cost is the layer's share of the network's float32 bytes and, on CPUs, of the multiply-adds that stay in floating
    point: dynamic forms compute in integers there. On the GPU delegate all compute in floating point.
    """
    total_bytes = sum(4 * layer.parameters for layer in layers) or 1
    total_macs = sum(layer.macs for layer in layers) or 1
    found: dict[tuple[str, str], list[Choice]] = {}
    for layer in layers:
        allowed = [form for form in forms if not (KEPT.fullmatch(layer.name) and _BITS[form] < 16)] or ["float16"]
        choices = []
        for form in allowed:
            effect = layer.effects.get(form)
            size = stored_bytes(layer, form)
            floating = target == "litert-cpu" and not form.endswith("dynamic")
            cost = size / total_bytes + (layer.macs / total_macs if floating else 0.0)
            choices.append(Choice((network, layer.name), form, size, cost, effect.worst if effect else 0.0))
        choices.sort(key=lambda choice: (choice.cost, choice.noise))
        kept: list[Choice] = []
        for choice in choices:
            if not kept or choice.noise < kept[-1].noise:
                kept.append(choice)
        found[network, layer.name] = kept
    return found


def for_quality(options: Mapping[tuple[str, str], list[Choice]], noise: float) -> dict[tuple[str, str], Choice] | None:
    """The cheap choice whose noises sum to at most `noise`; None if the best one's do not."""
    chosen = {key: choices[0] for key, choices in options.items()}
    while sum(choice.noise for choice in chosen.values()) > noise:
        better = _best_upgrade(options, chosen, by_size=False)
        if better is None:
            return None
        chosen[better.key] = better
    return chosen


def for_size(options: Mapping[tuple[str, str], list[Choice]], max_bytes: float) -> dict[tuple[str, str], Choice]:
    """The least noisy choice of at most `max_bytes`, greedily.

    Raises PocketfusionError with the smallest size that can be reached if even that is more.
    """
    options = {key: sorted(choices, key=lambda one: (one.bytes, one.noise)) for key, choices in options.items()}
    chosen = {key: choices[0] for key, choices in options.items()}
    total = sum(choice.bytes for choice in chosen.values())
    if total > max_bytes:
        raise PocketfusionError(
            f"--max-mb is {max_bytes / 1e6:g}, but the weights take {total / 1e6:.2f} MB at least with these forms: "
            "allow more, or add a smaller form to --forms"
        )
    while True:
        room = max_bytes - total
        better = _best_upgrade(options, chosen, by_size=True, room=room)
        if better is None:
            return chosen
        total += better.bytes - chosen[better.key].bytes
        chosen[better.key] = better


def _best_upgrade(
    options: Mapping[tuple[str, str], list[Choice]],
    chosen: Mapping[tuple[str, str], Choice],
    by_size: bool,
    room: float = math.inf,
) -> Choice | None:
    """The change of one layer that takes away most noise for what it costs."""
    best, best_rate = None, 0.0
    for key, choices in options.items():
        now = chosen[key]
        for choice in choices:
            gain = now.noise - choice.noise
            price = choice.bytes - now.bytes if by_size else choice.cost - now.cost
            if gain <= 0 or choice.bytes - now.bytes > room:
                continue
            rate = gain / max(price, 1e-12)
            if rate > best_rate:
                best, best_rate = choice, rate
    return best
