"""MIL's operations in torch: what `executor` runs a saved Core ML program with.

One function an operation, named and called as in coremltools' reference of MIL (`converters.mil.mil.ops.defs`);
what is not here is an error. Floats are float32 whatever the program says: the executor rounds. Integers that only say
something (axes, shapes) are tensors as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OPERATIONS: dict[str, Callable[..., Any]] = {}


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    OPERATIONS[function.__name__.rstrip("_")] = function
    return function


def _ints(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1)]


def _simple(**operations: Callable[..., Tensor]) -> None:
    OPERATIONS.update(operations)


_simple(
    add=lambda x, y: x + y,
    sub=lambda x, y: x - y,
    mul=lambda x, y: x * y,
    real_div=lambda x, y: x / y,
    pow=lambda x, y: x**y,
    maximum=lambda x, y: torch.maximum(x, y),
    minimum=lambda x, y: torch.minimum(x, y),
    greater_equal=lambda x, y: x >= y,
    abs=lambda x: x.abs(),
    cos=lambda x: x.cos(),
    exp=lambda x: x.exp(),
    relu=lambda x: x.relu(),
    sigmoid=lambda x: x.sigmoid(),
    silu=lambda x: F.silu(x),
    sin=lambda x: x.sin(),
    sqrt=lambda x: x.sqrt(),
    square=lambda x: x * x,
    tanh=lambda x: x.tanh(),
    clip=lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    rsqrt=lambda x, epsilon: torch.rsqrt(x + epsilon),
    softmax=lambda x, axis: x.softmax(int(axis)),
    select=lambda cond, a, b: torch.where(cond.bool(), a, b),
    linear=lambda x, weight, bias=None: F.linear(x, weight, bias),
    reduce_max=lambda x, axes, keep_dims: x.amax(_ints(axes), bool(keep_dims)),
    reduce_mean=lambda x, axes, keep_dims: x.mean(_ints(axes), bool(keep_dims)),
    reduce_sum=lambda x, axes, keep_dims: x.sum(_ints(axes), bool(keep_dims)),
    tile=lambda x, reps: x.repeat(_ints(reps)),
    transpose=lambda x, perm: x.permute(_ints(perm)),
    stack=lambda values, axis: torch.stack(values, int(axis)),
)


@_operation
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats stay float32 here; integers of any width become int32, truncated."""
    if dtype in ("fp16", "fp32"):
        return x.float()
    if dtype == "bool":
        return x.bool()
    if dtype in ("int8", "int16", "int32", "uint8", "uint16"):
        return x.to(torch.int32)
    raise ValueError(f"cast to {dtype}")


@_operation
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise ValueError(f"gelu of mode {mode}")
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@_operation
def matmul(x: Tensor, y: Tensor, transpose_x: Any = False, transpose_y: Any = False) -> Tensor:
    return (x.mT if bool(transpose_x) else x) @ (y.mT if bool(transpose_y) else y)


@_operation
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """iOS 18's: scores divided by the root of the head's width, a mask of booleans (kept) or to add."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


@_operation
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Any = 1,
) -> Tensor:
    """2-D: `pad` is [top, bottom, left, right], which counts for `custom` alone."""
    if x.ndim != 4 or pad_type not in ("valid", "custom"):
        raise ValueError(f"conv of {x.ndim} dimensions with padding {pad_type}")
    if pad_type == "custom" and pad is not None:
        top, bottom, left, right = _ints(pad)
        x = F.pad(x, (left, right, top, bottom))
    stride, dilation = (1 if values is None else _ints(values) for values in (strides, dilations))
    return F.conv2d(x, weight, bias, stride, 0, dilation, int(groups))


@_operation
def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


@_operation
def layer_norm(x: Tensor, axes: Tensor, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Tensor:
    """Over the last axes alone. Nothing inside is rounded: what Apple's kernels keep there is not known."""
    shape = [x.shape[axis] for axis in _ints(axes)]
    if [axis % x.ndim for axis in _ints(axes)] != list(range(x.ndim - len(shape), x.ndim)):
        raise ValueError(f"layer_norm over the axes {_ints(axes)} of {x.ndim}")
    return F.layer_norm(x, shape, gamma, beta, float(epsilon))


@_operation
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the extent, -1 takes what is left."""
    return x.reshape([extent or x.shape[i] for i, extent in enumerate(_ints(shape))])


@_operation
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    """`axes` are the result's."""
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


@_operation
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


@_operation
def concat(values: list[Tensor], axis: Tensor, interleave: Any = False) -> Tensor:
    if bool(interleave):
        raise ValueError("concat with interleave")
    return torch.cat(values, int(axis))


@_operation
def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(_ints(split_sizes), int(axis))
    assert num_splits is not None
    return x.split(x.shape[int(axis)] // int(num_splits), int(axis))


@_operation
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """Where a mask says so, from the beginning or to the end, or a single index whose axis goes."""
    rank = x.ndim
    steps = [1] * rank if stride is None else _ints(stride)
    free, open_, drop = (
        [False] * rank if m is None else [bool(v) for v in m] for m in (begin_mask, end_mask, squeeze_mask)
    )
    if any(step < 1 for step in steps):
        raise ValueError(f"slice_by_index with the strides {steps}")
    chosen: list[Any] = []
    for i, (first, last) in enumerate(zip(_ints(begin), _ints(end), strict=True)):
        chosen.append(first if drop[i] else slice(None if free[i] else first, None if open_[i] else last, steps[i]))
    return x[tuple(chosen)]


@_operation
def gather(x: Tensor, indices: Tensor, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    axis = int(axis) % x.ndim
    if int(batch_dims):
        raise ValueError("gather with batch_dims")
    taken = x.index_select(axis, indices.reshape(-1).long())
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@_operation
def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Any = 0.0) -> Tensor:
    """`pad`: before and after each of the last axes, in their order."""
    if mode != "constant":
        raise ValueError(f"pad of mode {mode}")
    sides = _ints(pad)
    pairs = [sides[i : i + 2] for i in range(0, len(sides), 2)]
    return F.pad(x, [side for pair in reversed(pairs) for side in pair], value=float(constant_val))


@_operation
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Any = 1.0, scale_factor_width: Any = 1.0) -> Tensor:
    factors = (float(scale_factor_height), float(scale_factor_width))
    if any(factor != int(factor) for factor in factors):
        raise ValueError(f"upsample_nearest_neighbor by {factors}")
    return F.interpolate(x, scale_factor=factors, mode="nearest")


@_operation
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    """iOS 16's integers: scale * (value - zero point), one of each for every index of `axis`, or one in all."""
    shape = [-1 if i == int(axis) % quantized_data.ndim else 1 for i in range(quantized_data.ndim)]
    if scale.ndim:
        scale = scale.reshape(shape)
    if zero_point.ndim:
        zero_point = zero_point.reshape(shape)
    return scale * (quantized_data.float() - zero_point.float())


@_operation
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """iOS 18's integers: scale * (data - offset), one of each for every block."""

    def spread(values: Tensor) -> Tensor:
        for axis, extent in enumerate(data.shape):
            values = values.repeat_interleave(extent // values.shape[axis], axis)
        return values.float()

    return spread(scale) * (data.float() - (0.0 if offset is None else spread(offset)))


@_operation
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None
) -> Tensor:
    """A palette's colours: iOS 16's, with `shape` and indices packed into bytes, lowest bits first, or iOS 18's, one
    palette for every block of the indices."""
    if shape is not None:
        bits = int(math.log2(lut.numel()))
        number = math.prod(_ints(shape))
        places = torch.arange(number * bits)
        ones = indices.long()[places // 8] >> places % 8 & 1
        packed = (ones.reshape(number, bits) << torch.arange(bits)).sum(1)
        return lut.reshape(-1)[packed].reshape(_ints(shape))
    if lut.shape[-1] != 1:
        raise ValueError("constexpr_lut_to_dense with vectors")
    block = torch.zeros_like(indices, dtype=torch.long)
    for axis, extent in enumerate(indices.shape):
        of = torch.arange(extent) // (extent // lut.shape[axis])
        block = block * lut.shape[axis] + of.reshape([-1 if i == axis else 1 for i in range(indices.ndim)])
    return lut.reshape(-1, lut.shape[-2])[block, indices.long()]
