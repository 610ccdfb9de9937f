"""Captioned pictures in memory-mapped arrays with an index: what the trainers read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.licences import LicenceNote

FORMAT, VERSION = "pocketfusion-images", 1


class CaptionedImages:
    """Pictures and their captions.

    `images`: uint8 [N, size, size, 3], RGB. `rows`: one dictionary a picture with at least `captions` (a list, the
    plainest first), `split` and `flip` (whether the mirrored picture still fits its caption).
    """

    def __init__(
        self,
        images: np.ndarray,
        rows: Sequence[dict],
        name: str,
        fingerprint: str,
        licences: Sequence[LicenceNote] = (),
    ):
        self.images, self.rows, self.name, self.fingerprint = images, list(rows), name, fingerprint
        self.licences = tuple(licences)  #: of the pictures, as far as the data set states them

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Width and height in pixels."""
        return self.images.shape[1]

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """Split name → indices of its pictures."""
        names = np.array([row["split"] for row in self.rows])
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    def indices(self, splits: Iterable[str]) -> np.ndarray:
        """Sorted indices of all pictures in `splits`; raises PocketfusionError if none of them exists here."""
        chosen = [self.splits[name] for name in splits if name in self.splits]
        if not chosen:
            raise PocketfusionError(
                f"{self.name} has no split named {' or '.join(splits)}: it has {', '.join(self.splits)}"
            )
        return np.sort(np.concatenate(chosen))


def open_packed(path: Path, size: int, *, verify: bool = False) -> CaptionedImages:
    """Opens a folder that `pocketfusion data` wrote, at one of its sizes (pixels).

    Raises PocketfusionError if a file is missing, altered (with `verify`) or damaged, or the size was not built.
    """
    try:
        manifest = json.loads((path / "dataset.json").read_text())
    except ValueError:
        raise PocketfusionError(f"{path / 'dataset.json'} is not valid JSON: build the data set again") from None
    if manifest.get("format") != FORMAT or manifest.get("version", 0) > VERSION:
        raise PocketfusionError(f"{path} was not made by this version of pocketfusion data: build it again")
    if size not in manifest["sizes"]:
        sizes = ", ".join(map(str, manifest["sizes"]))
        raise PocketfusionError(f"{path} has no pictures of {size} px (it has {sizes}): build it with --size {size}")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"]:
            raise PocketfusionError(f"{file} is missing or truncated: build the data set again")
        if verify and sha256_file(file) != entry["sha256"]:
            raise PocketfusionError(f"{file} was altered since it was built: build the data set again")
    images = np.load(path / f"images_{size}.npy", mmap_mode="r")
    rows = [json.loads(line) for line in (path / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    fingerprint = (
        manifest["files"][f"images_{size}.npy"]["sha256"][:16] + manifest["files"]["index.jsonl"]["sha256"][:16]
    )
    licences = [LicenceNote(**entry) for entry in manifest.get("licences", [])]
    return CaptionedImages(images, rows, f"{manifest['name']} at {size} px", fingerprint, licences)
