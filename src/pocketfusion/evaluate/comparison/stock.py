"""A model folder drawn by diffusers' own pipeline and scheduler: what bundles of it are held against.

Latents, and what noise a scheduler adds at its steps, are the runtime's (`runtime.denoise`).
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.pipeline_specs import CLASSES
from pocketfusion.models.guided import guidance_of
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.noise_schedule import ddim_scheduler
from pocketfusion.models.sampling import read_sampling
from pocketfusion.runtime.denoise import NoiseStream
from pocketfusion.runtime.specs import LatentSpec, SamplerName, SchedulerSpec

_OPTIONS: dict[SamplerName, dict[str, Any]] = {
    "ddim": {"clip_sample": False},
    "dpmpp-2m-karras": {"use_karras_sigmas": True},
}
#: What of the schedule is the model's own, and is read from its folder; the rest is how it is drawn.
OF_THE_MODEL = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: all that a bundle says of it."""

    sampler: SamplerName
    schedule: SchedulerSpec
    latents: LatentSpec
    num_inference_steps: int
    guidance_scale: float


class Probe(NamedTuple):
    """The predictions [2, h, w, C], without and with the prompt, that the UNet gave for latents [1, h, w, C]."""

    latents: np.ndarray
    timestep: float
    predictions: np.ndarray


class Drawn(NamedTuple):
    """One picture, uint8 [H, W, 3], with its latents [1, h, w, C] after each step as the runtime has them."""

    image: np.ndarray
    latents: list[np.ndarray]
    probes: list[Probe]  #: at the first, the middle and the last step
    seconds: float


class _Call(NamedTuple):
    sample: torch.Tensor
    timestep: Any
    settings: dict[str, Any]
    prediction: torch.Tensor


class Stock:
    """A folder's `StableDiffusionPipeline` in fp32, on the GPU if there is one."""

    def __init__(self, folder: Path):
        """Raises PocketfusionError if it is not a sound model folder."""
        self.pipeline: Any = load_pipeline(folder)
        sampling = read_sampling(folder)
        self.guidance = guidance_of(self.pipeline.unet, sampling.guidance if sampling else None)
        self.schedule: dict[str, Any] = dict(ddim_scheduler(self.pipeline.scheduler).config)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline.to(self.device)

    @property
    def pixels(self) -> int:
        """Pixels a latent."""
        return int(self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """`prompt_embeds` [1, T, D] as the pipeline makes them."""
        return self.pipeline.encode_prompt(prompt, self.device, 1, False)[0]  # type: ignore[no-any-return]

    def token_ids(self, prompt: str) -> np.ndarray:
        """[1, T], as the pipeline pads and cuts them."""
        tokenizer = self.pipeline.tokenizer
        length = min(tokenizer.model_max_length, self.pipeline.text_encoder.config.max_position_embeddings)
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return np.asarray(ids.input_ids)

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, drawing: Drawing) -> Drawn:
        """Draws with the pipeline's own call.

        Raises PocketfusionError for NaN, and where diffusers' scheduler takes another number of steps than it is told.
        """
        size, pixels, calls, last = drawing.latents, self.pixels, list[_Call](), list[torch.Tensor]()
        stream = NoiseStream(seed, size.height, size.width, size.channels)
        start = torch.from_numpy(stream.draw()).permute(2, 0, 1)[None].contiguous().to(self.device)
        self.pipeline.scheduler = self._scheduler(drawing)

        def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls.append(_Call(args[0], args[1], kwargs, output[0]))

        def after_step(pipeline: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            last[:] = [values["latents"]]
            return {}

        hook = self.pipeline.unet.register_forward_hook(keep, with_kwargs=True)
        try:
            with _noise_of(self.pipeline.scheduler, stream, self.device):
                began = time.perf_counter()
                picture = self.pipeline(
                    prompt,
                    height=size.height * pixels,
                    width=size.width * pixels,
                    num_inference_steps=drawing.num_inference_steps,
                    # a folded scale is in the weights, and the pipeline is asked for none
                    guidance_scale=1.0 if self.guidance == "folded" else drawing.guidance_scale,
                    latents=start,
                    eta=drawing.schedule.eta if drawing.sampler == "tcd" else 0.0,
                    callback_on_step_end=after_step,
                ).images[0]
                seconds = time.perf_counter() - began
        finally:
            hook.remove()
        if len(calls) != drawing.num_inference_steps:
            raise PocketfusionError(
                f"diffusers takes {len(calls)} steps where {drawing.num_inference_steps} are asked for with "
                f"{drawing.schedule.timestep_spacing} spacing: choose another --steps"
            )
        if not bool(last[0].isfinite().all()):
            raise PocketfusionError(
                f"the folder's UNet gave NaN or infinity at guidance {drawing.guidance_scale:g}: the model is "
                "unsound, or the guidance is too high"
            )
        inputs = [call.sample[:1] for call in calls[1:]]  # scaled for the UNet: the runtime's own
        probed = dict.fromkeys((0, len(calls) // 2, len(calls) - 1))
        return Drawn(
            np.asarray(picture.convert("RGB")),
            [_nhwc(latents) for latents in (*inputs, last[0])],
            [self._probe(calls[k]) for k in probed],
            seconds,
        )

    def _probe(self, call: _Call) -> Probe:
        """With one prediction a step, the other one is asked for."""
        both = call.prediction
        if len(both) == 1:
            settings = call.settings | {"encoder_hidden_states": self.encode("")}
            both = torch.cat([self.pipeline.unet(call.sample, call.timestep, **settings)[0], both])
        return Probe(_nhwc(call.sample[:1]), float(call.timestep), _nhwc(both))

    def _scheduler(self, drawing: Drawing) -> Any:
        """diffusers' class of the sampler: the schedule that the folder's model was trained on, drawn as asked for."""
        kind = getattr(diffusers, CLASSES[drawing.sampler])
        values = {key: self.schedule[key] for key in OF_THE_MODEL}
        values |= drawing.schedule.model_dump(exclude=set(OF_THE_MODEL))
        known = inspect.signature(kind.__init__).parameters
        own = _OPTIONS.get(drawing.sampler, {})
        return kind(**{key: value for key, value in values.items() if key in known}, **own)


def _nhwc(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.permute(0, 2, 3, 1).float().cpu().numpy())


@contextmanager
def _noise_of(scheduler: Any, stream: NoiseStream, device: str) -> Iterator[None]:
    """The scheduler's fresh noise is the stream's next: diffusers takes it from a generator of torch."""
    module, name = sys.modules[type(scheduler).__module__], "randn_tensor"
    if not hasattr(module, name):
        yield
        return
    own = getattr(module, name)
    setattr(module, name, lambda *_, **__: torch.from_numpy(stream.draw()).permute(2, 0, 1)[None].to(device))
    try:
        yield
    finally:
        setattr(module, name, own)
