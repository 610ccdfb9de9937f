"""`pocketfusion data emoji OUT`: packages → pictures and captions as packed arrays with an index, byte for byte."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from pocketfusion.artefact import atomic_folder, check_new, reserve, sha256_file
from pocketfusion.data.emoji.concepts import Drawing, captions_for, iter_drawings, load_concepts, may_flip, name_index
from pocketfusion.data.emoji.drawings import DEFAULT_STYLES, STYLES, fetch_packages, lock_hash
from pocketfusion.data.emoji.scenes import render_on, render_scene, sample_scene, scene_may_flip
from pocketfusion.data.emoji.split import assign_split, frozen_groups
from pocketfusion.data.packed import FORMAT, VERSION
from pocketfusion.errors import PocketfusionError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EmojiSettings:
    """What to build. `variants` adds that many scaled and shifted renderings of each training drawing."""

    styles: tuple[str, ...] = DEFAULT_STYLES
    sizes: tuple[int, ...] = (64, 128)
    scenes: int = 2000
    variants: int = 0
    skin_tones: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises PocketfusionError on a value that cannot be built."""
        for style in self.styles:
            if style not in STYLES:
                raise PocketfusionError(f"there is no style '{style}': choose from {', '.join(STYLES)}")
        for size in self.sizes:
            if not 16 <= size <= 512:
                raise PocketfusionError(f"a size of {size} px is outside 16 to 512: choose another --size")
        for name in ("scenes", "variants"):
            if getattr(self, name) < 0:
                raise PocketfusionError(f"--{name} {getattr(self, name)} is negative: give 0 or more")


@dataclass(frozen=True)
class _Job:
    row: dict
    paint: Callable[[int], np.ndarray]


def _paint_all(jobs: list[_Job], sizes: tuple[int, ...]) -> list[np.ndarray]:
    return [np.stack([job.paint(size) for job in jobs]) for size in sizes]


def _rng(*parts: object) -> random.Random:
    return random.Random(sha256("|".join(map(str, parts)).encode()).digest())


def _drawing_row(drawing: Drawing, groups: dict[str, str]) -> dict:
    concept, style = drawing.concept, STYLES[drawing.style]
    group = groups.get(concept.base, concept.base)
    return {
        "id": f"{style.name}/{concept.hex}",
        "kind": "drawing",
        "split": assign_split(group, style.family),
        "style": style.name,
        "family": style.family,
        "hex": concept.hex,
        "label": concept.label,
        "captions": captions_for(concept, style.name),
        "tags": list(concept.tags),
        "group": concept.group,
        "concept_group": group,
        "gender": concept.gender,
        "flip": may_flip(concept),
        "licence": style.spdx,
    }


def plan(settings: EmojiSettings, node_modules: Path) -> list[_Job]:
    """Every picture to render, in its final order: drawings by style, then variants, then scenes."""
    concepts = load_concepts(node_modules, skin_tones=settings.skin_tones)
    names, groups = name_index(node_modules, concepts), frozen_groups()
    jobs: list[_Job] = []
    variants: list[_Job] = []
    by_style: dict[str, list[Drawing]] = {}
    for style in settings.styles:
        for drawing in iter_drawings(node_modules, style, concepts, names):
            row = _drawing_row(drawing, groups)
            jobs.append(_Job(row, partial(render_on, drawing.source)))
            if row["split"] != "train":
                continue
            by_style.setdefault(style, []).append(drawing)
            for number in range(settings.variants):
                rng = _rng("variant", settings.seed, row["id"], number)
                scale = round(rng.uniform(0.6, 1.0), 4)
                offset = (
                    round(rng.uniform(-0.5, 0.5) * (1 - scale), 4),
                    round(rng.uniform(-0.5, 0.5) * (1 - scale), 4),
                )
                placed = {"scale": scale, "offset": list(offset)}
                variants.append(
                    _Job(
                        {**row, "id": f"{row['id']}#{number}", "kind": "variant", **placed},
                        partial(render_on, drawing.source, scale=scale, offset=offset),
                    )
                )
    scenes: list[_Job] = []
    seen: set[str] = set()
    styles = sorted(style for style, drawings in by_style.items() if len(drawings) > 1)
    rng = _rng("scenes", settings.seed)
    while styles and len(scenes) < settings.scenes:
        scene, shown = sample_scene(by_style[rng.choice(styles)], rng)
        if scene.caption in seen:
            continue
        seen.add(scene.caption)
        row = {
            "id": f"scene/{len(scenes):06d}",
            "kind": "scene",
            "split": scene.split,
            "style": scene.style,
            "family": STYLES[scene.style].family,
            "label": scene.caption,
            "captions": [scene.caption],
            "flip": scene_may_flip(scene, shown),
            "licence": STYLES[scene.style].spdx,
            "scene": scene.as_dict(),
        }
        scenes.append(_Job(row, partial(render_scene, scene, shown)))
    return [*jobs, *variants, *scenes]


def _chunks(items: list[_Job], size: int) -> Iterable[list[_Job]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def build_emoji(
    out: Path,
    settings: EmojiSettings = EmojiSettings(),
    *,
    cache: Path | None = None,
    overwrite: bool = False,
    workers: int = 2,
    progress: Progress | None = None,
) -> dict:
    """Builds the data set folder and returns its `dataset.json`.

    Writes `images_<size>.npy` (uint8 [N, size, size, 3]), `index.jsonl` (one row a picture), `dataset.json`,
    `LICENCES.md` and `contact_sheet.png`. The same settings give the same bytes.
    Raises PocketfusionError on bad settings, an unreachable registry, damaged packages or an unwritable `out`.
    """
    settings.check()
    check_new(out, overwrite)
    with atomic_folder(out, overwrite=overwrite) as folder:
        if progress:
            progress("fetching packages", 0, 1)
        jobs = plan(settings, fetch_packages(cache))
        arrays = {
            size: np.lib.format.open_memmap(
                folder / f"images_{size}.npy", mode="w+", dtype=np.uint8, shape=(len(jobs), size, size, 3)
            )
            for size in settings.sizes
        }
        for size in settings.sizes:
            reserve(folder / f"images_{size}.npy")
        done = 0
        with ProcessPoolExecutor(workers) as pool:
            chunks = list(_chunks(jobs, 64))
            for pictures in pool.map(_paint_all, chunks, [settings.sizes] * len(chunks)):
                for array, block in zip(arrays.values(), pictures, strict=True):
                    array[done : done + len(block)] = block
                done += len(pictures[0])
                if progress:
                    progress("rendering", done, len(jobs))
        for array in arrays.values():
            array.flush()
        rows = [job.row for job in jobs]
        (folder / "index.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows), encoding="utf-8"
        )
        (folder / "LICENCES.md").write_text(licence_text(settings.styles), encoding="utf-8")
        _contact_sheet(arrays[max(settings.sizes)], rows, folder / "contact_sheet.png")
        files = sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".jsonl"))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": "emoji",
            "count": len(rows),
            "sizes": list(settings.sizes),
            "splits": dict(sorted(Counter(row["split"] for row in rows).items())),
            "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
            "settings": {**settings.__dict__, "styles": list(settings.styles), "sizes": list(settings.sizes)},
            "licences": [asdict(STYLES[name].licence_note) for name in settings.styles],
            "packages_lock_sha256": lock_hash(),
            "files": {p.name: {"sha256": sha256_file(p), "size": p.stat().st_size} for p in files},
        }
        (folder / "dataset.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def licence_text(styles: tuple[str, ...]) -> str:
    """The attributions that go beside the data, as Markdown."""
    lines = ["# Licences of the drawings", "", "| style | package | licence | attribution |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.package} | {s.spdx} | {s.attribution} |" for s in (STYLES[style] for style in styles)]
    lines += ["", "Names and keywords: emojibase-data (MIT), from Unicode CLDR (Unicode licence).", ""]
    return "\n".join(lines)


def _contact_sheet(images: np.ndarray, rows: list[dict], path: Path) -> None:
    from PIL import Image

    from pocketfusion.runtime.result import contact_sheet

    order = sorted(range(len(rows)), key=lambda i: sha256(rows[i]["id"].encode()).digest())
    scenes = [i for i in order if rows[i]["kind"] == "scene"][:12]
    chosen = [*[i for i in order if rows[i]["kind"] == "drawing"][: 48 - len(scenes)], *scenes]
    captions = [rows[i]["captions"][0] for i in chosen]
    contact_sheet([Image.fromarray(images[i]) for i in chosen], captions, columns=8).save(path)
