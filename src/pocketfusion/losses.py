"""The objectives as a library, for a training loop of one's own: docs/own-loop.md shows it.

UNets are diffusers' own or `ElasticUNet`, latents and states are tensors; no recipe, no data format, no loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pocketfusion.distill.consistency import consistency_loss, consistency_target, phase_times
from pocketfusion.distill.ddim import NoiseSchedule, add_noise, ddim_step, rollout, spans, v_of, v_target
from pocketfusion.distill.objectives import CFGAware, Mixed, Vanilla, distillation_loss, dynamic_scale, step_objective
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guided import guidance_embedding, guided_prediction, guided_predictor
from pocketfusion.train.elastic import random_blocks
from pocketfusion.train.recovery import StageFeatures, feature_loss
from pocketfusion.train.teacher import DenoisingObjective

__all__ = [
    "CFGAware",
    "DenoisingObjective",
    "Draws",
    "ElasticUNet",
    "Mixed",
    "NoiseSchedule",
    "StageFeatures",
    "Vanilla",
    "add_noise",
    "consistency_loss",
    "consistency_target",
    "ddim_step",
    "distillation_loss",
    "dynamic_scale",
    "feature_loss",
    "guidance_embedding",
    "guided_prediction",
    "guided_predictor",
    "phase_times",
    "random_blocks",
    "rollout",
    "spans",
    "step_objective",
    "v_of",
    "v_target",
]


@dataclass(frozen=True)
class Draws:
    """Random numbers of `count` samples from torch's `generator` (None: its default), as objectives ask for them."""

    count: int
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def indices(self) -> range:
        """The samples."""
        return range(self.count)

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), [count, *shape]."""
        return torch.rand(self.count, *shape, generator=self.generator)

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, [count, *shape]."""
        return torch.randn(self.count, *shape, generator=self.generator)

    def randint(self, high: int) -> torch.Tensor:
        """Uniform integers in [0, high), [count]."""
        return torch.randint(high, (self.count,), generator=self.generator)
