"""Systems under test: whatever turns prompts and seeds into pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.pipeline import MAX_SEED
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import SamplerName

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are drawn; arguments as diffusers names them."""

    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    batch: int = 64
    sampler: SamplerName = "ddim"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise PocketfusionError(
                f"--steps {self.num_inference_steps} is below 1: give the number of steps, such as 25"
            )
        if not 0 <= self.guidance_scale < float("inf"):
            raise PocketfusionError(f"--guidance {self.guidance_scale} is no guidance scale: give a number such as 4")


def _later_seed(seed: int) -> int:
    """The seed of what noise a sampler adds at its steps: the picture's, as far as `generate` takes seeds."""
    return seed % (MAX_SEED + 1)


class System(Protocol):
    """One model under test, whatever it runs on."""

    image_size: int
    batch: int  #: pictures that it likes to draw at once

    def identity(self) -> dict[str, Any]:
        """What a result file says of it: kind, name, hash."""

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplerSettings,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Prompts and noise seeds → uint8 [N, H, W, 3]; `on_batch` hears how many are done.

        Raises PocketfusionError, naming system and guidance, if a network gives NaN or infinity.
        """


class ModelFolder:
    """A model folder through stock diffusers networks in torch, on the GPU if there is one."""

    batch = 64

    def __init__(self, path: Path, precision: Precision = "fp32"):
        """`bf16` runs the networks under autocast; the sampler stays in fp32.

        Raises PocketfusionError if it is not a sound model folder.
        """
        import torch

        from pocketfusion.folder import folder_hash
        from pocketfusion.mobile.pipeline_specs import scheduler_spec
        from pocketfusion.models.guided import guidance_of
        from pocketfusion.models.loading import load_pipeline
        from pocketfusion.models.noise_schedule import ddim_scheduler
        from pocketfusion.models.sampling import read_sampling
        from pocketfusion.models.text_encoder import TextEncoder

        pipeline: Any = load_pipeline(path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.unet, self.vae = pipeline.unet.to(self.device).eval(), pipeline.vae.to(self.device).eval()
        self.sha256, self.precision = folder_hash(path), precision
        self.text = TextEncoder(pipeline.text_encoder.to(self.device), pipeline.tokenizer)
        self.scheduler = ddim_scheduler(pipeline.scheduler)
        self._schedule = lambda: scheduler_spec(pipeline)
        self.image_size = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.sampling = read_sampling(path)  #: how it is meant to be drawn, if its folder says so
        self.guidance = guidance_of(self.unet, self.sampling.guidance if self.sampling else None)
        self.name = path.resolve().name

    def identity(self) -> dict[str, Any]:
        """Kind, folder name, SHA-256 of the folder, and what the sampler is made of."""
        scheduler = {
            key: self.scheduler.config[key] for key in ("prediction_type", "timestep_spacing", "beta_schedule")
        }
        return {"kind": "model folder", "name": self.name, "sha256": self.sha256, "scheduler": scheduler}

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplerSettings,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Noise from numpy's PCG64(seed) per picture, as the phone runtime draws it."""
        images = []
        for start in range(0, len(prompts), settings.batch):
            part = slice(start, start + settings.batch)
            images.append(self._draw_batch(prompts[part], seeds[part], settings))
            if on_batch:
                on_batch(min(start + settings.batch, len(prompts)))
        return np.concatenate(images)

    def _draw_batch(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplerSettings) -> np.ndarray:
        import torch

        from pocketfusion.models.guided import noise_batch, sample_latents
        from pocketfusion.models.slim_autoencoder import to_uint8

        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        with torch.no_grad(), self._precision():
            states = self.text.encode(prompts)[0]
            empty = self.text.encode([""])[0].expand_as(states)
            if settings.sampler == "ddim":
                latents = sample_latents(
                    self.unet,
                    self.scheduler,
                    noise_batch(seeds, (channels, side, side)).to(self.device),
                    states,
                    empty,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    guidance=self.guidance,
                )
            else:
                sampler = self.with_sampler(settings.sampler, settings.num_inference_steps)
                latents = self._sample(sampler, seeds, states, empty, settings.guidance_scale)
            self._check(latents, "UNet", settings)
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            self._check(decoded, "decoder", settings)
        return to_uint8(decoded)

    def with_sampler(self, name: SamplerName, num_inference_steps: int) -> Sampler:
        """The runtime's sampler on this folder's schedule; PocketfusionError for steps that it does not have."""
        sampler = Sampler(name, self._schedule())
        sampler.set_timesteps(num_inference_steps)
        return sampler

    def _sample(
        self,
        sampler: Sampler,
        seeds: Sequence[int],
        states: torch.Tensor,
        empty: torch.Tensor,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Latents [B, C, h, w] by the runtime's sampler, with the noise that it takes on a phone."""
        import torch

        from pocketfusion.models.guided import guided_predictor, remembered_text
        from pocketfusion.runtime.denoise import NoiseStream, seeded_noise

        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        shape = side, side, channels
        streams = [NoiseStream(_later_seed(seed), *shape) for seed in seeds]

        def draw() -> np.ndarray:
            return np.stack([stream.draw() for stream in streams])

        def nchw(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).permute(0, 3, 1, 2).to(self.device)

        scale = torch.full((len(seeds),), guidance_scale, device=self.device)
        predict = guided_predictor(self.unet, states, empty, scale, self.guidance)
        draw()  # the place of the starting noise, as in `Pipeline.generate` with latents given
        latents = sampler.start(np.stack([seeded_noise(seed, *shape) for seed in seeds]))
        with remembered_text(self.unet):
            for k, t in enumerate(sampler.timesteps.tolist()):
                prediction = predict(nchw(latents), torch.tensor(float(t)))
                latents = sampler.step(prediction.permute(0, 2, 3, 1).cpu().numpy(), k, latents, draw)
        return nchw(latents)

    def _precision(self) -> AbstractContextManager:
        import torch

        return torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _check(self, values: torch.Tensor, network: str, settings: SamplerSettings) -> None:
        if not bool(values.isfinite().all()):
            raise PocketfusionError(
                f"{self.name}: its {network} gave NaN or infinity at guidance {settings.guidance_scale:g} and "
                f"{settings.num_inference_steps} steps: the model is unsound, or the guidance is too high"
            )


class BundleSystem:
    """A bundle on LiteRT, as `generate` runs it: one picture at a time."""

    batch = 1

    def __init__(self, path: Path, num_threads: int | None = None):
        """Raises PocketfusionError if the bundle cannot be opened or `num_threads` is below 1."""
        from pocketfusion.runtime.pipeline import Pipeline

        self.pipeline = Pipeline.load(path, num_threads)
        self.image_size = self.pipeline.manifest.image.height
        self.name = path.resolve().name

    def identity(self) -> dict[str, Any]:
        """Kind, folder name and SHA-256 of the manifest, which holds every file's."""
        return {"kind": "bundle", "name": self.name, "sha256": self.pipeline.bundle.hash}

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplerSettings,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """See `System`; seeds may be larger than those that `generate` takes."""
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            try:
                result = self.pipeline.generate(
                    prompt,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    latents=self.pipeline.noise(seed),
                    seed=_later_seed(seed),
                    sampler=settings.sampler,
                )
            except PocketfusionError as error:
                raise PocketfusionError(f"{self.name} at guidance {settings.guidance_scale:g}: {error}") from None
            images.append(np.asarray(result.images[0].convert("RGB")))
            if on_batch:
                on_batch(len(images))
        return np.stack(images)
