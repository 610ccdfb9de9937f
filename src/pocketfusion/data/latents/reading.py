"""A cache of latents, opened: captioned pictures without the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import sha256_file
from pocketfusion.data.buckets import Bucket
from pocketfusion.data.latents.layout import (
    INDEX,
    MANIFEST,
    PART,
    PARTS,
    PLAN,
    ROWS,
    TABLE,
    Plan,
    check_part,
    read_json,
    records_file,
)
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote

_MAPS = 400  #: files kept open, below the usual limit of 1,024


class LatentCache(CaptionedImages):
    """Captions and latents by number, memory-mapped; memory: some tens of bytes a picture and what is asked for.

    Takes the place of the pictures that it was made of: at one square size it has their name and fingerprint.
    """

    def __init__(self, path: Path, plan: Plan, manifest: dict[str, Any]):
        self.path, self.plan, self.encoding = path, plan, plan.encoding
        self.index: np.ndarray = np.load(path / TABLE, mmap_mode="r", allow_pickle=False)
        if self.index.dtype != INDEX or self.index.shape != (manifest["count"],):
            raise PocketfusionError(f"{path / TABLE} does not fit {MANIFEST}: run the same 'data cache' again")
        for name, known in (("part", plan.parts), ("bucket", plan.encoding.buckets), ("split", manifest["splits"])):
            if len(self.index) and self.index[name].max() >= len(known):
                raise ValueError(f"{TABLE} names a {name} that there is not")
        licences = [LicenceNote(**entry) for entry in manifest["licences"]]
        notes, name, fingerprint = manifest["notes"], manifest["name"], manifest["fingerprint"]
        super().__init__(np.empty(0), (), name, fingerprint, licences, notes)
        self.rows = _Rows(self)  # type: ignore[assignment]  # a sequence, read line by line
        self.split_names = list(manifest["splits"])
        self._map = lru_cache(_MAPS)(self._open_map)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> int:
        """Pixels of the side of a square picture of the buckets' area."""
        return self.encoding.size

    @property
    def key(self) -> str:
        """SHA-256 of what it is made of, known without reading the latents."""
        return sha256(f"{self.fingerprint} {self.name} {self.encoding}".encode()).hexdigest()

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """See `CaptionedImages`."""
        numbers = np.asarray(self.index["split"])
        found = {name: np.flatnonzero(numbers == number) for number, name in enumerate(self.split_names)}
        return {name: indices for name, indices in sorted(found.items()) if len(indices)}

    @property
    def flips(self) -> np.ndarray:
        """Which pictures may be mirrored, bool [N]."""
        return np.asarray(self.index["flip"])

    @property
    def buckets(self) -> np.ndarray:
        """The number of each picture's bucket in `encoding.buckets`, [N]."""
        return np.asarray(self.index["bucket"])

    @property
    def images(self) -> np.ndarray:
        """There are none: raises PocketfusionError."""
        raise self.no_pictures()

    @images.setter
    def images(self, value: np.ndarray) -> None:
        pass

    def no_pictures(self) -> PocketfusionError:
        """What to say where pictures are needed."""
        return PocketfusionError(
            f"{self.path} is a cache of latents without pictures, and this needs them: "
            f"give the folder that it was made of ({self.plan.source})"
        )

    def latents(self, indices: np.ndarray, mirrored: np.ndarray | None = None, halved: bool = False) -> np.ndarray:
        """Means and standard deviations of pictures of one bucket, fp16 [B, 2C, h, w].

        `mirrored` [B]: of the mirror images, where a picture may be mirrored. `halved`: of half-size pictures.
        """
        entries = self.index[indices]
        buckets = np.unique(entries["bucket"])
        if len(buckets) != 1:
            raise ValueError(f"pictures of {len(buckets)} buckets have no latents of one shape")
        bucket = self.encoding.buckets[buckets[0]]
        records = entries["record"].astype(np.int64)
        if mirrored is not None:
            records += mirrored & entries["flip"]
        found = np.empty((len(entries), *self.encoding.shape(bucket, halved)), np.float16)
        for part in np.unique(entries["part"]):
            chosen = entries["part"] == part
            try:
                found[chosen] = self._map(int(part), bucket, halved)[records[chosen]]
            except IndexError:
                name = self.plan.parts[int(part)].name
                raise PocketfusionError(f"{self.path}: {TABLE} and {name} do not fit: make the cache again") from None
        return found

    def row(self, number: int) -> dict[str, Any]:
        """What is said of a picture: id, split, captions and more."""
        entry = self.index[number]
        start = int(entry["line"])
        line = self._map(int(entry["part"]), None, False)[start : start + int(entry["length"])]
        return json.loads(line.tobytes())["row"] | {"split": self.split_names[entry["split"]]}

    def _open_map(self, part: int, bucket: Bucket | None, halved: bool) -> np.ndarray:
        folder = self.path / PARTS / self.plan.parts[part].name
        try:
            if bucket is None:
                return np.memmap(folder / ROWS, np.uint8, "r")
            shape = self.encoding.shape(bucket, halved)
            flat = np.memmap(folder / records_file(bucket, halved), np.float16, "r")
            return flat.reshape(-1, *shape)
        except OSError as error:
            raise PocketfusionError(
                f"{folder} cannot be read ({error.strerror}): run the same 'data cache' again"
            ) from None

    def check_size(self, size: int) -> None:
        """Raises PocketfusionError if the pictures are of another size than a recipe's."""
        if self.size != size:
            raise PocketfusionError(
                f"{self.path} is a cache of pictures of {self.size} px and the recipe's data.size is {size}: "
                f"make one with --size {size}, or change the recipe"
            )

    def check_encoder(self, autoencoder: str, halved: bool) -> None:
        """Raises PocketfusionError if the latents are not those of the autoencoder whose encoder has this SHA-256."""
        if self.encoding.autoencoder != autoencoder:
            raise PocketfusionError(
                f"{self.path} holds latents of another autoencoder ({self.encoding.autoencoder[:12]} and not "
                f"{autoencoder[:12]}): make a cache with the model's own"
            )
        if halved and not self.encoding.halved:
            raise PocketfusionError(
                f"{self.path} has no latents of half-size pictures, which the recipe's half_size_until asks for: "
                "make it with --halved, or set half_size_until to 0"
            )


class _Rows(Sequence):
    """The rows of a cache, read when they are asked for."""

    def __init__(self, cache: LatentCache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self.cache.row(i) for i in range(*number.indices(len(self)))]
        return self.cache.row(range(len(self))[number])


def is_cache(path: Path) -> bool:
    """Whether a folder is a cache of latents, finished or not."""
    return (path / MANIFEST).is_file() or ((path / PLAN).is_file() and (path / PARTS).is_dir())


def open_cache(path: Path, *, verify: bool = False) -> LatentCache:
    """Opens a cache; raises PocketfusionError if it is not finished, or a part is missing, truncated or altered.

    Sizes are looked at, with `verify` every file's SHA-256.
    """
    if not (path / MANIFEST).is_file():
        raise PocketfusionError(f"{path} is a cache that is not finished: run its 'data cache' again")
    manifest, plan = read_json(path / MANIFEST), Plan.load(path)
    try:
        if list(manifest["parts"]) != [part.name for part in plan.parts]:
            raise PocketfusionError(f"{path}: {MANIFEST} and {PLAN} do not fit: run the same 'data cache' again")
        _check(path, manifest["files"], verify)
        for name, stated in manifest["parts"].items():
            folder = path / PARTS / name
            about = check_part(folder, plan.key)
            if sha256_file(folder / PART) != stated:
                raise PocketfusionError(f"{folder / PART} was altered: delete the part and run 'data cache' again")
            if verify:
                _check(folder, about["files"], True)
        return LatentCache(path, plan, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PocketfusionError(f"{path} is damaged ({error}): make it again") from None


def _check(folder: Path, files: dict[str, Any], verify: bool) -> None:
    for name, entry in files.items():
        file = folder / name
        if os.sep in name or not file.is_file() or file.stat().st_size != entry["size"]:
            raise PocketfusionError(f"{file} is missing or truncated: run the same 'data cache' again")
        if verify and sha256_file(file) != entry["sha256"]:
            raise PocketfusionError(
                f"{file} was altered since it was made: delete {folder} and run the same 'data cache' again"
            )
