"""What `compare` measured, as its JSON file holds it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pocketfusion import __version__
from pocketfusion.evaluate.metrics import Estimate


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Pair(_Record):
    """One prompt drawn by both. `guidance_delta` is `mobile.gate.guidance_delta` on the stock pipeline's own latents;
    `latents_sqnr_db` follow the steps; `scores` have stock's and the bundle's by the scorer's name."""

    prompt: str
    seed: int
    psnr_db: float
    ssim: float
    latents_sqnr_db: list[float]
    guidance_delta: float | None
    scores: dict[str, tuple[float, float]]
    warnings: list[str]


class Score(_Record):
    """Mean CLIP scores of both sides, and of the bundle's minus stock's, with 95 % intervals over prompts."""

    stock: Estimate
    bundle: Estimate
    difference: Estimate


class Compared(_Record):
    """One bundle against the folder; `pairs` have the worst first. Sizes are bytes, seconds medians of a picture."""

    name: str
    path: str
    sha256: str
    exported_from: Literal["this folder", "another folder", "not said"]
    weights: dict[str, str]
    size: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    psnr_db: dict[str, float]  #: median, p5 (5 % of the prompts are below), worst
    ssim: float  #: median
    guidance_delta: float | None  #: the median prompt's
    latents_sqnr_db: list[float]  #: medians, by step
    scores: dict[str, Score]
    seconds: dict[str, float]  #: stock, bundle
    passed: bool | None  #: None without a threshold
    pairs: list[Pair]


class Comparison(_Record):
    """Everything that was compared, and how."""

    format: str = "pocketfusion-comparison"
    version: int = 1
    pocketfusion: str = __version__
    diffusers: str
    machine: str
    threads: int
    folder: dict[str, Any]  #: name, sha256, size of its networks' folders in bytes, unet: its class
    scorers: dict[str, dict[str, Any]]
    min_psnr_db: float | None
    bundles: list[Compared]

    @property
    def passed(self) -> bool:
        """Whether no bundle is below the threshold, if there is one."""
        return all(one.passed is not False for one in self.bundles)
