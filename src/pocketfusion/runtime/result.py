"""What a generation gives back: pictures, how they came to be, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

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


@dataclass
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
