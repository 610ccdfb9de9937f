"""From a prompt to pictures: text encoder, a sampler's guided steps, decoder."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.budget import choose_mode
from pocketfusion.runtime.denoise import Denoiser, NoiseStream, check_finite, resolve_guidance, seeded_noise
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.memory import peak_rss
from pocketfusion.runtime.networks import (
    ACCELERATORS,
    Accelerator,
    KeptWeights,
    Network,
    available_cores,
    check_threads,
)
from pocketfusion.runtime.residency import Mode, Residency, Turns, check_mode, in_turn
from pocketfusion.runtime.result import Cancelled, GenerationResult, Timings
from pocketfusion.runtime.runtimes import choose_runtime
from pocketfusion.runtime.samplers.sampler import Sampler, resolve_sampler
from pocketfusion.runtime.tiles import decode_tiled
from pocketfusion.runtime.tokenizer import PromptTokenizer, clean_text
from pocketfusion.runtime.trace import Trace

Array = npt.NDArray[np.float32]
Callback = Callable[[int, float, Array], "bool | None"]

MAX_SEED = 2**32 - 1
MAX_IMAGES = 1000


class Pipeline:
    """A loaded bundle, for one call at a time: while it is at work, other threads' calls are refused.

    A callback may call `decode` and `encode`, not `generate`. To draw in several threads, load one for each. `with`
    closes it at the end.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_threads: int | None = None,
        *,
        mode: Mode | None = None,
        memory_budget: float | None = None,
        accelerator: Accelerator = "cpu",
        runtime: str | None = None,
        trace: Path | str | None = None,
        cache: Path | str | None = None,
    ) -> None:
        """Loads the networks that the mode keeps; see `load` for the settings and what is raised."""
        start = time.perf_counter()
        self.bundle, self.manifest, self.turns = bundle, bundle.manifest, Turns()
        self.num_threads = available_cores() if num_threads is None else check_threads(num_threads)
        if accelerator not in ACCELERATORS:
            raise PocketfusionError(f"the accelerator is {accelerator!r}: choose {' or '.join(ACCELERATORS)}")
        self.runtime = choose_runtime(bundle.path, self.manifest, runtime)
        if accelerator != "cpu" and self.runtime != "litert":
            raise PocketfusionError(
                f"the accelerator is {accelerator}, and {self.runtime} runs on the CPU here: leave it out"
            )
        if cache is not None and self.runtime != "litert":
            raise PocketfusionError(
                f"a cache of packed weights is LiteRT's, and the runtime is {self.runtime}: leave it out"
            )
        if mode is not None:
            check_mode(mode)
        if memory_budget is not None:
            mode = choose_mode(bundle, memory_budget, mode)
        self.accelerator = accelerator
        self._kept = None if cache is None else KeptWeights(Path(cache))
        self.tokenizer = PromptTokenizer(bundle.file("tokenizer"), self.manifest.tokenizer)
        self._empty = self.tokenizer.encode("").input_ids, bundle.empty_prompt_embeds()
        self.mode: Mode = mode or "resident"
        self.trace = Trace(trace)
        self._networks = Residency(self.mode, self._load_network, self.trace)
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def load(
        cls,
        path: Path | str | None = None,
        num_threads: int | None = None,
        *,
        mode: Mode | None = None,
        memory_budget: float | None = None,
        accelerator: Accelerator = "cpu",
        runtime: str | None = None,
        trace: Path | str | None = None,
        cache: Path | str | None = None,
    ) -> Pipeline:
        """Opens and verifies the bundle at `path` (default: the embedded one), then loads it on `num_threads` threads
        (default: all cores).

        `mode` says which networks are in memory when (`residency.Mode`; pictures are the same in all): `resident`
        unless `memory_budget`, in MB of 10^6 bytes for the whole process, chooses the fastest that fits. `runtime` is
        one of `runtimes.RUNTIMES`, by default that of the bundle's files. `trace` is a .json file that every
        `generate` writes a timeline to, with a picture of it beside. `cache` is a folder that keeps packed weights
        (`KeptWeights`, LiteRT's), which the next start need not pack, if it can be written.
        Raises PocketfusionError for whatever is wrong with the bundle or a setting, and for too small a budget.
        """
        start = time.perf_counter()
        bundle = Bundle.open(embedded_bundle() if path is None else path, drawable=True)
        pipeline = cls(
            bundle,
            num_threads,
            mode=mode,
            memory_budget=memory_budget,
            accelerator=accelerator,
            runtime=runtime,
            trace=trace,
            cache=cache,
        )
        pipeline.load_seconds = time.perf_counter() - start
        return pipeline

    @in_turn(whole=True)
    def close(self) -> None:
        """Frees the networks and gives their memory back to the system; nothing can be drawn any more."""
        self._networks.close()
        self.trace.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        image, defaults = self.manifest.image, self.manifest.defaults
        steps, size = defaults.num_inference_steps, f"{image.width}×{image.height} px"
        return (
            f"<Pipeline {self.manifest.name}: {size}, {steps} steps of {self.manifest.sampler}, guidance "
            f"{defaults.guidance_scale:g}, {self.mode}, {self.num_threads} threads>"
        )

    def _load_network(self, name: str) -> Network:
        # the modes that are there to save memory keep packed weights in a mapped file
        spec, mapped = getattr(self.manifest.networks, name), self.mode != "resident"
        path = self.bundle.file(name)
        return Network(
            path,
            spec,
            self.num_threads,
            mapped=mapped,
            kept=self._kept,
            sha256=self.manifest.files[name].sha256,
            accelerator=self.accelerator,
            runtime=self.runtime,
        )

    @in_turn(whole=True)
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
        sampler: str | None = None,
        eta: float | None = None,
        callback: Callback | None = None,
    ) -> GenerationResult:
        """Draws `num_images` pictures of `prompt` with a sampler and guidance: classifier-free (Ho & Salimans, arXiv
        2207.12598, in diffusers' convention: `guidance_scale` up to 1 is the plain conditional model), or whatever the
        bundle's is. Where it is embedded or folded a step is one prediction and there is no negative prompt.

        `sampler` is one of `manifest.allowed_samplers`; None is the bundle's own. `eta` is TCD's share of fresh noise,
        0 to 1. Picture i starts from the noise of seed + i (a random seed if None) or from `latents` [num_images,
        height, width, channels]; what noise a sampler adds later is the seed's in both cases. The same seed gives the
        same bytes on the same machine.
        `callback(step, timestep, latents)` is called after each step (counted from 0, afresh for each picture) with
        latents [1, height, width, channels] to read, which `decode` makes a preview of; returning False or raising
        `Cancelled` stops, and `generate` raises `Cancelled`.

        Raises PocketfusionError for a setting out of range, one that the bundle's guidance or sampler cannot follow,
        NaN or infinity out of a network, and if this pipeline is at work already.
        """
        steps = self.manifest.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        timings, warnings = Timings(self.load_seconds), list[str]()
        scale = resolve_guidance(self.manifest, guidance_scale, negative_prompt, warnings)
        chosen = resolve_sampler(self.manifest, sampler, eta)
        chosen.set_timesteps(steps)
        seeds = self._seeds(seed, num_images, scale)
        given = None if latents is None else self._given(latents, num_images)
        start = time.perf_counter()
        try:
            texts = (negative_prompt, prompt) if self.manifest.guidance == "classifier-free" else (prompt,)
            with self._networks.use("text_encoder"):
                began = time.perf_counter()
                prompt_embeds = np.concatenate([self.encode(text, warnings) for text in texts])
                timings.text = time.perf_counter() - began
            # every picture is denoised before the first is decoded: so each network is needed once, in turn
            samples = self._denoise(chosen, seeds, given, prompt_embeds, scale, timings, callback)
            images = []
            with self._networks.use("decoder"):
                for sample in samples:
                    began = time.perf_counter()
                    images.append(self.decode(sample))
                    timings.decode.append(time.perf_counter() - began)
        finally:
            self._networks.settle()
        timings.total = time.perf_counter() - start
        about = {"mode": self.mode, "bundle": self.manifest.name, "prompt": clean_text(prompt), "steps": steps}
        self.trace.write(**about, sampler=chosen.name)
        return GenerationResult(
            images,
            clean_text(prompt),
            clean_text(negative_prompt),
            seeds if given is None or chosen.adds_noise else [],
            steps,
            scale,
            timings,
            peak_rss(),
            warnings,
            chosen.name,
            chosen.spec.eta if chosen.name == "tcd" else None,
        )

    def noise(self, seed: int) -> Array:
        """The starting noise of `seed`, [1, height, width, channels]: see `NoiseStream`."""
        shape = self.manifest.latents
        return seeded_noise(seed, shape.height, shape.width, shape.channels)[None]

    @in_turn(whole=False)
    def decode(self, latents: Array) -> Image.Image:
        """The picture of latents [1, height, width, channels]; PocketfusionError if the decoder gives NaN.

        Latents larger than the decoder's input are decoded in overlapping tiles.
        """
        with self._networks.use("decoder") as decoder:
            with self.trace.span("run", "decoder"):
                tile = decoder.spec.inputs[0].shape
                image = decode_tiled(lambda part: decoder(latents=part), latents, (tile[1], tile[2]))
            if not np.isfinite(image).all():
                raise PocketfusionError(f"{decoder.path}: the decoder produced NaN: the bundle is unsound")
        return Image.fromarray(np.round(np.clip(image[0] / 2 + 0.5, 0, 1) * 255).astype(np.uint8))

    def preview(self, latents: Array) -> Image.Image:
        """A picture of the sampler's latents [1, height, width, channels], at any step and in every mode, from the
        manifest's linear map: for next to nothing, without detail.

        Raises PocketfusionError if the bundle has no map.
        """
        if self.manifest.preview is None:
            raise PocketfusionError(f"the bundle {self.bundle.path} has no preview: export it again, or use decode")
        return self.manifest.preview.image(latents, (self.manifest.image.width, self.manifest.image.height))

    @in_turn(whole=False)
    def encode(self, text: str, warnings: list[str] | None = None) -> Array:
        """`prompt_embeds` of `text`, [1, max_length, width]; appends to `warnings` if the text was cut.

        Those of the empty prompt are the bundle's where it keeps them: what its text encoder gives.
        """
        tokens = self.tokenizer.encode(text)
        if self._empty[1] is not None and np.array_equal(tokens.input_ids, self._empty[0]):
            return self._empty[1].copy()
        if tokens.warning and warnings is not None:
            warnings.append(tokens.warning)
        with self._networks.use("text_encoder") as text_encoder:
            with self.trace.span("run", "text_encoder"):
                embeds = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            if not np.isfinite(embeds).all():
                raise PocketfusionError(
                    f"{text_encoder.path}: the text encoder produced NaN or infinity: the bundle is unsound"
                )
        return embeds

    @in_turn(whole=True)
    def predict(self, latents: Array, timestep: float, prompt_embeds: Array, guidance_scale: float) -> Array:
        """The UNet's own predictions for latents [1, height, width, channels], one for each row of `prompt_embeds`:
        [2, T, D] (negative and prompt) with classifier-free guidance, [1, T, D] else, where the scale counts."""
        scale = 2.0 if self.manifest.guidance == "classifier-free" else guidance_scale  # both rows are asked for
        with self._networks.use("unet") as unet:
            sampler = resolve_sampler(self.manifest, None)
            return Denoiser(unet, self.manifest, sampler, prompt_embeds, scale).predict(latents, timestep)

    def _denoise(
        self,
        sampler: Sampler,
        seeds: list[int],
        latents: list[Array] | None,
        prompt_embeds: Array,
        scale: float,
        timings: Timings,
        callback: Callback | None,
    ) -> list[Array]:
        """The final latents of each picture. The decoder begins to load beside the last one's steps."""
        samples, timesteps, shape = [], sampler.timesteps.tolist(), self.manifest.latents
        with self._networks.use("unet") as unet:
            denoiser = Denoiser(unet, self.manifest, sampler, prompt_embeds, scale)
            for index, seed in enumerate(seeds):
                if index == len(seeds) - 1:
                    self._networks.prefetch("decoder")
                stream = NoiseStream(seed, shape.height, shape.width, shape.channels)
                first = stream.draw()[None]
                denoiser.start(first if latents is None else latents[index], stream)
                for k, t in enumerate(timesteps):
                    began = time.perf_counter()
                    with self.trace.span("run", "unet", step=k + 1, picture=index):
                        sample = denoiser.step(k)
                    check_finite(sample, unet, k + 1, len(timesteps), t)
                    timings.steps.append(time.perf_counter() - began)
                    self._networks.check()
                    if callback is not None and callback(k, t, _to_read(sample)) is False:
                        raise Cancelled(f"cancelled at step {k + 1} of {len(timesteps)}")
                samples.append(sample)
        return samples

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


def _to_read(sample: Array) -> Array:
    """The same numbers, which a callback cannot change under the sampler."""
    view = sample.view()
    view.flags.writeable = False
    return view
