"""CLIP models from local files: a folder in the layout of transformers, or a checkpoint of open_clip's.

Published OpenCLIP models come in both layouts (laion/CLIP-ViT-g-14-laion2B-s34B-b88K among them), with equal numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from pocketfusion.artefact import sha256_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.weights import read_weights
from pocketfusion.folder import check_finite

# of CLIP's training pictures (Radford et al. 2021), used by OpenCLIP too
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TransformersClip:
    """Unit embeddings of pictures and captions."""

    def __init__(self, folder: Path, batch: int = 32):
        """Raises PocketfusionError if `folder` holds no CLIP model in safetensors, or a weight is NaN."""
        from transformers import AutoTokenizer, CLIPModel

        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
            if kind != "clip":
                raise ValueError(f"its config.json says model_type {kind!r}")
            model: Any = CLIPModel.from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._mean, self._std = _normalisation(folder)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PocketfusionError(
                f"{folder} holds no CLIP model that can be read ({reason[:120]}): it needs config.json, "
                "model.safetensors and the tokenizer's files"
            ) from None
        check_finite(model, str(folder))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.batch = model.to(self.device).eval(), batch
        self.size: int = model.config.vision_config.image_size
        self._tokens: int = model.config.text_config.max_position_embeddings
        pickled = tuple(file.name for file in folder.iterdir() if file.suffix in (".bin", ".md", ".pth"))
        self.sha256 = sha256_folder(folder, exclude=pickled)  # of what is read

    def preprocessing(self) -> str:
        """For the result file."""
        return f"{self.size} px, Pillow bicubic; mean {self._mean}, std {self._std}"

    @torch.no_grad()
    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Square pictures, uint8 [N, H, H, 3] → (embeddings, unit embeddings), both [N, E]."""
        mean, std = np.array(self._mean, np.float32), np.array(self._std, np.float32)
        parts = []
        for start in range(0, len(images), self.batch):
            pictures = [Image.fromarray(image) for image in images[start : start + self.batch]]
            resized = [picture.resize((self.size, self.size), Image.Resampling.BICUBIC) for picture in pictures]
            pixels = np.stack([(np.asarray(picture, np.float32) / 255 - mean) / std for picture in resized])
            seen = self.model.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))
            parts.append(self.model.visual_projection(seen.pooler_output).cpu())
        features = torch.cat(parts)
        return features.numpy(), F.normalize(features, dim=-1).numpy()

    @torch.no_grad()
    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → unit embeddings [N, E]; longer ones are cut."""
        parts = []
        for start in range(0, len(captions), self.batch):
            tokens = self._tokenizer(
                list(captions[start : start + self.batch]),
                padding="max_length",
                truncation=True,
                max_length=self._tokens,
                return_tensors="pt",
            ).to(self.device)
            read = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            parts.append(F.normalize(self.model.text_projection(read.pooler_output), dim=-1).cpu())
        return torch.cat(parts).numpy()


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the folder's `preprocessor_config.json`, or CLIP's."""
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return tuple(given.get("image_mean", _MEAN)), tuple(given.get("image_std", _STD))


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
