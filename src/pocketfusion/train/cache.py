"""Latents and prompt states, computed once and memory-mapped; the text encoder may run in training too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch.nn import functional as F

from pocketfusion.artefact import atomic_file, reserve
from pocketfusion.data.buckets import Bucket
from pocketfusion.data.latents.filling import Encode, PartsBar, fill, wait_until
from pocketfusion.data.latents.finishing import finish
from pocketfusion.data.latents.layout import MANIFEST, Encoding, Plan, missing_parts
from pocketfusion.data.latents.reading import LatentCache, open_cache
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import PicturesSource
from pocketfusion.folder import machine
from pocketfusion.models.dual_encoder import pool_states
from pocketfusion.models.slim_autoencoder import to_tensor
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.processes import lost_processes_are_told, process_state
from pocketfusion.terminal import titled


def _cached(path: Path, shape: tuple[int, ...], blocks: Callable[[], Iterator[np.ndarray]], what: str) -> np.ndarray:
    """Memory-maps `path`, which the first process writes from `blocks` (fp16, along the first axis) if need be."""
    if process_state().process_index > 0:
        with lost_processes_are_told("and it goes on from its caches"):
            wait_until(path.is_file)
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


def encoding_of(
    vae: AutoencoderKL, vae_hash: str, size: int, buckets: Sequence[Bucket] = (), halved: bool = False
) -> Encoding:
    """What a cache of `vae`'s latents is of; `buckets`: the square of `size` unless given."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return Encoding(
        vae_hash, vae.config.latent_channels, factor, size, tuple(buckets) or (Bucket(size, size),), halved
    )


def latent_encoder(vae: AutoencoderKL, device: torch.device, precision: str = "no") -> Encode:
    """Mean and standard deviation of the posterior of pictures, and with `halved` of their means over 2x2 pixels."""
    model = vae.to(device).eval()

    @torch.no_grad()
    def encode(pictures: np.ndarray, halved: bool) -> np.ndarray:
        pixels = to_tensor(pictures).to(device)
        pixels = F.avg_pool2d(pixels, 2) if halved else pixels
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = model.encode(pixels).latent_dist
            return torch.cat([found.mean, found.std], 1).half().cpu().numpy()

    return encode


def cache_latents(
    vae: AutoencoderKL,
    vae_hash: str,
    data: CaptionedImages,
    folder: Path,
    device: torch.device,
    halved: bool = False,
) -> LatentCache:
    """The latents of all of `data`, as a cache in `folder` (see `data.latents`), or of the cache that `data` is.

    All processes of the run must call it together: each encodes its share of the parts. `vae_hash`: of the encoder.
    Raises PocketfusionError if `data` is a cache of another autoencoder, and as `fill` does.
    """
    if isinstance(data, LatentCache):
        data.check_encoder(vae_hash, halved)
        return data
    out = folder / f"latents-{_key(vae_hash, data.fingerprint, 'halved' if halved else 'whole')}"
    if not (out / MANIFEST).is_file():
        source, state = PicturesSource(data), process_state()
        plan = Plan.of(source, encoding_of(vae, vae_hash, data.size, halved=halved), False, data.name)
        rank, ranks, encode = state.process_index, state.num_processes, latent_encoder(vae, device)
        with lost_processes_are_told("and it goes on from its caches"):
            with PartsBar("encoding latents", len(plan.parts[rank::ranks]), shown=rank == 0) as bar:
                fill(out, source, plan, encode, share=(rank, ranks), progress=bar.add)
            if rank == 0:
                wait_until(lambda: not missing_parts(out, plan))
                finish(out, machine())
            wait_until((out / MANIFEST).is_file)
    return open_cache(out)


class CaptionStates(Protocol):
    """Token states of the captions of some rows."""

    def take(self, rows: np.ndarray, u: np.ndarray) -> torch.Tensor:
        """States [B, T, D] fp32, on the CPU, of the caption that `pick` gives each of the `rows` for `u`."""


def pick(captions: Sequence, u: float) -> int:
    """Of n captions the first ⌊n u^1.5⌋ are passed over, so that earlier ones are likelier.

    `u` uniform in [0, 1): of two captions the first is taken with 0.63, of three with 0.48, 0.28 and 0.24.
    """
    return int(len(captions) * u**1.5)


class CachedStates:
    """Computed once for every distinct caption, and memory-mapped: 118 kB each with CLIP."""

    def __init__(self, text: TextEncoder, text_hash: str, rows: Sequence[dict], folder: Path):
        self.table = CaptionTable(rows)
        self.states = cache_prompts(text, text_hash, self.table.captions, folder)

    def take(self, rows: np.ndarray, u: np.ndarray) -> torch.Tensor:
        """See `CaptionStates`."""
        return torch.from_numpy(self.states[self.table.pick(rows, u)]).float()


class LiveStates:
    """Computed when they are needed, by the text encoder on its device; rounded as cached ones are."""

    def __init__(self, text: TextEncoder, rows: Sequence[dict], indices: np.ndarray):
        self.text, self.rows, self.indices = text, rows, indices

    def take(self, rows: np.ndarray, u: np.ndarray) -> torch.Tensor:
        """See `CaptionStates`."""
        captions = [self.rows[i]["captions"] for i in self.indices[rows]]
        return (
            self.text.encode([own[pick(own, x)] for own, x in zip(captions, u, strict=True)])[0].half().float().cpu()
        )


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
        """One caption number a row, as `pick` has it."""
        return np.array([self.choices[i][pick(self.choices[i], x)] for i, x in zip(rows, u, strict=True)])
