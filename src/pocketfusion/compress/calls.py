"""One function a kind of stage: calls what its command calls, and returns what was measured.

`Work` is what it is given, `Made` what it gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pocketfusion.artefact import atomic_folder, write_json
from pocketfusion.data.latents.reading import is_cache
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_dataset, open_training_data
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance
from pocketfusion.quiet import quiet
from pocketfusion.recipe import Recipe
from pocketfusion.train.place import StageRun

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """A stage at work. `recipe`: with its own settings; `inputs`: role → paths, each perhaps with @STEPS."""

    recipe: Recipe
    options: Any
    inputs: Mapping[str, tuple[str, ...]]
    place: StageRun
    cache: Path  #: latents and prompt states, shared by the stages
    skip_bad: bool  #: leave pictures out that cannot be read
    progress: Progress

    def path(self, role: str) -> Path:
        """The one path of a role."""
        return Path(self.inputs[role][0])

    def maybe(self, role: str) -> Path | None:
        """The one path of a role that may be missing."""
        return Path(self.inputs[role][0]) if role in self.inputs else None

    @property
    def pictures(self) -> CaptionedImages:
        """The data at the recipe's size."""
        return _opened(self.path("data"), self.recipe.data.size, self.skip_bad)

    @property
    def latents(self) -> CaptionedImages:
        """The same for stages that need latents alone: a cache of them will do."""
        path, size = self.path("data"), self.recipe.data.size
        return open_training_data(path, size) if is_cache(path) else self.pictures


@lru_cache(maxsize=1)  # a folder of pictures is read once for all stages
def _opened(path: Path, size: int, skip_bad: bool) -> CaptionedImages:
    return open_dataset(path, size, skip_bad=skip_bad)


@dataclass(frozen=True)
class Made:
    """What a stage gave: its scores, whether it is finished, the samples and seconds of all its training."""

    scores: dict[str, float]
    finished: bool = True
    samples: int = 0
    seconds: float = 0.0


def _trained(provenance: Provenance) -> Made:
    numbers = {k: v for k, v in provenance.results.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return Made(numbers, provenance.finished, provenance.samples_seen, 3600 * provenance.hours)


def _autoencoder(work: Work) -> Made:
    from pocketfusion.train.autoencoder import train_autoencoder

    judge = work.maybe("loss-judge")
    return _trained(train_autoencoder(work.recipe, work.pictures, work.place, loss_judge=judge))


def _judge(work: Work, *, for_losses: bool = False) -> Made:
    from pocketfusion.train.judge import train_judge

    return _trained(train_judge(work.recipe, work.pictures, work.place, for_losses=for_losses))


def _base(work: Work) -> Made:
    from pocketfusion.train.teacher import train_teacher

    return _trained(train_teacher(work.recipe, work.latents, work.path("autoencoder"), work.place, cache=work.cache))


def _to_v(work: Work) -> Made:
    from pocketfusion.distill.to_v import to_v

    return _trained(to_v(work.recipe, work.latents, work.path("folder"), work.place, work.cache))


def _elastic(work: Work) -> Made:
    from pocketfusion.train.elastic import train_elastic

    return _trained(train_elastic(work.recipe, work.latents, work.path("folder"), work.place, work.cache))


def _evolve(work: Work) -> Made:
    """The search; unfinished if its time is over."""
    from pocketfusion.evolve.actions import parse_kinds
    from pocketfusion.evolve.algorithm import OutOfTime
    from pocketfusion.evolve.search import Inputs, evolve_folder

    options = work.options
    table = work.path("latency")
    inputs = Inputs(
        work.path("folder"),
        work.recipe,
        work.path("data"),
        str(work.path("judge")),
        table / "latency.json" if table.is_dir() else table,
        options.samples,
        options.steps,
        options.seed,
        options.precision,
        options.force,
        work.skip_bad,
    )
    try:
        made = evolve_folder(
            inputs,
            work.place,
            budget_ms=options.budget_ms,
            budget_ratio=options.budget_ratio,
            rounds=options.rounds,
            group=options.group,
            kinds=parse_kinds(",".join(options.actions)),
            train_steps=options.train_steps,
            cache=work.cache,
            progress=lambda number, done, total: work.progress(f"round {number + 1}", done, total),
        )
    except OutOfTime:
        return Made({}, finished=False)
    return _trained(made)


def _recover(work: Work) -> Made:
    from pocketfusion.train.recovery import recover

    folder, base = work.path("folder"), work.path("base")
    return _trained(recover(work.recipe, work.latents, folder, base, work.place, work.cache))


def _distill_steps(work: Work) -> Made:
    from pocketfusion.distill.steps import distill_progressively, distill_steps

    settings = work.recipe.step_distillation
    assert settings is not None
    run = distill_steps if work.options.schedule == "direct" else distill_progressively
    folder, teacher = work.path("folder"), work.path("teacher")
    return _trained(run(work.recipe, settings, work.latents, folder, teacher, work.place, work.cache))


def _distill_guidance(work: Work) -> Made:
    from pocketfusion.distill.guidance import distill_guidance

    options = work.options
    return _trained(
        distill_guidance(
            work.recipe,
            work.latents,
            work.path("folder"),
            work.place,
            work.maybe("teacher"),
            options.fixed,
            None,
            options.steps,
            work.cache,
        )
    )


def _distill_consistency(work: Work) -> Made:
    from pocketfusion.distill.consistency import distill_consistency

    settings = work.recipe.consistency
    assert settings is not None
    folder, teacher = work.path("folder"), work.path("teacher")
    return _trained(distill_consistency(work.recipe, settings, work.latents, folder, teacher, work.place, work.cache))


def _distill_decoder(work: Work) -> Made:
    from pocketfusion.distill.decoder import distill_decoder

    settings = work.recipe.decoder
    assert settings is not None
    return _trained(
        distill_decoder(
            work.recipe,
            work.pictures,
            work.path("folder"),
            work.place,
            settings,
            sampler=work.maybe("sampler"),
            loss_judge=work.maybe("loss-judge"),
            cache=work.cache,
        )
    )


def _data(work: Work) -> Made:
    options, out = work.options, work.place.out
    if options.source == "shapes":
        from pocketfusion.data.shapes import make_shapes

        return Made({"pictures": make_shapes(out, work.recipe.data.size, overwrite=True)["count"]})
    from pocketfusion.data.emoji.build import EmojiSettings, build_emoji
    from pocketfusion.data.emoji.drawings import DEFAULT_STYLES

    asked = options.model_dump(include={"scenes", "variants", "skin_tones", "seed"})
    settings = EmojiSettings(styles=options.style or DEFAULT_STYLES, sizes=(work.recipe.data.size,), **asked)
    return Made({"pictures": build_emoji(out, settings, overwrite=True, progress=work.progress)["count"]})


def _profile(work: Work) -> Made:
    with quiet():  # the libraries' import messages
        from pocketfusion.latency.breakdown import plot_table
        from pocketfusion.latency.profiling import measure
        from pocketfusion.latency.target import load_target, validation_architectures
        from pocketfusion.latency.timing_backends import make_backend
        from pocketfusion.runtime.networks import available_cores

    options, blocks = work.options, work.place.run / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    backend = make_backend(options.backend, options.weights, options.threads or available_cores(), blocks)
    backend.check()
    target = load_target(str(work.path("folder")))
    table = measure(
        target,
        backend,
        batches=sorted(set(options.batch)),
        runs=options.runs,
        base_only=options.base_only,
        validation=validation_architectures(target.config, options.architectures),
        progress=work.progress,
    )
    with atomic_folder(work.place.out, overwrite=True) as partial:
        table.save(partial / "latency.json")
        plot_table(table, partial / "latency.png")
    return Made({"step_ms": table.overhead[max(table.overhead)].whole.median})


def _quantize(work: Work) -> Made:
    with quiet():
        from pocketfusion.mobile.quantization.mixed_precision import plan
        from pocketfusion.mobile.quantization.sensitivity import draw

    options = work.options
    work.place.run.mkdir(parents=True, exist_ok=True)
    made = plan(
        work.path("folder"),
        target=options.target,
        forms=options.forms,
        min_sqnr=options.min_sqnr,
        max_mb=options.max_mb,
        samples=options.samples,
        analysis=work.place.run / "analysis.json",
        progress=work.progress,
    )
    with atomic_folder(work.place.out, overwrite=True) as partial:
        made.recipe.save(partial / "weights.yaml")
        write_json(partial / "networks.json", made.as_dict()["networks"])
        draw(made.sensitivity, partial / "sensitivity.png")
    worst = min(network.measured_db for network in made.networks)
    return Made({"sqnr_db": worst, "mb": sum(network.size for network in made.networks) / 1e6})


def _export(work: Work) -> Made:
    with quiet():
        from pocketfusion.mobile.export import export
        from pocketfusion.mobile.outlook import prepare

    options, recipe, out = work.options, work.maybe("recipe"), work.place.out
    given = options.given(recipe / "weights.yaml" if recipe is not None and recipe.is_dir() else recipe)
    outlook = prepare(work.path("folder"), out, given, options.device, overwrite=True)
    outlook.check(out)
    report = export(
        work.path("folder"),
        out,
        name=f"{work.recipe.name}-{out.name}",
        overwrite=True,
        progress=work.progress,
        **outlook.options,
    )
    scores = {"sqnr_db": min(network.sqnr_db for network in report.networks), "mb": report.size / 1e6}
    deltas = [network.guidance_delta for network in report.networks if network.guidance_delta is not None]
    return Made(scores | ({"guidance_delta": max(deltas)} if deltas else {}))


def _check(work: Work) -> Made:
    from pocketfusion.mobile.delegate.check import PRECISIONS, check

    options = work.options
    report = check(
        work.path("bundle"),
        static=options.static,
        precisions=(options.precision,) if options.precision else PRECISIONS,
        threads=options.threads,
        timeout=options.timeout,
        progress=lambda what: work.progress(what, 0, 0),
    )
    with atomic_folder(work.place.out, overwrite=True) as partial:
        write_json(partial / "check.json", report.as_dict())
    return Made({"graphs_failed": sum(not graph.passed for graph in report.graphs)})


def _evaluate(work: Work) -> Made:
    from pocketfusion.evaluate.extractors import open_extractor
    from pocketfusion.evaluate.fid_clip.curves import at_equal_clip
    from pocketfusion.evaluate.fid_clip.curves_run import Measuring, evaluate_systems
    from pocketfusion.evaluate.reference import ReferenceSource
    from pocketfusion.evaluate.systems import named_systems

    options = work.options
    pictures = {"seed": options.seed, "samples": options.samples, "skip_bad": work.skip_bad}
    source = ReferenceSource(work.path("data"), sets=",".join(options.sets), **pictures)
    sampling = options.model_dump(include={"seed", "diversity_prompts", "diversity_images", "kid_only"})
    curves = evaluate_systems(
        named_systems(work.inputs["systems"], precision=options.precision),
        source.open,
        lambda: open_extractor(work.path("judge"), None, None),
        work.place.out,
        Measuring(tuple(sorted(options.guidance)), **sampling),
        overwrite=True,
        progress=work.progress,
    )
    if curves is None:
        raise PocketfusionError("compress evaluates in one process: do not launch several")
    first, last = curves.curves[0], curves.curves[-1]
    best = last.best
    scores = {"kid": best.kid.value, "clip_score": best.clip_score.value, "top5": best.top5.value}
    if best.frechet is not None:
        scores["frechet"] = best.frechet.value
    equal = at_equal_clip(first, last) if last is not first else None
    return Made(scores | ({"lead": equal.widest_lead[1]} if equal else {}))


def _bench(work: Work) -> Made:
    from pocketfusion.runtime.bench import Settings, bench

    options, bundles = work.options, [Path(one) for one in work.inputs["bundles"]]
    settings, drawn, total = Settings(**options.model_dump()), iter(range(1, 10**9)), len(bundles) * (1 + options.runs)
    rows = bench(bundles, settings, lambda: work.progress("drawing", next(drawn), total))
    with atomic_folder(work.place.out, overwrite=True) as partial:
        write_json(partial / "bench.json", {"bundles": rows, "runs": settings.runs, "prompt": settings.prompt})
    times = {name: 1000 * rows[-1]["seconds"][name]["median"] for name in ("total", "step")}
    scores = {"total_ms": times["total"], "step_ms": times["step"]}
    return Made(scores | ({"peak_mb": rows[-1]["peak_rss"] / 1e6} if rows[-1]["peak_rss"] else {}))


CALLS: dict[str, Callable[[Work], Made]] = {
    "data": _data,
    "loss-judge": partial(_judge, for_losses=True),
    "autoencoder": _autoencoder,
    "judge": _judge,
    "base": _base,
    "to-v": _to_v,
    "profile": _profile,
    "elastic": _elastic,
    "evolve": _evolve,
    "recover": _recover,
    "distill-steps": _distill_steps,
    "distill-guidance": _distill_guidance,
    "distill-consistency": _distill_consistency,
    "distill-decoder": _distill_decoder,
    "quantize": _quantize,
    "export": _export,
    "check": _check,
    "evaluate": _evaluate,
    "bench": _bench,
}
