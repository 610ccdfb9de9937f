"""`pocketfusion sweep`: opens everything, sweeps, writes curve.json, curve.md and curve.png."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, check_writable_parent, write_json
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings
from pocketfusion.evaluate.run import judge_notes, open_judge
from pocketfusion.evaluate.sets import choose_sets
from pocketfusion.evaluate.sweep import Point, PointCache, Progress, Reference, Sweep, sweep
from pocketfusion.folder import check_folder, folder_hash, machine

HEADER = ("system", "guidance", "Fréchet distance", "CLIP score", "95 % interval", "top-5 %")


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path in front as tells them apart.

    Raises PocketfusionError if one is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise PocketfusionError(f"{twice} is named twice: name each model folder once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def sweep_folders(
    folders: Sequence[Path],
    data: Path,
    judge: Path,
    out: Path,
    *,
    guidance: Sequence[float],
    sampler: SamplerSettings,
    samples: int,
    sets: Sequence[str],
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Sweep:
    """Sweeps model folders and writes the result folder `out` atomically; arguments as the command's.

    Points are kept in `OUT.run`: the same command goes on where a killed one stopped. Raises PocketfusionError before
    any drawing if an input is missing or does not fit, or `out` exists.
    """
    check_writable_parent(out)
    if out.exists() and not overwrite:
        raise PocketfusionError(f"{out} exists already: choose another output path or pass --overwrite")
    named = labels(folders)
    for folder in folders:
        check_folder(folder)
    scorer = open_judge(judge)
    identities: list[dict[str, Any]] = []
    size = 0
    for folder in folders:
        system = ModelFolder(folder)  # opened and let go again: a damaged one is told of before hours of drawing
        if identities and system.image_size != size:
            raise PocketfusionError(
                f"{folder} draws {system.image_size} px but {folders[0]} draws {size} px: sweep them apart"
            )
        identities.append(system.identity() | {"name": folder.resolve().name})
        size = system.image_size
    images = open_dataset(data, size)
    chosen = choose_sets(images, sets, samples)
    reference = Reference.of(images, scorer, chosen, seed)
    protocol: dict[str, Any] = {
        "judge": {"name": judge.resolve().name, "sha256": folder_hash(judge)},
        "data": {"name": images.name, "fingerprint": images.fingerprint},
        "image_size": size,
        "num_inference_steps": sampler.num_inference_steps,
        "seed": seed,
        "seeds": "per picture: sha256('SEED|ID'), first 12 hexadecimal digits; noise by numpy PCG64",
        "sets": {part.name: [images.rows[i]["id"] for i in part.indices] for part in chosen},
        "caption": "the plainest (first) of each picture",
        "feature_dimensions": int(reference.features.shape[1]),
    }
    systems = [
        (label, identity, partial(ModelFolder, folder))
        for label, identity, folder in zip(named, identities, folders, strict=True)
    ]
    cache = PointCache(out.with_name(f"{out.name}.run"))
    result = sweep(systems, scorer, reference, guidance, sampler, protocol, cache, progress)
    result.protocol = protocol | {"pocketfusion": __version__, "machine": machine(), "samples": samples}
    result.notes = judge_notes(judge, images.fingerprint)
    with atomic_folder(out, overwrite=overwrite) as folder_:
        write_sweep(result, folder_)
    return result


def write_sweep(result: Sweep, folder: Path) -> None:
    """Writes curve.json, curve.md and curve.png into an existing folder."""
    from pocketfusion.evaluate.sweep_figure import plot_curves

    write_json(folder / "curve.json", result.model_dump())
    (folder / "curve.md").write_text(markdown(result), encoding="utf-8")
    plot_curves(result, folder / "curve.png")


def _cells(point: Point, is_best: bool) -> tuple[str, ...]:
    score = point.clip_score
    return (
        f"{point.guidance_scale:g}",
        f"{point.frechet:.2f}{' (lowest)' if is_best else ''}",
        f"{score.value:.2f}",
        f"{score.low:.2f}–{score.high:.2f}",
        f"{100 * point.top5.value:.1f}",
    )


def rows(result: Sweep) -> list[tuple[str, ...]]:
    """The table's cells, under HEADER; the real pictures last."""
    cells = [(curve.label, *_cells(point, point is curve.best)) for curve in result.curves for point in curve.points]
    score, top5 = result.real["clip_score"], result.real["top5"]
    real = (
        "real pictures",
        "",
        "0",
        f"{score.value:.2f}",
        f"{score.low:.2f}–{score.high:.2f}",
        f"{100 * top5.value:.1f}",
    )
    return [*cells, real]


def remarks(result: Sweep) -> list[str]:
    """What a reader needs to read the table right."""
    sets = {name: len(ids) for name, ids in result.protocol["sets"].items()}
    listed = ", ".join(f"{name} ({count})" for name, count in sets.items())
    return [
        *result.notes,
        f"{sum(sets.values())} pictures a point: {listed}; the same captions and noise for every system; "
        f"{result.protocol['num_inference_steps']} steps.",
        "Fréchet distance on the judge's features to the real pictures of the same captions; it is comparable only at "
        "equal counts, with this judge and data.",
    ]


def markdown(result: Sweep) -> str:
    """The sweep as one page."""
    protocol = result.protocol
    lines = [HEADER, tuple("---" for _ in HEADER), *rows(result)]
    systems = ", ".join(f"{curve.label} `{curve.system['sha256'][:12]}`" for curve in result.curves)
    parts = [
        "# Fréchet distance and CLIP score over guidance",
        f"{systems}; judge `{protocol['judge']['sha256'][:12]}`, data {protocol['data']['name']} "
        f"`{protocol['data']['fingerprint'][:12]}`, seed {protocol['seed']}, {protocol['image_size']} px.",
        "![curves](curve.png)",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        "\n".join(f"- {line}" for line in remarks(result)),
    ]
    return "\n\n".join(parts) + "\n"


def table(result: Sweep) -> Table:
    """The table for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if i else "left")
    for cells in rows(result):
        shown.add_row(*cells)
    return shown
