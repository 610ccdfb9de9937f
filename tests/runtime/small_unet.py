"""Bundles whose UNet is a few layers, in each of the forms that a manifest can name: all must draw one picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from pocketfusion.artefact import sha256_file

DIM = 16  #: of the timestep's embedding
TIME = {"dim": DIM, "flip_sin_to_cos": True, "downscale_freq_shift": 0.0}


class SmallUNet(nn.Module):
    """Two convolutions between which time and text are added: `sample` [B, H, W, 4] -> the prediction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.time, self.text = nn.Linear(DIM, 8), nn.Linear(32, 8)

    def predict(self, sample: torch.Tensor, embedding: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(sample.permute(0, 3, 1, 2))
        h = h + (self.time(embedding) + 4 * self.text(states.mean(1)))[:, :, None, None]
        return self.conv_out(torch.tanh(h)).permute(0, 2, 3, 1)


class Plain(SmallUNet):
    def forward(self, sample, timestep, encoder_hidden_states):
        embedding = get_timestep_embedding(timestep, DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
        return {"noise_pred": self.predict(sample, embedding, encoder_hidden_states)}


class OutsideTime(SmallUNet):
    def forward(self, sample, timestep_embedding, encoder_hidden_states):
        return {"noise_pred": self.predict(sample, timestep_embedding, encoder_hidden_states)}


class Folded(SmallUNet):
    """Guidance and the DDIM step in the graph, as `step_coefficients` (guidance_scale, a, b) say."""

    def forward(self, sample, timestep_embedding, encoder_hidden_states, step_coefficients):
        both = self.predict(torch.cat([sample, sample]), timestep_embedding, encoder_hidden_states)
        uncond, cond = both[:1], both[1:]
        scale, a, b = (step_coefficients[:, i : i + 1, None, None] for i in range(3))
        return {"prev_sample": a * sample + b * (uncond + scale * (cond - uncond))}


class Embedded(OutsideTime):
    """With the guidance scale's embedding beside the time's."""

    def forward(self, sample, timestep_embedding, encoder_hidden_states, timestep_cond):
        return super().forward(sample, timestep_embedding + timestep_cond, encoder_hidden_states)


def make_bundles(tiny: Path, folder: Path) -> dict[str, Path]:
    """Bundles `plain` (batch 2), `single` (batch 1), `outside` (embedding computed by the runtime) and `folded`."""

    def tensors(batch: int, outside: bool) -> dict[str, list[int]]:
        t = {"timestep_embedding": [batch, DIM]} if outside else {"timestep": [batch]}
        return {"sample": [batch, 8, 8, 4], **t, "encoder_hidden_states": [batch, 32, 32]}

    return {
        "plain": _make(tiny, folder / "plain", Plain(), tensors(2, False), "noise_pred", None),
        "single": _make(tiny, folder / "single", Plain(), tensors(1, False), "noise_pred", None),
        "outside": _make(tiny, folder / "outside", OutsideTime(), tensors(2, True), "noise_pred", TIME),
        "folded": make_folded(tiny, folder / "folded"),
    }


def make_embedded(tiny: Path, path: Path) -> Path:
    """A bundle whose guidance is embedded, of batch 1."""
    inputs = {"sample": [1, 8, 8, 4], "timestep_embedding": [1, DIM], "encoder_hidden_states": [1, 32, 32]}
    _make(tiny, path, Embedded(), {**inputs, "timestep_cond": [1, DIM]}, "noise_pred", TIME)
    manifest = json.loads((path / "bundle.json").read_text())
    del manifest["files"]["empty_prompt_embeds"]
    (path / "bundle.json").write_text(json.dumps(manifest | {"guidance": "embedded"}))
    return path


def make_folded(tiny: Path, path: Path) -> Path:
    """The bundle `folded`: guidance and the scheduler's step in the graph."""
    inputs = {"sample": [1, 8, 8, 4], "timestep_embedding": [2, DIM], "encoder_hidden_states": [2, 32, 32]}
    return _make(tiny, path, Folded(), {**inputs, "step_coefficients": [1, 3]}, "prev_sample", TIME)


def _make(
    tiny: Path, path: Path, module: nn.Module, inputs: dict[str, list[int]], output: str, time: dict[str, Any] | None
) -> Path:
    import litert_torch

    shutil.copytree(tiny, path)
    samples = {name: torch.zeros(shape) for name, shape in inputs.items()}
    litert_torch.convert(module.eval(), sample_kwargs=samples).export(str(path / "unet.tflite"))
    manifest = json.loads((path / "bundle.json").read_text())
    file = path / "unet.tflite"
    manifest["files"]["unet"].update(sha256=sha256_file(file), size=file.stat().st_size)
    manifest["networks"]["unet"].update(
        inputs=[{"name": name, "shape": shape, "dtype": "float32"} for name, shape in inputs.items()],
        outputs=[{"name": output, "shape": inputs["sample"], "dtype": "float32"}],
    )
    if time is not None:
        manifest["time_embedding"] = time
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path
