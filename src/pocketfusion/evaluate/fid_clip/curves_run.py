"""`pocketfusion evaluate`: opens everything, draws what is missing in all processes, scores and writes in one.

`measure` makes a point of a curve from pictures in the store; `evaluate_systems` all points of all systems.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketfusion import __version__
from pocketfusion.artefact import atomic_file, atomic_folder, check_new, check_writable_parent
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.extractors import Extractor
from pocketfusion.evaluate.fid_clip.curves import Curve, Curves, Point, PointCache
from pocketfusion.evaluate.fid_clip.curves_report import write_curves
from pocketfusion.evaluate.fid_clip.drawing import PictureStore, Plan, Shelf, Wanted, draw_missing, load
from pocketfusion.evaluate.generate import SamplerSettings
from pocketfusion.evaluate.metrics import (
    KID_SUBSETS,
    Estimate,
    RealFeatures,
    bootstrap,
    clip_score,
    diversity,
    frechet_estimate,
    frechet_resamples,
    kid,
    kid_subset_size,
    retrieval,
    too_few_for_frechet,
)
from pocketfusion.evaluate.reference import CaptionedReference
from pocketfusion.evaluate.systems import SystemSpec, labels
from pocketfusion.folder import machine
from pocketfusion.locks import hold, release
from pocketfusion.runtime.networks import available_cores

if TYPE_CHECKING:
    from accelerate import PartialState

SHOWN = 8  #: captions on the sheet of pictures
_WAIT = timedelta(days=2)  #: a process may draw for long after another has finished
_CHUNK = 512  #: pictures that go through the extractor at once

Progress = Callable[[str, int, int], None]  #: what is done, pictures done, pictures in all
_OnScored = Callable[[int], None]  #: how many more pictures went through the extractor


def _extract(
    get: Callable[[np.ndarray], np.ndarray], count: int, extractor: Extractor, on_scored: _OnScored
) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, F] and embeddings [count, E] of pictures that `get` gives by number, a chunk at a time."""
    features, embeddings = [], []
    for start in range(0, count, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, count))
        part = extractor.image_features(get(numbers))
        features.append(part[0])
        embeddings.append(part[1])
        on_scored(len(numbers))
    return np.concatenate(features), np.concatenate(embeddings)


@dataclass(frozen=True)
class _RealSide:
    """What the extractor says of the real pictures and of the captions."""

    real: RealFeatures  #: [M, F], of the pictures that FID and KID compare with
    embeddings: np.ndarray  #: of the captions' own pictures, [N, E]
    texts: np.ndarray  #: of the captions, [N, E]
    captions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        reference: CaptionedReference,
        extractor: Extractor,
        cache: Path,
        on_scored: _OnScored = lambda count: None,
    ) -> _RealSide:
        """Kept in the folder `cache`, since real pictures can be many."""
        captions = tuple(reference.captions)
        key = json.dumps({"extractor": extractor.identity(), "reference": reference.fingerprint}, sort_keys=True)
        file = cache / f"real-{sha256(key.encode()).hexdigest()[:24]}.npz"
        try:
            with np.load(file) as kept:
                return cls(RealFeatures(kept["features"]), kept["embeddings"], kept["texts"], captions)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there, or damaged
        features, embeddings = _extract(reference.real_images, reference.real_count, extractor, on_scored)
        if reference.real_images != reference.images:  # one method where both sides are the same pictures
            _, embeddings = _extract(reference.images, len(captions), extractor, on_scored)
        texts = extractor.text_embeddings(reference.captions)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            np.savez(partial, features=features, embeddings=embeddings, texts=texts)
        return cls(RealFeatures(features), embeddings, texts, captions)

    def scores(self, embeddings: np.ndarray) -> dict[str, Estimate]:
        """CLIP score and top-5 of one picture a caption with these embeddings, [N, E]."""
        ranked = retrieval(embeddings, self.texts, self.captions, ks=(5,))
        return {"clip_score": bootstrap(clip_score(embeddings, self.texts)), "top5": bootstrap(ranked.hits[5])}


def measure(
    shelf: Shelf,
    plan: Plan,
    reference: CaptionedReference,
    side: _RealSide,
    extractor: Extractor,
    spec: SystemSpec,
    guidance_scale: float,
    *,
    kid_only: bool = False,
    on_scored: _OnScored = lambda count: None,
) -> Point:
    """Scores the pictures of one system at one scale; raises PocketfusionError if one is not in the store."""
    what = f"{spec.name} at guidance {guidance_scale:g}"

    def pictures(wanted: Sequence[Wanted]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda numbers: reference.prepare(load(shelf, [wanted[i] for i in numbers], what))

    features, embeddings = _extract(pictures(plan.pictures), len(plan.pictures), extractor, on_scored)
    varied = None
    if plan.again:
        again = [one for row in plan.again for one in row]
        drawn, _ = _extract(pictures(again), len(again), extractor, on_scored)
        varied = diversity(drawn.reshape(len(plan.again), -1, drawn.shape[1]))
    return Point(
        guidance_scale=guidance_scale,
        num_inference_steps=spec.num_inference_steps,
        sampler=spec.sampling,
        precision=spec.precision,
        pictures=len(plan.pictures),
        frechet=None if kid_only else frechet_estimate(features, side.real),
        kid=kid(features, side.real.features),
        diversity=varied,
        **side.scores(embeddings),
    )


def processes() -> PartialState:
    """This process among those that `accelerate launch` started; outside of it, the only one."""
    from pocketfusion.processes import process_state

    return process_state(_WAIT)


@dataclass(frozen=True)
class Measuring:
    """What a point is made of, besides its system."""

    guidance: Sequence[float]
    seed: int = 0
    diversity_prompts: int = 32
    diversity_images: int = 4
    kid_only: bool = False

    def __post_init__(self) -> None:
        if self.diversity_prompts < 0:
            raise PocketfusionError(f"--diversity-prompts {self.diversity_prompts} is below 0: give 0 for none")
        if self.diversity_prompts and self.diversity_images < 2:
            raise PocketfusionError(
                f"--diversity-images {self.diversity_images} have no pairs: give at least 2, or --diversity-prompts 0"
            )


@dataclass(frozen=True)
class _Line:
    """One system of the run with its label, scales and shelves."""

    spec: SystemSpec
    label: str
    shelves: dict[float, Shelf]


def _sizes(specs: Sequence[SystemSpec]) -> int:
    """Opens every system and lets it go again, so that a damaged one is told of before hours of drawing: pixels."""
    sizes = [spec.open(1).image_size for spec in specs]
    for spec, size in zip(specs, sizes, strict=True):
        if size != sizes[0]:
            raise PocketfusionError(
                f"{spec.path} draws {size} px but {specs[0].path} draws {sizes[0]} px: evaluate them apart"
            )
    return sizes[0]


def _protocol(reference: CaptionedReference, extractor: Extractor, measuring: Measuring) -> dict[str, Any]:
    """What all points of a run depend on besides system and guidance."""
    count = min(len(reference.captions), reference.real_count)
    return {
        "extractor": extractor.identity(),
        "feature_dimensions": extractor.feature_dimensions,
        "reference": reference.fingerprint,
        **reference.protocol(),
        "pictures": len(reference.captions),
        "image_size": reference.image_size,
        "seed": measuring.seed,
        "seeds": "per picture: sha256('SEED|ID'), first 12 hexadecimal digits; noise by numpy PCG64",
        "frechet_resamples": 0 if measuring.kid_only else frechet_resamples(extractor.feature_dimensions),
        "kid": {"subsets": KID_SUBSETS, "subset_size": kid_subset_size(count)},
        "diversity": {"prompts": measuring.diversity_prompts, "images": measuring.diversity_images},
    }


def _check_count(reference: CaptionedReference, extractor: Extractor, kid_only: bool) -> None:
    count = min(len(reference.captions), reference.real_count)
    if kid_only:
        if count < 4:
            raise PocketfusionError(f"{reference.name}: {count} pictures are too few for KID: raise --samples")
        return
    absent = too_few_for_frechet(count, extractor.feature_dimensions)
    if absent:
        raise PocketfusionError(
            f"{reference.name}: {absent}; raise --samples, name more --sets, or take --kid-only without FID"
        )


def evaluate_systems(
    specs: Sequence[SystemSpec],
    open_reference: Callable[[int], CaptionedReference],
    open_extractor: Callable[[], Extractor],
    out: Path,
    measuring: Measuring,
    *,
    store: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Curves | None:
    """Draws and scores all systems over guidance and writes the result folder `out` atomically.

    `open_reference` gets the pixels that the systems draw. Pictures go to `store` (default: OUT.run/pictures), points
    to OUT.run: the same command goes on where a killed one stopped. Under `accelerate launch` each process draws its
    share, and the first one scores and writes; the others return None.

    Raises PocketfusionError before any drawing if an input does not fit, `out` exists or another process works on it,
    and during it if a network gives NaN.
    """
    state = processes()
    progress = progress if state.is_main_process else lambda what, done, total: None
    check_new(out, overwrite)
    if store is not None:
        check_writable_parent(store)
        if store.exists() and not store.is_dir():
            raise PocketfusionError(f"--store {store} is a file: give a folder for the pictures")
        if store.resolve().is_relative_to(out.resolve()):
            raise PocketfusionError(f"--store {store} is in --out {out}, which is replaced whole: give another folder")
    named, size = labels(specs), _sizes(specs)
    extractor, reference = open_extractor(), open_reference(size)
    _check_count(reference, extractor, measuring.kid_only)
    protocol = _protocol(reference, extractor, measuring)
    plan = Plan.of(reference, measuring.seed, measuring.diversity_prompts, measuring.diversity_images)
    run = out.with_name(f"{out.name}.run")
    hold(run)
    pictures, points = PictureStore(store or run / "pictures"), PointCache(run / "points")
    with state.main_process_first():  # one process makes the folders, the others find them
        lines = [
            _Line(
                spec,
                label,
                {w: pictures.shelf(spec.name, spec.drawn_with(), w, size) for w in spec.scales(measuring.guidance)},
            )
            for spec, label in zip(specs, named, strict=True)
        ]

    def key(line: _Line, scale: float) -> dict[str, Any]:
        return {"protocol": protocol, "system": line.spec.drawn_with(), "guidance_scale": scale}

    done: dict[tuple[str, float], Point | None] = {
        (line.label, scale): points.get(key(line, scale)) for line in lines for scale in line.shelves
    }
    _draw(lines, done, plan, (state.process_index, state.num_processes), progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    side = _RealSide.of(reference, extractor, run)
    total, scored, curves = len(plan.pictures) * sum(point is None for point in done.values()), 0, []
    for line in lines:
        measured = []
        for scale, shelf in line.shelves.items():
            point = done[line.label, scale]
            if point is None:
                progress("scoring", scored, total)
                point = measure(shelf, plan, reference, side, extractor, line.spec, scale, kid_only=measuring.kid_only)
                points.put(key(line, scale), point)
                scored += len(plan.pictures)
            measured.append(point)
        curves.append(Curve(label=line.label, system=line.spec.identity(), points=measured))
    result = Curves(
        protocol=protocol | {"pocketfusion": __version__, "machine": machine()},
        real=side.scores(side.embeddings),
        curves=curves,
        notes=[*reference.notes, *_notes(lines)],
    )
    sheet = _sheet(lines, curves, plan, reference)
    with atomic_folder(out, overwrite=overwrite) as partial:
        write_curves(result, *sheet, partial)
    release(run)
    return result


def _notes(lines: Sequence[_Line]) -> list[str]:
    """Scales that a distilled system was not made for."""
    notes = []
    for line in lines:
        low, high = line.spec.guidance_range or (0.0, float("inf"))
        outside = [f"{scale:g}" for scale in line.shelves if not low <= scale <= high]
        if outside:
            notes.append(
                f"{line.label} was distilled for guidance {low:g} to {high:g}: {', '.join(outside)} is outside."
            )
    return notes


def _draw(
    lines: Sequence[_Line],
    points: dict[tuple[str, float], Point | None],
    plan: Plan,
    share: tuple[int, int],
    progress: Progress,
) -> None:
    """This process's share (its number, their number) of all pictures of points that are not measured yet."""
    index, processes = share
    mine = plan.everything()[index::processes]
    threads = None if processes == 1 else max(1, available_cores() // processes)
    total, count = len(mine) * sum(point is None for point in points.values()), 0
    for line in lines:
        opened = cache(lambda spec=line.spec: spec.open(threads))
        for scale, shelf in line.shelves.items():
            if points[line.label, scale] is not None:
                continue
            what = f"{line.label} at guidance {scale:g}"
            progress(what, count, total)

            def advance(drawn: int, what: str = what) -> None:
                nonlocal count
                count += drawn
                progress(what, count, total)

            draw_missing(opened, shelf, mine, _settings(line.spec, scale), advance)


def _settings(spec: SystemSpec, scale: float) -> SamplerSettings:
    return SamplerSettings(spec.num_inference_steps, scale, sampler=spec.sampler)


def _sheet(
    lines: Sequence[_Line], curves: Sequence[Curve], plan: Plan, reference: CaptionedReference
) -> tuple[list[str], list[tuple[str, np.ndarray]]]:
    """A few captions; their real pictures and each system's, at the guidance of its lowest distance, named."""
    numbers = np.unique(np.linspace(0, len(plan.pictures) - 1, SHOWN).astype(int))
    shown = [plan.pictures[i] for i in numbers]
    rows = [("real", reference.images(numbers))]
    for line, curve in zip(lines, curves, strict=True):
        scale = curve.best.guidance_scale
        shelf, settings = line.shelves[scale], _settings(line.spec, scale)
        draw_missing(line.spec.open, shelf, shown, settings)  # a cached point's pictures may have been deleted
        rows.append((f"{curve.label}, guidance {scale:g}", reference.prepare(load(shelf, shown, curve.label))))
    return [one.prompt for one in shown], rows
