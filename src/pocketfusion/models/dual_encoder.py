"""The judge: a small image-text dual encoder (CLIP's contrastive loss) that this project trains to score pictures.

It reads pictures with a small convolutional tower and captions with the frozen MiniLM's mean token state. It has never
seen held-out pictures. At full size open_clip takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.models.loading import load_part
from pocketfusion.models.text_encoder import TextEncoder, load_text_encoder
from pocketfusion.recipe import TextSettings


class _Block(nn.Module):
    """Two 3x3 convolutions with group norm and a residual path; halves the resolution."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(8, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, width_out)
        self.shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width_in, H, W] → [B, width_out, H/2, W/2]."""
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(y)) + self.shortcut(F.avg_pool2d(x, 2)))


class JudgeModel(ModelMixin, ConfigMixin):
    """Image tower, text head and temperature. Both towers give unit vectors of `embed_dim`."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        widths: tuple[int, ...] = (32, 64, 128, 192),
        text_width: int = 384,
        embed_dim: int = 128,
        text: dict | None = None,
        for_losses: bool = False,
    ):
        """`for_losses`: its features are trained against, so it must never score."""
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, stride=2)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.feature_norm = nn.LayerNorm(2 * widths[-1])
        self.image_head = nn.Linear(2 * widths[-1], embed_dim)
        self.text_head = nn.Sequential(nn.Linear(text_width, 256), nn.GELU(), nn.Linear(256, embed_dim))
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # CLIP's 1/0.07

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, S, S] in [-1, 1] → the stem's and every block's output [B, C, h, w]; S may differ from training."""
        found = [F.silu(self.stem(pixels))]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] in [-1, 1] → [B, F]: mean and maximum over positions, what the Fréchet distance uses."""
        x = self.maps(pixels)[-1]
        return self.feature_norm(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))

    def embed_images(self, features: torch.Tensor) -> torch.Tensor:
        """[B, F] → unit vectors [B, embed_dim]."""
        return F.normalize(self.image_head(features).float(), dim=-1)

    def embed_texts(self, pooled: torch.Tensor) -> torch.Tensor:
        """Mean token states [B, text_width] → unit vectors [B, embed_dim]."""
        return F.normalize(self.text_head(pooled).float(), dim=-1)

    def forward(self, pixels: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image embeddings, text embeddings, logit scale)."""
        return self.embed_images(self.features(pixels)), self.embed_texts(pooled), self.log_scale.exp().clamp(max=100)


def pool_states(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token states under the mask: [B, T, D], [B, T] → [B, D]."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


class Judge:
    """A trained judge with its text encoder, ready to score numpy pictures and captions."""

    def __init__(self, model: JudgeModel, text: TextEncoder):
        self.model, self.text = model.eval(), text

    @property
    def image_size(self) -> int:
        """Pixels it wants; other sizes are resized."""
        return self.model.config.image_size

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        size = self.image_size
        if images.shape[1:3] != (size, size):
            resized = [Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS) for image in images]
            images = np.stack([np.asarray(picture) for picture in resized])
        return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def image_features(self, images: np.ndarray, batch: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] → (features [N, F], unit embeddings [N, E]), fp32."""
        features, embeddings = [], []
        for start in range(0, len(images), batch):
            part = self.model.features(self._pixels(images[start : start + batch]).to(self.model.device))
            features.append(part.float().cpu().numpy())
            embeddings.append(self.model.embed_images(part).cpu().numpy())
        return np.concatenate(features), np.concatenate(embeddings)

    @torch.no_grad()
    def text_embeddings(self, captions: Sequence[str], batch: int = 128) -> np.ndarray:
        """Captions → unit embeddings [N, E], fp32."""
        parts = []
        for start in range(0, len(captions), batch):
            states, mask = self.text.encode(captions[start : start + batch])
            parts.append(self.model.embed_texts(pool_states(states, mask).to(self.model.device)).cpu().numpy())
        return np.concatenate(parts)


def load_judge(path: Path, *, for_losses: bool = False) -> Judge:
    """Loads a judge folder; raises PocketfusionError if it is not one, is damaged, or was trained for the other use.

    What a model was trained against must not score it: a judge `for_losses` only gives features.
    """
    if not (path / "config.json").is_file():
        raise PocketfusionError(f"there is no judge at {path}: train one with 'pocketfusion train-judge'")
    if read_json(path / "config.json").get("_class_name") != "JudgeModel":
        raise PocketfusionError(f"{path} is not a judge: its config.json names another class")
    try:
        model = load_part(JudgeModel, path)
    except PocketfusionError as error:
        raise PocketfusionError(f"the judge is damaged: {error}") from None
    if model.config.for_losses != for_losses:
        raise PocketfusionError(
            f"{path} was trained to give losses their features and must not score: name the recipe's other judge"
            if model.config.for_losses
            else f"{path} is the judge that scores and must not be trained against: train one with --for-losses"
        )
    return Judge(model, load_text_encoder(TextSettings.model_validate(model.config.text or {})))
