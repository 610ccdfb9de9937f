"""What `export --target` may be asked for, checked before anything is loaded.

Files in `--layout apple` and `--layout diffusers` are for pipelines of others, which tokenise, guide and step
themselves, with CLIP's tokenizer and without a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfusion.errors import INSTALL_COREML, INSTALL_ONNX_EXPORT, PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.mobile.devices import TARGETS
from pocketfusion.runtime.manifest import NETWORKS

if TYPE_CHECKING:
    from pocketfusion.mobile.export_settings import ExportSettings


def check_forms(target: str, weights: Mapping[str, str], layout: str) -> None:
    """Raises PocketfusionError for a network's form of weights, or a layout, that the target does not have."""
    known = TARGETS[target]
    for network, kind in weights.items():
        if network not in NETWORKS or kind not in known.forms:
            raise PocketfusionError(
                f"{kind!r} weights for {network!r} are not known to {target}: choose {', '.join(known.forms)} for "
                f"{', '.join(NETWORKS)}"
            )
    if layout not in known.layouts:
        raise PocketfusionError(
            f"--layout is {layout!r} and the target {target}: its files are laid out as {' or '.join(known.layouts)}"
        )


#: What pipelines of others divide latents by before they call the decoder, whatever the model's own factor is.
SCALE = 0.18215


def check_outside_loop(settings: ExportSettings, folder: Path) -> None:
    """Raises PocketfusionError for options and models that such a pipeline has no place for."""
    said: Iterable[tuple[bool, str]] = (
        (settings.two_calls, "--two-calls"),
        (settings.scheduler_step, "--scheduler-step"),
        (settings.decoder_tile is not None, "--decoder-tile"),
        (bool(settings.embedding), "--embedding"),
    )
    for given, option in said:
        if given:
            raise PocketfusionError(
                f"--layout {settings.layout} has no {option}: leave it out, or choose --layout bundle"
            )
    encoder = read_json(folder / "text_encoder" / "config.json")
    if encoder.get("model_type") != "clip_text_model" or encoder.get("use_attention_mask"):
        raise PocketfusionError(
            f"--layout {settings.layout} is of models with CLIP's text encoder and no mask, and {folder} has "
            f"{encoder.get('model_type')!r}: choose --layout bundle"
        )


def check_guidance(layout: str, guidance: str) -> None:
    """Raises PocketfusionError where such a pipeline would guide what is guided already."""
    if layout != "bundle" and guidance != "classifier-free":
        raise PocketfusionError(
            f"--layout {layout} guides by itself, and this model's guidance is {guidance}: choose --layout bundle"
        )


#: Versions of iOS that programs can be made for; what runs on the oldest runs on all later ones.
IOS = (17, 18)
OLDEST = IOS[0]
#: Forms of weights that need a later iOS.
_SINCE = {"int4-block": 18}


def check_options(settings: ExportSettings, folder: Path) -> None:
    """Raises PocketfusionError for what a Core ML bundle cannot be, and for its options on another target."""
    check_ios(settings.target, settings.ios, settings.weights)
    if settings.target != "coreml":
        return
    if find_spec("coremltools") is None:
        raise PocketfusionError(f"--target coreml needs coremltools: {INSTALL_COREML}")
    if settings.recipe is not None:
        raise PocketfusionError("--recipe is of LiteRT's targets: choose Core ML's weights by --weights and its kin")
    if settings.layout == "apple":
        check_outside_loop(settings, folder)


def check_ios(target: str, given: int | None, weights: Mapping[str, str]) -> None:
    """Raises PocketfusionError for an iOS that no program is made for, or that lacks a form of weights."""
    if target != "coreml":
        if given is not None:
            raise PocketfusionError(f"--ios is {given} and the target {target}: it is of coreml")
        return
    ios = OLDEST if given is None else given
    if ios < OLDEST:
        raise PocketfusionError(
            f"--ios is {ios}, too old: ML Programs with these operations and weights need iOS {OLDEST}, so choose "
            f"{' or '.join(str(each) for each in IOS)}"
        )
    if ios not in IOS:
        raise PocketfusionError(
            f"--ios is {ios}: choose {' or '.join(str(each) for each in IOS)}; later ones run both"
        )
    for network, kind in weights.items():
        if ios < _SINCE.get(kind, ios):
            raise PocketfusionError(
                f"{kind} weights for {network} need iOS {_SINCE[kind]} and --ios is {ios}: give --ios {_SINCE[kind]}, "
                "or choose int8, palette6 or palette4"
            )


PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_options(settings: ExportSettings, folder: Path) -> None:
    """Raises PocketfusionError for what an ONNX bundle cannot be."""
    if settings.target != "onnx":
        return
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise PocketfusionError(f"--target onnx needs {', '.join(missing)}: {INSTALL_ONNX_EXPORT}")
    if settings.recipe is not None:
        raise PocketfusionError("--recipe is of LiteRT's targets: choose ONNX's weights by --weights and its kin")
    if settings.layout == "diffusers":
        check_outside_loop(settings, folder)
        if (channels := read_json(folder / "unet" / "config.json").get("in_channels")) != 4:
            raise PocketfusionError(
                f"--layout diffusers is of latents of 4 channels, and {folder} has {channels}: choose --layout bundle"
            )
