"""`quantize`: a model folder in, a weight recipe out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.targets import LiteRTTarget
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.mobile.plan import Plan


@app.command("quantize")
def quantize_command(
    folder: Annotated[Path, typer.Argument(help="Model folder (diffusers layout).", show_default=False)],
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
    from pocketfusion.cli.extras import require_compress
    from pocketfusion.errors import PocketfusionError

    if recipe.exists() and not overwrite:
        raise PocketfusionError(f"{recipe} exists already: choose another path or pass --overwrite")
    check_files(recipe, analysis, plot, json_file)
    require_compress()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pocketfusion.quiet import quiet

    with quiet():  # the libraries' import messages
        from pocketfusion.mobile.plan import plan

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
        from pocketfusion.mobile.sensitivity_figure import draw

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
