"""Where a Core ML program in fp16 computes in fp32: operations whose values leave half precision, or lose too much.

- **Group norms**: coremltools lowers them to a mean, deviations, their squares and a root. The square of a deviation
  above 255 is infinite in fp16 (docs/mobile.md). Layer norms are one operation, whose inside is the kernel's.
- **The time embedding's sines**: of angles up to 1000, whose last bit in fp16 is half a radian.
- **A sampler's step in the graph**: the latents' sum, whose rounding every later step would inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_ROOTS = ("sqrt", "rsqrt")
#: What a sine's argument is made by, and what a step in the graph is made of.
_ARGUMENT = ("mul", "add", "sub", "real_div", "expand_dims", "reshape", "tile")
_STEP = ("mul", "add", "sub", "split", "slice_by_index", "reshape", "expand_dims")


def in_half() -> Callable[[Any], bool]:
    """A selector for `FP16ComputePrecision`: False for the operations that stay in fp32."""
    known: dict[int, set[str]] = {}

    def choose(operation: Any) -> bool:
        block = operation.enclosing_block
        if id(block) not in known:  # at the first operation, before any cast has been put in
            known[id(block)] = islands(block)
        return operation.name not in known[id(block)]

    return choose


def islands(block: Any) -> set[str]:
    """Names of the operations of a PyMIL `block` that need fp32."""
    found: set[str] = set()
    for operation in block.operations:
        if operation.op_type == "square":
            found |= {one.name for one in _norm(operation)}
        elif operation.op_type in ("sin", "cos"):
            found |= {one.name for one in _above(operation, _ARGUMENT)}
    for output in block.outputs:
        if output.op is not None and output.op.op_type in _STEP:
            found |= {one.name for one in _above(output.op, _STEP)}
    return found


def _norm(square: Any) -> Iterator[Any]:
    """The operations of the norm that `square` is of, if its argument is a deviation from a mean."""
    deviation = square.x.op
    if deviation is None or deviation.op_type != "sub":
        return
    mean = deviation.y.op
    if mean is None or mean.op_type != "reduce_mean" or mean.x is not deviation.x:
        return
    yield from (mean, deviation, square)
    after, wanted = [square], [("reduce_mean",), ("add", *_ROOTS), (*_ROOTS, "real_div", "mul"), ("real_div", "mul")]
    for kinds in wanted:
        after = [child for one in after for output in one.outputs for child in output.child_ops]
        after = [child for child in after if child.op_type in kinds]
        yield from after


def _above(operation: Any, kinds: tuple[str, ...]) -> Iterator[Any]:
    """`operation`, and what it is computed from by operations of `kinds` alone."""
    yield operation
    for value in operation.inputs.values():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if one.op is not None and one.op.op_type in kinds:
                yield from _above(one.op, kinds)
