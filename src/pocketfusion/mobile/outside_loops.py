"""What pipelines of others ask of a model, those that files in `--layout apple` and `--layout diffusers` are for: they
tokenise, guide and step themselves, with CLIP's tokenizer and without a mask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_json

if TYPE_CHECKING:
    from pocketfusion.mobile.export_settings import ExportSettings

#: What they divide latents by before they call the decoder, whatever the model's own factor is.
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
