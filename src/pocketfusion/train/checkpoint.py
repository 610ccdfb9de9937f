"""Checkpoints of the training loop in safetensors: weights, EMA, AdamW moments and the step, nothing pickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError

_STATE = ("step", "exp_avg", "exp_avg_sq")
_KEEP = 2


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, ema: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> Path:
    """Writes `folder/step_<step>` atomically and removes all but the newest two."""
    names = [name for name, _ in model.named_parameters()]
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        # a parameter that random depth has left out has fewer steps, or none
        moments.update({f"{key}:{name}": state[key].contiguous() for key in _STATE if key in state})
    path = folder / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(path, overwrite=True) as partial:
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
        save_file(
            {name: v.detach().contiguous() for name, v in zip(names, ema, strict=True)}, partial / "ema.safetensors"
        )
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step}))
    for old in sorted(folder.glob("step_*"))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if any."""
    return max(folder.glob("step_*"), default=None)


def load_checkpoint(path: Path, model: nn.Module, ema: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restores everything in place and returns the step; raises PocketfusionError if a file is damaged."""
    device = next(model.parameters()).device
    try:
        step = json.loads((path / "state.json").read_text())["step"]
        weights = load_file(path / "model.safetensors", device=str(device))
        averages = load_file(path / "ema.safetensors", device=str(device))
        moments = load_file(path / "optimizer.safetensors", device=str(device))
        model.load_state_dict(weights)
        for (name, parameter), average in zip(model.named_parameters(), ema, strict=True):
            average.copy_(averages[name])
            if f"step:{name}" in moments:
                state = {key: moments[f"{key}:{name}"].clone(memory_format=torch.preserve_format) for key in _STATE}
                if not optimizer.defaults.get("fused"):
                    state["step"] = state["step"].cpu()  # fused AdamW keeps its step beside the parameters
                optimizer.state[parameter] = state
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise PocketfusionError(
            f"the checkpoint {path} is damaged ({error.__class__.__name__}): delete it to resume from the one before"
        ) from None
    return step
