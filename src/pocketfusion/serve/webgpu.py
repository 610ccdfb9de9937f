"""The WebGPU form of a bundle: made once from the model folder that the bundle was exported from, and kept.

A bundle for CPUs has operations that WebGPU does not take, and its sibling is another export of the same folder: 40 MB
more for the embedded model. It is therefore neither in the package nor in the repository, but in the user's cache,
by the folder's hash, which every bundle's manifest names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import MANIFEST, NETWORKS, Bundle

TARGET = "litert-gpu"


def cached(model: str) -> Path:
    """Where the WebGPU bundle of the model folder with this hash is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketfusion"
    return cache / f"webgpu-{model[:16]}"


def with_siblings(bundles: Iterable[Bundle]) -> list[Bundle]:
    """The bundles, each with its WebGPU sibling behind it if the cache has one and it is not among them already."""
    given = list(bundles)
    models = {model for bundle in given if bundle.manifest.target == TARGET if (model := _model(bundle))}
    found = []
    for bundle in given:
        found.append(bundle)
        model = _model(bundle)
        if model and model not in models and (cached(model) / MANIFEST).is_file():
            models.add(model)
            found.append(Bundle.open(cached(model)))
    return found


def make_sibling(folder: Path, bundles: Iterable[Bundle], progress: Callable[[str, int, int], None]) -> Path:
    """The WebGPU bundle of `folder`, exported into the cache unless it is there, with the weights, defaults and name
    that the bundle made from it has; PocketfusionError if none of `bundles` was made from `folder`, or as `export`."""
    from pocketfusion.folder import check_folder, folder_hash
    from pocketfusion.mobile.export import export

    check_folder(folder)
    model = folder_hash(folder)
    bundle = next((bundle for bundle in bundles if _model(bundle) == model), None)
    if bundle is None:
        raise PocketfusionError(
            f"{folder} is not the model folder of any bundle given: give the one that it was exported from"
        )
    out, manifest = cached(model), bundle.manifest
    if not (out / MANIFEST).is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        export(
            folder,
            out,
            name=manifest.name,
            overwrite=True,
            progress=progress,
            target=TARGET,
            weights={name: getattr(manifest.networks, name).weights for name in NETWORKS},
            num_inference_steps=manifest.defaults.num_inference_steps,
            guidance_scale=manifest.defaults.guidance_scale,
        )
    return out


def _model(bundle: Bundle) -> str | None:
    model = bundle.manifest.provenance.get("model_folder")
    return model if isinstance(model, str) and len(model) == 64 and model.isalnum() else None
