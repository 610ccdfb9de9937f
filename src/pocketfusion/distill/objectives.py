"""Step distillation's objectives: which guidance a sample is distilled at, and how the losses are added.

SnapFusion (arXiv 2306.00980) section 4.2: L = L_dstl + γ L_ori, where L_dstl is L_vani or, with probability p, L_cfg.
The two differ in the guidance scale alone: L_vani has w = 1, L_cfg draws w, so a mixture is a draw of w.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pocketfusion.artefact import atomic_file
from pocketfusion.distill.ddim import Level, truncated_snr_in_v
from pocketfusion.train.batch import Batch


class StepObjective(Protocol):
    """Which guidance scale each sample of a batch is distilled at."""

    def guidance_scale(self, batch: Batch) -> torch.Tensor:
        """w [B], the same for teacher and student; where it is 1 only the conditional branch runs."""


@dataclass(frozen=True)
class Vanilla:
    """L_vani (eq. 8): the conditional branch alone."""

    def guidance_scale(self, batch: Batch) -> torch.Tensor:
        """Ones."""
        return torch.ones(len(batch.indices))


@dataclass(frozen=True)
class CFGAware:
    """L_cfg (eq. 9): teacher and student guided alike, w ~ U[low, high] for each sample."""

    low: float = 2.0
    high: float = 14.0

    def guidance_scale(self, batch: Batch) -> torch.Tensor:
        """Uniform numbers."""
        return self.low + (self.high - self.low) * batch.rand()


@dataclass(frozen=True)
class Mixed:
    """L_cfg with probability p, else L_vani (section 4.2).

    Drawn for each sample, where the paper's text can also be read as one draw for a whole batch: the expected loss is
    the same and its gradient is calmer.
    """

    probability: float
    guided: CFGAware

    def guidance_scale(self, batch: Batch) -> torch.Tensor:
        """Uniform numbers where the draw says so, ones elsewhere."""
        guided = batch.rand() < self.probability
        return torch.where(guided, self.guided.guidance_scale(batch), torch.ones(len(batch.indices)))


def step_objective(probability: float, low: float, high: float) -> StepObjective:
    """The objective of a probability p: vanilla at 0, CFG-aware at 1, mixed between."""
    if probability == 0:
        return Vanilla()
    guided = CFGAware(low, high)
    return guided if probability == 1 else Mixed(probability, guided)


def distillation_loss(
    v: torch.Tensor, target: torch.Tensor, at: Level, guidance_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over samples of max(α², σ²) |v − ṽ|², scalar in fp32: eq. 8's max(SNR, 1) |x̂ − x̃|² written in v.

    With `guidance_scale` [B] each sample's is divided by w² + (w − 1)², by which guidance multiplies the variance of
    independent errors of its two branches: ours, not the paper's. Unguided samples (w = 1) stay as they are.
    """
    error = truncated_snr_in_v(at).flatten() * (v.float() - target).square().flatten(1).mean(1)
    if guidance_scale is not None:
        w = guidance_scale.to(error.device).float()
        error = error / (w.square() + (w - 1).square())
    return error.mean()


def evenly_shared(total: int, share: float) -> torch.Tensor:
    """Which of a batch's samples are a `share` of it, spread evenly and at least one: bool [total]."""
    position = torch.arange(total)
    chosen = ((position + 1) * share).floor() > (position * share).floor()
    chosen[0] |= not bool(chosen.any())
    return chosen


def dynamic_scale(distilled: torch.Tensor, original: torch.Tensor) -> float:
    """What L_ori is multiplied by, before γ, to be of L_dstl's size; a constant for the gradient.

    Both are means over the whole step's batch, whatever the parts that it is done in.

    SnapFusion section 4.2 and appendix C: without it, L_ori outweighs a distillation loss that shrinks.
    """
    return distilled.item() / max(original.item(), 1e-12)


class TargetCache:
    """Tensors by training step, in a folder named by the hash of all they depend on; fp32 `.npy` files.

    Runs with the same teacher, data, seed, grid and guidance draws (another student, or another γ) find each other's.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = folder / f"targets-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: Batch, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives for this part of this step, on the CPU; read if an earlier run has written it."""
        file = self.folder / f"{batch.step:07d}-{batch.start}-{len(batch.indices)}of{batch.total}.npy"
        if file.is_file():
            return torch.from_numpy(np.load(file, allow_pickle=False))
        made = make()
        with atomic_file(file) as partial:
            np.save(partial, made.cpu().numpy())
        return made
