"""`pocketfusion compare`: the same prompts and noise through stock diffusers and through bundles, pair by pair.

`Comparison` is what was measured, as the JSON file holds it; `compare` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pocketfusion import __version__
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.comparison.stock import OF_THE_MODEL, Drawing, Drawn, Stock
from pocketfusion.evaluate.metrics import Estimate, bootstrap, clip_score
from pocketfusion.folder import COMPONENTS, folder_hash, machine
from pocketfusion.likeness import psnr, ssim
from pocketfusion.mobile.gate import guidance_delta, sqnr
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.networks import available_cores, check_threads
from pocketfusion.runtime.pipeline import MAX_SEED, Pipeline
from pocketfusion.runtime.samplers.sampler import resolve_sampler
from pocketfusion.runtime.tokenizer import PromptTokenizer

_OTHER_TEXT = 3.0  #: dB of the prompt's states below which the text encoder is another's; int4 weights leave above 6

Progress = Callable[[str, int, int], None]  #: what is done, pictures done, pictures in all


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Pair(_Record):
    """One prompt drawn by both. `guidance_delta` is `mobile.gate.guidance_delta` on the stock pipeline's own latents;
    `latents_sqnr_db` follow the steps; `scores` have stock's and the bundle's by the scorer's name."""

    prompt: str
    seed: int
    psnr_db: float
    ssim: float
    latents_sqnr_db: list[float]
    guidance_delta: float | None
    scores: dict[str, tuple[float, float]]
    warnings: list[str]


class Score(_Record):
    """Mean CLIP scores of both sides, and of the bundle's minus stock's, with 95 % intervals over prompts."""

    stock: Estimate
    bundle: Estimate
    difference: Estimate


class Compared(_Record):
    """One bundle against the folder; `pairs` have the worst first. Sizes are bytes, seconds medians of a picture."""

    name: str
    path: str
    sha256: str
    exported_from: Literal["this folder", "another folder", "not said"]
    weights: dict[str, str]
    size: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    psnr_db: dict[str, float]  #: median, p5 (5 % of the prompts are below), worst
    ssim: float  #: median
    guidance_delta: float | None  #: the median prompt's
    latents_sqnr_db: list[float]  #: medians, by step
    scores: dict[str, Score]
    seconds: dict[str, float]  #: stock, bundle
    passed: bool | None  #: None without a threshold
    pairs: list[Pair]


class Comparison(_Record):
    """Everything that was compared, and how."""

    format: str = "pocketfusion-comparison"
    version: int = 1
    pocketfusion: str = __version__
    diffusers: str
    machine: str
    threads: int
    folder: dict[str, Any]  #: name, sha256, size of its networks' folders in bytes, unet: its class
    scorers: dict[str, dict[str, Any]]
    min_psnr_db: float | None
    bundles: list[Compared]

    @property
    def passed(self) -> bool:
        """Whether no bundle is below the threshold, if there is one."""
        return all(one.passed is not False for one in self.bundles)


@dataclass(frozen=True)
class Asked:
    """What is drawn: prompt i from the noise of seed + i, with each bundle's own settings unless one is given."""

    prompts: Sequence[str]
    seed: int = 0
    sampler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED - len(self.prompts) + 1:
            raise PocketfusionError(f"--seed {self.seed} is out of range: prompt i takes seed + i, up to {MAX_SEED}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 1e4:
            raise PocketfusionError(
                f"--guidance {self.guidance_scale:g} is no guidance scale: give a number such as 4"
            )

    def drawing(self, bundle: Bundle) -> Drawing:
        """Of `bundle`; raises PocketfusionError for a sampler or steps that it does not have."""
        manifest = bundle.manifest
        sampler = resolve_sampler(manifest, self.sampler)
        given = self.num_inference_steps
        steps = manifest.defaults.num_inference_steps if given is None else given
        sampler.set_timesteps(steps)
        scale = manifest.defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if manifest.guidance == "folded" and scale != manifest.defaults.guidance_scale:
            raise PocketfusionError(
                f"{bundle.path} has guidance {manifest.defaults.guidance_scale:g} folded in: leave --guidance out"
            )
        return Drawing(sampler.name, manifest.scheduler, manifest.latents, steps, scale)


@dataclass(frozen=True)
class Outcome:
    """The result and its pictures, uint8 [H, W, 3]: of bundle b the pairs' own order, (stock, bundle) each."""

    comparison: Comparison
    pictures: list[list[tuple[np.ndarray, np.ndarray]]]


def compare(
    folder: Path,
    bundles: Sequence[Path],
    asked: Asked,
    *,
    scorers: dict[str, tuple[Any, dict[str, Any]]] | None = None,
    min_psnr_db: float | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Draws `asked` with diffusers in fp32 from `folder` and with each bundle, and compares the pairs.

    `scorers`: by name, one with `image_features` and `text_embeddings`, and what the result says of it.
    Raises PocketfusionError before any drawing if a bundle cannot be one of this folder's model: other latents, text
    encoder, schedule or prediction; and during it if a network gives NaN.
    """
    scorers, threads = scorers or {}, available_cores() if threads is None else check_threads(threads)
    opened = [Bundle.open(path, drawable=True) for path in bundles]
    drawings = [asked.drawing(bundle) for bundle in opened]
    torch.set_num_threads(threads)
    progress("opening", 0, 0)
    stock = Stock(folder)
    for bundle in opened:
        check_match(stock, bundle, asked.prompts)
    different = [d for i, d in enumerate(drawings) if d not in drawings[:i]]
    total, done = len(asked.prompts) * (len(different) + len(opened)), 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    drawn: list[list[Drawn]] = []
    for drawing in different:
        side = []
        for number, prompt in enumerate(asked.prompts):
            side.append(stock.draw(prompt, asked.seed + number, drawing))
            advance("stock diffusers")
        drawn.append(side)
    guidance, unet = stock.guidance, type(stock.pipeline.unet).__name__
    del stock  # the bundles have the memory to themselves
    compared, pictures = [], []
    for bundle, drawing in zip(opened, drawings, strict=True):
        side = drawn[different.index(drawing)]
        one, images = _compare(bundle, drawing, side, asked, guidance, folder, scorers, min_psnr_db, threads, advance)
        compared.append(one)
        pictures.append(images)
    size = sum(f.stat().st_size for part in COMPONENTS for f in (folder / part).rglob("*") if f.is_file())
    about = {"name": folder.resolve().name, "sha256": folder_hash(folder), "size": size, "unet": unet}
    return Outcome(
        Comparison(
            machine=machine(),
            diffusers=diffusers.__version__,
            threads=threads,
            folder=about,
            scorers={name: described for name, (_, described) in scorers.items()},
            min_psnr_db=min_psnr_db,
            bundles=compared,
        ),
        pictures,
    )


def check_match(stock: Stock, bundle: Bundle, prompts: Sequence[str]) -> None:
    """Raises PocketfusionError if the bundle cannot be one of the model: what differs is named."""
    manifest, pipeline = bundle.manifest, stock.pipeline
    differs = f"{bundle.path} is another model's bundle: its"
    channels, factor = pipeline.unet.config.in_channels, manifest.image.height / manifest.latents.height
    if manifest.latents.channels != channels:
        raise PocketfusionError(
            f"{differs} latents have {manifest.latents.channels} channels, the folder's {channels}"
        )
    if factor != stock.pixels:
        raise PocketfusionError(f"{differs} decoder makes {factor:g} pixels of a latent, the folder's {stock.pixels}")
    for key in OF_THE_MODEL:
        theirs, ours = getattr(manifest.scheduler, key), stock.schedule[key]
        if theirs != ours:
            raise PocketfusionError(f"{differs} {key} is {theirs}, the folder's {ours}")
    tokenizer = PromptTokenizer(bundle.file("tokenizer"), manifest.tokenizer)
    if any(not np.array_equal(tokenizer.encode(prompt).input_ids, stock.token_ids(prompt)) for prompt in prompts):
        raise PocketfusionError(f"{differs} tokenizer reads the prompts as other tokens than the folder's")
    runner = Pipeline(bundle, mode="sequential")  # loads the text encoder alone
    try:
        theirs, ours = runner.encode(prompts[0]), stock.encode(prompts[0]).cpu().numpy()
    finally:
        runner.close()
    if theirs.shape != ours.shape or sqnr(ours, theirs) < _OTHER_TEXT:
        raise PocketfusionError(f"{differs} text encoder gives other states for a prompt than the folder's")


def _compare(
    bundle: Bundle,
    drawing: Drawing,
    stock: Sequence[Drawn],
    asked: Asked,
    guidance: str,
    folder: Path,
    scorers: dict[str, tuple[Any, dict[str, Any]]],
    min_psnr_db: float | None,
    threads: int,
    advance: Callable[[str], None],
) -> tuple[Compared, list[tuple[np.ndarray, np.ndarray]]]:
    manifest, runner = bundle.manifest, Pipeline(bundle, threads)
    images, seconds, pairs = [], [], list[Pair]()
    for number, (prompt, reference) in enumerate(zip(asked.prompts, stock, strict=True)):
        latents: list[np.ndarray] = []
        result = runner.generate(
            prompt,
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            sampler=drawing.sampler,
            seed=asked.seed + number,
            callback=lambda step, t, values, latents=latents: latents.append(values.copy()),  # type: ignore[misc]
        )
        image = np.asarray(result.images[0].convert("RGB"))
        images.append(image)
        seconds.append(result.timings.total)
        pairs.append(
            Pair(
                prompt=prompt,
                seed=asked.seed + number,
                psnr_db=round(psnr(reference.image, image), 3),
                ssim=round(ssim(reference.image, image), 5),
                latents_sqnr_db=[round(sqnr(a, b), 2) for a, b in zip(reference.latents, latents, strict=True)],
                guidance_delta=_guidance(runner, prompt, reference, drawing)
                if guidance == manifest.guidance
                else None,
                scores={},
                warnings=result.warnings,
            )
        )
        advance(manifest.name)
    runner.close()
    scores = _score(scorers, asked.prompts, [one.image for one in stock], images, pairs)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].psnr_db)
    levels = np.array([pair.psnr_db for pair in pairs])
    deltas = [pair.guidance_delta for pair in pairs if pair.guidance_delta is not None]
    compared = Compared(
        name=manifest.name,
        path=str(bundle.path),
        sha256=bundle.hash,
        exported_from=_origin(bundle, folder),
        weights={name: getattr(manifest.networks, name).weights for name in ("text_encoder", "unet", "decoder")},
        size=sum(file.size for file in manifest.files.values()),
        sampler=drawing.sampler,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        psnr_db={
            "median": round(float(np.median(levels)), 2),
            "p5": round(float(np.percentile(levels, 5)), 2),
            "worst": round(float(levels.min()), 2),
        },
        ssim=round(float(np.median([pair.ssim for pair in pairs])), 4),
        guidance_delta=round(float(np.median(deltas)), 4) if deltas else None,
        latents_sqnr_db=np.median([p.latents_sqnr_db for p in pairs], axis=0).round(2).tolist(),
        scores=scores,
        seconds={
            "stock": round(float(np.median([one.seconds for one in stock])), 4),
            "bundle": round(float(np.median(seconds)), 4),
        },
        passed=None if min_psnr_db is None else bool(levels.min() >= min_psnr_db),
        pairs=[pairs[i] for i in order],
    )
    return compared, [(stock[i].image, images[i]) for i in order]


def _guidance(runner: Pipeline, prompt: str, reference: Drawn, drawing: Drawing) -> float | None:
    """The bundle's guidance delta on the latents that the stock pipeline met."""
    states = [runner.encode(text) for text in ("", prompt)]
    rows = [np.concatenate(states)] if runner.manifest.guidance == "classifier-free" else states
    measured = [
        np.concatenate([runner.predict(p.latents, p.timestep, row, drawing.guidance_scale) for row in rows])
        for p in reference.probes
    ]
    ratio = guidance_delta(np.stack([probe.predictions for probe in reference.probes]), np.stack(measured))
    return None if ratio is None else round(ratio, 4)


def _origin(bundle: Bundle, folder: Path) -> Literal["this folder", "another folder", "not said"]:
    said = bundle.manifest.provenance.get("model_folder")
    if not isinstance(said, str):
        return "not said"
    return "this folder" if said == folder_hash(folder) else "another folder"


def _score(
    scorers: dict[str, tuple[Any, dict[str, Any]]],
    prompts: Sequence[str],
    stock: Sequence[np.ndarray],
    bundle: Sequence[np.ndarray],
    pairs: Sequence[Pair],
) -> dict[str, Score]:
    """CLIP scores of both sides by each scorer, and into the pairs."""
    scores = {}
    for name, (scorer, _) in scorers.items():
        texts = scorer.text_embeddings(list(prompts))
        sides = [clip_score(scorer.image_features(np.stack(side))[1], texts) for side in (stock, bundle)]
        for pair, before, after in zip(pairs, *sides, strict=True):
            pair.scores[name] = (round(float(before), 3), round(float(after), 3))
        scores[name] = Score(
            stock=bootstrap(sides[0]), bundle=bootstrap(sides[1]), difference=bootstrap(sides[1] - sides[0])
        )
    return scores
