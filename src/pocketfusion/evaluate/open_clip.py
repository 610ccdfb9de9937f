"""Any model of open_clip from a local checkpoint, as a judge or for the CLIP score at full size."""

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
from pocketfusion.evaluate.weights import read_weights


class OpenClip:
    """open_clip's model `name` (SnapFusion's is ViT-g-14) as a judge; nothing is downloaded and nothing unpickled.

    Raises PocketfusionError if open_clip or the checkpoint is missing or they do not fit.
    """

    def __init__(self, name: str, checkpoint: Path, batch: int = 32):
        if find_spec("open_clip") is None:
            raise PocketfusionError(f"the judge {name} needs open_clip: pip install open_clip_torch")
        try:
            import open_clip
        except ImportError as error:  # it needs torchvision, which an install without dependencies leaves out
            raise PocketfusionError(f"open_clip is installed but does not load ({error}): install it whole") from None
        weights = read_weights(checkpoint, f"weights of open_clip's {name}")
        try:
            model: Any
            model, _, self._preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
            model.load_state_dict(weights)
            self._tokenize = open_clip.get_tokenizer(name)
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
