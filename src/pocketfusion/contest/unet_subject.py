"""The UNet of a model folder, alone and without the weights of all else; and what a picture of it is drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.contest.contenders import Call, Subject
from pocketfusion.mobile import pipeline_specs
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.measure import PROMPTS, tokenize
from pocketfusion.mobile.wrappers import TimeEmbeddingAt, UNet, time_embedding_spec, unet_form, wrap
from pocketfusion.models.guided import guidance_of
from pocketfusion.models.loading import assemble, empty_part, load_part
from pocketfusion.models.sampling import usual_sampling
from pocketfusion.quiet import quiet
from pocketfusion.runtime.denoise import NoiseStream, guidance_embedding
from pocketfusion.runtime.samplers.sampler import Sampler

PROMPT = PROMPTS[1]


def open_unet(
    subject: Subject, time: TimeEmbeddingAt = "inside"
) -> tuple[nn.Module, pipeline_specs.Samples, dict[str, Any]]:
    """The UNet in fp32 with a bundle's inputs and outputs, sample inputs, and how its time embedding is computed."""
    folder = Path(subject.folder)
    with quiet():
        pipeline = assemble(folder, lambda kind, part: (load_part if part.name == "unet" else empty_part)(kind, part))
    ExportSettings(size=subject.size).resize(pipeline)
    form = unet_form(guidance_of(pipeline.unet, usual_sampling(folder).guidance), "litert-cpu")
    samples = pipeline_specs.samples(pipeline, form.batch, time)["unet"]
    said = time_embedding_spec(pipeline.unet).model_dump() if time == "outside" else {}
    return UNet(pipeline.unet, time).eval(), samples, said


class Drawing:
    """One picture as each contender draws it: its latents, and the next call. The first one's noise is the seed's."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self._scene, shape = scene, scene.shape
        self._stream = NoiseStream(seed, *shape)
        self._sampler = Sampler(*scene.sampler)
        self._sampler.set_timesteps(scene.steps)
        self.latents = self._sampler.start(self._stream.draw()[None])

    def call(self, step: int) -> Call:
        """The UNet's inputs of a step, counted from 0."""
        scene, rows = self._scene, len(self._scene.states)
        inputs = {
            "sample": np.repeat(self.latents, rows, axis=0),
            "timestep": np.full(rows, float(self._sampler.timesteps[step]), np.float32),
            "encoder_hidden_states": scene.states,
        }
        return inputs | ({} if scene.condition is None else {"timestep_cond": scene.condition})

    def take(self, step: int, prediction: np.ndarray) -> None:
        """Goes on from what the UNet gave."""
        scale, cond = max(self._scene.scale, 1.0), prediction[-1:]
        guided = prediction[:1] + scale * (cond - prediction[:1]) if len(prediction) == 2 else cond
        self.latents = self._sampler.step(
            guided.astype(np.float32), step, self.latents, lambda: self._stream.draw()[None]
        )


class Scene:
    """What is drawn: the prompt's states by PyTorch, sampler, guidance, and PyTorch's decoder for all contenders.

    Raises PocketfusionError for what is no model folder, and for steps or a size that it cannot draw.
    """

    def __init__(self, subject: Subject, steps: int | None) -> None:
        folder = Path(subject.folder)
        settings = ExportSettings(size=subject.size, num_inference_steps=steps)
        settings.check(folder, None, False)
        with quiet():
            pipeline = assemble(
                folder, lambda kind, part: (empty_part if part.name == "unet" else load_part)(kind, part)
            )
        settings.resize(pipeline)
        sampling = settings.sampling(folder)
        defaults = settings.defaults(folder, sampling)
        self.steps, self.scale = defaults.num_inference_steps, defaults.guidance_scale
        self.guidance = guidance_of(pipeline.unet, sampling.guidance)
        self.sampler = settings.drawn_with(folder, pipeline, self.steps)
        latents, image = pipeline_specs.latent_spec(pipeline), pipeline_specs.image_spec(pipeline)
        self.shape, self.image_size = (latents.height, latents.width, latents.channels), (image.width, image.height)
        networks = wrap(pipeline)
        self._decoder = networks["decoder"]
        self.states = self._encoded(pipeline, networks["text_encoder"])
        width = pipeline.unet.config.time_cond_proj_dim
        self.condition = guidance_embedding(self.scale, width) if width else None

    @torch.no_grad()
    def _encoded(self, pipeline: Any, encoder: nn.Module) -> np.ndarray:
        """Of the empty prompt and the prompt; of the prompt alone where guidance is in the UNet."""
        texts = tokenize(pipeline, pipeline_specs.tokenizer_spec(pipeline).max_length)[:2]
        calls = [{name: torch.from_numpy(values) for name, values in one.items()} for one in texts]
        states = [encoder(**one)["prompt_embeds"].numpy() for one in calls]
        return np.concatenate(states if self.guidance == "classifier-free" else states[1:])

    @torch.no_grad()
    def picture(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3], by PyTorch's decoder in fp32."""
        image = self._decoder(latents=torch.from_numpy(latents))["image"][0].numpy()
        return np.round(np.clip(image / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
