"""What a stage's call is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pocketfusion.data.latents.reading import is_cache
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_dataset, open_training_data
from pocketfusion.recipe import Recipe
from pocketfusion.train.place import StageRun

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """A stage at work. `recipe`: with its own settings; `inputs`: role → paths, each perhaps with @STEPS."""

    recipe: Recipe
    options: Any
    inputs: Mapping[str, tuple[str, ...]]
    place: StageRun
    cache: Path  #: latents and prompt states, shared by the stages
    skip_bad: bool  #: leave pictures out that cannot be read
    progress: Progress

    def path(self, role: str) -> Path:
        """The one path of a role."""
        return Path(self.inputs[role][0])

    def maybe(self, role: str) -> Path | None:
        """The one path of a role that may be missing."""
        return Path(self.inputs[role][0]) if role in self.inputs else None

    @property
    def pictures(self) -> CaptionedImages:
        """The data at the recipe's size."""
        return _opened(self.path("data"), self.recipe.data.size, self.skip_bad)

    @property
    def latents(self) -> CaptionedImages:
        """The same for stages that need latents alone: a cache of them will do."""
        path, size = self.path("data"), self.recipe.data.size
        return open_training_data(path, size) if is_cache(path) else self.pictures


@lru_cache(maxsize=1)  # a folder of pictures is read once for all stages
def _opened(path: Path, size: int, skip_bad: bool) -> CaptionedImages:
    return open_dataset(path, size, skip_bad=skip_bad)


@dataclass(frozen=True)
class Made:
    """What a stage gave: its scores, whether it is finished, the samples and seconds of all its training."""

    scores: dict[str, float]
    finished: bool = True
    samples: int = 0
    seconds: float = 0.0
