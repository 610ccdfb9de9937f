"""A run shown where people look: accelerate's trackers (TensorBoard, W&B, trackio, ...) beside the run's own files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Trackers:
    """What a run's trackers are told; nothing at all without any, or on another process than the first."""

    def __init__(self, accelerator: Any, run: Path, settings: dict[str, Any], names: Iterable[str]):
        self.names = list(names)
        self.accelerator = accelerator
        if self.names:
            config = {
                key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
            }
            accelerator.init_trackers("pocketfusion", config=config, init_kwargs={"wandb": {"name": run.name}})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of a step."""
        if self.names:
            self.accelerator.log(values, step=step)

    def picture(self, step: int, file: Path) -> None:
        """A preview, for trackers that show pictures."""
        if not self.names:
            return
        pixels = np.asarray(Image.open(file).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                how = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"preview": pixels}, step=step, **how)

    def finish(self) -> None:
        """Lets them write what they hold; `Accelerator.end_training` would end the process group too."""
        for tracker in self.accelerator.trackers if self.names else ():
            tracker.finish()
