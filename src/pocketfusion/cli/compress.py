"""`compress`: every stage of a recipe, from pictures or a checkpoint to a bundle for the phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.train import LogWithOpt, shown_in

if TYPE_CHECKING:
    from rich.progress import Progress

    from pocketfusion.compress.chain import Chain, Stage
    from pocketfusion.compress.records import Record

NameOpt = str | None


@app.command("compress")
def compress_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe with stages, such as recipes/tiny.yaml.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of all stages' results.", show_default=False)],
    start: Annotated[NameOpt, typer.Option("--from", metavar="STAGE", help="Begin with it.")] = None,
    until: Annotated[NameOpt, typer.Option("--until", metavar="STAGE", help="Stop after it.")] = None,
    only: Annotated[NameOpt, typer.Option("--only", metavar="STAGE", help="Only this one.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Stop after MIN; run again to go on.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take, measured here.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is, while it runs or not.")] = False,
    log_with: LogWithOpt = None,
) -> None:
    """Run every stage of a recipe in order: one command from pictures to the phone.

    A finished stage whose settings and inputs are unchanged is skipped, a killed one goes on. A stage that does not
    reach its gate stops the chain with exit code 2. At the end OUT/report.html shows it all.
    """
    from pocketfusion.cli.extras import COMPRESS, quiet_libraries, require

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

        from pocketfusion.progress import titled

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
