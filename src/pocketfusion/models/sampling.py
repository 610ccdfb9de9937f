"""How a model folder is meant to be sampled: its steps, its guidance scale, and what guidance costs it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Guidance

SAMPLING = "sampling.json"

__all__ = ["SAMPLING", "Guidance", "Sampling", "read_sampling", "write_sampling"]


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


def write_sampling(folder: Path, sampling: Sampling) -> None:
    """Writes `sampling.json` into the folder."""
    write_json(folder / SAMPLING, sampling.model_dump(mode="json", exclude_none=True))
