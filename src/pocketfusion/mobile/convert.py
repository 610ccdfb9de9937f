"""One network to one `.tflite` file, by litert-torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental import proxy_tensor

from pocketfusion.artefact import atomic_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.flatbuffer import drop_unused, module_chains, read, rename, write
from pocketfusion.mobile.placeholders import fill, without_convolutions
from pocketfusion.mobile.products import mend_products
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.rewrites.passes import contiguous
from pocketfusion.mobile.targets import TARGETS, Target
from pocketfusion.quiet import quiet
from pocketfusion.runtime.memory import release_garbage
from pocketfusion.temporaries import scratch_folder

#: The signature every file has. The UNet's takes batch 2, negative prompt and prompt, or batch 1 where guidance is
#: embedded or folded. A second one of another batch would share the weights on disk, but XNNPACK packs them once more
#: in memory, and tracing it doubles the time of an export.
DEFAULT_SIGNATURE = "serving_default"


def convert(
    module: nn.Module, samples: Mapping[str, torch.Tensor], path: Path, target: Target = TARGETS["litert-cpu"]
) -> dict[str, int]:
    """Writes `module`, rewritten for `target`, as fp32 LiteRT at `path`, atomically; returns the rewrites' counts.

    `samples`: sample inputs by name. Shapes and types are fixed to theirs; inputs and the module's outputs (a dict)
    keep their names; tensors are named after their modules (`flatbuffer.rename`). Nothing is copied that need not be
    (`placeholders`), so that a full-size UNet converts in little more memory than it takes (docs/export.md).
    Raises PocketfusionError if the network holds an operation that litert-torch cannot lower.
    """
    with quiet():
        import litert_torch

        litert_torch.config.show_progress = False
        converter = litert_torch.Converter()
        rewritten, counts = rewrite(module, target)
        chains = module_chains(rewritten)
        convolutions = without_convolutions(rewritten)
        converter.add_signature(DEFAULT_SIGNATURE, contiguous(rewritten), sample_kwargs=dict(samples))
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
        with atomic_file(path) as partial, scratch_folder("convert", path.parent) as scratch:
            raw = scratch / "raw.tflite"
            model.export(str(raw))
            del model, converter, rewritten
            forget_trace()
            contents = read(raw)
            rename(contents, chains)
            fill(contents, convolutions)
            if target.name == "litert-cpu":  # others' delegates take both forms
                mend_products(contents)
            drop_unused(contents)
            write(contents, partial)
    return counts


def forget_trace() -> None:
    """Frees what a conversion leaves: the compiler's constants, and the traced graph with all its weights, to which
    torch.export keeps a table of proxies until the next one. Of SD-1.5's UNet, 5 GB."""
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    release_garbage()
