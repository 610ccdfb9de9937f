"""Latents and prompt states, computed once and memory-mapped: training never runs the encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch.nn import functional as F

from pocketfusion.artefact import atomic_file, reserve
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.models.judge import pool_states
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.progress import titled
from pocketfusion.train.autoencoder import to_tensor


def _cached(path: Path, shape: tuple[int, ...], blocks: Callable[[], Iterator[np.ndarray]], what: str) -> np.ndarray:
    """Memory-maps `path`, writing it from `blocks` (fp16, along the first axis) if it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            reserve(partial)
            done = 0
            for block in track(blocks(), description=titled(what), total=None):
                array[done : done + len(block)] = block
                done += len(block)
            array.flush()
            del array
    return np.load(path, mmap_mode="r")


def _key(*parts: str) -> str:
    return sha256("\0".join(parts).encode()).hexdigest()[:20]


def cache_latents(
    vae: AutoencoderKL,
    vae_hash: str,
    data: CaptionedImages,
    indices: np.ndarray,
    folder: Path,
    device: torch.device,
    halved: bool = False,
) -> np.ndarray:
    """Posterior mean and standard deviation of each picture and its mirror image: fp16 [N, 2 (flip), 2C, h, w].

    `halved`: of the pictures at half their width and height (means over 2x2 pixels).
    """
    side = data.size // 2 ** (len(vae.config.block_out_channels) - 1) // (2 if halved else 1)
    channels = vae.config.latent_channels
    what = "halved latents" if halved else "latents"
    key = _key(what, vae_hash, data.fingerprint, sha256(indices.tobytes()).hexdigest())

    @torch.no_grad()
    def blocks() -> Iterator[np.ndarray]:
        model = vae.to(device).eval()
        for part in np.array_split(indices, max(1, len(indices) // 64)):
            pixels = to_tensor(data.images[part]).to(device)
            pixels = F.avg_pool2d(pixels, 2) if halved else pixels
            both = [model.encode(x).latent_dist for x in (pixels, pixels.flip(-1))]
            yield torch.stack([torch.cat([p.mean, p.std], 1) for p in both], 1).half().cpu().numpy()

    shape = (len(indices), 2, 2 * channels, side, side)
    return _cached(folder / f"latents-{key}.npy", shape, blocks, f"encoding {what}")


def cache_prompts(text: TextEncoder, text_hash: str, captions: Sequence[str], folder: Path) -> np.ndarray:
    """Token states of each caption: fp16 [M, max_length, width]."""
    key = _key("prompts", text_hash, str(text.max_length), *captions)

    def blocks() -> Iterator[np.ndarray]:
        for states, _ in text.iter_encoded(captions):
            yield states

    shape = (len(captions), text.max_length, text.width)
    return _cached(folder / f"prompts-{key}.npy", shape, blocks, "encoding captions")


def cache_pooled(text: TextEncoder, text_hash: str, captions: Sequence[str], folder: Path) -> np.ndarray:
    """Mean token state of each caption, what a judge reads: fp16 [M, width]."""
    key = _key("pooled", text_hash, str(text.max_length), *captions)

    def blocks() -> Iterator[np.ndarray]:
        for states, mask in text.iter_encoded(captions):
            yield pool_states(torch.from_numpy(states).float(), torch.from_numpy(mask)).half().numpy()

    return _cached(folder / f"pooled-{key}.npy", (len(captions), text.width), blocks, "encoding captions")


class CaptionTable:
    """Distinct captions of some rows and, for each row, which of them are its own."""

    def __init__(self, rows: Sequence[dict]):
        self.captions = sorted({caption for row in rows for caption in row["captions"]})
        number = {caption: i for i, caption in enumerate(self.captions)}
        self.choices = [np.array([number[caption] for caption in row["captions"]]) for row in rows]

    def pick(self, rows: np.ndarray, u: np.ndarray) -> np.ndarray:
        """One caption number a row: of n the first ⌊n u^1.5⌋ are passed over, so that earlier ones are likelier.

        `u` uniform in [0, 1): of two captions the first is taken with 0.63, of three with 0.48, 0.28 and 0.24.
        """
        return np.array([self.choices[i][int(len(self.choices[i]) * x**1.5)] for i, x in zip(rows, u, strict=True)])
