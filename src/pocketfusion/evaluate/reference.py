"""What systems are measured against: captions with their real pictures, under one image protocol.

They come from our own data or from MS-COCO (`coco`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.sets import EvaluationSet


@dataclass(frozen=True)
class ImageProtocol:
    """How real and generated pictures become the pictures that are scored: squares of `size` pixels.

    The whole picture is resized with Pillow's bicubic filter, its sides stretched to a square and nothing cropped, as
    BK-SDM's evaluation code does. With `jpeg_quality`, pictures pass through JPEG before (unless they come from a
    file) and after the resize, as they do there.
    """

    size: int
    jpeg_quality: int | None = None

    def real(self, picture: Image.Image) -> np.ndarray:
        """A picture from a file → uint8 [size, size, 3]."""
        resized = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(self._through_jpeg(resized))

    def generated(self, images: np.ndarray) -> np.ndarray:
        """Pictures as a system draws them, uint8 [N, H, W, 3] → uint8 [N, size, size, 3]."""
        if images.shape[1:3] == (self.size, self.size) and self.jpeg_quality is None:
            return images
        return np.stack([self.real(self._through_jpeg(Image.fromarray(image))) for image in images])

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        filter_ = "Pillow bicubic of the whole picture, sides stretched, no crop"
        return {"size": self.size, "resize": filter_, "jpeg_quality": self.jpeg_quality}

    def _through_jpeg(self, picture: Image.Image) -> Image.Image:
        if self.jpeg_quality is None:
            return picture
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.jpeg_quality)
        return Image.open(file).convert("RGB")


class CaptionedReference(Protocol):
    """Captions that every system draws, their own pictures, and the real pictures that FID compares with."""

    name: str
    image_size: int  #: pixels of what is scored; generated pictures are brought to it by `prepare`
    ids: list[str]  #: one a caption; noise seeds follow from them
    captions: list[str]
    notes: list[str]  #: what a reader of the scores must know of the data
    real_count: int  #: pictures that FID compares with; they may be more than the captions' own

    @property
    def fingerprint(self) -> str:
        """Changes with anything that a score against this reference depends on."""

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The captions' own pictures by their places in `ids`: uint8 [N, image_size, image_size, 3]."""

    def real_images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures of FID's real side, by number below `real_count`: uint8 [N, image_size, image_size, 3]."""

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Generated pictures of any size, uint8 [N, H, W, 3], under the image protocol."""

    def protocol(self) -> dict[str, Any]:
        """Everything that identifies the captions and pictures, for the result file."""


class SetsReference:
    """Sets of our own data (packed, shards, folders) as a reference: FID against the captions' own pictures."""

    def __init__(self, data: CaptionedImages, sets: Sequence[EvaluationSet]):
        self.data, self.sets = data, tuple(sets)
        self.name, self.image_size = data.name, data.size
        self.indices = np.concatenate([chosen.indices for chosen in self.sets])
        self.captions = [caption for chosen in self.sets for caption in chosen.captions]
        self.ids = [str(data.rows[i]["id"]) for i in self.indices]
        self.notes = list(data.notes)
        self.real_count = len(self.ids)
        self._protocol = ImageProtocol(data.size)

    @cached_property
    def fingerprint(self) -> str:
        """Of the data and of which of its pictures and captions are used."""
        listed = "\n".join(f"{id_}\0{caption}" for id_, caption in zip(self.ids, self.captions, strict=True))
        return sha256(f"{self.data.fingerprint}\n{listed}".encode()).hexdigest()

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `CaptionedReference`."""
        return np.asarray(self.data.images[self.indices[np.asarray(indices)]])

    real_images = images

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """See `CaptionedReference`."""
        return self._protocol.generated(images)

    def protocol(self) -> dict[str, Any]:
        """See `CaptionedReference`."""
        return {
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            "image_size": self.image_size,
            "sets": {part.name: [self.data.rows[i]["id"] for i in part.indices] for part in self.sets},
            "caption": "the plainest (first) of each picture",
            "real": "the pictures of the captions",
        }


SAMPLES, COCO_SAMPLES = 768, 30_000


@dataclass(frozen=True)
class ReferenceSource:
    """One of two folders, and which of its captions are drawn; see `evaluate --help`.

    Raises PocketfusionError unless exactly one of `data` and `coco` is given, or if `real` is unknown.
    """

    data: Path | None = None
    coco: Path | None = None
    sets: str = "test_combo"  #: of `data`: names with commas, pooled
    samples: int | None = None  #: of each set, or of COCO in all
    seed: int = 0
    annotations: Path | None = None
    size: int = 256
    real: str = "all"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if (self.data is None) == (self.coco is None):
            raise PocketfusionError("captions come from one place: give either --data FOLDER or --coco FOLDER")
        if self.real not in ("all", "listed"):
            raise PocketfusionError(f"--real {self.real} is unknown: choose all or listed")

    def open(
        self, drawn: int, on_checked: Callable[[int, int], None] = lambda done, total: None
    ) -> CaptionedReference:
        """The reference for systems that draw `drawn` pixels; `on_checked` hears how many COCO pictures were read.

        Raises PocketfusionError if the folder or a set is missing or damaged, or if COCO's pictures are scored at more
        pixels than are drawn.
        """
        if self.data is not None:
            from pocketfusion.data.sources import open_dataset
            from pocketfusion.evaluate.sets import choose_sets

            images = open_dataset(self.data, drawn, skip_bad=self.skip_bad)
            names = [name.strip() for name in self.sets.split(",") if name.strip()]
            return SetsReference(images, choose_sets(images, names, SAMPLES if self.samples is None else self.samples))
        from pocketfusion.evaluate.coco import open_coco

        assert self.coco is not None
        if self.size > drawn:
            raise PocketfusionError(
                f"the systems draw {drawn} px, which scoring at {self.size} px would enlarge: give --size {drawn}"
            )
        return open_coco(
            self.coco,
            self.annotations,
            COCO_SAMPLES if self.samples is None else self.samples,
            self.size,
            self.seed,
            self.skip_bad,
            "all" if self.real == "all" else "listed",
            on_checked,
        )
