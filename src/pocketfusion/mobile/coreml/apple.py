"""The resource layout of Apple's Swift package StableDiffusion (github.com/apple/ml-stable-diffusion): its names of
files, its networks' tensors, its tokenizer's files.

What the package asks for, read in its sources: the text encoder has one input, ids as floats, and the output
`last_hidden_state`; the UNet two rows, the negative prompt's first, NCHW, states [2, D, 1, T]; the decoder gets
latents that Swift has divided by 0.18215 already. Everything else it does itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.target_options import SCALE  # unless an app sets `decoderScaleFactor`
from pocketfusion.mobile.wrappers import nchw

NAMES = {"text_encoder": "TextEncoder", "unet": "Unet", "decoder": "VAEDecoder"}
Call = dict[str, np.ndarray]


class AppleTextEncoder(nn.Module):
    """`input_ids` float32 [1, T] -> `last_hidden_state` [1, T, D]."""

    def __init__(self, wrapped: Any):
        super().__init__()
        self.text_encoder = wrapped.text_encoder

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.text_encoder(input_ids.to(torch.int32))[0]}


class AppleUNet(nn.Module):
    """`sample` [2, C, H, W], `timestep` [2], `encoder_hidden_states` [2, D, 1, T] -> `noise_pred` [2, C, H, W]."""

    def __init__(self, wrapped: Any):
        super().__init__()
        self.unet = wrapped.unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        states = encoder_hidden_states.squeeze(2).transpose(1, 2)
        return {"noise_pred": self.unet(sample, timestep, states, return_dict=False)[0]}


class AppleDecoder(nn.Module):
    """`z` [1, C, H, W], latents over `SCALE` -> `image` [1, 3, 8H, 8W] in [-1, 1]."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.decoder = wrapped

    def forward(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image": nchw(self.decoder(latents=SCALE * z.permute(0, 2, 3, 1))["image"])}


_WRAPPERS: dict[str, type[nn.Module]] = {
    "text_encoder": AppleTextEncoder,
    "unet": AppleUNet,
    "decoder": AppleDecoder,
}


def wrap(network: str, module: nn.Module) -> nn.Module:
    """A bundle's wrapped network (`mobile.wrappers`) with the package's tensors in place of the bundle's."""
    return _WRAPPERS[network](module).eval()


def inputs(network: str, call: Mapping[str, np.ndarray]) -> Call:
    """A bundle's inputs as the package gives them."""
    if network == "text_encoder":
        return {"input_ids": call["input_ids"].astype(np.float32)}
    if network == "decoder":
        return {"z": np.ascontiguousarray(call["latents"].transpose(0, 3, 1, 2)) / np.float32(SCALE)}
    states = call["encoder_hidden_states"].transpose(0, 2, 1)[:, :, None]
    sample = np.ascontiguousarray(call["sample"].transpose(0, 3, 1, 2))
    return {"sample": sample, "timestep": call["timestep"], "encoder_hidden_states": np.ascontiguousarray(states)}


def output(network: str, found: np.ndarray) -> np.ndarray:
    """The package's output as the bundle's."""
    return found if network == "text_encoder" else found.transpose(0, 2, 3, 1)


def write_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Path]:
    """CLIP's `vocab.json` and `merges.txt` at `folder`, by their names in the manifest.

    Raises PocketfusionError for a tokenizer that is no byte-pair encoding.
    """
    said = json.loads(tokenizer.to_str())
    model = said["model"]
    if model.get("type") != "BPE":
        raise PocketfusionError(
            f"--layout apple needs CLIP's byte-pair tokenizer, and this folder's is {model.get('type')}: choose "
            "--layout bundle"
        )
    files = {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}
    vocabulary = dict(model["vocab"]) | {one["content"]: one["id"] for one in said["added_tokens"]}
    files["vocab"].write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    files["merges"].write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return files
