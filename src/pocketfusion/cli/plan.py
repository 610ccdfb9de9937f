"""`plan`: which settings make a recipe's trainings fit into a GPU's memory, with the arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.recipe import Recipe
    from pocketfusion.train.room import Planner, Room, Work


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, such as recipes/sd15.yaml.", show_default=False)],
    gpu_gb: Annotated[
        float | None, typer.Option("--gpu-gb", metavar="GB", help="Memory of a GPU. Default: of this machine.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="SECTION", help="Only that section of the recipe.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes that share a batch.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Weights, moments and EMA in shards (FSDP2).")] = False,
) -> None:
    """Say how much memory each stage's training takes, part by part, and which settings make it fit. Runs nothing."""
    if gpu_gb is not None and not gpu_gb > 0:
        raise PocketfusionError(f"--gpu-gb {gpu_gb:g} is not above 0: give the memory of a GPU, such as 24")
    from pocketfusion.cli.extras import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    from pocketfusion.cli.train import check_trackers_of
    from pocketfusion.recipe import load_recipe, nearest

    loaded = load_recipe(recipe)
    check_trackers_of(loaded)
    quiet_libraries()
    from pocketfusion.train.room import Planner, works_of

    works = works_of(loaded)
    if stage is not None:
        names = [work.name for work in works]
        if stage not in names:
            raise PocketfusionError(f"the recipe {loaded.name} trains no {stage!r}: {nearest(stage, names)}")
        works = [work for work in works if work.name == stage]
    _check_processes(loaded, {stage} if stage else {*(work.name for work in works), "decoder"}, processes)
    kind, limit = _machine() if gpu_gb is None else ("cuda", 1e9 * gpu_gb)
    planner = Planner(kind, processes, fsdp)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    where = "GPU" if kind == "cuda" else "this machine's CPU"
    console.print(
        f"{loaded.name}: {limit / 1e9:.1f} GB of {where}, {processes} process{'es' if processes > 1 else ''}"
    )
    for work in works:
        _show(console, planner, work, limit)


def _check_processes(recipe: Recipe, sections: set[str], processes: int) -> None:
    """Raises PocketfusionError for a section whose batch they cannot share: else it is told hours later."""
    from pocketfusion.train.micro_batch import parts_of

    for name, section in recipe:
        if name in sections and section is not None:
            try:
                parts_of(section.train, processes)
            except PocketfusionError as error:
                raise PocketfusionError(f"{name}: {error}") from None


def _machine() -> tuple[str, float]:
    import torch

    from pocketfusion.runtime.memory import available_memory

    if torch.cuda.is_available():
        return "cuda", float(torch.cuda.mem_get_info()[1])
    return "cpu", available_memory()


def _show(console: Console, planner: Planner, work: Work, limit: float) -> None:
    from pocketfusion.train.room import ladder

    count = f"{work.student.parameters / 1e6:,.1f} M parameters"
    console.print(f"\n{work.name}: {count}, batch {work.train.batch_size}")
    if work.train.micro_batch != "auto":
        room = planner.room(work)
        verdict = "fits" if room.peak <= limit else "does not fit"
        console.print(f"  in parts of {room.micro_batch}, as the recipe says: {_sum(room)}: {verdict}")
    for name, train, room_found in ladder(planner, work, limit):
        if room_found is None:
            console.print(f"  {name}: {_sum(planner.room(work, train, 1))} for one sample: does not fit")
        else:
            console.print(f"  {name}: micro_batch {room_found.micro_batch}: {_sum(room_found)}")


def _sum(room: Room) -> str:
    terms = " + ".join(f"{name} {value / 1e9:.2f}" for name, value in room.parts.items())
    return f"{terms} = {room.peak / 1e9:.1f} GB"
