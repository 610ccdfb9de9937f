"""Where an evaluation's captions and real pictures come from: our own data or MS-COCO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.images import CaptionedReference, SetsReference

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
