"""One function a kind of stage: calls what its command calls, and returns what was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pocketfusion.artefact import atomic_folder, write_json
from pocketfusion.compress import model_calls
from pocketfusion.compress.work import Made, Work
from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet


def _data(work: Work) -> Made:
    options, out = work.options, work.place.out
    if options.source == "shapes":
        from pocketfusion.data.shapes import make_shapes

        return Made({"pictures": make_shapes(out, work.recipe.data.size, overwrite=True)["count"]})
    from pocketfusion.data.emoji.build import EmojiSettings, build_emoji
    from pocketfusion.data.emoji.packages import DEFAULT_STYLES

    asked = options.model_dump(include={"scenes", "variants", "skin_tones", "seed"})
    settings = EmojiSettings(styles=options.style or DEFAULT_STYLES, sizes=(work.recipe.data.size,), **asked)
    return Made({"pictures": build_emoji(out, settings, overwrite=True, progress=work.progress)["count"]})


def _profile(work: Work) -> Made:
    with quiet():  # the libraries' import messages
        from pocketfusion.latency.backends import make_backend
        from pocketfusion.latency.figures import plot_table
        from pocketfusion.latency.measure import measure
        from pocketfusion.latency.target import load_target
        from pocketfusion.latency.validate import validation_architectures
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
        from pocketfusion.mobile.plan import plan
        from pocketfusion.mobile.sensitivity_figure import draw

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
    "loss-judge": partial(model_calls.judge, for_losses=True),
    "autoencoder": model_calls.autoencoder,
    "judge": model_calls.judge,
    "base": model_calls.base,
    "to-v": model_calls.to_v,
    "profile": _profile,
    "elastic": model_calls.elastic,
    "evolve": model_calls.evolve,
    "recover": model_calls.recover,
    "distill-steps": model_calls.distill_steps,
    "distill-guidance": model_calls.distill_guidance,
    "distill-consistency": model_calls.distill_consistency,
    "distill-decoder": model_calls.distill_decoder,
    "quantize": _quantize,
    "export": _export,
    "check": _check,
    "evaluate": _evaluate,
    "bench": _bench,
}
