"""Analyse, then choose: a model folder's weight recipe under a budget of quality or size (`pocketfusion quantize`).

Forms are chosen greedily from the layers' sensitivities. The noises of single layers are taken to add up, which holds
while they are small and independent; the choice is measured as a whole afterwards (`quality`) and tightened where that
was too hopeful.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketfusion.artefact import check_files
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder, folder_hash
from pocketfusion.mobile.devices import TargetName
from pocketfusion.mobile.measure import reference_runs
from pocketfusion.mobile.pipeline_specs import tokenizer_spec
from pocketfusion.mobile.quantization.packing import FORMS, Form, storable
from pocketfusion.mobile.quantization.sensitivity import Effect, Layer, Probe, Sensitivity, analyse, decibels, save
from pocketfusion.mobile.quantization.weight_forms import KEPT, NetworkRecipe, WeightRecipe
from pocketfusion.mobile.wrappers import wrap
from pocketfusion.models.guided import guidance_of
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sampling import usual_sampling
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import NETWORKS

#: The choice is made for this much less noise each time that the whole turns out worse than the sum of its parts.
_TIGHTEN, _TRIES = 0.7, 12
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NetworkPlan:
    """A network's forms: weights' bytes, quality predicted (sum of the layers' noises) and measured as a whole, in dB.

    Quality is the lesser of the output's SQNR and, for a UNet, the guidance direction's.
    """

    name: str
    size: int
    predicted_db: float
    measured_db: float
    guidance_delta: float | None
    forms: dict[str, Form]


@dataclass(frozen=True)
class Plan:
    """A recipe and what it costs, by network."""

    recipe: WeightRecipe
    sensitivity: Sensitivity
    networks: list[NetworkPlan]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values, without the recipe and the analysis, which have files of their own."""
        return {"model": self.recipe.model, "networks": [asdict(network) for network in self.networks]}


def plan(
    folder: Path,
    *,
    target: TargetName = "litert-cpu",
    forms: Sequence[str] = ("int8-dynamic", "int8", "float16"),
    min_sqnr: float | None = None,
    max_mb: float | None = None,
    samples: int = 4,
    analysis: Path | None = None,
    progress: Progress = lambda stage, index, count: None,
) -> Plan:
    """Chooses each layer's form from `forms` so that every network keeps `min_sqnr` dB, or all take `max_mb` MB.

    `samples`: sampling steps, of two prompts', that each layer is judged on. `analysis`: a JSON file for the
    sensitivities, written as it goes; layers that it has are not measured again.
    Raises PocketfusionError for a budget that nothing meets (with the best that can be reached), an unknown form, or
    an analysis of another model.
    """
    chosen_forms = _check(forms, min_sqnr, max_mb, samples)
    check_folder(folder)
    if analysis is not None:
        check_files(analysis)
    known = _known(analysis, folder_hash(folder), target, samples)
    progress("PyTorch reference", 0, 1)
    with quiet():
        pipeline = load_pipeline(folder)
    networks = wrap(pipeline)
    sampling = usual_sampling(folder)
    guidance, length = guidance_of(pipeline.unet, sampling.guidance), tokenizer_spec(pipeline).max_length
    reference = reference_runs(pipeline, networks, length, sampling.guidance_scale, guidance)
    inner = {"text_encoder": pipeline.text_encoder, "unet": pipeline.unet, "decoder": networks["decoder"]}
    probes = {name: Probe(name, networks[name], inner[name], reference, samples) for name in NETWORKS}
    sensitivity = known
    for name, probe in probes.items():
        kept: list[Layer] = []

        def done(
            layer: Layer,
            index: int,
            count: int,
            name: str = name,
            kept: list[Layer] = kept,
            before: Sensitivity = sensitivity,
        ) -> None:
            progress(f"{name.replace('_', ' ')}: {layer.name}", index + 1, count)
            kept.append(layer)
            if analysis is not None and index % 20 == 19:
                save(before.model_copy(update={"networks": {**before.networks, name: kept}}), analysis)

        layers = analyse(probe, chosen_forms, target, known.networks.get(name, ()), done)
        sensitivity = sensitivity.model_copy(update={"networks": {**sensitivity.networks, name: layers}})
    if analysis is not None:
        save(sensitivity, analysis)
    options = {name: candidates(name, sensitivity.networks[name], chosen_forms, target) for name in NETWORKS}
    if max_mb is not None:
        everything = {key: choices for one in options.values() for key, choices in one.items()}
        picked = for_size(everything, max_mb * 1e6)
        plans = [_plan(n, {k: c for k, c in picked.items() if k[0] == n}, probes[n], target) for n in NETWORKS]
    else:
        assert min_sqnr is not None
        plans = [_within(name, options[name], probes[name], target, min_sqnr) for name in NETWORKS]
    listed = {one.name: NetworkRecipe.listing(_heard(one.forms, sensitivity)) for one in plans}
    recipe = WeightRecipe.model_validate({"model": sensitivity.model, "target": target, **listed})
    return Plan(recipe, sensitivity, plans)


def _heard(forms: Mapping[str, Form], sensitivity: Sensitivity) -> dict[str, Form]:
    """Without the layers that change nothing in any form: some, such as BERT's pooler, are in no exported network, and
    a rule for them would match no layer."""
    silent = {
        layer.name
        for layers in sensitivity.networks.values()
        for layer in layers
        if not any(effect.worst for effect in layer.effects.values())
    }
    return {name: form for name, form in forms.items() if name not in silent}


def _check(forms: Sequence[str], min_sqnr: float | None, max_mb: float | None, samples: int) -> tuple[Form, ...]:
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise PocketfusionError(f"--forms has {unknown[0] if unknown else 'none'!r}: choose among {', '.join(FORMS)}")
    if (min_sqnr is None) == (max_mb is None):
        raise PocketfusionError("give one budget: --min-sqnr DB for quality or --max-mb MB for size")
    for option, value in (("--min-sqnr", min_sqnr), ("--max-mb", max_mb)):
        if value is not None and not 0 < value < 1e6:
            raise PocketfusionError(f"{option} is {value:g}: choose a number above 0")
    if not 1 <= samples <= 10:
        raise PocketfusionError(f"--samples is {samples}: choose 1 to 10, the sampling steps of the gate's runs")
    return tuple(forms)  # type: ignore[arg-type]  # checked


def _known(analysis: Path | None, model: str, target: TargetName, samples: int) -> Sensitivity:
    if analysis is None or not analysis.exists():
        return Sensitivity(model=model, target=target, samples=samples)
    known = Sensitivity.load(analysis)
    for what, found, wanted in (
        ("another model", known.model, model),
        (f"target {known.target}", known.target, target),
        (f"{known.samples} samples", known.samples, samples),
    ):
        if found != wanted:
            raise PocketfusionError(f"{analysis} is an analysis of {what}: name another file or remove it")
    return known


def _within(
    name: str, options: Mapping[tuple[str, str], list[Choice]], probe: Probe, target: TargetName, min_sqnr: float
) -> NetworkPlan:
    """The cheap choice that keeps `min_sqnr` dB when measured as a whole."""
    noise = 10 ** (-min_sqnr / 10)
    for _ in range(_TRIES):
        picked = for_quality(options, noise)
        if picked is None:
            break
        found = _plan(name, picked, probe, target)
        if found.measured_db >= min_sqnr:
            return found
        noise *= _TIGHTEN
    best = _plan(name, {key: min(c, key=lambda one: one.noise) for key, c in options.items()}, probe, target)
    if best.measured_db >= min_sqnr:
        return best
    raise PocketfusionError(
        f"--min-sqnr is {min_sqnr:g} dB, but the {name.replace('_', ' ')} reaches {best.measured_db:.1f} dB at best "
        "with these forms: ask for less, or add a finer form to --forms"
    )


def _plan(name: str, picked: Mapping[tuple[str, str], Choice], probe: Probe, target: TargetName) -> NetworkPlan:
    forms = {layer: choice.form for (_, layer), choice in picked.items()}
    measured: Effect = probe.effect(forms, target)
    return NetworkPlan(
        name=name,
        size=round(sum(choice.bytes for choice in picked.values())),
        predicted_db=round(decibels(sum(choice.noise for choice in picked.values())), 2),
        measured_db=round(decibels(measured.worst), 2),
        guidance_delta=None if measured.guidance_delta is None else round(measured.guidance_delta, 5),
        forms=forms,
    )


_BITS = {"float32": 32.0, "float16": 16.0, "int8": 8.0, "int8-dynamic": 8.0, "int4-dynamic": 4.0}


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
