"""Bundles for the browser's engine, and the pictures that Python draws with them: made when the tests run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import sha256_file
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.pipeline import Pipeline

#: Of the embedded bundle: what each exercises is in its settings.
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red apple, noto style", "seed": 3},
    {"prompt": "ΣΊΣΥΦΟΣ 苹果 🍎", "seed": 2**32 - 1, "steps": 2, "guidance": 1},
    {"prompt": "a cat", "negativePrompt": "blue", "seed": 5, "steps": 3, "sampler": "euler-ancestral", "count": 2},
    {"prompt": "two happy dogs", "seed": 6, "steps": 4, "guidance": 3.5, "sampler": "dpmpp-2m-karras"},
]
#: Of the small bundles, one for each form of UNet.
SMALL = {"prompt": "a red cat", "negativePrompt": "blue", "seed": 11, "steps": 3, "guidance": 4.0}
FORMS = ("plain", "single", "outside", "folded")


def make(folder: Path, forms: dict[str, Path]) -> None:
    """Fills `folder` with the bundles' folders and drawn.json: each request, where, and its pictures' pixels."""
    paths = {"emoji": embedded_bundle()}
    paths |= {name: Path(shutil.copytree(path, folder / name)) for name, path in forms.items()}
    for_gpu(paths["outside"], folder / "gpu")
    paths["gpu"] = folder / "gpu"
    cases = [{"bundle": "emoji", "request": request} for request in REQUESTS]
    cases += [{"bundle": form, "request": SMALL} for form in (*FORMS, "gpu")]
    pipelines: dict[str, Pipeline] = {}
    for case in cases:
        name, request = case["bundle"], case["request"]
        pipeline = pipelines.setdefault(name, Pipeline.load(paths[name], 1))
        result = pipeline.generate(
            request["prompt"],
            negative_prompt=request.get("negativePrompt", ""),
            seed=request["seed"],
            num_images=request.get("count", 1),
            num_inference_steps=request.get("steps"),
            guidance_scale=request.get("guidance"),
            sampler=request.get("sampler"),
        )
        case["pictures"] = [np.asarray(image).ravel().tolist() for image in result.images]
        case["size"] = list(result.images[0].size)
        case["hash"] = pipeline.bundle.hash
    places = {name: str(path) for name, path in paths.items()}
    (folder / "drawn.json").write_text(json.dumps({"bundles": places, "cases": cases}))


def for_gpu(source: Path, path: Path) -> None:
    """A copy of a small bundle as `export --target litert-gpu` marks one: with what its networks give for noise."""
    from pocketfusion.mobile import gate
    from pocketfusion.mobile.bundle_extras import known_result
    from pocketfusion.mobile.convert import DEFAULT_SIGNATURE

    shutil.copytree(source, path)
    manifest = Bundle.open(source).manifest
    known = []
    for name in ("unet", "decoder"):
        spec = getattr(manifest.networks, name)
        about = (manifest.scheduler, manifest.defaults.guidance_scale, manifest.time_embedding)
        file = path / f"{name}.tflite"

        def run(inputs: list, output: str, file: Path = file) -> np.ndarray:
            return gate.run(file, inputs, output, DEFAULT_SIGNATURE)

        known.append(known_result(run, spec.inputs, spec.outputs[0].name, *about))
    write_self_check(path, np.concatenate(known))


def write_self_check(path: Path, values: np.ndarray) -> None:
    """Makes `values` the bundle's self-check, and the bundle one for GPUs."""
    file = path / "selfcheck.f32"
    file.write_bytes(values.astype("<f4").tobytes())
    manifest = json.loads((path / "bundle.json").read_text())
    entry = {"path": file.name, "sha256": sha256_file(file), "size": file.stat().st_size}
    manifest["files"]["selfcheck"] = entry
    manifest["target"] = "litert-gpu"
    (path / "bundle.json").write_text(json.dumps(manifest))
