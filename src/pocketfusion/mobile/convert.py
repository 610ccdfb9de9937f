"""One network to one `.tflite` file, by litert-torch.

Convolutions are converted without their weights, which are put into the finished file. litert-torch holds a weight
up to four times: the module's, the compiler's constant, that constant transposed, and the file in memory. A
constant of one value it keeps as that value. So each convolution goes in with a weight of one value and comes out
known by it; the real weights are read only while the file is written. Linear layers keep their weights: the
compiler folds norms and attention's scale into those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import nn
from torch.fx.experimental import proxy_tensor

from pocketfusion.artefact import atomic_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.devices import TARGETS, Target
from pocketfusion.mobile.flatbuffer import (
    drop_unused,
    has_data,
    module_chains,
    operation_code,
    operation_name,
    read,
    rename,
    short_path,
    write,
)
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.rewrites.passes import contiguous, view
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


#: Placeholders' values differ by 1 / _STEPS, exactly representable in float32.
_STEPS = 4096
#: Smaller weights stay: they cost no memory, and a scale before them, as in front of a decoder, is folded into them.
_LARGE = 4096


class ConvolutionWeight:
    """A weight [out, in, h, w] as the bytes of a `.tflite` file's [out, h, w, in]; computed when an array is asked."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.detach()

    def __len__(self) -> int:
        return 4 * self.weight.numel()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        laid_out = self.weight.float().permute(0, 2, 3, 1).contiguous().numpy()
        return laid_out.reshape(-1).view(np.uint8)


def without_convolutions(module: nn.Module) -> dict[tuple[tuple[int, ...], int], tuple[str, torch.Tensor]]:
    """Puts placeholders into `module`, a copy of its own, in place; returns the convolutions' paths and weights.

    They are known by their shape and their number among those of this shape: number n is filled with 1 + n / 4096.
    """
    taken: dict[tuple[tuple[int, ...], int], tuple[str, torch.Tensor]] = {}
    counts: Counter[tuple[int, ...]] = Counter()
    layers = []
    for path, child in module.named_modules():
        if type(child) is nn.Conv2d and child.groups == 1 and child.weight.numel() >= _LARGE:
            shape = tuple(child.weight.shape)
            taken[shape, counts[shape]] = path, child.weight
            layers.append((child, counts[shape]))
            counts[shape] += 1
    for number in range(max(counts.values(), default=0)):  # one buffer serves a number of every shape
        same = [child for child, n in layers if n == number]
        filled = torch.full((max(child.weight.numel() for child in same),), 1 + number / _STEPS)
        for child in same:
            child.weight = view(filled[: child.weight.numel()].view(child.weight.shape))
    return taken


def fill(model: Any, taken: Mapping[tuple[tuple[int, ...], int], tuple[str, torch.Tensor]]) -> None:
    """Puts the weights in `taken` into a converted `ModelT` with named tensors, whose convolutions it names too.

    Raises PocketfusionError if a weight has no operation of its own.
    """
    left = dict(taken)
    for graph in model.subgraphs:
        for operator in graph.operators:
            if operation_name(model, operator) != "CONV_2D":
                continue
            tensor = graph.tensors[operator.inputs[1]]
            data = model.buffers[tensor.buffer].data
            if data is None or not len(data):
                continue
            values = np.asarray(data).view(np.float32)
            out, height, width, channels = (int(extent) for extent in tensor.shape)
            key = (out, channels, height, width), round((float(values[0]) - 1) * _STEPS)
            if key not in left or not (values == values[0]).all():
                continue
            path, weight = left.pop(key)
            tensor.name = f"{short_path(path)}#{operator.inputs[1]}"
            graph.tensors[operator.outputs[0]].name = f"{short_path(path)}#{operator.outputs[0]}"
            tensor.buffer = len(model.buffers)  # the converter may have let equal buffers be one
            buffer = schema.BufferT()
            buffer.data = ConvolutionWeight(weight)
            model.buffers.append(buffer)
    if left:
        path, _ = next(iter(left.values()))
        raise PocketfusionError(
            f"the convolution {path} has no operation of its own in the converted graph: report it"
        )


def mend_products(model: Any) -> int:
    """Makes every FULLY_CONNECTED whose weight is computed a BATCH_MATMUL, in place; returns how many there were.

    The converter writes QKᵀ of a single head so, as in the autoencoder's attention. XNNPACK takes layers with constant
    weights only, and LiteRT's own kernel took a sixth of a whole decoder's time for this one product (docs/speed.md).
    """
    count = 0
    for graph in model.subgraphs:
        for operator in graph.operators:
            if operation_name(model, operator) != "FULLY_CONNECTED":
                continue
            layer, weight = operator.builtinOptions, graph.tensors[operator.inputs[1]]
            more = layer.fusedActivationFunction or (len(operator.inputs) > 2 and operator.inputs[2] >= 0)
            keeps = layer.keepNumDims or len(graph.tensors[operator.inputs[0]].shape) == 2
            if has_data(model, weight) or more or not keeps:
                continue
            operator.opcodeIndex = operation_code(model, schema.BuiltinOperator.BATCH_MATMUL)
            operator.inputs = np.array(operator.inputs[:2], np.int32)
            operator.builtinOptionsType = schema.BuiltinOptions.BatchMatMulOptions
            operator.builtinOptions = schema.BatchMatMulOptionsT()
            operator.builtinOptions.adjY = True
            count += 1
    return count
