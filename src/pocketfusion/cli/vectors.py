"""`vectors`: reference values of a bundle, for ports of the runtime to other languages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app


@app.command("vectors")
def vectors_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Of the picture. Default: a red apple.")] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads; more than one may change last bits.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write what a port of the runtime compares itself with, as plain JSON and .npy.

    Token ids of 50 odd prompts, noise, every sampler's coefficients, each network's inputs and outputs, the latents
    after every step, the picture. docs/port.md has the rules.
    """
    from pocketfusion.port.vectors import PROMPT, write_vectors
    from pocketfusion.runtime.networks import check_threads
    from pocketfusion.terminal import Console

    check_threads(threads)
    console, notes = (Console(stderr=error, highlight=False, markup=False, soft_wrap=True) for error in (False, True))
    with notes.status("opening the bundle") as status:
        index = write_vectors(
            bundle,
            out,
            prompt=PROMPT if prompt is None else prompt,
            num_threads=threads,
            overwrite=overwrite,
            progress=status.update,
        )
    picture = index["picture"]
    console.print(
        f"{out}: {index['bundle']['name']}, {picture['prompt']!r} with seed {picture['seed']} in "
        f"{picture['num_inference_steps']} steps of {picture['sampler']}; docs/port.md has the rules"
    )
