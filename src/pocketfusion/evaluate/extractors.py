"""What pictures and captions are scored with: our judge, or the field's Inception-v3 and CLIP from local weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash

if TYPE_CHECKING:
    from pocketfusion.models.dual_encoder import Judge

CLIP_MODEL = "ViT-g-14"  #: SnapFusion's and BK-SDM's; BK-SDM's weights are laion2b_s34b_b88k
CLIP_SCORE = "100 × mean cosine (BK-SDM prints the mean cosine itself)"


class Extractor(Protocol):
    """Features for FID and KID, and embeddings that pictures and captions share for the CLIP score."""

    name: str
    feature_dimensions: int

    def identity(self) -> dict[str, Any]:
        """Everything that its numbers depend on, for the result file and for keys of caches."""

    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] → (features [N, feature_dimensions] fp32, unit embeddings [N, E])."""

    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → unit embeddings [N, E]."""


class JudgeExtractor:
    """This project's judge: both its features and its embeddings. Its scores compare with its own only."""

    def __init__(self, path: Path):
        """Raises PocketfusionError as `open_judge` does."""
        self.judge = open_judge(path)
        self.name = f"judge {path.resolve().name}"
        self.feature_dimensions = 2 * self.judge.model.config.widths[-1]
        self._sha256 = folder_hash(path)

    def identity(self) -> dict[str, Any]:
        """See `Extractor`."""
        size = self.judge.image_size
        return {
            "kind": "judge",
            "name": self.name,
            "sha256": self._sha256,
            "resize": f"{size} px, Pillow Lanczos",
            "clip_score": "100 × mean cosine of this judge",
        }

    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Extractor`."""
        return self.judge.image_features(images)

    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """See `Extractor`."""
        return self.judge.text_embeddings(captions)


def open_judge(path: Path) -> Judge:
    """Loads the judge, on the GPU if there is one.

    Raises PocketfusionError if it is missing or damaged, or was trained with a text encoder of another width.
    """
    import torch

    from pocketfusion.models.dual_encoder import load_judge

    judge = load_judge(path)
    wanted, given = judge.model.config.text_width, judge.text.width
    if wanted != given:
        raise PocketfusionError(
            f"the judge {path} was trained with a text encoder of width {wanted}, not {given}: "
            "train it again with 'pocketfusion train-judge'"
        )
    judge.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return judge


class StandardExtractor:
    """FID's Inception-v3 (pool3) and a CLIP model, from local weights: what the papers score with."""

    def __init__(self, inception: Path, clip: Path, clip_model: str = CLIP_MODEL):
        """`clip`: a folder with a CLIP model in transformers' layout, or a checkpoint of open_clip's `clip_model`.

        Raises PocketfusionError if weights are missing, cannot be read safely or belong to another network, or if
        open_clip is needed and not installed.
        """
        from pocketfusion.evaluate.inception import FEATURES, load_inception

        self._inception = load_inception(inception)
        self.feature_dimensions = FEATURES
        self._clip, described = open_clip_model(clip, clip_model)
        self.name = f"Inception-v3 and {described['name']}"
        self._identity = {
            "kind": "standard",
            "name": self.name,
            "inception": {
                "sha256": sha256_file(inception),
                "features": f"pool3, {FEATURES}",
                "preprocessing": "299 px, bilinear without antialiasing, to [-1, 1], as pytorch-fid",
            },
            "clip": described,
            "clip_score": CLIP_SCORE,
        }

    def identity(self) -> dict[str, Any]:
        """See `Extractor`."""
        return self._identity

    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Extractor`."""
        return self._inception.features(images), self._clip.image_features(images)[1]

    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """See `Extractor`."""
        return self._clip.text_embeddings(captions)


def open_clip_model(clip: Path, clip_model: str = CLIP_MODEL) -> tuple[Any, dict[str, Any]]:
    """A CLIP model with `image_features` and `text_embeddings`, and what a result file says of it.

    `clip` is a folder in transformers' layout or a checkpoint of open_clip's `clip_model`. Raises PocketfusionError if
    it is missing or cannot be read safely, or if open_clip is needed and not installed.
    """
    if not clip.exists():
        raise PocketfusionError(f"there is no CLIP model at {clip}: pocketfusion downloads nothing, give a local one")
    if clip.is_dir():
        from pocketfusion.evaluate.clip import TransformersClip

        model = TransformersClip(clip)
        described = {"name": clip.resolve().name, "layout": "transformers", "sha256": model.sha256}
        return model, described | {"preprocessing": model.preprocessing()}
    from pocketfusion.evaluate.clip import OpenClip

    described = {"name": clip_model, "layout": "open_clip", "preprocessing": "open_clip's own for these weights"}
    return OpenClip(clip_model, clip), described | {"sha256": sha256_file(clip)}


def open_extractor(
    judge: Path | None, inception: Path | None, clip: Path | None, clip_model: str = CLIP_MODEL
) -> Extractor:
    """The judge, or Inception-v3 with CLIP: whichever is given.

    Raises PocketfusionError unless exactly one of them is, whole, and as they do.
    """
    if judge is not None:
        if inception is not None or clip is not None:
            raise PocketfusionError("--judge and --inception/--clip are two ways to score: give one of them")
        return JudgeExtractor(judge)
    if inception is None and clip is None:
        raise PocketfusionError("nothing to score with: give --judge FOLDER, or --inception FILE and --clip PATH")
    if inception is None or clip is None:
        missing = "--inception FILE (for FID)" if inception is None else "--clip PATH (for the CLIP score)"
        raise PocketfusionError(f"a curve needs both networks: give {missing} too")
    return StandardExtractor(inception, clip, clip_model)
