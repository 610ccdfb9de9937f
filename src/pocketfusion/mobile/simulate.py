"""Simulated quantisation: a PyTorch network that computes with the values which packed weights would give it.

For analysis only: nothing gets smaller here (`pack` does that). Weights are rounded by the packer's own function.
The dynamic forms on a CPU round activations too: XNNPACK takes one scale and zero point per row of a matrix product
(a token) and per picture of a convolution; the GPU delegate computes the same forms in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pocketfusion.mobile.pack import Form, rounded, storable
from pocketfusion.mobile.targets import TargetName

#: Modules whose weights are quantised, and the operation that each becomes.
_LAYERS: dict[type[nn.Module], str] = {
    nn.Linear: "FULLY_CONNECTED",
    nn.Conv2d: "CONV_2D",
    nn.Embedding: "EMBEDDING_LOOKUP",
}


def quantizable(network: nn.Module) -> dict[str, Any]:
    """The layers of `network` that have a form, by name."""
    return {name: module for name, module in network.named_modules() if type(module) in _LAYERS}


def layer_operation(layer: nn.Module) -> str:
    """The `.tflite` operation that a layer becomes."""
    return _LAYERS[type(layer)]


def rounded_activations(x: torch.Tensor, operation: str) -> torch.Tensor:
    """`x` rounded to 8 bits with a zero point, as XNNPACK's dynamic operators do: per token, or per picture."""
    axes = (-1,) if operation == "FULLY_CONNECTED" else tuple(range(1, x.ndim))
    low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(x / scale) + zero_point, -128, 127) - zero_point) * scale


@contextmanager
def simulated(network: nn.Module, forms: Mapping[str, Form], target: TargetName = "litert-cpu") -> Iterator[None]:
    """`network` computes as if its layers named in `forms` had these forms on `target`, while the block runs."""
    layers = quantizable(network)
    with ExitStack() as undo:
        for name, form in forms.items():
            layer = layers[name]
            operation = layer_operation(layer)
            exact = layer.weight.data
            layer.weight.data = torch.from_numpy(rounded(exact.numpy(), storable(form, operation)))
            undo.callback(setattr, layer.weight, "data", exact)
            if form.endswith("dynamic") and target == "litert-cpu" and operation != "EMBEDDING_LOOKUP":
                undo.callback(layer.register_forward_pre_hook(_rounding(operation)).remove)
        yield


def _rounding(operation: str) -> Any:
    return lambda module, inputs: (rounded_activations(inputs[0], operation), *inputs[1:])
