"""The forms in which a UNet is exported, and the plain one's calls as calls of such a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.wrappers import TimeEmbeddingAt
from pocketfusion.models.sampling import Guidance
from pocketfusion.runtime.manifest import TimeEmbedding

Call = dict[str, np.ndarray]


@dataclass(frozen=True)
class UNetForm:
    """Rows of a call, where the time embedding is computed, and whether the DDIM step is in the graph.

    See `wrappers.UNet` for the tensors. `batch` is 2 with classifier-free guidance in one call, 1 in two calls or
    with guidance embedded or folded.
    """

    batch: int
    time_embedding: TimeEmbeddingAt = "inside"
    scheduler_step: bool = False

    @property
    def output(self) -> str:
        """The name of the file's output."""
        return "prev_sample" if self.scheduler_step else "noise_pred"

    def calls(self, call: Mapping[str, np.ndarray], time_proj: torch.nn.Module) -> list[Call]:
        """Calls of the file whose outputs, one after the other, are the rows of the plain UNet's `call`.

        With the DDIM step in the graph, the coefficients (scale, 0, 1) give back the prediction: of the negative
        prompt with scale 0, of the prompt with scale 1.
        """
        rows = len(call["timestep"])
        inputs = dict(call)
        if self.time_embedding == "outside":
            inputs["timestep_embedding"] = time_proj(torch.from_numpy(inputs.pop("timestep"))).numpy()
        parts = [{key: value[i : i + self.batch] for key, value in inputs.items()} for i in range(0, rows, self.batch)]
        if not self.scheduler_step:
            return parts
        result = []
        for part in parts:
            for scale in range(self.batch) if self.batch == 2 else (1,):
                coefficients = np.array([[scale, 0.0, 1.0]], np.float32)
                result.append({**part, "sample": part["sample"][:1], "step_coefficients": coefficients})
        return result


def unet_form(guidance: Guidance, target: str, two_calls: bool = False, scheduler_step: bool = False) -> UNetForm:
    """The form for `target`: on GPUs the time embedding comes from outside, as fp16 sines are wrong.

    Raises PocketfusionError for a step in the graph whose two predictions are two calls' outputs.
    """
    batch = 2 if guidance == "classifier-free" and not two_calls else 1
    if scheduler_step and two_calls and guidance == "classifier-free":
        raise PocketfusionError(
            "--scheduler-step guides in the UNet's graph, and --two-calls asks for the two predictions one after the "
            "other: leave one of them out"
        )
    return UNetForm(batch, "outside" if target == "litert-gpu" else "inside", scheduler_step)


def time_embedding_spec(unet: Any) -> TimeEmbedding:
    """How the runtime computes `timestep_embedding`, from the UNet's config."""
    config = unet.config
    return TimeEmbedding.made(
        dim=config.block_out_channels[0],
        flip_sin_to_cos=config.flip_sin_to_cos,
        downscale_freq_shift=config.freq_shift,
    )


def joined(outputs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The file's outputs [N, ...], `counts` of them for each plain call, as [calls, rows, H, W, C]."""
    result, start = [], 0
    for count in counts:
        result.append(np.concatenate(outputs[start : start + count]))
        start += count
    return np.stack(result)
