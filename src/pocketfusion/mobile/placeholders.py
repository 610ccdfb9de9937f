"""Convolutions converted without their weights, which are put into the finished file.

litert-torch holds a weight up to four times: the module's, the compiler's constant, that constant transposed, and the
file in memory. A constant of one value it keeps as that value. So each convolution goes in with a weight of one value
and comes out known by it; the real weights are read only while the file is written.
Linear layers keep their weights: the compiler folds norms and attention's scale into those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.flatbuffer import operation_name, short_path
from pocketfusion.mobile.rewrites.passes import view

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
