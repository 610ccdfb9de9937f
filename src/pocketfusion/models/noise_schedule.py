"""The noise schedule that a folder's model was trained on, whatever sampler's configuration the folder keeps."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, SchedulerMixin

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.models.loading import library_class

#: What says how the model was trained: it holds whatever class the file names.
_OF_THE_MODEL = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
#: What DDIM shares with other samplers: taken where the file's own class knows it, else off.
_OF_THE_SAMPLER = ("clip_sample", "thresholding", "set_alpha_to_one", "steps_offset", "timestep_spacing")
_OFF = {"clip_sample": False, "thresholding": False}


def ddim_scheduler(scheduler: Any) -> DDIMScheduler:
    """DDIM on the schedule of `scheduler`, of any of diffusers' classes.

    A key that its file lacks has its own class's default, and what only its own sampler does is left behind: so no
    model clips because DDIM would. A few-step model's class, LCM's, begins at pure noise: `trailing`; for `linspace`,
    which other samplers have by default, DDIM's own is taken. Raises PocketfusionError for flow matching and classes
    without betas.
    """
    said, kind = dict(scheduler.config), type(scheduler).__name__
    if "FlowMatch" in kind or said.get("use_flow_sigmas") or said.get("prediction_type") == "flow_prediction":
        raise PocketfusionError(
            f"the folder's scheduler ({kind}) is for flow matching, another process than Stable Diffusion 1 and 2's: "
            "its models are not supported"
        )
    missing = [key for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule") if key not in said]
    if missing:
        raise PocketfusionError(f"the folder's scheduler ({kind}) has no {missing[0]}: it is of another process")
    known = inspect.signature(type(scheduler).__init__).parameters
    values = {key: said[key] for key in _OF_THE_MODEL if key in said}
    values |= _OFF | {key: said[key] for key in _OF_THE_SAMPLER if key in said and key in known}
    if kind == "LCMScheduler":
        values["timestep_spacing"] = "trailing"
    elif values.get("timestep_spacing") == "linspace":
        del values["timestep_spacing"]
    return DDIMScheduler(**values)


def read_ddim_scheduler(folder: Path) -> DDIMScheduler:
    """`ddim_scheduler` of the model folder's own; raises PocketfusionError as it does, or if the file is damaged."""
    file = folder / "scheduler" / "scheduler_config.json"
    said = read_json(file)
    kind = library_class(diffusers, str(said.get("_class_name", "DDIMScheduler")), SchedulerMixin)
    try:
        return ddim_scheduler(kind.from_config(said))
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise PocketfusionError(f"{file} could not be read ({str(error)[:200]}): restore it from its source") from None
