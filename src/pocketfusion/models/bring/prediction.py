"""What a checkpoint's UNet predicts, epsilon or v, and on which noise schedule: files of weights rarely say so.

In this order: what is asked for; a marker or metadata in the file; for SD-1, epsilon, as all that were published with
it; for SD-2, whose 512-px models predict epsilon and 768-px models v with the same shapes, a measurement. At the last
time step z_t is nearly noise alone, so a network that predicts the noise gives back what it is given (A1111's loader
tells them apart at the same step); one that predicts v gives about minus the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors import safe_open

from pocketfusion.errors import PocketfusionError
from pocketfusion.recognise import Checkpoint

PredictionType = Literal["epsilon", "v_prediction"]
#: Correlation of a UNet's answer to noise at the last step with that noise: above, it predicts it; below, it does not.
EPSILON_ABOVE, V_BELOW = 0.9, 0.5
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_ROUNDING = 5e-3  #: of a bfloat16 near 1; the two schedules differ by more
_SIZE = 16  #: of the latents of the measurement, a multiple of every UNet's factor


@dataclass(frozen=True)
class Prediction:
    """What a UNet predicts, in words why that is known, and whether its schedule ends without signal."""

    kind: PredictionType
    why: str
    zero_snr: bool = False


def stated_prediction(checkpoint: Checkpoint, asked: PredictionType | None) -> Prediction | None:
    """What is asked for, else what the file says, else SD-1's; None for an SD-2 that says nothing."""
    zero_snr = _zero_snr(checkpoint)
    if asked is not None:
        return Prediction(asked, "asked for", zero_snr)
    if "v_pred" in checkpoint.tensors:
        return Prediction("v_prediction", "the file has the marker v_pred", zero_snr)
    said = checkpoint.metadata
    for key, values in (
        ("modelspec.prediction_type", {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}),
        ("ss_v_parameterization", {"true": "v_prediction", "false": "epsilon"}),
    ):
        if (value := str(said.get(key, "")).lower()) in values:
            return Prediction(values[value], f"the file's metadata: {key} is {value}", zero_snr)  # type: ignore[arg-type]
    architecture = str(said.get("modelspec.architecture", "")).lower()
    if architecture.startswith("stable-diffusion-v2-"):
        kind: PredictionType = "v_prediction" if architecture.endswith("-v") else "epsilon"
        return Prediction(kind, f"the file's metadata: modelspec.architecture is {architecture[:60]}", zero_snr)
    if not checkpoint.linear:
        return Prediction("epsilon", "SD-1's, as the file says nothing else", zero_snr)
    return None


def measured_prediction(checkpoint: Checkpoint, correlation: float) -> Prediction:
    """By `answer_to_noise`; raises PocketfusionError between the two kinds' ranges."""
    zero_snr = _zero_snr(checkpoint)
    measured = f"measured: its answer to noise correlates {correlation:.2f} with it"
    if correlation > EPSILON_ABOVE:
        return Prediction("epsilon", measured, zero_snr)
    if correlation < V_BELOW:
        return Prediction("v_prediction", measured, zero_snr)
    raise PocketfusionError(
        f"{checkpoint.file} does not say what it predicts, and its answer to noise correlates {correlation:.2f} with "
        f"it (epsilon above {EPSILON_ABOVE}, v below {V_BELOW}): give --prediction-type epsilon or v_prediction"
    )


@torch.no_grad()
def answer_to_noise(unet_folder: Path) -> float:
    """Correlation of the UNet's output for pure noise at the last time step, text states 0, with that noise."""
    unet = UNet2DConditionModel.from_pretrained(unet_folder, torch_dtype=torch.bfloat16, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, _SIZE, _SIZE, generator=generator)
    states = torch.zeros(1, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
    answer = unet(noise.to(unet.dtype), 999, states).sample.float()
    pair = torch.stack([noise.flatten(), answer.flatten()]).nan_to_num()
    return float(torch.nan_to_num(torch.corrcoef(pair)[0, 1]))


def scheduler(prediction: Prediction) -> DDIMScheduler | PNDMScheduler:
    """The sampler's configuration as published folders have it: PNDM for epsilon, DDIM for v."""
    if prediction.kind == "epsilon" and not prediction.zero_snr:
        return PNDMScheduler(**_BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    return DDIMScheduler(
        **_BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction.kind,
        rescale_betas_zero_snr=prediction.zero_snr,
        timestep_spacing="trailing" if prediction.zero_snr else "leading",
    )


def _zero_snr(checkpoint: Checkpoint) -> bool:
    """Whether the file's marker, metadata or schedule says that the last step has no signal (arXiv 2305.08891).

    Raises PocketfusionError for a schedule that is neither Stable Diffusion's nor this one.
    """
    if "ztsnr" in checkpoint.tensors or str(checkpoint.metadata.get("ss_zero_terminal_snr")).lower() == "true":
        return True
    if "alphas_cumprod" not in checkpoint.tensors:
        return False
    with safe_open(checkpoint.file, framework="pt") as weights:
        found = weights.get_tensor("alphas_cumprod").float().numpy().ravel()
    distance = {}
    for zero_snr in (False, True):
        wanted = DDIMScheduler(**_BETAS, rescale_betas_zero_snr=zero_snr).alphas_cumprod.numpy()
        distance[zero_snr] = float(abs(found - wanted).max()) if found.shape == wanted.shape else 1.0
    if min(distance.values()) < _ROUNDING:
        return distance[True] < distance[False]
    raise PocketfusionError(
        f"{checkpoint.file} was trained on another noise schedule than Stable Diffusion's: its alphas_cumprod has "
        f"{found.size} steps that end at {float(found[-1]) if found.size else 0:.4g}, which is not supported"
    )
