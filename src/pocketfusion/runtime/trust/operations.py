"""What each operation that the exporter writes makes of its inputs: types and shapes, or why it cannot be run.

One rule an operation, after LiteRT's own kernels (tensorflow/lite/kernels), for the shapes and types that the exporter
writes. An operation without a rule is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pocketfusion.runtime.trust.flat import Unsound

Shape = tuple[int, ...]
Result = tuple[str, Shape]

#: Weights are floats, or small integers with scales.
_WEIGHTS = ("float32", "int8", "int4")
#: Broadcasting kernels for more dimensions exist for some operations only.
_BROADCAST_RANK = 4
_MAX_STEP = 64  #: stride or dilation of a convolution


@dataclass(frozen=True)
class Quantization:
    """How many scales a tensor has, and the axis that they belong to."""

    scales: int
    axis: int


class Tensor:
    """A tensor as declared: bytes of its elements, whether a constant holds them, a small constant's integers."""

    __slots__ = ("bytes", "constant", "quantization", "shape", "type", "values")

    def __init__(
        self,
        shape: Shape,
        kind: str,
        size: int,
        constant: bool,
        values: Shape | None,
        quantization: Quantization | None,
    ) -> None:
        self.shape, self.type, self.bytes, self.constant = shape, kind, size, constant
        self.values, self.quantization = values, quantization


@dataclass
class Operation:
    """One operation: its settings by the schema's names, its inputs in order (None: left out)."""

    name: str
    settings: dict[str, Any]
    inputs: list[Tensor | None] = field(default_factory=list)

    def take(self, *kinds: str | Sequence[str], optional: int = 0) -> list[Any]:
        """The inputs, one of each of `kinds`; the last `optional` ones may be left out and are None then."""
        given = self.inputs + [None] * (len(kinds) - len(self.inputs))
        if len(given) != len(kinds):
            raise Unsound(f"it has {len(self.inputs)} inputs, not {len(kinds)}")
        for place, (tensor, kind) in enumerate(zip(given, kinds, strict=True)):
            if tensor is None:
                if place < len(kinds) - optional:
                    raise Unsound(f"its input {place} is missing")
            elif tensor.type != kind and (isinstance(kind, str) or tensor.type not in kind):
                raise Unsound(f"its input {place} is {tensor.type}")
        return given


Rule = Callable[[Operation], list[Result]]


def _constant(tensor: Tensor, rank: int, count: int | None = None) -> Shape:
    """A constant's integers: `rank` dimensions, `count` of them."""
    if tensor.values is None or len(tensor.shape) != rank or (count is not None and len(tensor.values) != count):
        raise Unsound("what tells its shape is not a constant of the right size")
    return tensor.values


def _activation(operation: Operation) -> None:
    if not 0 <= operation.settings.get("activation", 0) <= 3:
        raise Unsound("its activation function is none that the exporter writes")


def unary(operation: Operation) -> list[Result]:
    (x,) = operation.take("float32")
    return [("float32", x.shape)]


def softmax(operation: Operation) -> list[Result]:
    (x,) = operation.take("float32")
    if not 1 <= len(x.shape) <= _BROADCAST_RANK or not math.isfinite(operation.settings["beta"]):
        raise Unsound("it has no axis to sum over")
    return [("float32", x.shape)]


def cast(operation: Operation) -> list[Result]:
    (x,) = operation.take(("float32", "int32", "bool"))
    return [("float32", x.shape)]


def dequantize(operation: Operation) -> list[Result]:
    (x,) = operation.take(("float16", "int8"))
    if not x.constant:
        raise Unsound("what it unpacks is no weight")
    if x.type == "int8":
        _scales(x, None)
    return [("float32", x.shape)]


def _scales(weight: Tensor, axis: int | None) -> None:
    """A packed weight has a scale for each index of its axis."""
    if weight.type not in ("int8", "int4"):
        return
    q = weight.quantization
    if q is None or not 0 <= q.axis < len(weight.shape) or axis not in (None, q.axis):
        raise Unsound("its weight has no scales, or along a wrong axis")
    if q.scales != weight.shape[q.axis]:
        raise Unsound(f"its weight of shape {list(weight.shape)} has {q.scales} scales")


def broadcast(*shapes: Shape) -> Shape:
    """The shape of an element-wise operation's result."""
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    rank = max(map(len, shapes))
    if rank > _BROADCAST_RANK:
        raise Unsound(f"it broadcasts {rank} dimensions")
    result = []
    for extents in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        largest = max(extents)
        if any(extent not in (1, largest) for extent in extents):
            raise Unsound(f"its inputs {' and '.join(str(list(shape)) for shape in shapes)} do not fit together")
        result.append(largest)
    return tuple(result)


def binary(operation: Operation) -> list[Result]:
    a, b = operation.take("float32", "float32")
    _activation(operation)
    return [("float32", broadcast(a.shape, b.shape))]


def select(operation: Operation) -> list[Result]:
    condition, a, b = operation.take("bool", "float32", "float32")
    return [("float32", broadcast(condition.shape, a.shape, b.shape))]


def reshape(operation: Operation) -> list[Result]:
    x, shape = operation.take(("float32", "int32", "bool"), "int32")
    wanted, elements = _constant(shape, 1), math.prod(x.shape)
    if (unknown := wanted.count(-1)) == 1:
        rest = -math.prod(wanted)
        wanted = tuple(elements // rest if extent == -1 else extent for extent in wanted) if rest > 0 else ()
    if unknown > 1 or any(extent < 1 for extent in wanted) or math.prod(wanted) != elements:
        raise Unsound(f"its input {list(x.shape)} cannot have the shape {list(shape.values)}")
    return [(x.type, wanted)]


def transpose(operation: Operation) -> list[Result]:
    x, order = operation.take(("float32", "int32"), "int32")
    axes = _constant(order, 1)
    if sorted(axes) != list(range(len(x.shape))):
        raise Unsound(f"{list(axes)} is no order of {len(x.shape)} dimensions")
    return [(x.type, tuple(x.shape[axis] for axis in axes))]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Unsound(f"its axis is {axis} of {rank} dimensions")
    return axis % rank


def concatenation(operation: Operation) -> list[Result]:
    parts = operation.take(*["float32"] * max(len(operation.inputs), 1))
    _activation(operation)
    first = parts[0].shape
    axis = _axis(operation.settings["axis"], len(first))
    for part in parts:
        if len(part.shape) != len(first) or any(
            part.shape[i] != extent for i, extent in enumerate(first) if i != axis
        ):
            raise Unsound("its inputs do not fit together")
    return [("float32", tuple(sum(p.shape[i] for p in parts) if i == axis else e for i, e in enumerate(first)))]


def slice_(operation: Operation) -> list[Result]:
    x, begin, size = operation.take(("float32", "int32"), "int32", "int32")
    rank = len(x.shape)
    starts, extents = _constant(begin, 1, rank), _constant(size, 1, rank)
    ends = [e if n == -1 else s + n for e, s, n in zip(x.shape, starts, extents, strict=True)]
    if rank > 5 or any(not 0 <= s < end <= e for s, end, e in zip(starts, ends, x.shape, strict=True)):
        raise Unsound(f"it takes a part that {list(x.shape)} lacks")
    return [(x.type, tuple(end - s for s, end in zip(starts, ends, strict=True)))]


def strided_slice(operation: Operation) -> list[Result]:
    x, *given = operation.take(("float32", "int32"), "int32", "int32", "int32")
    rank, masks = len(x.shape), operation.settings
    starts, ends, steps = (_constant(one, 1, rank) for one in given)
    if rank > 5 or masks["ellipsis"] or masks["new_axis"] or masks["shrink"] or masks["offset"] or min(steps) < 1:
        raise Unsound("it takes a part in a way that the exporter does not write")
    shape = []
    for axis, extent in enumerate(x.shape):
        start = None if masks["begin"] >> axis & 1 else starts[axis]
        end = None if masks["end"] >> axis & 1 else ends[axis]
        shape.append(len(range(extent)[start : end : steps[axis]]))
    if min(shape) < 1:
        raise Unsound("it takes a part that is empty")
    return [(x.type, tuple(shape))]


def pad(operation: Operation) -> list[Result]:
    x, padding = operation.take("float32", "int32")
    rank = len(x.shape)
    amounts = _constant(padding, 2, 2 * rank)
    if rank > _BROADCAST_RANK or padding.shape != (rank, 2) or min(amounts, default=0) < 0:
        raise Unsound(f"its padding {list(amounts)} does not fit {list(x.shape)}")
    return [("float32", tuple(e + amounts[2 * i] + amounts[2 * i + 1] for i, e in enumerate(x.shape)))]


def reduce(operation: Operation) -> list[Result]:
    x, axes = operation.take("float32", "int32")
    rank = len(x.shape)
    gone = {_axis(axis, rank) for axis in _constant(axes, len(axes.shape) and 1)}
    if rank > _BROADCAST_RANK or not gone:
        raise Unsound(f"it has {rank} dimensions and {len(gone)} to reduce")
    if operation.settings["keep_dims"]:
        return [("float32", tuple(1 if i in gone else e for i, e in enumerate(x.shape)))]
    return [("float32", tuple(e for i, e in enumerate(x.shape) if i not in gone))]


def matmul(operation: Operation) -> list[Result]:
    a, b = operation.take("float32", "float32")
    if not (2 <= len(a.shape) <= 5 and 2 <= len(b.shape) <= 5):
        raise Unsound("its inputs are no matrices")
    left, right = a.shape[-2:], b.shape[-2:]
    left = left[::-1] if operation.settings["adj_x"] else left
    right = right[::-1] if operation.settings["adj_y"] else right
    if left[1] != right[0]:
        raise Unsound(f"its inputs {list(a.shape)} and {list(b.shape)} do not fit together")
    return [("float32", (*broadcast(a.shape[:-2], b.shape[:-2]), left[0], right[1]))]


def _bias(bias: Tensor | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise Unsound(f"its bias {list(bias.shape)} is not of {channels} channels")


def fully_connected(operation: Operation) -> list[Result]:
    x, weight, bias = operation.take("float32", _WEIGHTS, "float32", optional=1)
    _activation(operation)
    if len(weight.shape) != 2 or not x.shape or x.shape[-1] != weight.shape[1]:
        raise Unsound(f"its weight {list(weight.shape)} does not fit {list(x.shape)}")
    if operation.settings["weights_format"]:
        raise Unsound("its weight is stored in a way that the exporter does not write")
    _packed(weight, 0)
    _bias(bias, weight.shape[0])
    rows = x.shape[:-1] if operation.settings["keep_dims"] else (math.prod(x.shape[:-1]),)
    return [("float32", (*rows, weight.shape[0]))]


def _packed(weight: Tensor, axis: int) -> None:
    _scales(weight, axis)
    if weight.type != "float32" and not weight.constant:
        raise Unsound("its weight is packed but no constant")


def _window(extent: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    """Extent of a convolution's output; padding 0 is the schema's SAME, 1 its VALID."""
    if not (1 <= stride <= _MAX_STEP and 1 <= dilation <= _MAX_STEP and padding in (0, 1)):
        raise Unsound(f"its stride is {stride}, its dilation {dilation}")
    reach = (kernel - 1) * dilation + 1
    if padding == 1 and reach > extent:
        raise Unsound("its kernel is larger than its input")
    return -(-extent // stride) if padding == 0 else (extent - reach) // stride + 1


def _windows(operation: Operation, x: Tensor, kernel: Shape) -> Shape:
    s = operation.settings
    return tuple(
        _window(x.shape[1 + i], kernel[i], s[f"stride_{side}"], s[f"dilation_{side}"], s["padding"])
        for i, side in enumerate("hw")
    )


def convolution(operation: Operation) -> list[Result]:
    x, weight, bias = operation.take("float32", _WEIGHTS, "float32", optional=1)
    _activation(operation)
    if len(x.shape) != 4 or len(weight.shape) != 4 or weight.shape[3] != x.shape[3]:
        raise Unsound(f"its weight {list(weight.shape)} does not fit {list(x.shape)}")
    _packed(weight, 0)
    _bias(bias, weight.shape[0])
    return [("float32", (x.shape[0], *_windows(operation, x, weight.shape[1:3]), weight.shape[0]))]


def depthwise(operation: Operation) -> list[Result]:
    x, weight, bias = operation.take("float32", _WEIGHTS, "float32", optional=1)
    _activation(operation)
    if len(x.shape) != 4 or len(weight.shape) != 4 or weight.shape[0] != 1:
        raise Unsound(f"its weight {list(weight.shape)} does not fit {list(x.shape)}")
    if weight.shape[3] != x.shape[3] * operation.settings["multiplier"]:
        raise Unsound(f"its weight {list(weight.shape)} does not fit {list(x.shape)}")
    _packed(weight, 3)
    _bias(bias, weight.shape[3])
    return [("float32", (x.shape[0], *_windows(operation, x, weight.shape[1:3]), weight.shape[3]))]


def resize(operation: Operation) -> list[Result]:
    x, size = operation.take("float32", "int32")
    height, width = _constant(size, 1, 2)
    if len(x.shape) != 4 or min(height, width) < 1:
        raise Unsound(f"it makes {height}x{width} of {list(x.shape)}")
    if operation.settings["align"] and operation.settings["half_pixel"]:
        raise Unsound("its pixels are aligned in two ways")
    return [("float32", (x.shape[0], height, width, x.shape[3]))]


def embedding(operation: Operation) -> list[Result]:
    ids, table = operation.take("int32", _WEIGHTS)
    if len(ids.shape) != 1 or len(table.shape) != 2:
        raise Unsound(f"its table {list(table.shape)} does not fit {list(ids.shape)}")
    _packed(table, 0)
    return [("float32", (ids.shape[0], table.shape[1]))]
