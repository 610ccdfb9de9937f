"""What a generation gives back: pictures, how they came to be, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

from pocketfusion.runtime.sheet import contact_sheet
from pocketfusion.runtime.specs import SamplerName


class Cancelled(Exception):
    """Raised by `Pipeline.generate` when its callback asked to stop; a callback may raise it too."""


@dataclass
class Timings:
    """Seconds. `load` is the pipeline's (verify, load, pack); `steps` has one entry per step of every picture.

    What `text`, `steps` and `decode` leave of `total` are callbacks and, in the modes that load while they draw,
    waiting for networks to be loaded and freed.
    """

    load: float
    text: float = 0.0
    steps: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    total: float = 0.0  #: of this call, without `load`


@dataclass(repr=False)
class GenerationResult:
    """Pictures and how they came to be; `seeds[i]` draws `images[i]` again with the same settings."""

    images: list[Image.Image]
    prompt: str
    negative_prompt: str
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    timings: Timings
    peak_rss: int | None  #: bytes, of the whole process so far; None where the system does not tell
    warnings: list[str]
    sampler: SamplerName
    eta: float | None = None  #: TCD's share of fresh noise; None with other samplers

    def __repr__(self) -> str:
        size, steps = "×".join(map(str, self.images[0].size)), self.num_inference_steps
        return (
            f"<GenerationResult: {len(self.images)} of {self.prompt!r}, {size} px, {steps} steps of {self.sampler}, "
            f"guidance {self.guidance_scale:g}, seeds {_span(self.seeds)}, {self.timings.total:.2f} s>"
        )

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture, or all of them on a sheet."""
        file = BytesIO()
        captions = [f"seed {seed}" for seed in self.seeds] or None
        shown = self.images[0] if len(self.images) == 1 else contact_sheet(self.images, captions)
        shown.save(file, format="PNG")
        return file.getvalue()


def _span(seeds: list[int]) -> str:
    return "of the latents given" if not seeds else f"{seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")
