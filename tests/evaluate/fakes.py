"""A judge that knows colours and nothing else, and systems that draw what they are told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketfusion.data.shapes import COLOURS

NAMES = list(COLOURS)
VALUES = np.array([COLOURS[name] for name in NAMES], dtype=np.float32)


class ColourJudge:
    """Embeds a picture as how much of each named colour it shows, and a caption as the colours it names."""

    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(images, dtype=np.float32)[:, :, :, None]
        near = np.abs(pixels - VALUES).max(axis=-1) < 40
        counts = near.mean(axis=(1, 2))
        return counts * 100, _unit(counts + 1e-3)

    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        return _unit(np.array([[float(name in caption) for name in NAMES] for caption in captions]) + 1e-3)


def _unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


class FakeSystem:
    """Draws `pictures[prompt]`, or grey noise of the seed for a prompt it does not know."""

    image_size = 64
    batch = 64

    def __init__(self, pictures: dict[str, np.ndarray] | None = None):
        self.pictures = pictures or {}
        self.seeds: list[int] = []

    def identity(self) -> dict:
        return {"kind": "fake", "name": "fake", "sha256": "0" * 64}

    def draw(self, prompts, seeds, settings, on_batch=None) -> np.ndarray:
        self.seeds = list(seeds)
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            grey = np.random.default_rng(seed).integers(0, 256, (64, 64, 1), dtype=np.uint8).repeat(3, axis=2)
            images.append(self.pictures.get(prompt, grey))
        if on_batch:
            on_batch(len(images))
        return np.stack(images)
