"""From a prompt to pictures: text encoder, guided DDIM steps, decoder."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.guidance import guidance_embedding, resolve_guidance
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.memory import peak_rss
from pocketfusion.runtime.networks import Network, available_cores
from pocketfusion.runtime.noise import seeded_noise
from pocketfusion.runtime.scheduler import DDIMScheduler
from pocketfusion.runtime.tokenizer import PromptTokenizer, clean_text

Array = npt.NDArray[np.float32]
Callback = Callable[[int, int, Array], "bool | None"]

MAX_SEED = 2**32 - 1
MAX_IMAGES = 1000


class Cancelled(Exception):
    """Raised by `Pipeline.generate` when its callback asked to stop; a callback may raise it too."""


@dataclass
class Timings:
    """Seconds. `load` is the pipeline's (verify, load, pack); `steps` has one entry per step of every picture."""

    load: float
    text: float = 0.0
    steps: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    total: float = 0.0  #: of this call, without `load`; callbacks are in it


@dataclass
class GenerationResult:
    """Pictures and how they came to be; `seeds[i]` alone draws `images[i]` again."""

    images: list[Image.Image]
    prompt: str
    negative_prompt: str
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    timings: Timings
    peak_rss: int | None  #: bytes, of the whole process so far; None where the system does not tell
    warnings: list[str]


class Pipeline:
    """A loaded bundle. Not thread-safe: use one per thread."""

    def __init__(self, bundle: Bundle, num_threads: int | None = None) -> None:
        """Loads the three networks; raises PocketfusionError if one cannot be loaded or `num_threads` is below 1."""
        start = time.perf_counter()
        self.bundle, self.manifest = bundle, bundle.manifest
        self.num_threads = available_cores() if num_threads is None else num_threads
        if self.num_threads < 1:
            raise PocketfusionError(f"the number of threads is {self.num_threads}: choose 1 or more")
        networks = self.manifest.networks
        self.tokenizer = PromptTokenizer(bundle.file("tokenizer"), self.manifest.tokenizer)
        self.text_encoder = Network(bundle.file("text_encoder"), networks.text_encoder, self.num_threads)
        self.unet = Network(bundle.file("unet"), networks.unet, self.num_threads)
        self.decoder = Network(bundle.file("decoder"), networks.decoder, self.num_threads)
        self.scheduler = DDIMScheduler(self.manifest.scheduler)
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def load(cls, path: Path | str | None = None, num_threads: int | None = None) -> Pipeline:
        """Opens and verifies the bundle at `path` (default: the embedded one), then loads it on `num_threads` threads
        (default: all cores). Raises PocketfusionError for whatever is wrong with it."""
        start = time.perf_counter()
        pipeline = cls(Bundle.open(embedded_bundle() if path is None else path), num_threads)
        pipeline.load_seconds = time.perf_counter() - start
        return pipeline

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        num_images: int = 1,
        latents: Array | None = None,
        callback: Callback | None = None,
    ) -> GenerationResult:
        """Draws `num_images` pictures of `prompt` with DDIM and guidance: classifier-free (Ho & Salimans, arXiv
        2207.12598, in diffusers' convention: `guidance_scale` 1 is the plain conditional model), or whatever the
        bundle's is. Where it is embedded or folded a step is one prediction and there is no negative prompt.

        Picture i starts from the noise of seed + i (a random seed if None) or from `latents`
        [num_images, height, width, channels]; the same seed gives the same bytes on the same machine.
        `callback(step, timestep, latents)` is called after each step (counted from 0, afresh for each picture) with
        latents [1, height, width, channels], which `decode` makes a preview of; returning False or raising
        `Cancelled` stops, and `generate` raises `Cancelled`.

        Raises PocketfusionError for a setting out of range, one that the bundle's guidance cannot follow, and for NaN
        or infinity out of a network.
        """
        steps = self.manifest.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        timings, warnings = Timings(self.load_seconds), list[str]()
        scale = resolve_guidance(self.manifest, guidance_scale, negative_prompt, warnings)
        timesteps = self.scheduler.set_timesteps(steps)
        seeds = self._seeds(seed, num_images, scale)
        noise = [self.noise(s) for s in seeds] if latents is None else self._given(latents, num_images)
        start = time.perf_counter()
        texts = (negative_prompt, prompt) if self.manifest.guidance == "classifier-free" else (prompt,)
        prompt_embeds = np.concatenate([self.encode(text, warnings) for text in texts])
        timings.text = time.perf_counter() - start
        images = []
        for sample in noise:
            for k, t in enumerate(timesteps):
                began = time.perf_counter()
                noise_pred = self._noise_pred(sample, int(t), prompt_embeds, scale)
                if not np.isfinite(noise_pred).all():
                    what = "NaN" if np.isnan(noise_pred).any() else "infinity"
                    raise PocketfusionError(
                        f"{self.unet.path}: the network produced {what} at step {k + 1} of {steps} (timestep {t}): "
                        "the bundle is unsound, or the guidance is too high"
                    )
                sample = self.scheduler.step(noise_pred, int(t), sample)
                timings.steps.append(time.perf_counter() - began)
                if callback is not None and callback(k, int(t), sample) is False:
                    raise Cancelled(f"cancelled at step {k + 1} of {steps}")
            began = time.perf_counter()
            images.append(self.decode(sample))
            timings.decode.append(time.perf_counter() - began)
        timings.total = time.perf_counter() - start
        return GenerationResult(
            images,
            clean_text(prompt),
            clean_text(negative_prompt),
            seeds if latents is None else [],
            steps,
            scale,
            timings,
            peak_rss(),
            warnings,
        )

    def noise(self, seed: int) -> Array:
        """Standard normal latents of `seed`, [1, height, width, channels], by numpy's PCG64."""
        shape = self.manifest.latents
        return seeded_noise(seed, shape.height, shape.width, shape.channels)[None]

    def decode(self, latents: Array) -> Image.Image:
        """The picture of latents [1, height, width, channels]; PocketfusionError if the decoder gives NaN."""
        image = self.decoder(latents=latents)
        if not np.isfinite(image).all():
            raise PocketfusionError(f"{self.decoder.path}: the decoder produced NaN: the bundle is unsound")
        return Image.fromarray(np.round(np.clip(image[0] / 2 + 0.5, 0, 1) * 255).astype(np.uint8))

    def encode(self, text: str, warnings: list[str] | None = None) -> Array:
        """`prompt_embeds` of `text`, [1, max_length, width]; appends to `warnings` if the text was cut."""
        tokens = self.tokenizer.encode(text)
        if tokens.warning and warnings is not None:
            warnings.append(tokens.warning)
        embeds = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        if not np.isfinite(embeds).all():
            raise PocketfusionError(
                f"{self.text_encoder.path}: the text encoder produced NaN or infinity: the bundle is unsound"
            )
        return embeds

    def _noise_pred(self, sample: Array, timestep: int, prompt_embeds: Array, scale: float) -> Array:
        """Guided prediction: uncond + scale * (cond - uncond), or what the UNet gives; scale 1 needs no uncond.

        `prompt_embeds` [2, T, D], or [1, T, D] with embedded or folded guidance.
        """
        if len(prompt_embeds) == 1:
            return self._one_call(sample, timestep, prompt_embeds, scale)
        rows = 1 if scale == 1.0 and 1 in self.unet.batch_sizes else 2
        noise_pred = self.unet(
            sample=np.repeat(sample, rows, axis=0),
            timestep=np.full(rows, timestep, np.float32),
            encoder_hidden_states=prompt_embeds[-rows:],
        )
        cond = noise_pred[-1:]
        if scale == 1.0:
            return cond
        with np.errstate(over="ignore", invalid="ignore"):  # an absurd scale is told by the caller's check
            return (noise_pred[:1] + scale * (cond - noise_pred[:1])).astype(np.float32)

    def _one_call(self, sample: Array, timestep: int, prompt_embeds: Array, scale: float) -> Array:
        inputs = {
            "sample": sample,
            "timestep": np.full(1, timestep, np.float32),
            "encoder_hidden_states": prompt_embeds,
        }
        if self.manifest.guidance == "embedded":
            (shape,) = (tensor.shape for tensor in self.unet.spec.inputs if tensor.name == "timestep_cond")
            inputs["timestep_cond"] = guidance_embedding(scale, shape[1])
        return self.unet(**inputs)

    def _given(self, latents: Array, num_images: int) -> list[Array]:
        shape = (num_images, self.manifest.latents.height, self.manifest.latents.width, self.manifest.latents.channels)
        if latents.shape != shape or not np.isfinite(latents).all():
            raise PocketfusionError(
                f"latents are {list(latents.shape)}: finite numbers of shape {list(shape)} are needed"
            )
        return list(latents.astype(np.float32)[:, None])

    def _seeds(self, seed: int | None, num_images: int, scale: float) -> list[int]:
        if not math.isfinite(scale):
            raise PocketfusionError(f"the guidance scale is {scale}: choose a finite number, 1 for no guidance")
        if not 1 <= num_images <= MAX_IMAGES:
            raise PocketfusionError(f"the number of pictures is {num_images}: choose 1 to {MAX_IMAGES}")
        if seed is None:
            seed = secrets.randbelow(MAX_SEED - num_images + 2)
        if not 0 <= seed <= MAX_SEED - num_images + 1:
            raise PocketfusionError(
                f"the seed is {seed}: choose 0 to {MAX_SEED - num_images + 1}, as picture i takes seed + i"
            )
        return list(range(seed, seed + num_images))
