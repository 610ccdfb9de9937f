"""How a model folder is meant to be sampled: its steps, its guidance scale, and what guidance costs it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.runtime.manifest import Guidance

SAMPLING = "sampling.json"

__all__ = ["SAMPLING", "Guidance", "Sampling", "read_sampling", "usual_sampling", "write_sampling"]


class Sampling(BaseModel):
    """The contents of `sampling.json`, which a stage that changes them writes into its model folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_inference_steps: int = Field(gt=0)
    guidance_scale: float = Field(ge=0)
    guidance: Guidance = "classifier-free"
    guidance_range: tuple[float, float] | None = None  #: the scales that an embedded one was distilled for


def read_sampling(folder: Path) -> Sampling | None:
    """What the folder says, or None if it says nothing; raises PocketfusionError if the file is damaged."""
    file = folder / SAMPLING
    if not file.is_file():
        return None
    try:
        return Sampling.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, ValueError):
        raise PocketfusionError(f"{file} is damaged: restore it from its source or remove it") from None


def usual_sampling(folder: Path) -> Sampling:
    """What the folder says, else how its kind of model is drawn: LCM and TCD in 4 steps, Turbo in 1, others in 25.

    LCM (arXiv 2310.04378) and TCD (2402.19159) are known by their schedulers, LCM at diffusers' 8.5 where the UNet
    takes the scale, and without guidance where it does not; Turbo (arXiv 2311.17042) by Euler's `trailing` spacing, as
    its folders have it.
    """
    if (stated := read_sampling(folder)) is not None:
        return stated
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    embedded = read_json(folder / "unet" / "config.json").get("time_cond_proj_dim") is not None
    kind: Guidance = "embedded" if embedded else "classifier-free"
    name = str(scheduler.get("_class_name"))
    if name in ("LCMScheduler", "TCDScheduler"):
        return Sampling(num_inference_steps=4, guidance_scale=8.5 if embedded else 1.0, guidance=kind)
    if name.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing":
        return Sampling(num_inference_steps=1, guidance_scale=0.0, guidance=kind)
    return Sampling(num_inference_steps=25, guidance_scale=4.0, guidance=kind)


def write_sampling(folder: Path, sampling: Sampling) -> None:
    """Writes `sampling.json` into the folder."""
    write_json(folder / SAMPLING, sampling.model_dump(mode="json", exclude_none=True))
