"""Guidance at generation: what it asks of the UNet, and which settings a bundle's kind of guidance can follow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Manifest

Array = npt.NDArray[np.float32]


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
