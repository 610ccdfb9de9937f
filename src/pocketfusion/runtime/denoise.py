"""The denoising loop: noise of a seed, guidance, a sampler's steps on a UNet's own buffers, copying only what changes.

What stays the same for a prompt (its embeddings, the guidance scale's) is written once. With the scheduler step folded
into the graph (input `step_coefficients`) the latents stay in the runtime's buffers from step to step, and are only
copied out to be checked and shown.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Manifest
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import TimeEmbedding


def timestep_embedding(timestep: float, spec: TimeEmbedding) -> Array:
    """`timestep_embedding` [1, spec.dim], as diffusers' `get_timestep_embedding` gives it (max_period 10,000).

    Sin then cos (or cos then sin, flipped) of t / 10000^(i / (dim/2 - shift)). The angles are computed in float32, as
    there: at t = 1000 its rounding is part of what the UNet was trained with. Functions are computed in float64 and
    then rounded: numpy's own float32 ones differ by their last bit from processor to processor.
    """
    half = spec.dim // 2
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp((exponent / np.float32(half - spec.downscale_freq_shift)).astype(np.float64))
    angles = (np.float32(timestep) * frequencies.astype(np.float32)).astype(np.float64)
    parts = [np.sin(angles), np.cos(angles)]
    values = np.concatenate([*(parts[::-1] if spec.flip_sin_to_cos else parts), np.zeros(spec.dim % 2, np.float32)])
    return values.astype(np.float32)[None]


class NoiseStream:
    """Standard normal latents of a seed, [height, width, channels] float32 each: numpy's PCG64, one call a draw.

    The first are the starting noise; samplers that add noise take the following ones, a draw for each step that does.
    """

    def __init__(self, seed: int, height: int, width: int, channels: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._shape = (height, width, channels)

    def draw(self) -> npt.NDArray[np.float32]:
        """The next latents of the stream."""
        return self._generator.standard_normal(self._shape, np.float32)


def seeded_noise(seed: int, height: int, width: int, channels: int) -> npt.NDArray[np.float32]:
    """The starting noise of `seed`, [height, width, channels]."""
    return NoiseStream(seed, height, width, channels).draw()


def guidance_embedding(guidance_scale: float, dim: int) -> Array:
    """`timestep_cond` [1, dim] of a guidance scale, as diffusers' stock pipeline passes it.

    Sin then cos of 1000 (w - 1) / 10000^(i / (dim/2 - 1)), in float64: the angles are thousands of radians.
    """
    half = dim // 2
    angles = 1000.0 * (guidance_scale - 1) * 10000.0 ** -(np.arange(half) / max(half - 1, 1))
    values = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2)])
    return values.astype(np.float32)[None]


def resolve_guidance(
    manifest: Manifest, guidance_scale: float | None, negative_prompt: str, warnings: list[str]
) -> float:
    """The scale to draw with: the one asked for or the bundle's default. Warns of one that the UNet was not taught.

    Raises PocketfusionError for what the bundle's guidance cannot follow: a scale that is not the folded one, or a
    negative prompt where there is no unconditional prediction.
    """
    default = manifest.defaults.guidance_scale
    scale = default if guidance_scale is None else float(guidance_scale)
    if manifest.guidance == "classifier-free":
        return scale
    if negative_prompt.strip():
        raise PocketfusionError(
            f"this bundle's guidance is {manifest.guidance}, so a negative prompt has no effect: leave it out or take "
            "a bundle of classifier-free guidance"
        )
    if manifest.guidance == "folded" and scale != default:
        raise PocketfusionError(
            f"the guidance scale is {scale:g}, but this bundle has {default:g} folded in and draws with no other: "
            "leave it out"
        )
    if manifest.guidance_range is not None:
        low, high = manifest.guidance_range
        if not low <= scale <= high:
            warnings.append(f"the guidance scale {scale:g} is outside {low:g} to {high:g}, which the UNet was taught")
    return scale


Array = npt.NDArray[np.float32]


class Denoiser:
    """Draws latents of one prompt at one guidance scale, as many pictures as wanted."""

    def __init__(
        self, unet: Network, manifest: Manifest, sampler: Sampler, prompt_embeds: Array, scale: float
    ) -> None:
        """`prompt_embeds` [2, T, D], negative and prompt, or [1, T, D] with embedded or folded guidance; `sampler`
        has its timesteps set."""
        self.unet, self.sampler = unet, sampler
        self.scale = max(float(scale), 1.0)  # at and below 1 there is no guidance, as in diffusers
        self._embedding = manifest.time_embedding
        self._batch = unet.spec.batch
        self._folded = unet.spec.input("step_coefficients") is not None
        #: the text inputs of one step's calls: both rows in one, or a call for each where the UNet takes one row
        rows = prompt_embeds if self.scale > 1 or self._batch == 2 else prompt_embeds[-1:]
        self._texts = np.split(rows, len(rows) // self._batch)
        unet.write(encoder_hidden_states=self._texts[0])
        condition = unet.spec.input("timestep_cond")
        if condition is not None:
            unet.write(timestep_cond=guidance_embedding(scale, condition.shape[1]))

    def start(self, latents: Array, stream: NoiseStream) -> None:
        """Begins a picture at standard normal latents [1, H, W, C]; what noise its steps add is the stream's next."""
        self._latents = self.sampler.start(latents)
        self._fresh = True
        self._noise = lambda: stream.draw()[None]

    def step(self, k: int) -> Array:
        """Step k, from 0: the new latents [1, H, W, C], a copy. NaN and infinity pass through."""
        self._write_time(float(self.sampler.timesteps[k]))
        if self._folded:
            a, b = self.sampler.coefficients(k)
            if self._fresh:
                self.unet.write(sample=self._latents)
            else:
                self.unet.feed_back("sample")
            self._fresh = False
            with np.errstate(over="ignore"):
                self.unet.write(step_coefficients=np.array([[self.scale, a, b]], np.float32))
            self.unet.run()
            latents = self.unet.read()
            self._latents = self.sampler.add_noise(k, latents, self._noise)
            self._fresh = self._latents is not latents  # then they are no longer those in the UNet's buffer
            return self._latents
        self.unet.write(sample=np.repeat(self._latents, self._batch, axis=0))
        prediction = self._guided()
        with np.errstate(over="ignore", invalid="ignore"):
            self._latents = self.sampler.step(prediction, k, self._latents, self._noise)
        return self._latents

    def predict(self, latents: Array, timestep: float) -> Array:
        """The UNet's own predictions for latents [1, H, W, C] at a timestep: [rows, H, W, C]. Not while drawing."""
        self._write_time(timestep)
        if not self._folded:
            self.unet.write(sample=np.repeat(latents, self._batch, axis=0))
            return self._rows()
        parts = []
        for scale in range(2) if self._batch == 2 else (1,):  # 0 x + 1 of the guided prediction: that of each row
            self.unet.write(sample=latents, step_coefficients=np.array([[scale, 0, 1]], np.float32))
            self.unet.run()
            parts.append(self.unet.read())
        return np.concatenate(parts)

    def _write_time(self, timestep: float) -> None:
        if self._embedding:
            values = timestep_embedding(timestep, self._embedding)
            self.unet.write(timestep_embedding=np.repeat(values, self._batch, axis=0))
        else:
            self.unet.write(timestep=np.full(self._batch, timestep, np.float32))

    def _rows(self) -> Array:
        """The predictions of the text's rows for what else is written, one below the other."""
        parts = []
        for text in self._texts:
            if len(self._texts) > 1:
                self.unet.write(encoder_hidden_states=text)
            self.unet.run()
            parts.append(self.unet.read())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _guided(self) -> Array:
        """uncond + scale * (cond - uncond), or the one prediction there is; in diffusers' convention."""
        prediction = self._rows()
        cond = prediction[-1:]
        if len(prediction) == 1 or self.scale == 1.0:
            return cond
        uncond = prediction[:1]
        with np.errstate(over="ignore", invalid="ignore"):  # an absurd scale is told by check_finite
            cond -= uncond
            cond *= self.scale
            cond += uncond
        return cond


def check_finite(latents: Array, unet: Network, step: int, steps: int, timestep: float) -> None:
    """Raises PocketfusionError if the `latents` after a step (counted from 1) hold NaN or infinity."""
    if not np.isfinite(latents).all():
        what = "NaN" if np.isnan(latents).any() else "infinity"
        kept = f", or the weights kept in {unet.kept_in} are damaged: empty that folder" if unet.kept_in else ""
        raise PocketfusionError(
            f"{unet.path}: the network produced {what} at step {step} of {steps} (timestep {timestep:g}): "
            f"the bundle is unsound, or the guidance is too high{kept}"
        )
