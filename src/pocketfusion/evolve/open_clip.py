"""A judge for full size: any model of open_clip, from a local checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from pocketfusion.errors import PocketfusionError


class OpenClip:
    """open_clip's model `name` (SnapFusion's is ViT-g-14) as a judge; nothing is downloaded and nothing unpickled.

    Raises PocketfusionError if open_clip or the checkpoint is missing or they do not fit.
    """

    def __init__(self, name: str, checkpoint: Path, batch: int = 32):
        if find_spec("open_clip") is None:
            raise PocketfusionError(f"the judge {name} needs open_clip: pip install open_clip_torch")
        if not checkpoint.is_file() or checkpoint.suffix != ".safetensors":
            raise PocketfusionError(
                f"there is no safetensors checkpoint of {name} at {checkpoint}: fetch it from where open_clip's "
                "list of pretrained models says"
            )
        import open_clip
        from safetensors.torch import load_file

        try:
            model: Any = open_clip.create_model(name, pretrained=None)
            model.load_state_dict(load_file(checkpoint))
            self._tokenize = open_clip.get_tokenizer(name)
            config = open_clip.get_model_preprocess_cfg(model)
            self._preprocess = open_clip.image_transform_v2(open_clip.PreprocessCfg(**config), is_train=False)
        except Exception as error:
            raise PocketfusionError(
                f"{checkpoint} is no checkpoint of open_clip's {name} ({str(error).splitlines()[0][:120]})"
            ) from None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.batch = model.to(self.device).eval(), batch

    @torch.no_grad()
    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] → (embeddings, unit embeddings), both [N, E]."""
        parts = []
        for start in range(0, len(images), self.batch):
            pictures = [self._preprocess(Image.fromarray(image)) for image in images[start : start + self.batch]]
            parts.append(self.model.encode_image(torch.stack(pictures).to(self.device)).float().cpu())
        features = torch.cat(parts)
        return features.numpy(), F.normalize(features, dim=-1).numpy()

    @torch.no_grad()
    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → unit embeddings [N, E]."""
        parts = []
        for start in range(0, len(captions), self.batch):
            tokens = self._tokenize(list(captions[start : start + self.batch])).to(self.device)
            parts.append(F.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu())
        return torch.cat(parts).numpy()
