"""`evolve`, `plot-drops`, `remove`, `prune`: a smaller UNet, searched, compared, cut."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import (
    CacheOpt,
    DataOpt,
    JsonOpt,
    MinutesOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    RecipeOpt,
    ReplaceOpt,
    RunOpt,
    SkipBadOpt,
)
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.evolve.algorithm import Progress

LatencyOpt = Annotated[Path, typer.Option("--latency", help="Table that `profile` wrote.", show_default=False)]
MsOpt = Annotated[float | None, typer.Option("--budget-ms", help="Milliseconds of one guided UNet step.")]
RatioOpt = Annotated[float | None, typer.Option("--budget-ratio", help="Share of the base's latency, such as 0.5.")]
ForceOpt = Annotated[bool, typer.Option("--force", help="Use a latency table though it does not match.")]


class Precision(str, Enum):
    """Arithmetic of the validation pictures."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.command("evolve")
def evolve_command(
    folder: ModelArg,
    recipe: RecipeOpt,
    data: DataOpt,
    judge: Annotated[
        str, typer.Option("--judge", help="Judge folder, or open_clip:NAME:FILE.safetensors.", show_default=False)
    ],
    latency: LatencyOpt,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; with --dry-run, a JSON file.")
    ] = None,
    budget_ms: MsOpt = None,
    budget_ratio: RatioOpt = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Most rounds.")] = 10,
    group: Annotated[int, typer.Option("--group", help="Most actions a round.")] = 4,
    actions: Annotated[
        str, typer.Option("--actions", help="Kinds, with commas.")
    ] = "remove,self-attention,feed-forward,drop,duplicate",
    samples: Annotated[int, typer.Option("--samples", help="Validation pictures of each evaluation.")] = 256,
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps of each.")] = 10,
    train_steps: Annotated[int, typer.Option("--train-steps", help="Robust training after each round.")] = 200,
    precision: Annotated[Precision, typer.Option("--precision", help="Of the evaluations.")] = Precision.fp32,
    seed: Annotated[int, typer.Option("--seed", help="Of noise and training.")] = 0,
    run: RunOpt = None,
    cache: CacheOpt = None,
    max_minutes: MinutesOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the first ranking.")] = False,
    as_json: JsonOpt = False,
    overwrite: OverwriteOpt = False,
    force: ForceOpt = False,
    skip_bad: SkipBadOpt = False,
) -> None:
    """Remove what costs time without earning quality, copy what earns most, until the latency budget is met.

    SnapFusion's Algorithm 1. Evaluations are kept in OUT.run: a killed search goes on where it was.
    """
    from pocketfusion.cli.shared import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    from pocketfusion.evolve.actions import parse_kinds
    from pocketfusion.recipe import load_recipe
    from pocketfusion.train.place import StageRun

    kinds = parse_kinds(actions)
    loaded = load_recipe(recipe)
    if out is None and not dry_run:
        raise PocketfusionError("--out is missing: give the folder to write, or --dry-run for the first ranking alone")
    if dry_run and out is not None and out.exists() and not (overwrite and out.is_file()):
        raise PocketfusionError(f"{out} exists already: choose another output path or pass --overwrite")
    stage = StageRun.at(out, run, max_minutes, overwrite) if out is not None else None
    quiet_libraries()  # imports them: only after the quick checks
    from pocketfusion.evolve.algorithm import OutOfTime
    from pocketfusion.evolve.search import Inputs, evolve_folder, rank_folder

    folder = model_folder(folder)
    inputs = Inputs(folder, loaded, data, judge, latency, samples, steps, seed, precision.value, force, skip_bad)
    try:
        with _bar() as progress:
            if dry_run:
                ranked = rank_folder(inputs, kinds, stage.run if stage else run, progress, _deadline(max_minutes))
            else:
                assert stage is not None
                made = evolve_folder(
                    inputs,
                    stage,
                    budget_ms=budget_ms,
                    budget_ratio=budget_ratio,
                    rounds=rounds,
                    group=group,
                    kinds=kinds,
                    train_steps=train_steps,
                    cache=cache,
                    progress=progress,
                )
    except OutOfTime:
        Console(stderr=True, highlight=False).print("stopped by --max-minutes; run the same command to go on")
        return
    if dry_run:
        _show_ranking(ranked, out, as_json)
        return
    assert out is not None
    results = made.results
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{out}: {results['latency_ms']:.4g} ms a guided step, {results['latency_ratio']:.2f} of the base, "
        f"after {results['rounds']} rounds ({results['stopped']})"
    )
    console.print(f"{results['evaluations']} evaluations of {results['seconds_per_evaluation']:.1f} s")
    console.print(f"measured on {made.data['name']}")
    console.print("written: the model folder, actions.json, frontier.json, frontier.png")


def _deadline(minutes: float | None) -> float:
    import time

    return time.monotonic() + 60 * minutes if minutes else float("inf")


class _bar:
    """A progress bar a round on stderr; gives the function that the search reports to."""

    def __enter__(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar, self.tasks = Progress(*columns, console=Console(stderr=True)), dict[int, Any]()
        self.bar.start()

        def progress(number: int, done: int, total: int) -> None:
            if number not in self.tasks:
                self.tasks[number] = self.bar.add_task(f"round {number + 1}: evaluating actions", total=total)
            self.bar.update(self.tasks[number], completed=done, total=total)

        return progress

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


def _show_ranking(ranked: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from rich import box
    from rich.table import Table

    from pocketfusion.artefact import write_json
    from pocketfusion.evolve.actions import Action

    if out is not None:
        write_json(out, ranked)
    if as_json:
        typer.echo(json.dumps(ranked, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("action", no_wrap=True)
    for title in ("score lost", "± error", "ms saved", "lost / ms"):
        table.add_column(title, justify="right")
    order = ranked["ranking"]
    for i in [*order, *(i for i in range(len(ranked["values"])) if i not in set(order))]:
        entry = ranked["values"][i]
        worth = "saves nothing" if entry["value"] is None else f"{entry['value']:.3f}"
        label = Action.model_validate(entry["action"]).label
        table.add_row(label, f"{entry['drop']:.2f}", f"{entry['error']:.2f}", f"{entry['saved_ms']:.3f}", worth)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"CLIP score {ranked['score']:.2f} ± {ranked['error']:.2f}, {ranked['latency_ms']:.4g} ms a guided step; "
        f"{ranked['seconds_per_evaluation']:.1f} s an evaluation"
    )
    if out is not None:
        console.print(f"written to {out}")


@app.command("plot-drops")
def plot_drops_command(
    before: Annotated[Path, typer.Argument(help="Ranking from `evolve --dry-run`, before robust training.")],
    after: Annotated[Path, typer.Argument(help="The same after it, or `evolve`'s actions.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.", show_default=False)],
) -> None:
    """Draw the score that each removed block costs, before and after robust training (SnapFusion's Figure 5)."""
    from pocketfusion.artefact import atomic_file
    from pocketfusion.cli.shared import require

    require("matplotlib")
    from pocketfusion.evolve.figures import plot_drops, removal_drops

    drops = []
    for path in (before, after):
        try:
            drops.append(removal_drops(json.loads(path.read_text(encoding="utf-8")), str(path)))
        except (OSError, ValueError):
            raise PocketfusionError(f"{path} is not a readable JSON file: check the path") from None
    with atomic_file(out) as partial:
        plot_drops(drops[0], drops[1], partial)
    typer.echo(f"written to {out}")


class Method(str, Enum):
    """How `remove` chooses blocks."""

    bk_sdm = "bk-sdm"
    random = "random"


@app.command("remove")
def remove_command(
    folder: ModelArg,
    latency: LatencyOpt,
    out: OutOpt,
    method: Annotated[Method, typer.Option("--method", help="Order of removal.")] = Method.bk_sdm,
    budget_ms: MsOpt = None,
    budget_ratio: RatioOpt = None,
    seed: Annotated[int, typer.Option("--seed", help="Of a random removal.")] = 0,
    as_json: JsonOpt = False,
    overwrite: ReplaceOpt = False,
    force: ForceOpt = False,
) -> None:
    """Remove blocks to a latency budget without looking at quality: by BK-SDM's order, or at random.

    What an evolved network is compared with; nothing is trained, `recover` does that.
    """
    from pocketfusion.artefact import check_new
    from pocketfusion.cli.shared import require_compress

    check_new(out, overwrite)
    require_compress()
    from pocketfusion.evolve.removal import remove_folder

    folder = model_folder(folder)
    made = remove_folder(
        folder,
        latency,
        out,
        method=method.value,
        budget_ms=budget_ms,
        budget_ratio=budget_ratio,
        seed=seed,
        force=force,
        overwrite=overwrite,
    )
    results = made.results
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{out}: {results['blocks']} blocks, {results['latency_ms']:.4g} ms a guided step, "
        f"{results['latency_ratio']:.2f} of the base"
    )
    console.print(f"removed: {', '.join(results['removed'])}")


class Rule(str, Enum):
    """How `prune` chooses units."""

    uniform = "uniform"
    sensitivity = "sensitivity"


@app.command("prune")
def prune_command(
    folder: ModelArg,
    out: OutOpt,
    rule: Annotated[Rule, typer.Option("--rule", help="Which units go.")] = Rule.uniform,
    ratio: Annotated[float, typer.Option("--ratio", help="Share of the UNet's parameters to remove.")] = 0.11,
    data: Annotated[Path | None, typer.Option("--data", help="Captioned pictures to measure on.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Pictures to measure on.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    as_json: JsonOpt = False,
    overwrite: ReplaceOpt = False,
    skip_bad: SkipBadOpt = False,
) -> None:
    """Prune ResNet channels, attention heads and feed-forward units of the UNet; `recover` trains it afterwards.

    `uniform` takes the same share of the largest layers (Squeezing); `sensitivity` what harms the output least.
    """
    from pocketfusion.artefact import check_new
    from pocketfusion.cli.shared import quiet_libraries, require_compress

    check_new(out, overwrite)
    require_compress()
    quiet_libraries()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pocketfusion.prune.pruning import prune_folder

    folder = model_folder(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring" if rule == Rule.sensitivity else "pruning", total=None)
        made = prune_folder(
            folder,
            out,
            rule=rule.value,
            ratio=ratio,
            data=data,
            samples=samples,
            seed=seed,
            overwrite=overwrite,
            skip_bad=skip_bad,
            done=lambda count, total: bar.update(task, completed=count, total=total),
        )
    results = made.results
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for part, lines in results["units"].items():
        console.print(f"{part.replace('_', ' ')}: {', '.join(lines)}")
    saved = 1 - results["multiply_adds"] / results["base_multiply_adds"]
    console.print(
        f"{out}: {results['parameters'] / 1e6:.2f} M parameters of {results['base_parameters'] / 1e6:.2f} M "
        f"({results['removed']:.1%} less), multiply-adds {saved:.1%} less"
    )
    if noise := results.get("noise"):
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in noise.items())
        console.print(f"noise over signal on held-out latents: {shown}")
    if made.data:
        console.print(f"measured on {made.data['name']}")
