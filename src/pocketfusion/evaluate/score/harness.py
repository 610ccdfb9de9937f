"""`pocketfusion score`: draws each set's captions and scores them beside the real pictures, any system alike.

`score_system` is the harness; `score_folder` opens what it needs and writes the result folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, check_new, write_json
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.extractors import open_judge
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings, System
from pocketfusion.evaluate.metrics import (
    POOL,
    bootstrap,
    clip_score,
    frechet_distance,
    retrieval,
    too_few_for_frechet,
)
from pocketfusion.evaluate.prompts import fixed_prompts
from pocketfusion.evaluate.score.composition import Scorer, check_scenes
from pocketfusion.evaluate.score.copying import Gallery, Nearest, Pair, nearest_training, thumbnails
from pocketfusion.evaluate.score.score_report import (
    NearestStats,
    Report,
    Row,
    SceneScores,
    SetResult,
    markdown,
    nearest_pairs,
    plot_scores,
    prompt_sheet,
)
from pocketfusion.evaluate.sets import TRAIN_SPLITS, EvaluationSet, choose_sets, picture_seed, shuffled_order
from pocketfusion.folder import folder_hash, machine, read_provenance

_PAIRS = 12  #: nearest pairs shown
_FEATURE_BATCH = 512

Progress = Callable[[str, int, int], None]  #: stage, done, total


@dataclass(frozen=True)
class Scored:
    """Pictures of one set with what is measured on them; rows follow the set's order."""

    images: np.ndarray
    features: np.ndarray
    embeddings: np.ndarray
    nearest: Nearest


def _join(parts: Sequence[Scored]) -> Scored:
    """Several sets as one, in their order."""

    def joined(get: Callable[[Scored], np.ndarray]) -> np.ndarray:
        return np.concatenate([get(part) for part in parts])

    near = Nearest(
        joined(lambda part: part.nearest.rms),
        joined(lambda part: part.nearest.position),
        joined(lambda part: part.nearest.cosine),
    )
    return Scored(joined(lambda p: p.images), joined(lambda p: p.features), joined(lambda p: p.embeddings), near)


@dataclass(frozen=True)
class Outcome:
    """The report and the pictures that go with it."""

    report: Report
    prompt_images: np.ndarray  #: of the fixed prompts, in their order
    pairs: list[Pair]  #: the generated pictures nearest to a training picture, nearest first


def _training_gallery(data: CaptionedImages, judge: Scorer, progress: Progress) -> Gallery:
    """All training pictures, scenes included; raises PocketfusionError if the data has none."""
    indices = data.indices(TRAIN_SPLITS)
    small, features = [], []
    for start in range(0, len(indices), _FEATURE_BATCH):
        images = data.images[indices[start : start + _FEATURE_BATCH]]
        small.append(thumbnails(images))
        features.append(judge.image_features(images)[0])
        progress("training pictures", min(start + _FEATURE_BATCH, len(indices)), len(indices))
    flip = np.array([bool(data.rows[i]["flip"]) for i in indices])
    return Gallery(indices, np.concatenate(small), np.concatenate(features), flip)


def score(images: np.ndarray, judge: Scorer, gallery: Gallery, own: np.ndarray | None = None) -> Scored:
    """Judge features and nearest training pictures; `own` as in `nearest_training`."""
    features, embeddings = judge.image_features(images)
    return Scored(images, features, embeddings, nearest_training(thumbnails(images), features, gallery, own))


def _nearest_stats(near: Nearest, threshold: float) -> NearestStats:
    return NearestStats(
        rms_median=float(np.median(near.rms)),
        rms_p5=float(np.percentile(near.rms, 5)),
        cosine_median=float(np.median(near.cosine)),
        suspicious=float((near.rms < threshold).mean()),
    )


def _scene_scores(images: np.ndarray, scenes: Sequence[dict], judge: Scorer) -> SceneScores:
    found = check_scenes(images, scenes, judge)
    relation = {name: bootstrap(found[name]) if len(found[name]) else None for name in ("layout", "relation")}
    return SceneScores(background=bootstrap(found["background"]), number=bootstrap(found["number"]), **relation)


def _set_result(
    chosen: EvaluationSet,
    real: Scored,
    generated: Scored,
    texts: np.ndarray,
    gallery: Gallery,
    threshold: float,
) -> SetResult:
    """The three rows of one set; `texts` [N, E] are its captions' embeddings."""
    order = shuffled_order(chosen.captions)
    absent = too_few_for_frechet(min(len(texts), len(gallery.features)), gallery.features.shape[1])
    rows, pool, chance = {}, 0, {1: 0.0, 5: 0.0}
    for kind, scored in (("real", real), ("generated", generated), ("shuffled", real)):
        picked = order if kind == "shuffled" else np.arange(len(texts))
        ranked = retrieval(scored.embeddings, texts[picked], [chosen.captions[i] for i in picked])
        row = Row(
            clip_score=bootstrap(clip_score(scored.embeddings, texts[picked])),
            top1=bootstrap(ranked.hits[1]),
            top5=bootstrap(ranked.hits[5]),
        )
        if kind != "shuffled":
            row.nearest = _nearest_stats(scored.nearest, threshold)
            row.frechet_train = None if absent else frechet_distance(scored.features, gallery.features)
            pool, chance = ranked.pool, ranked.chance
        rows[kind] = row
    if not absent:
        rows["generated"].frechet_real = frechet_distance(generated.features, real.features)
    share = {}
    for key in ("clip_score", "top1", "top5"):
        ceiling = getattr(rows["real"], key).value
        if ceiling > 0:
            share[key] = getattr(rows["generated"], key).value / ceiling
    return SetResult(
        name=chosen.name,
        count=len(texts),
        pool=pool,
        chance_top1=chance[1],
        chance_top5=chance[5],
        share=share,
        frechet_absent=absent,
        real=rows["real"],
        generated=rows["generated"],
        shuffled=rows["shuffled"],
    )


def _draw(
    system: System,
    sets: Sequence[EvaluationSet],
    data: CaptionedImages,
    sampler: SamplerSettings,
    seed: int,
    progress: Progress,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures of each set's captions, and of the fixed prompts, drawn in one go."""
    fixed = fixed_prompts()
    prompts = [caption for chosen in sets for caption in chosen.captions] + [p.prompt for p in fixed]
    keys = [data.rows[i]["id"] for chosen in sets for i in chosen.indices] + [p.id for p in fixed]
    seeds = [picture_seed(seed, key) for key in keys]
    images = system.draw(prompts, seeds, sampler, lambda done: progress("drawing", done, len(prompts)))
    ends = np.cumsum([len(chosen.indices) for chosen in sets])
    *parts, last = np.split(images, ends)
    return parts, last


def score_system(
    system: System,
    data: CaptionedImages,
    judge: Scorer,
    sets: Sequence[EvaluationSet],
    *,
    sampler: SamplerSettings,
    judge_identity: dict[str, Any],
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Outcome:
    """Scores `system` on `sets` of `data`; with several sets, also on all of them together ("all").

    Raises PocketfusionError if the data has no training pictures or its pictures are not of the system's size.
    """
    if data.size != system.image_size:
        raise PocketfusionError(
            f"{data.name} has pictures of {data.size} px but the model draws {system.image_size} px: "
            "open the data at that size"
        )
    gallery = _training_gallery(data, judge, progress)
    drawn, prompt_images = _draw(system, sets, data, sampler, seed, progress)
    real, generated, texts = [], [], []
    for done, (chosen, images) in enumerate(zip(sets, drawn, strict=True), 1):
        real.append(score(np.asarray(data.images[chosen.indices]), judge, gallery, own=chosen.indices))
        generated.append(score(images, judge, gallery))
        texts.append(judge.text_embeddings(list(chosen.captions)))
        progress("scoring", done, len(sets))
    held_out = [scored.nearest.rms for chosen, scored in zip(sets, real, strict=True) if not chosen.is_training]
    threshold = float(np.percentile(np.concatenate(held_out or [scored.nearest.rms for scored in real]), 5))
    results = []
    for i, chosen in enumerate(sets):
        result = _set_result(chosen, real[i], generated[i], texts[i], gallery, threshold)
        scenes = [data.rows[k].get("scene") for k in chosen.indices]
        if all(scenes):
            shuffled = [scenes[k] for k in shuffled_order(chosen.captions)]
            result.scenes = {
                "real": _scene_scores(real[i].images, scenes, judge),
                "generated": _scene_scores(generated[i].images, scenes, judge),
                "shuffled": _scene_scores(real[i].images, shuffled, judge),
            }
        results.append(result)
    every = EvaluationSet("all", np.concatenate([s.indices for s in sets]), tuple(c for s in sets for c in s.captions))
    all_generated = _join(generated)
    if len(sets) > 1:
        results.append(_set_result(every, _join(real), all_generated, np.concatenate(texts), gallery, threshold))
    report = Report(
        protocol={
            "system": system.identity(),
            "judge": judge_identity,
            "data": {"name": data.name, "fingerprint": data.fingerprint},
            "image_size": data.size,
            "sampler": {k: getattr(sampler, k) for k in ("num_inference_steps", "guidance_scale")},
            "seed": seed,
            "seeds": "per picture: sha256('SEED|ID'), first 12 hexadecimal digits; noise by numpy PCG64",
            "sets": {chosen.name: [data.rows[i]["id"] for i in chosen.indices] for chosen in sets},
            "caption": "the plainest (first) of each picture",
            "retrieval_pool": POOL,
            "feature_dimensions": int(gallery.features.shape[1]),
            "training_pictures": len(gallery.indices),
            "suspicious_below_rms": threshold,
        },
        sets=results,
    )
    return Outcome(report, prompt_images, _nearest_pairs(every, all_generated, gallery, data))


def _nearest_pairs(every: EvaluationSet, generated: Scored, gallery: Gallery, data: CaptionedImages) -> list[Pair]:
    pairs = []
    for i in np.argsort(generated.nearest.rms, kind="stable")[:_PAIRS]:
        source = int(gallery.indices[generated.nearest.position[i]])
        picture = np.asarray(data.images[source])
        caption = data.rows[source]["captions"][0]
        pairs.append(Pair(generated.images[i], picture, every.captions[i], caption, float(generated.nearest.rms[i])))
    return pairs


def _judge_notes(path: Path, fingerprint: str) -> list[str]:
    """What a reader must know of a judge that does not fit, or may not fit, the data it scores."""
    provenance = read_provenance(path)
    if provenance is None:
        return ["The judge carries no provenance: whether it has seen these held-out pictures is not known."]
    if provenance.data.get("fingerprint") != fingerprint:
        return ["The judge was trained on other data (or another build or size of it) than it scores here."]
    return []


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Writes scores.json, scores.md, scores.png, prompts.png and nearest.png into an existing folder."""
    write_json(folder / "scores.json", outcome.report.model_dump())
    (folder / "scores.md").write_text(markdown(outcome.report), encoding="utf-8")
    plot_scores(outcome.report, folder / "scores.png")
    prompt_sheet(outcome.prompt_images, fixed_prompts(), folder / "prompts.png")
    nearest_pairs(outcome.pairs, folder / "nearest.png")


def score_folder(
    folder: Path,
    data: Path,
    judge: Path,
    out: Path,
    *,
    sampler: SamplerSettings,
    samples: int = 256,
    sets: Sequence[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    skip_bad: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Scores a model folder and writes the result folder `out` atomically; arguments as the command's.

    Raises PocketfusionError before any long work if an input is missing or does not fit, or `out` exists.
    """
    check_new(out, overwrite)
    system = ModelFolder(folder)
    scorer = open_judge(judge)
    images = open_dataset(data, system.image_size, skip_bad=skip_bad)
    chosen = choose_sets(images, sets, samples)
    identity: dict[str, Any] = {"name": judge.resolve().name, "sha256": folder_hash(judge)}
    outcome = score_system(
        system, images, scorer, chosen, sampler=sampler, judge_identity=identity, seed=seed, progress=progress
    )
    outcome.report.protocol |= {"pocketfusion": __version__, "machine": machine(), "samples": samples}
    outcome.report.notes += images.notes + _judge_notes(judge, images.fingerprint)
    with atomic_folder(out, overwrite=overwrite) as partial:
        write_outcome(outcome, partial)
    return outcome.report
