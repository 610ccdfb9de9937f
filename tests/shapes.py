"""A captioned data set drawn here: coloured squares and discs, in the packed format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pocketfusion.artefact import sha256_file

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "orange": (250, 150, 30)}
SIZE = 64


def picture(shape: str, colour: str, radius: int) -> np.ndarray:
    """One shape on white, uint8 [64, 64, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    inside = np.maximum(abs(x), abs(y)) < radius if shape == "square" else x**2 + y**2 < radius**2
    return np.where(inside[..., None], COLOURS[colour], 255).astype(np.uint8)


def make_shapes(path: Path) -> Path:
    """Writes the folder and returns its path."""
    path.mkdir()
    images, rows = [], []
    splits = ["train"] * 5 + ["val_combo", "test_combo", "val_concept", "train_scene"]
    for shape in ("square", "disc"):
        for colour in COLOURS:
            for number, split in enumerate(splits):
                images.append(picture(shape, colour, 8 + 2 * number))
                rows.append(
                    {
                        "id": f"{colour}-{shape}-{number}",
                        "kind": "drawing",
                        "split": split,
                        "style": "plain",
                        "label": f"{colour} {shape}",
                        "captions": [f"{colour} {shape}", f"a {colour} {shape}"],
                        "flip": True,
                    }
                )
    np.save(path / "images_64.npy", np.stack(images))
    (path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        n: {"sha256": sha256_file(path / n), "size": (path / n).stat().st_size}
        for n in ("images_64.npy", "index.jsonl")
    }
    manifest = {"format": "pocketfusion-images", "version": 1, "name": "shapes", "sizes": [SIZE], "files": files}
    manifest["licences"] = [{"what": "Drawings plain", "spdx": "CC0-1.0", "attribution": "nobody"}]
    (path / "dataset.json").write_text(json.dumps(manifest))
    return path
