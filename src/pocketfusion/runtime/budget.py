"""Choosing a mode that fits a memory budget, from what each network holds."""

from __future__ import annotations

import math

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.footprint import estimate
from pocketfusion.runtime.manifest import NETWORKS, Bundle
from pocketfusion.runtime.memory import memory, release
from pocketfusion.runtime.residency import MODES, Mode
from pocketfusion.runtime.trust.litert_file import verify

MB = 10**6
#: What the process holds apart from the networks when it has run them: LiteRT's libraries, latents, pictures.
BASE = 40 * MB


def held(bundle: Bundle) -> dict[str, int]:
    """Bytes that each network holds with mapped weights, estimated from its file; PocketfusionError if that is not
    LiteRT's, whose memory alone is known."""
    if bundle.manifest.target == "onnx":
        raise PocketfusionError(
            f"what {bundle.path} takes in ONNX Runtime is not known before: choose a mode instead of a memory budget"
        )
    networks = bundle.manifest.networks
    for name in NETWORKS:
        verify(bundle.file(name), getattr(networks, name))  # before the estimate believes what it says
    return {name: estimate(bundle.file(name)) for name in NETWORKS}


def needed(bundle: Bundle) -> dict[Mode, int]:
    """The most bytes that this process will hold in each mode, itself included.

    `resident` keeps packed weights in the heap, beside the pages of the networks' files.
    """
    networks = held(bundle)
    release()  # what the estimate itself took
    now = memory()
    base = BASE + (now.total if now else 0)
    files = sum(bundle.manifest.files[name].size for name in NETWORKS)
    return {
        "resident": base + sum(networks.values()) + files,
        "pipelined": base + networks["unet"] + max(networks["text_encoder"], networks["decoder"]),
        "sequential": base + max(networks.values()),
    }


def choose_mode(bundle: Bundle, memory_budget: float, mode: Mode | None = None) -> Mode:
    """`mode`, or if None the fastest one, that fits `memory_budget` (MB, 10^6 bytes).

    Raises PocketfusionError for a budget that is no positive number, or that nothing (or not `mode`) fits.
    """
    if not memory_budget > 0 or math.isinf(memory_budget):
        raise PocketfusionError(f"the memory budget is {memory_budget:g} MB: choose a positive number")
    needs = needed(bundle)
    fitting = [m for m in MODES if needs[m] <= memory_budget * MB]
    if mode is None and fitting:
        return fitting[0]
    if mode is None:
        networks = held(bundle)
        largest = max(networks, key=lambda name: networks[name])
        program = needs["sequential"] - networks[largest]
        raise PocketfusionError(
            f"the memory budget is {memory_budget:g} MB, but the largest network ({largest}) alone holds about "
            f"{networks[largest] / MB:.0f} MB and the program {program / MB:.0f} MB: allow "
            f"{math.ceil(needs['sequential'] / MB)} MB, or take a bundle of smaller weights"
        )
    if mode not in fitting:
        hint = f"choose --mode {fitting[0]} or " if fitting else ""
        raise PocketfusionError(
            f"the memory budget is {memory_budget:g} MB, but the mode {mode} needs about {needs[mode] / MB:.0f} MB: "
            f"{hint}allow {math.ceil(needs[mode] / MB)} MB"
        )
    return mode
