"""`data cache`, `data merge-cache`, `data show-cache`: latents of pictures, made where the processors are."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfusion.cli.data import data_app
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

OutArg = Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False)]


@data_app.command("cache")
def cache_command(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of shards, of pictures or of packed pictures; or a URL of shards (s3, gs, http, https, hf).",
            show_default=False,
        ),
    ],
    out: OutArg,
    vae: Annotated[Path, typer.Option("--vae", help="Autoencoder, or a model folder with one.", show_default=False)],
    size: Annotated[list[int], typer.Option("--size", help="Pixels of a square's side; may be repeated.")],
    aspect: Annotated[
        list[str] | None,
        typer.Option("--aspect", help="Width:height of a bucket, as 3:4; may be repeated. Default: 1:1."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part", help="K/N: every N-th part from the K-th. Default: all, a launch's processes share them."
        ),
    ] = None,
    halved: Annotated[
        bool, typer.Option("--halved", help="Keep latents of half-size pictures too, for half_size_until.")
    ] = False,
    precision: Annotated[str, typer.Option("--precision", help="The encoder's: no (fp32) or bf16.")] = "no",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures encoded at once.")] = 32,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads that decode. Default: one a core, 8 at most.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave samples out that cannot be used; counts and lists them.")
    ] = False,
) -> None:
    """Encode captioned pictures to a cache of latents, which every training command takes as --data.

    Reads every shard once, resumes to the shard, and holds no more than a few pictures in memory.
    """
    from pocketfusion.cli.extras import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    share = _share(part)
    if precision not in ("no", "bf16"):
        raise PocketfusionError(f"--precision {precision!r} is none: give no or bf16")
    from pocketfusion.artefact import check_writable_parent
    from pocketfusion.data.buckets import make_buckets
    from pocketfusion.data.latents.bar import PartsBar
    from pocketfusion.data.latents.filling import fill
    from pocketfusion.data.latents.finishing import finish
    from pocketfusion.data.latents.layout import Plan, missing_parts
    from pocketfusion.data.remote import is_url, shown
    from pocketfusion.data.rows import LeftOut
    from pocketfusion.data.sources import any_source

    check_writable_parent(out)
    source = any_source(data, max(size), LeftOut(skip_bad), out)
    quiet_libraries()
    from dataclasses import replace

    import torch

    from pocketfusion.folder import ENCODER, machine, weights_hash
    from pocketfusion.models.slim_autoencoder import load_vae
    from pocketfusion.train.cache import encoding_of, latent_encoder

    folder = vae / "vae" if (vae / "vae" / "config.json").is_file() else vae
    if not (folder / "config.json").is_file():
        raise PocketfusionError(f"there is no autoencoder at {vae}: give a model folder or its vae/")
    model = load_vae(folder)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    buckets = make_buckets(sorted(size), aspect or ["1:1"], factor * (2 if halved else 1))
    encoding = encoding_of(model, weights_hash(folder, ENCODER), max(size), buckets, halved)
    where = shown(data) if is_url(data) else data
    plan = Plan.of(source, replace(encoding, precision=precision), skip_bad, where)
    encode, began = latent_encoder(model, device, precision), time.monotonic()
    with PartsBar("encoding latents", len(plan.parts[share[0] :: share[1]])) as bar:
        how: dict[str, Any] = {"share": share, "batch": batch, "workers": workers, "progress": bar.add}
        encoded = fill(out, source, plan, encode, **how)
    console = Console(highlight=False)
    seconds = time.monotonic() - began
    rate = f" in {seconds:,.0f} s, {encoded / seconds:,.1f} a second" if encoded else ""
    console.print(f"{out}: {encoded:,} pictures encoded{rate}")
    if missing := missing_parts(out, plan):
        console.print(f"  {len(missing)} of {len(plan.parts)} parts are still to be made (see --part)")
    else:
        _print(console, finish(out, machine()))


@data_app.command("merge-cache")
def merge_command(
    out: OutArg,
    folders: Annotated[list[Path], typer.Argument(help="Caches that machines made --part by --part.")],
) -> None:
    """Bring the parts of one cache together that were made in several folders."""
    from pocketfusion.artefact import check_writable_parent
    from pocketfusion.data.latents.finishing import merge

    check_writable_parent(out)
    _print(Console(highlight=False), merge(out, folders))


@data_app.command("show-cache")
def show_command(
    path: OutArg,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the SHA-256 of every file.")] = False,
) -> None:
    """Show what a cache of latents holds, and check that all of it is there."""
    from pocketfusion.data.latents.layout import MANIFEST
    from pocketfusion.data.latents.reading import open_cache

    open_cache(path, verify=verify)
    console = Console(highlight=False)
    _print(console, json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    console.print(f"  check        ok, every file's {'SHA-256' if verify else 'size'} matches")


def _share(part: str | None) -> tuple[int, int]:
    """K/N → (K - 1, N); without one, what falls to this process of a launch."""
    if part is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if not found or int(found[1]) > int(found[2]):
        raise PocketfusionError(f"--part {part!r} is none: give K/N with K from 1 to N, such as 1/4")
    return int(found[1]) - 1, int(found[2])


def _print(console: Console, manifest: dict[str, Any]) -> None:
    encoding = manifest["encoding"]
    console.print(f"{manifest['name']}: {manifest['count']:,} pictures as latents", style="bold", markup=False)
    console.print(f"  buckets      {', '.join(f'{name} ({n:,})' for name, n in manifest['buckets'].items())}")
    console.print(f"  splits       {', '.join(f'{name} {n:,}' for name, n in manifest['splits'].items() if n)}")
    console.print(f"  autoencoder  {encoding['autoencoder'][:12]}, factor {encoding['factor']}")
    console.print(f"  fingerprint  {manifest['fingerprint']}")
    for note in manifest["notes"]:
        console.print(f"  note         {note}", markup=False, soft_wrap=True)
