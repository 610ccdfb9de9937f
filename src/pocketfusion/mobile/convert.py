"""One network to one `.tflite` file, by litert-torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pocketfusion.artefact import atomic_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.flatbuffer import slim
from pocketfusion.mobile.quiet import quiet
from pocketfusion.mobile.rewrites import rewrite

#: The signature every file has. The UNet's takes batch 2: negative prompt, prompt.
DEFAULT_SIGNATURE = "serving_default"
#: The UNet's second signature: batch 1, for guidance scale 1. Both share one copy of the weights.
BATCH_1 = "batch1"


def convert(module: nn.Module, signatures: Mapping[str, Mapping[str, torch.Tensor]], path: Path) -> None:
    """Writes `module` as fp32 LiteRT at `path`, atomically.

    `signatures`: signature name -> sample inputs by name. Shapes and types are fixed to the samples'; inputs and the
    module's outputs (a dict) keep their names. Signatures share one copy of the weights.
    Raises PocketfusionError if the network holds an operation that litert-torch cannot lower.
    """
    with quiet():
        import litert_torch

        litert_torch.config.show_progress = False
        rewritten = rewrite(module)
        converter = litert_torch.Converter()
        for name, samples in signatures.items():
            converter.add_signature(name, rewritten, sample_kwargs=dict(samples))
        try:
            model = converter.convert()
        except OSError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PocketfusionError(
                f"litert-torch cannot convert {type(module).__name__} ({reason[:200]}): "
                "only the Stable Diffusion 1 and 2 families are known to convert"
            ) from error
        with atomic_file(path) as partial:
            model.export(str(partial))
            slim(partial)
