"""Systems under test: whatever turns prompts and seeds into pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocketfusion.errors import PocketfusionError


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are drawn; arguments as diffusers names them."""

    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    batch: int = 64

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise PocketfusionError(
                f"--steps {self.num_inference_steps} is below 1: give the number of steps, such as 25"
            )
        if not 0 <= self.guidance_scale < float("inf"):
            raise PocketfusionError(f"--guidance {self.guidance_scale} is no guidance scale: give a number such as 4")


class System(Protocol):
    """One model under test, whatever it runs on."""

    image_size: int

    def identity(self) -> dict[str, Any]:
        """What a result file says of it: kind, name, hash."""

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplerSettings,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Prompts and noise seeds → uint8 [N, H, W, 3]; `on_batch` hears how many are done."""


class ModelFolder:
    """A model folder through stock diffusers networks in torch, on the GPU if there is one."""

    def __init__(self, path: Path):
        """Raises PocketfusionError if it is not a sound model folder."""
        import torch
        from diffusers import DDIMScheduler

        from pocketfusion.folder import folder_hash, load_pipeline
        from pocketfusion.models.text_encoder import TextEncoder

        pipeline: Any = load_pipeline(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.unet, self.vae = pipeline.unet.to(device).eval(), pipeline.vae.to(device).eval()
        self.sha256 = folder_hash(path)
        self.text = TextEncoder(pipeline.text_encoder.to(device), pipeline.tokenizer, self.sha256)
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.image_size = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
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
        """DDIM (η = 0); noise from numpy's PCG64(seed) per picture, as the phone runtime draws it."""
        from pocketfusion.train.sample import sample_images

        return sample_images(
            self.unet, self.vae, self.text, self.scheduler, prompts, seeds, **asdict(settings), on_batch=on_batch
        )
