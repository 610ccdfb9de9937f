"""One network to one `.tflite` file, by litert-torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pocketfusion.artefact import atomic_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.flatbuffer import slim
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.quiet import quiet

#: The signature every file has. The UNet's takes batch 2, negative prompt and prompt, or batch 1 where guidance is
#: embedded or folded. A second one of another batch would share the weights on disk, but XNNPACK packs them once more
#: in memory, and tracing it doubles the time of an export.
DEFAULT_SIGNATURE = "serving_default"


def convert(module: nn.Module, samples: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes `module` as fp32 LiteRT at `path`, atomically.

    `samples`: sample inputs by name. Shapes and types are fixed to theirs; inputs and the module's outputs (a dict)
    keep their names.
    Raises PocketfusionError if the network holds an operation that litert-torch cannot lower.
    """
    with quiet():
        import litert_torch

        litert_torch.config.show_progress = False
        converter = litert_torch.Converter()
        converter.add_signature(DEFAULT_SIGNATURE, rewrite(module)[0], sample_kwargs=dict(samples))
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
