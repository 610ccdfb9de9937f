"""Latents to distil a decoder on: drawn from captions alone, with fresh noise for each, kept memory-mapped on disk.

SnapFusion (arXiv 2306.00980), appendix B.2, draws them with 50 DDIM steps; the number is unlimited, since noise is.
Training pictures stand beside them: drawn latents teach a small decoder only as well as the teacher draws them;
pictures say what is right, edges and flat colours above all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pocketfusion.artefact import sha256_folder
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.locks import try_lock
from pocketfusion.models.guided import guidance_of, guided_prediction, noise_batch
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.noise_schedule import ddim_scheduler
from pocketfusion.models.sampling import Sampling, read_sampling
from pocketfusion.models.slim_autoencoder import to_tensor
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.recipe import DataSettings, DecoderDistillSettings
from pocketfusion.terminal import titled
from pocketfusion.train.batch import Batch, BatchPlan
from pocketfusion.train.cache import CaptionTable, cache_latents

_PAPER_STEPS = 50
_BLOCK = 64  #: captions of a pass that keep the shares
_TARGET_BATCH = 32


@dataclass(frozen=True)
class PoolSettings:
    """How latents are drawn; each sample's guidance scale is uniform in `guidance_scale` (from, to)."""

    num_inference_steps: int
    guidance_scale: tuple[float, float]
    precision: str = "bf16"
    batch: int = 64
    seed: int = 0


def pool_settings(settings: DecoderDistillSettings, sampling: Sampling | None) -> PoolSettings:
    """How a sampler that states `sampling` is to draw: at its own steps unless the recipe says how many.

    Raises PocketfusionError if its embedded guidance was distilled for none of the wanted scales.
    """
    steps = settings.num_inference_steps or (sampling.num_inference_steps if sampling else _PAPER_STEPS)
    low, high = settings.guidance_scale
    if sampling is not None and sampling.guidance_range is not None:
        first, last = sampling.guidance_range
        if high < first or low > last:
            raise PocketfusionError(
                f"decoder.guidance_scale {low:g} to {high:g} lies outside of {first:g} to {last:g}, which the sampler "
                "was distilled for: choose scales of that range"
            )
        low, high = max(low, first), min(high, last)
    return PoolSettings(steps, (low, high), settings.precision, settings.batch, settings.train.seed)


class LatentSampler:
    """A model folder that draws latents: everything of it but its autoencoder."""

    def __init__(self, folder: Path):
        """Raises PocketfusionError unless it is a sound model folder."""
        self.folder = folder
        parts = ("unet", "text_encoder", "tokenizer", "scheduler")
        self.fingerprint = sha256("".join(sha256_folder(folder / part) for part in parts).encode()).hexdigest()
        self.sampling = read_sampling(folder)
        config = UNet2DConditionModel.load_config(folder / "unet")
        size = config["sample_size"]
        self.shape = (config["in_channels"], *((size, size) if isinstance(size, int) else size))  #: of a latent
        self.unet: Any = None

    def load(self, device: torch.device, precision: str) -> None:
        """Loads the networks once; `precision` bf16 is the UNet's alone, latents are kept in fp32 while drawing."""
        if self.unet is not None:
            return
        pipeline: Any = load_pipeline(self.folder)
        self.device = device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.unet = pipeline.unet.to(device, self.dtype).eval()
        self.guidance = guidance_of(self.unet, self.sampling.guidance if self.sampling else None)
        self.text = TextEncoder(pipeline.text_encoder.to(device), pipeline.tokenizer)
        self.scheduler = ddim_scheduler(pipeline.scheduler)
        self.null = self.text.encode([""])[0].to(self.dtype)

    @torch.no_grad()
    def draw(self, captions: Sequence[str], seeds: Sequence[int], scales: torch.Tensor, steps: int) -> torch.Tensor:
        """DDIM (η = 0), one guidance scale a sample [B]: latents [B, C, h, w], fp32, scaled as the UNet's are."""
        states = self.text.encode(captions)[0].to(self.dtype)
        self.scheduler.set_timesteps(steps)
        latents = noise_batch(seeds, self.shape).to(self.device) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            z_t = latents.to(self.dtype)
            prediction = guided_prediction(self.unet, z_t, t, states, self.null, scales, self.guidance)
            latents = self.scheduler.step(prediction, t, latents).prev_sample
        return latents


@dataclass(frozen=True)
class Pool:
    """A list of captions without end, and how a latent of each is drawn.

    The caption, the noise and the guidance scale of a sample depend on the seed and its number alone, so that a pool
    can be prolonged. `splits`: names and shares of the data's splits.
    """

    sampler: LatentSampler
    settings: PoolSettings
    data: CaptionedImages
    splits: tuple[tuple[str, float], ...]

    @property
    def key(self) -> str:
        """What the samples depend on, shortened to 20 hexadecimal digits."""
        sampling = self.sampler.sampling
        described = [self.sampler.fingerprint, asdict(self.settings), self.data.fingerprint, self.splits]
        return sha256(json.dumps([*described, sampling and sampling.guidance]).encode()).hexdigest()[:20]

    def captions(self, count: int) -> list[str]:
        """The first `count` captions, in shuffled passes over the pictures; raises PocketfusionError without any."""
        pools, rows = [], self.data.rows
        for name, share in self.splits:
            captioned = [i for i in self.data.splits.get(name, ()) if rows[i]["captions"]]
            pools.append((np.array(captioned, dtype=int), share))
        if not any(len(indices) and share > 0 for indices, share in pools):
            names = " or ".join(name for name, _ in self.splits)
            raise PocketfusionError(
                f"{self.data.name} has no captions in {names}: distill-decoder draws its latents from captions"
            )
        plan = BatchPlan(pools, _BLOCK, self.settings.seed)
        chosen = np.concatenate([plan.indices(step) for step in range(-(-count // _BLOCK))])[:count]
        table = CaptionTable([rows[i] for i in chosen])
        picked = table.pick(np.arange(count), np.random.default_rng([self.settings.seed, 0]).random(count))
        return [table.captions[i] for i in picked]

    def latents(self, count: int, cache: Path, device: torch.device) -> np.ndarray:
        """The first `count` latents, memory-mapped: fp16 [count, C, h, w]. Resumes to the batch.

        Raises PocketfusionError if there are no captions or a latent is not finite.
        """
        captions, sampler, settings = self.captions(count), self.sampler, self.settings
        low, high = settings.guidance_scale
        rng = np.random.default_rng([settings.seed, 1])
        scales = torch.from_numpy(rng.uniform(low, high, count)).float()
        first = (settings.seed + 1) << 32  # of the noise seeds: evaluation and pools of other seeds use others

        def block(start: int, stop: int) -> np.ndarray:
            sampler.load(device, settings.precision)
            seeds = range(first + start, first + stop)
            latents = sampler.draw(captions[start:stop], seeds, scales[start:stop], settings.num_inference_steps)
            if not bool(torch.isfinite(latents).all()):
                raise PocketfusionError(
                    f"{sampler.folder} drew NaN or infinite latents (captions {start + 1} to {stop}): check its "
                    f"weights, or draw with precision 'no' instead of {settings.precision!r}"
                )
            return latents.half().cpu().numpy()

        path = cache / f"decoder-latents-{self.key}.f16"
        return _prolonged(path, (count, *sampler.shape), settings.batch, block, "drawing latents")


def decode_pool(
    vae: AutoencoderKL, vae_key: str, pool: Pool, latents: np.ndarray, cache: Path, device: torch.device
) -> np.ndarray:
    """The teacher's picture of each of the pool's latents, memory-mapped: fp16 [N, 3, H, W]; resumes as they do."""
    key = sha256(f"{vae_key}\0{pool.key}".encode()).hexdigest()[:20]
    side = latents.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (len(latents), vae.config.out_channels, side, side)

    def block(start: int, stop: int) -> np.ndarray:
        return decode(vae, latents[start:stop], device).half().cpu().numpy()

    path = cache / f"decoder-targets-{key}.f16"
    return _prolonged(path, shape, _TARGET_BATCH, block, "decoding with the teacher")


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: np.ndarray, device: torch.device) -> torch.Tensor:
    """Pictures [B, 3, H, W] of the sampler's latents; raises PocketfusionError if one is not finite."""
    z = torch.from_numpy(np.asarray(latents, dtype=np.float32)).to(device) / vae.config.scaling_factor
    pictures = vae.decode(z).sample
    if not bool(torch.isfinite(pictures).all()):
        raise PocketfusionError("the teacher's decoder gives NaN or infinity: check its weights")
    return pictures


def _prolonged(
    path: Path, shape: tuple[int, ...], batch: int, block: Callable[[int, int], np.ndarray], what: str
) -> np.ndarray:
    """The first rows of the raw fp16 file `path`, memory-mapped; `block(start, stop)` gives those that it lacks."""
    row = 2 * math.prod(shape[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    done = path.stat().st_size // row if path.is_file() else 0
    if done < shape[0]:
        with path.open("ab") as file, _bar(what, done, shape[0]) as advance:
            if try_lock(file.fileno()) is False:  # a cache may be shared by runs
                raise PocketfusionError(
                    f"another run is {what} into {path}: wait for its end, or give another --cache"
                )
            file.truncate(done * row)  # a row that a kill cut short
            while done < shape[0]:
                stop = min(done - done % batch + batch, shape[0])
                file.write(np.ascontiguousarray(block(done, stop)).tobytes())
                file.flush()
                os.fsync(file.fileno())  # else a power failure may leave rows of zeros
                advance(stop - done)
                done = stop
    return np.memmap(path, np.float16, mode="r", shape=shape)


@contextmanager
def _bar(what: str, done: int, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(titled(what), total=total, completed=done)
        yield lambda count: progress.advance(task, count)


class EncodedPictures:
    """The training pictures by row; `pools` are rows and their shares, as the other stages draw them."""

    def __init__(self, settings: DataSettings, data: CaptionedImages):
        train, scenes = data.indices(["train"]), np.empty(0, dtype=int)
        if "train_scene" in data.splits and settings.scene_share:
            scenes = data.indices(["train_scene"])
        self.data = data
        self.indices = np.concatenate([train, scenes])
        self.flip = data.flips[self.indices] & settings.flip
        rows = np.split(np.arange(len(self.indices)), [len(train)])
        self.pools = list(zip(rows, (1 - settings.scene_share, settings.scene_share), strict=True))

    def prepare(self, vae: AutoencoderKL, vae_hash: str, cache: Path, device: torch.device) -> None:
        """Encodes the pictures, all processes together; later runs find them. `vae_hash`: of the encoder."""
        self.latents = cache_latents(vae, vae_hash, self.data, cache, device)

    def take(self, rows: np.ndarray, batch: Batch, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [R, C, h, w], sampled from mean and deviation, and pictures [R, 3, H, W], some mirrored that may be.

        `chosen` [part]: which of the batch's samples the `rows` [R] are. The latents are the autoencoder's, unscaled.
        """
        mirrored = (batch.rand() < 0.5)[chosen] & torch.from_numpy(self.flip[rows])
        latents = self.latents.latents(self.indices[rows], mirrored.numpy())
        mean, std = torch.from_numpy(latents).float().chunk(2, dim=1)
        pixels = to_tensor(self.data.images[self.indices[rows]])
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return mean + std * batch.randn(*mean.shape[1:])[chosen], pixels
