"""MS-COCO as published: the official folder with a fixed list of captions as a reference to score against."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pocketfusion.data.pictures import PICTURES, read_picture
from pocketfusion.data.rows import LeftOut
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.coco_list import Annotations, Caption, find_annotations, is_plain, list_sha256
from pocketfusion.evaluate.images import ImageProtocol

Real = Literal["all", "listed"]  #: what FID compares with: the split's whole set, or the listed captions' pictures


class CocoReference:
    """A caption list with its pictures (see `images.CaptionedReference`), which are read when they are asked for."""

    def __init__(
        self,
        annotations: Annotations,
        chosen: Sequence[Caption],
        folder: Path,
        real: Sequence[str],
        image_protocol: ImageProtocol,
        settings: dict[str, Any],
        notes: list[str],
    ):
        """`chosen`: the list; `folder`: where the pictures are; `real`: file names of FID's real side; `settings`: how
        the list and the real side were chosen, for the result file."""
        self.folder, self.chosen, self.real, self.notes = folder, list(chosen), list(real), notes
        self.name = f"MS-COCO {annotations.file.stem}"
        self.image_protocol, self.image_size = image_protocol, image_protocol.size
        self.ids = [Path(entry.file_name).stem for entry in chosen]
        self.captions = [entry.text for entry in chosen]
        self.real_count = len(real)
        sizes = "\n".join(f"{name} {(folder / name).stat().st_size}" for name in self.real)
        self._protocol = {
            "data": {"name": "MS-COCO", "annotations": annotations.file.name, "sha256": annotations.sha256},
            **settings,
            "samples": len(chosen),
            "caption": "one an image, both by hash of seed and id",
            "list_sha256": list_sha256(chosen),
            "real_count": len(real),
            "real_sha256": sha256(sizes.encode()).hexdigest(),  # of file names and sizes
            "image": image_protocol.describe(),
        }
        self.fingerprint = sha256(json.dumps(self._protocol, sort_keys=True).encode()).hexdigest()

    def protocol(self) -> dict[str, Any]:
        """See `CaptionedReference`."""
        return self._protocol

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """See `CaptionedReference`."""
        return self.image_protocol.generated(images)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `CaptionedReference`; raises PocketfusionError naming a picture that cannot be read."""
        return self._read([self.chosen[int(i)].file_name for i in indices])

    def real_images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `CaptionedReference`; raises PocketfusionError naming a picture that cannot be read."""
        return self._read([self.real[int(i)] for i in indices])

    def _read(self, names: Sequence[str]) -> np.ndarray:
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
            return np.stack(list(pool.map(lambda name: self._picture(name), names)))

    def _picture(self, name: str) -> np.ndarray:
        with LeftOut(skip=False).or_raise():
            picture = read_picture(self.folder / name)
        return self.image_protocol.real(picture)


def _is_bad(file: Path) -> bool:
    try:
        read_picture(file)
        return False
    except PocketfusionError:
        return True


def _pictures_folder(folder: Path, annotations: Path) -> Path:
    """`folder/val2014` for captions_val2014.json, or `folder` itself."""
    split = annotations.stem.removeprefix("captions_")
    return folder / split if (folder / split).is_dir() else folder


def _named(count: int, what: str, names: Sequence[str]) -> str:
    return f"{count:,} {what} ({', '.join(names[:3])}{', …' if count > 3 else ''})."


def open_coco(
    folder: Path,
    annotations: Path | None,
    samples: int,
    size: int = 256,
    seed: int = 0,
    skip_bad: bool = False,
    real: Real = "all",
    on_checked: Callable[[int, int], None] = lambda done, total: None,
) -> CocoReference:
    """The official layout (`val2014/` beside `annotations/captions_val2014.json`; 2017 likewise) or a flat folder.

    256 px is BK-SDM's protocol, which has JPEG files in between; for other sizes no paper says more than the size.
    `real`: FID against all pictures of the annotation file that are there (BK-SDM: 40,504), or against those of the
    list. With `skip_bad` all of them are decoded first (`on_checked`: done, total) and unreadable ones left out of
    both sides. What is missing or left over is in the notes.

    Raises PocketfusionError if a file or folder is missing or not in COCO's format, the list is longer than there are
    captioned images, or a picture of the list is missing.
    """
    if not folder.is_dir():
        raise PocketfusionError(f"there is no COCO folder at {folder}: it holds val2014/ and annotations/")
    if size < 32:
        raise PocketfusionError(f"pictures of {size} px are too small to score: COCO is scored at 256 or 512 px")
    notes = []
    listed = Annotations(annotations or find_annotations(folder))
    pictures = _pictures_folder(folder, listed.file)
    try:
        present = {file.name for file in pictures.iterdir() if file.suffix.lower() in PICTURES and is_plain(file.name)}
    except OSError as error:
        raise PocketfusionError(f"{pictures} cannot be listed ({error.strerror})") from None
    if not present:
        raise PocketfusionError(f"{pictures} holds no pictures: unpack the split's zip file there")
    chosen = listed.choose(samples, seed)
    absent = [entry.file_name for entry in chosen if entry.file_name not in present]
    if absent:
        raise PocketfusionError(
            f"{len(absent)} of the {samples} listed captions have no picture in {pictures} "
            f"(first: {', '.join(absent[:3])}): unpack the whole split there"
        )
    expected = set(listed.images.values())
    captioned = {listed.images[id_] for id_ in listed.captions if id_ in listed.images}
    if gone := sorted(captioned - present):
        notes.append(_named(len(gone), "captioned images have no picture here", gone))
    if bare := sorted(present - captioned):
        notes.append(_named(len(bare), "pictures have no caption and are not in the list", bare))
    if strays := sorted(str(id_) for id_ in listed.captions if id_ not in listed.images):
        notes.append(_named(len(strays), "image ids have captions but no entry in 'images'", strays))
    of_real = sorted(expected & present) if real == "all" else [entry.file_name for entry in chosen]
    if skip_bad:
        needed, bad = sorted({*of_real, *(entry.file_name for entry in chosen)}), []
        with ThreadPoolExecutor() as pool:
            for done, (name, is_bad) in enumerate(
                zip(needed, pool.map(lambda name: _is_bad(pictures / name), needed), strict=True), 1
            ):
                bad += [name] if is_bad else []
                on_checked(done, len(needed))
        if bad:
            known_bad = set(bad)
            chosen = [entry for entry in chosen if entry.file_name not in known_bad]
            of_real = [name for name in of_real if name not in known_bad]
            notes.append(_named(len(bad), "unreadable pictures were left out", bad))
        if len(chosen) < 2:
            raise PocketfusionError(f"{pictures} has {len(bad)} unreadable pictures and fewer than 2 others listed")
    # BK-SDM's files are .jpg, written with Pillow's default quality
    protocol = ImageProtocol(size, jpeg_quality=75 if size == 256 else None)
    settings = {"seed": seed, "samples_asked": samples, "real": real}
    return CocoReference(listed, chosen, pictures, of_real, protocol, settings, notes)
