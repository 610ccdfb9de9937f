"""`import` and `data`: a checkpoint in one file, pictures, latents."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared_options import JsonOpt, OutArg, ReplaceOpt, ReplaceOutOpt
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.models.bring.importer import Found


class Predicts(str, Enum):
    """What a UNet may predict."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


@app.command("import")
def import_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SOURCE] OUT",
            help="Checkpoint (.safetensors) or model folder, and the folder to write; with --from-hub OUT alone.",
            show_default=False,
        ),
    ],
    from_hub: Annotated[
        str | None,
        typer.Option(
            "--from-hub", metavar="ID", help="OWNER/NAME or OWNER/NAME/FILE.safetensors of the Hugging Face Hub."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub (main if not given).")
    ] = None,
    prediction_type: Annotated[
        Predicts | None,
        typer.Option("--prediction-type", help="What the UNet predicts, where the file says it wrong or not at all."),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Take the averaged weights where the file has both.")
    ] = True,
    clip_skip: Annotated[
        int, typer.Option("--clip-skip", metavar="N", help="Leave out the text encoder's last N - 1 layers.")
    ] = 1,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Autoencoder to take instead: a file, or a folder with config.json.")
    ] = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option("--embedding", help="Textual inversion (safetensors) to add. Repeatable.", show_default=False),
    ] = None,
    as_json: JsonOpt = False,
    overwrite: ReplaceOpt = False,
) -> None:
    """Make a model folder of a Stable Diffusion 1 or 2 checkpoint: one file, a folder, or a repository of the Hub.

    Without --from-hub nothing is downloaded, and nothing is ever unpickled. Commands that take a model folder take a
    checkpoint's file as well, and import it first.

        pocketfusion import dreamshaper_8.safetensors dreamshaper

        pocketfusion import anything.safetensors out --vae kl-f8-anime2.safetensors --clip-skip 2

        pocketfusion import --from-hub stable-diffusion-v1-5/stable-diffusion-v1-5 sd15
    """
    if len(paths) != (1 if from_hub else 2):
        wanted = "OUT alone" if from_hub else "SOURCE and OUT"
        raise PocketfusionError(f"give {wanted}: {len(paths)} paths are given ({', '.join(map(str, paths))})")
    if revision is not None and from_hub is None:
        raise PocketfusionError(f"--revision {revision} is of the Hub: give --from-hub with it, or leave it out")
    from pocketfusion.artefact import check_new
    from pocketfusion.cli.shared import require_compress

    out = paths[-1]
    check_new(out, overwrite)
    require_compress()
    from pocketfusion.cli.shared import stages
    from pocketfusion.models.bring.importer import Changes, import_file, import_folder

    changes = Changes(
        prediction_type=prediction_type.value if prediction_type else None,
        ema=ema,
        clip_skip=clip_skip,
        vae=vae,
        embeddings=tuple(embedding or ()),
    )
    with stages() as on_stage:
        source, origin = paths[0], None
        if from_hub is not None:
            from pocketfusion.models.bring.hub import fetch

            on_stage(f"fetching {from_hub}")
            branch = revision or "main"
            fetched = fetch(from_hub, branch)
            source, origin = fetched.path, {"repository": from_hub, "revision": branch, "commit": fetched.commit}
        elif source.is_dir() and changes == Changes():
            raise PocketfusionError(f"{source} is a folder already: give it to the other commands as it is")
        function = import_folder if source.is_dir() else import_file
        found = function(source, out, changes, overwrite=overwrite, origin=origin, on_stage=on_stage)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    show(found, out)


def show(found: Found, out: Path) -> None:
    """Prints what was found in a checkpoint."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    predicts = f"{found.prediction_type} ({found.prediction_why})"
    if found.zero_snr:
        predicts += "; the schedule ends without signal"
    rows = [
        ("family", found.family),
        ("predicts", predicts),
        ("pictures", f"{found.picture_size} px"),
        ("UNet", found.unet),
        ("text encoder", found.text_encoder),
        ("VAE", found.vae),
        ("weights", found.weights),
    ]
    if found.tokens:
        rows.append(("learnt tokens", ", ".join(found.tokens)))
    if found.leftovers:
        rows.append(("left out", ", ".join(f"{kind} ({count})" for kind, count in found.leftovers.items())))
    if found.unused:
        more = f" and {found.unused_count - len(found.unused)} more" if found.unused_count > len(found.unused) else ""
        rows.append(("not known", ", ".join(found.unused) + more))
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(f"written to {out}")


data_app = typer.Typer(help="Build captioned data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("emoji")
def emoji_command(
    out: OutArg,
    size: Annotated[
        list[int] | None, typer.Option("--size", help="Pixels; may be repeated. Default: 64, 128.")
    ] = None,
    style: Annotated[
        list[str] | None, typer.Option("--style", help="Drawing style; may be repeated. Default: the eight free ones.")
    ] = None,
    scenes: Annotated[int, typer.Option(help="How many composed scenes to add.")] = 3000,
    variants: Annotated[int, typer.Option(help="Scaled and shifted renderings added per training drawing.")] = 0,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="Add the skin-tone variants.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of scenes and variants.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Where fetched packages are kept.")] = None,
    overwrite: ReplaceOutOpt = False,
) -> None:
    """Build the captioned emoji data set from its pinned packages (same settings, same bytes)."""
    from pocketfusion.cli.shared import require

    require("resvg_py", "numpy", "PIL")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from pocketfusion.data.emoji.build import EmojiSettings, build_emoji
    from pocketfusion.data.emoji.drawings import DEFAULT_STYLES

    settings = EmojiSettings(
        styles=tuple(dict.fromkeys(style or DEFAULT_STYLES)),
        sizes=tuple(sorted(set(size or (64, 128)))),
        scenes=scenes,
        variants=variants,
        skin_tones=skin_tones,
        seed=seed,
    )
    console = Console(highlight=False)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        manifest = build_emoji(out, settings, cache=cache, overwrite=overwrite, progress=progress)
    table = Table("split", "pictures")
    for split, count in manifest["splits"].items():
        table.add_row(split, f"{count:,}")
    table.add_row("all", f"{manifest['count']:,}", style="bold")
    console.print(table)
    console.print(f"{out}: {out / 'contact_sheet.png'} shows it, {out / 'LICENCES.md'} says whose drawings they are")


CacheFolderArg = Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False)]


@data_app.command("cache")
def cache_command(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of shards, of pictures or of packed pictures; or a URL of shards (s3, gs, http, https, hf).",
            show_default=False,
        ),
    ],
    out: CacheFolderArg,
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
    from pocketfusion.cli.shared import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    share = _share(part)
    if precision not in ("no", "bf16"):
        raise PocketfusionError(f"--precision {precision!r} is none: give no or bf16")
    from pocketfusion.artefact import check_writable_parent
    from pocketfusion.data.buckets import make_buckets
    from pocketfusion.data.latents.filling import PartsBar, fill
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
        _print_cache(console, finish(out, machine()))


@data_app.command("merge-cache")
def merge_command(
    out: CacheFolderArg,
    folders: Annotated[list[Path], typer.Argument(help="Caches that machines made --part by --part.")],
) -> None:
    """Bring the parts of one cache together that were made in several folders."""
    from pocketfusion.artefact import check_writable_parent
    from pocketfusion.data.latents.finishing import merge

    check_writable_parent(out)
    _print_cache(Console(highlight=False), merge(out, folders))


@data_app.command("show-cache")
def show_command(
    path: CacheFolderArg,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the SHA-256 of every file.")] = False,
) -> None:
    """Show what a cache of latents holds, and check that all of it is there."""
    from pocketfusion.data.latents.layout import MANIFEST
    from pocketfusion.data.latents.reading import open_cache

    open_cache(path, verify=verify)
    console = Console(highlight=False)
    _print_cache(console, json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    console.print(f"  check        ok, every file's {'SHA-256' if verify else 'size'} matches")


def _share(part: str | None) -> tuple[int, int]:
    """K/N → (K - 1, N); without one, what falls to this process of a launch."""
    if part is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if not found or int(found[1]) > int(found[2]):
        raise PocketfusionError(f"--part {part!r} is none: give K/N with K from 1 to N, such as 1/4")
    return int(found[1]) - 1, int(found[2])


def _print_cache(console: Console, manifest: dict[str, Any]) -> None:
    encoding = manifest["encoding"]
    console.print(f"{manifest['name']}: {manifest['count']:,} pictures as latents", style="bold", markup=False)
    console.print(f"  buckets      {', '.join(f'{name} ({n:,})' for name, n in manifest['buckets'].items())}")
    console.print(f"  splits       {', '.join(f'{name} {n:,}' for name, n in manifest['splits'].items() if n)}")
    console.print(f"  autoencoder  {encoding['autoencoder'][:12]}, factor {encoding['factor']}")
    console.print(f"  fingerprint  {manifest['fingerprint']}")
    for note in manifest["notes"]:
        console.print(f"  note         {note}", markup=False, soft_wrap=True)
