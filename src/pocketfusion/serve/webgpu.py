"""The WebGPU form of a bundle: made once from the model folder that the bundle was exported from, and kept.

A bundle for CPUs has operations that WebGPU does not take, and its sibling is another export of the same folder: 40 MB
more for the embedded model. It is therefore neither in the package nor in the repository, but in the user's cache,
by what `model_of` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import MANIFEST, Bundle
from pocketfusion.serve.site import model_of

_TARGET = "litert-gpu"


def cached(model: str) -> Path:
    """Where the WebGPU bundle of a model is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketfusion"
    return cache / f"webgpu-{model[:16]}-{model.rpartition('-')[2]}"


def with_siblings(bundles: Iterable[Bundle]) -> list[Bundle]:
    """The bundles, each with its WebGPU sibling behind it if the cache has one and it is not among them already."""
    given = list(bundles)
    models = {model_of(bundle) for bundle in given if bundle.manifest.target == _TARGET}
    found = []
    for bundle in given:
        found.append(bundle)
        model = model_of(bundle)
        if model and model not in models and (cached(model) / MANIFEST).is_file():
            models.add(model)
            found.append(Bundle.open(cached(model)))
    return found


def make_sibling(folder: Path, bundles: Iterable[Bundle], progress: Callable[[str, int, int], None]) -> Path:
    """The WebGPU bundle of `folder`, as `export --for browser` makes it, in the cache; made now unless it is there.

    It has the name, the defaults and the pictures' size of the one of `bundles` that was made from `folder`.
    Raises PocketfusionError if there is none, or as `export`.
    """
    from pocketfusion.folder import check_folder, folder_hash

    check_folder(folder)
    made = folder_hash(folder)
    found = ((bundle, model) for bundle in bundles if (model := model_of(bundle)) and model.startswith(made))
    bundle, model = next(found, (None, ""))
    if bundle is None:
        raise PocketfusionError(
            f"{folder} is not the model folder of any bundle given: give the one that it was exported from"
        )
    out, manifest = cached(model), bundle.manifest
    if not (out / MANIFEST).is_file():
        with quiet():  # the libraries' import messages
            from pocketfusion.mobile.export import export
            from pocketfusion.mobile.outlook import prepare
        out.parent.mkdir(parents=True, exist_ok=True)
        given = {**manifest.defaults.model_dump(), "size": (manifest.image.height, manifest.image.width)}
        options = prepare(folder, out, given, "browser", overwrite=True).options
        export(folder, out, name=manifest.name, overwrite=True, progress=progress, **options)
    return out
