"""What a generation leaves on disk: PNG files that say how they were made, and a record as JSON."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pocketfusion import __version__
from pocketfusion.artefact import atomic_file
from pocketfusion.runtime.pipeline import GenerationResult, Pipeline
from pocketfusion.runtime.runtimes import runtime_version


def save_png(image: Image.Image, path: Path, text: dict[str, Any]) -> None:
    """Writes `image` with `text` as PNG text chunks, atomically; equal arguments give equal bytes."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    with atomic_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def png_text(pipeline: Pipeline, result: GenerationResult, index: int) -> dict[str, Any]:
    """The text chunks of picture `index`: all that is needed to draw it again."""
    return {
        "prompt": result.prompt,
        "negative_prompt": result.negative_prompt,
        "seed": result.seeds[index],
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "sampler": result.sampler,
        **({} if result.eta is None else {"eta": result.eta}),
        "bundle": f"{pipeline.manifest.name} {pipeline.bundle.hash}",
        "Software": f"pocketfusion {__version__}",
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of the times given."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "count": len(seconds),
    }


def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(pipeline: Pipeline) -> dict[str, Any]:
    """What a measured time depends on: bundle, threads, processor and versions."""
    return {
        "bundle": {
            "name": pipeline.manifest.name,
            "path": str(pipeline.bundle.path),
            "sha256": pipeline.bundle.hash,
            "weights": {name: spec.weights for name, spec in pipeline.manifest.networks},
        },
        "threads": pipeline.num_threads,
        "cpu": cpu_name(),
        "runtime": runtime_version(pipeline.runtime),
        "python": platform.python_version(),
        "pocketfusion": __version__,
    }


def record(pipeline: Pipeline, result: GenerationResult, files: Sequence[Path], sheet: Path | None) -> dict[str, Any]:
    """The full record of a generation whose pictures were saved as `files`: times in seconds, sizes in bytes.

    Nothing is warmed up: the first step counts like the others.
    """
    timings = result.timings
    return {
        "prompt": result.prompt,
        "negative_prompt": result.negative_prompt,
        "seeds": result.seeds,
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "guidance": pipeline.manifest.guidance,
        "sampler": result.sampler,
        "eta": result.eta,
        "scheduler": pipeline.manifest.scheduler.model_dump(),
        "images": [str(file) for file in files],
        "contact_sheet": str(sheet) if sheet else None,
        "image_size": list(result.images[0].size),
        "seconds": {
            "load": timings.load,
            "text": timings.text,
            "step": spread(timings.steps),
            "decode": spread(timings.decode),
            "total": timings.total,
        },
        "peak_rss": result.peak_rss,
        "mode": pipeline.mode,
        "warnings": result.warnings,
        **environment(pipeline),
    }
