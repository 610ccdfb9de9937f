"""A captioned data set drawn here in a moment, for tests and trials: coloured squares and discs, packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import atomic_folder, sha256_file

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "orange": (250, 150, 30)}
_SPLITS = (*["train"] * 5, "val_combo", "test_combo", "val_concept", "train_scene")


def picture(shape: str, colour: str, radius: int, size: int) -> np.ndarray:
    """One shape on white, uint8 [size, size, 3]; `radius` in pixels."""
    y, x = np.mgrid[:size, :size] - size // 2
    inside = np.maximum(abs(x), abs(y)) < radius if shape == "square" else x**2 + y**2 < radius**2
    return np.where(inside[..., None], COLOURS[colour], 255).astype(np.uint8)


def make_shapes(path: Path, size: int = 64, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes 72 pictures of `size` pixels and their captions into the folder `path`; returns its `dataset.json`."""
    images, rows = [], []
    for shape in ("square", "disc"):
        for colour in COLOURS:
            for number, split in enumerate(_SPLITS):
                images.append(picture(shape, colour, (8 + 2 * number) * size // 64, size))
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
    with atomic_folder(path, overwrite=overwrite) as partial:
        names = (f"images_{size}.npy", "index.jsonl")
        np.save(partial / names[0], np.stack(images))
        (partial / names[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {n: {"sha256": sha256_file(partial / n), "size": (partial / n).stat().st_size} for n in names}
        manifest: dict[str, Any] = {"format": "pocketfusion-images", "version": 1, "name": "shapes", "sizes": [size]}
        manifest |= {"count": len(rows), "files": files}
        manifest["licences"] = [{"what": "Drawings plain", "spdx": "CC0-1.0", "attribution": "nobody"}]
        (partial / "dataset.json").write_text(json.dumps(manifest))
    return manifest
