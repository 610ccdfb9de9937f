"""The folder that diffusers' `OnnxStableDiffusionPipeline` loads: its names of files, its networks' tensors.

What the pipeline asks for, read in its sources: `text_encoder(input_ids)`, `unet(sample, timestep [1],
encoder_hidden_states)` and `vae_decoder(latent_sample)`, NCHW, any number of rows, latents that it has divided by
0.18215 already. It never calls the `vae_encoder` that it names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from pocketfusion.artefact import write_json
from pocketfusion.mobile.target_options import SCALE
from pocketfusion.mobile.wrappers import nchw

FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "decoder": "vae_decoder"}
#: Of each output's name.
OUTPUTS = {"text_encoder": "last_hidden_state", "unet": "out_sample", "decoder": "sample"}
_ROWS = {
    "text_encoder": ("input_ids",),
    "unet": ("sample", "encoder_hidden_states"),
    "decoder": ("latent_sample",),
}
Call = dict[str, np.ndarray]


class _TextEncoder(nn.Module):
    """`input_ids` int32 [B, T] -> `last_hidden_state` [B, T, D]."""

    def __init__(self, wrapped: Any):
        super().__init__()
        self.text_encoder = wrapped.text_encoder

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.text_encoder(input_ids)[0]}


class _UNet(nn.Module):
    """`sample` [B, C, H, W], `timestep` [1], `encoder_hidden_states` [B, T, D] -> `out_sample` [B, C, H, W]."""

    def __init__(self, wrapped: Any):
        super().__init__()
        self.unet = wrapped.unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"out_sample": self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]}


class _Decoder(nn.Module):
    """`latent_sample` [B, C, H, W], latents over 0.18215 -> `sample` [B, 3, 8H, 8W] in [-1, 1]."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.decoder = wrapped

    def forward(self, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": nchw(self.decoder(latents=SCALE * latent_sample.permute(0, 2, 3, 1))["image"])}


_WRAPPERS: dict[str, type[nn.Module]] = {"text_encoder": _TextEncoder, "unet": _UNet, "decoder": _Decoder}


def wrap(network: str, module: nn.Module) -> nn.Module:
    """A bundle's wrapped network (`mobile.wrappers`) with the pipeline's tensors in place of the bundle's."""
    return _WRAPPERS[network](module).eval()


def samples(network: str, given: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A bundle's sample inputs as the pipeline gives them, of two rows, as torch.export takes one row for a constant;
    and which axes are free."""
    call = inputs(network, {name: values.numpy() for name, values in given.items()})
    rows = _ROWS[network]
    tensors = {name: torch.from_numpy(values) for name, values in call.items()}
    tensors |= {name: torch.cat([tensors[name], tensors[name]])[:2].contiguous() for name in rows}
    free = {0: torch.export.Dim.AUTO}  # a named one would have to end at 63: diffusers copies larger batches once more
    return tensors, {name: free if name in rows else None for name in tensors}


def inputs(network: str, call: Mapping[str, np.ndarray]) -> Call:
    """A bundle's inputs as the pipeline gives them."""
    if network == "text_encoder":
        return {"input_ids": call["input_ids"]}
    if network == "decoder":
        return {"latent_sample": np.ascontiguousarray(call["latents"].transpose(0, 3, 1, 2)) / np.float32(SCALE)}
    sample = np.ascontiguousarray(call["sample"].transpose(0, 3, 1, 2))
    states = np.ascontiguousarray(call["encoder_hidden_states"])
    return {"sample": sample, "timestep": call["timestep"][:1], "encoder_hidden_states": states}


def output(network: str, found: np.ndarray) -> np.ndarray:
    """The pipeline's output as the bundle's."""
    return found if network == "text_encoder" else found.transpose(0, 2, 3, 1)


def write_index(folder: Path, out: Path) -> dict[str, Path]:
    """Tokenizer, scheduler and `model_index.json` of the model folder beside the networks in `out`; the files written
    by their names in the manifest."""
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(folder / part, out / part)
    scheduler = diffusers.DDIMScheduler.load_config(str(folder / "scheduler"))
    index = out / "model_index.json"
    network = ["diffusers", "OnnxRuntimeModel"]
    nothing = [None, None]
    write_json(
        index,
        {
            "_class_name": "OnnxStableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "requires_safety_checker": False,
            "safety_checker": nothing,
            "feature_extractor": nothing,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            **{name: network for name in FOLDERS.values()},
            "vae_encoder": nothing,
        },
    )
    written = [index, *(file for part in ("tokenizer", "scheduler") for file in sorted((out / part).iterdir()))]
    return {file.relative_to(out).as_posix(): file for file in written}
