"""`compress` and `quantize`: every stage of a recipe, and the weights' forms of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import DiffusersArg, LiteRTTarget, LogWithOpt, MinutesOpt
from pocketfusion.cli.train_commands import shown_in
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from rich.progress import Progress

    from pocketfusion.compress.chain import Chain, Stage
    from pocketfusion.compress.records import Record
    from pocketfusion.mobile.quantization.mixed_precision import Plan

NameOpt = str | None


@app.command("compress")
def compress_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe with stages, such as recipes/tiny.yaml.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of all stages' results.", show_default=False)],
    start: Annotated[NameOpt, typer.Option("--from", metavar="STAGE", help="Begin with it.")] = None,
    until: Annotated[NameOpt, typer.Option("--until", metavar="STAGE", help="Stop after it.")] = None,
    only: Annotated[NameOpt, typer.Option("--only", metavar="STAGE", help="Only this one.")] = None,
    max_minutes: MinutesOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take, measured here.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is, while it runs or not.")] = False,
    log_with: LogWithOpt = None,
) -> None:
    """Run every stage of a recipe in order: one command from pictures to the phone.

    A finished stage whose settings and inputs are unchanged is skipped, a killed one goes on. A stage that does not
    reach its gate stops the chain with exit code 2. At the end OUT/report.html shows it all.
    """
    from pocketfusion.cli.shared import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    from pocketfusion.compress.chain import chain_of
    from pocketfusion.compress.runner import Span, open_out, run_chain
    from pocketfusion.recipe import load_recipe
    from pocketfusion.train.place import check_trackers

    chain = chain_of(shown_in(load_recipe(recipe, whole=False), log_with))
    for stage in chain.stages:
        check_trackers(stage.train.log_with if stage.train else ())
    span = Span.of(chain, start, until, only)
    open_out(chain, out)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if status:
        from pocketfusion.compress.overview import overview

        console.print(overview(chain, out))
        return
    quiet_libraries()  # imports them: only after the quick checks
    chain = chain.opened(model_folder)
    from pocketfusion.compress.forecast import check_disk, forecast, table

    if dry_run:
        console.print(table(chain, forecast(chain, out)))
        return
    check_disk(chain, out, span)
    with _Shown(chain) as shown:
        result = run_chain(chain, out, span=span, max_minutes=max_minutes, display=shown.display)
    ran = len(result.ran)
    console.print(f"{ran} {'stage' if ran == 1 else 'stages'} run, {len(result.skipped)} unchanged")
    console.print(f"written: {out / 'report.html'}")
    if result.unfinished:
        console.print(f"stopped by --max-minutes in {result.unfinished}; run the same command to go on")


class _Shown:
    """A line for every stage that ended, and under it the bar of the one at work."""

    def __init__(self, chain: Chain):
        from pocketfusion.compress.runner import Display

        self.count = len(chain.stages)
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.display = Display(self._begun, self._ended, self._progress)
        self.bar: Progress | None = None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _begun(self, stage: Stage, number: int) -> None:
        train = stage.train
        steps = f", {train.steps:,} steps of {train.batch_size}" if train else ""
        self.console.print(f"stage {number} of {self.count}: {stage.name}{steps}", style="bold")

    def _ended(self, stage: Stage, number: int, record: Record, skipped: bool) -> None:
        self._stop()
        known = [f"{name} {record.scores[name]:.4g}" for name in stage.is_a.scores if name in record.scores]
        gate = "" if record.gate_met is None else f"; gate {record.gate} {'met' if record.gate_met else 'NOT met'}"
        how = "unchanged" if skipped else f"{record.seconds:,.0f} s"
        self.console.print(f"stage {number} of {self.count}: {stage.name} done ({how}) {', '.join(known)}{gate}")

    def _progress(self, what: str, done: int, total: int) -> None:
        from rich import progress

        from pocketfusion.terminal import titled

        if not self.console.is_terminal:
            return
        if self.bar is None:
            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
            left = progress.TimeRemainingColumn()
            self.bar = progress.Progress(*columns, left, console=self.console, transient=True)
            self.task = self.bar.add_task(titled(what))
            self.bar.start()
        self.bar.update(self.task, description=titled(what), completed=done, total=total or None)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@app.command("quantize")
def quantize_command(
    folder: DiffusersArg,
    recipe: Annotated[Path, typer.Argument(help="Weight recipe to write (YAML).", show_default=False)],
    min_sqnr: Annotated[
        float | None,
        typer.Option(help="Quality budget: dB that every network keeps, output and guidance direction."),
    ] = None,
    max_mb: Annotated[float | None, typer.Option(help="Size budget: MB that all weights may take.")] = None,
    forms: Annotated[
        str, typer.Option(help="Forms to choose from: float32, float16, int8, int8-dynamic, int4-dynamic.")
    ] = "int8-dynamic,int8,float16",
    target: Annotated[LiteRTTarget, typer.Option(help="Where the bundle is to run.")] = LiteRTTarget.litert_cpu,
    samples: Annotated[int, typer.Option(help="Sampling steps that each layer is judged on.")] = 4,
    analysis: Annotated[
        Path | None, typer.Option(help="Keep the layers' sensitivities here (JSON); a second run starts from them.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the sensitivities here (PNG).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that exists.")] = False,
) -> None:
    """Measure how much each layer's weights may be rounded, and choose their forms under a budget.

    The recipe is applied by `export --recipe`; every layer's form can be edited in it.
    """
    from pocketfusion.artefact import check_files, write_json
    from pocketfusion.cli.shared import require_compress
    from pocketfusion.errors import PocketfusionError

    if recipe.exists() and not overwrite:
        raise PocketfusionError(f"{recipe} exists already: choose another path or pass --overwrite")
    check_files(recipe, analysis, plot, json_file)
    require_compress()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pocketfusion.quiet import quiet

    with quiet():  # the libraries' import messages
        from pocketfusion.mobile.quantization.mixed_precision import plan

    folder = model_folder(folder)
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading")
        made = plan(
            folder,
            target=target.value,
            forms=[form.strip() for form in forms.split(",")],
            min_sqnr=min_sqnr,
            max_mb=max_mb,
            samples=samples,
            analysis=analysis,
            progress=lambda stage, index, count: bar.update(task, description=stage, completed=index, total=count),
        )
    made.recipe.save(recipe)
    _print(made, console)
    console.print(f"{recipe}: apply it with pocketfusion export {folder} OUT --recipe {recipe}")
    if plot is not None:
        from pocketfusion.mobile.quantization.sensitivity import draw

        draw(made.sensitivity, plot)
        console.print(f"{plot}: noise by layer and form")
    if json_file is not None:
        write_json(json_file, made.as_dict())


def _print(made: Plan, console: Console) -> None:
    from collections import Counter

    from rich.table import Table

    table = Table("network", "weights MB", "predicted dB", "measured dB", "guidance delta", "layers by form")
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in made.networks:
        counts = ", ".join(f"{form} {count}" for form, count in Counter(row.forms.values()).most_common())
        delta = "" if row.guidance_delta is None else f"{row.guidance_delta:.4f}"
        figures = (f"{row.size / 1e6:.2f}", f"{row.predicted_db:.1f}", f"{row.measured_db:.1f}")
        table.add_row(row.name.replace("_", " "), *figures, delta, counts)
    console.print(table)
    for name, layers in made.sensitivity.networks.items():
        worst = sorted(layers, key=lambda layer: -max(effect.worst for effect in layer.effects.values()))[:3]
        named = ", ".join(layer.name for layer in worst)
        console.print(f"most sensitive in the {name.replace('_', ' ')}: {named}", soft_wrap=True)
