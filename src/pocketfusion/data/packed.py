"""Captioned pictures in memory-mapped arrays with an index: what the trainers read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import sha256_file
from pocketfusion.data.files import json_lines, parse_json, read_text
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote

FORMAT, VERSION = "pocketfusion-images", 1


class CaptionedImages:
    """Pictures and their captions.

    `images`: uint8 [N, size, size, 3], RGB, or what gives that by index. `rows`: one dictionary a picture with
    `captions` (a list, the plainest first), `split`, `flip` (whether the mirrored picture still fits its caption)
    and perhaps more.
    """

    def __init__(
        self,
        images: Any,
        rows: Sequence[dict],
        name: str,
        fingerprint: str,
        licences: Sequence[LicenceNote] = (),
        notes: Sequence[str] = (),
    ):
        self.images, self.rows, self.name, self.fingerprint = images, list(rows), name, fingerprint
        self.licences = tuple(licences)  #: of the pictures, as far as the data set states them
        self.notes = list(notes)  #: what was left out or not read, for the user and the results' readers

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Width and height in pixels."""
        return self.images.shape[1]

    @cached_property
    def flips(self) -> np.ndarray:
        """Which pictures may be mirrored, bool [N]."""
        return np.array([row["flip"] for row in self.rows], bool)

    @property
    def buckets(self) -> np.ndarray:
        """The number of each picture's bucket, [N]: pictures of one size are of one."""
        return np.zeros(len(self), np.uint16)

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
                f"{self.name} has no split named {' or '.join(splits)}: it has {', '.join(self.splits)} "
                "(give some pictures such a 'split'; of two pictures or more without one, some are held out)"
            )
        return np.sort(np.concatenate(chosen))


def open_packed(path: Path, size: int, *, verify: bool = False) -> CaptionedImages:
    """Opens a folder that `pocketfusion data` wrote, at one of its sizes (pixels).

    Raises PocketfusionError if a file is missing, altered (with `verify`) or damaged, or the size was not built.
    """
    manifest = parse_json(read_text(path / "dataset.json"), str(path / "dataset.json"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise PocketfusionError(f"{path} was not made by this version of pocketfusion data: build it again")
    try:
        sizes, files = list(manifest["sizes"]), {str(name): dict(entry) for name, entry in manifest["files"].items()}
        if size not in sizes:
            raise PocketfusionError(
                f"{path} has no pictures of {size} px (it has {', '.join(map(str, sizes))}): "
                f"build it with --size {size}"
            )
        for name, entry in files.items():
            file = path / name
            if Path(name).name != name or not file.is_file() or file.stat().st_size != entry["size"]:
                raise PocketfusionError(f"{file} is missing or truncated: build the data set again")
            if verify and sha256_file(file) != entry["sha256"]:
                raise PocketfusionError(f"{file} was altered since it was built: build the data set again")
        images = np.load(path / f"images_{size}.npy", mmap_mode="r")
        index = path / "index.jsonl"
        rows = [_row(parse_json(line, where), where) for where, line in json_lines(read_text(index), str(index))]
        if images.dtype != np.uint8 or images.shape != (len(rows), size, size, 3):
            raise PocketfusionError(f"{path}: images_{size}.npy and index.jsonl do not fit: build the data set again")
        fingerprint = files[f"images_{size}.npy"]["sha256"][:16] + files["index.jsonl"]["sha256"][:16]
        licences = [LicenceNote(**entry) for entry in manifest.get("licences", [])]
        return CaptionedImages(images, rows, f"{manifest['name']} at {size} px", fingerprint, licences)
    except PocketfusionError:
        raise
    except Exception as error:  # a field of another type somewhere, or an array's header that numpy cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise PocketfusionError(f"{path} is damaged ({reason}): build the data set again") from None


def _row(values: Any, where: str) -> dict:
    kinds = {"id": str, "captions": list, "split": str, "flip": bool}
    if not isinstance(values, dict) or not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        raise PocketfusionError(f"{where} lacks id, captions, split or flip: build the data set again")
    if not all(isinstance(text, str) for text in values["captions"]):
        raise PocketfusionError(f"{where} has a caption that is no text: build the data set again")
    return values
