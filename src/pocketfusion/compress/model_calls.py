"""The stages that train a network: one function each, which calls what the command calls."""

from __future__ import annotations

from pocketfusion.compress.work import Made, Work
from pocketfusion.folder import Provenance


def _trained(provenance: Provenance) -> Made:
    numbers = {k: v for k, v in provenance.results.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return Made(numbers, provenance.finished, provenance.samples_seen, 3600 * provenance.hours)


def autoencoder(work: Work) -> Made:
    """The autoencoder."""
    from pocketfusion.train.autoencoder import train_autoencoder

    judge = work.maybe("loss-judge")
    return _trained(train_autoencoder(work.recipe, work.pictures, work.place, loss_judge=judge))


def judge(work: Work, *, for_losses: bool = False) -> Made:
    """A judge, or with `for_losses` the one for losses."""
    from pocketfusion.train.judge import train_judge

    return _trained(train_judge(work.recipe, work.pictures, work.place, for_losses=for_losses))


def base(work: Work) -> Made:
    """The base."""
    from pocketfusion.train.teacher import train_teacher

    return _trained(train_teacher(work.recipe, work.latents, work.path("autoencoder"), work.place, cache=work.cache))


def to_v(work: Work) -> Made:
    """An ε-model becomes a v-model."""
    from pocketfusion.distill.to_v import to_v as convert

    return _trained(convert(work.recipe, work.latents, work.path("folder"), work.place, work.cache))


def elastic(work: Work) -> Made:
    """Robust training."""
    from pocketfusion.train.elastic import train_elastic

    return _trained(train_elastic(work.recipe, work.latents, work.path("folder"), work.place, work.cache))


def evolve(work: Work) -> Made:
    """The search; unfinished if its time is over."""
    from pocketfusion.evolve.actions import parse_kinds
    from pocketfusion.evolve.algorithm import OutOfTime
    from pocketfusion.evolve.inputs import Inputs
    from pocketfusion.evolve.run import evolve_folder

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


def recover(work: Work) -> Made:
    """Recovery by distillation."""
    from pocketfusion.train.recovery import recover as run

    folder, base = work.path("folder"), work.path("base")
    return _trained(run(work.recipe, work.latents, folder, base, work.place, work.cache))


def distill_steps(work: Work) -> Made:
    """Fewer steps."""
    from pocketfusion.distill.run_steps import distill_progressively
    from pocketfusion.distill.run_steps import distill_steps as directly

    settings = work.recipe.step_distillation
    assert settings is not None
    run = directly if work.options.schedule == "direct" else distill_progressively
    folder, teacher = work.path("folder"), work.path("teacher")
    return _trained(run(work.recipe, settings, work.latents, folder, teacher, work.place, work.cache))


def distill_guidance(work: Work) -> Made:
    """One call a step."""
    from pocketfusion.distill.guidance import distill_guidance as run

    options = work.options
    return _trained(
        run(
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


def distill_consistency(work: Work) -> Made:
    """Four, two or one step."""
    from pocketfusion.distill.run_consistency import distill_consistency as run

    settings = work.recipe.consistency
    assert settings is not None
    folder, teacher = work.path("folder"), work.path("teacher")
    return _trained(run(work.recipe, settings, work.latents, folder, teacher, work.place, work.cache))


def distill_decoder(work: Work) -> Made:
    """A smaller decoder."""
    from pocketfusion.distill.decoder import distill_decoder as run

    settings = work.recipe.decoder
    assert settings is not None
    return _trained(
        run(
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
