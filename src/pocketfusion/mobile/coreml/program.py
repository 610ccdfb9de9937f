"""One network to one `.mlpackage`: torch.export, coremltools, fp16 with islands of fp32.

The islands are operations whose values leave half precision, or lose too much in it:

- **Group norms**: coremltools lowers them to a mean, deviations, their squares and a root. The square of a deviation
  above 255 is infinite in fp16 (docs/mobile.md). Layer norms are one operation, whose inside is the kernel's.
- **The time embedding's sines**: of angles up to 1000, whose last bit in fp16 is half a radian.
- **A sampler's step in the graph**: the latents' sum, whose rounding every later step would inherit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.coreml.mlpackage import save
from pocketfusion.mobile.devices import Target
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.rewrites.passes import contiguous
from pocketfusion.quiet import quiet

_ROOTS = ("sqrt", "rsqrt")
#: What a sine's argument is made by, and what a step in the graph is made of.
_ARGUMENT = ("mul", "add", "sub", "real_div", "expand_dims", "reshape", "tile")
_STEP = ("mul", "add", "sub", "split", "slice_by_index", "reshape", "expand_dims")


#: Oldest iOS that programs can be made for, to the deployment target's name in coremltools.
TARGETS = {17: "iOS17", 18: "iOS18"}
_UNKNOWN = re.compile(r"op '([\w.:<>]+)'|fx node (\w+)|for (\w+) not implemented")


def convert(
    module: nn.Module,
    samples: Mapping[str, torch.Tensor],
    path: Path,
    target: Target,
    ios: int = 17,
    half: bool = True,
) -> dict[str, int]:
    """Writes `module`, rewritten for `target`, as an ML Program for iOS `ios` at `path`; returns the rewrites' counts.

    `samples`: sample inputs by name; shapes and types are fixed to theirs. Inputs and outputs (a dict) keep their
    names and stay float32 or int32; within, `half` computes in fp16 but for `islands`, else in fp32.
    Raises PocketfusionError, with the module's path, if the network holds what coremltools cannot express.
    """
    rewritten, counts = rewrite(module, target)
    with quiet(), torch.no_grad():
        import coremltools as ct

        outputs = rewritten(**samples)
        precision = ct.transform.FP16ComputePrecision(in_half()) if half else ct.precision.FLOAT32
        exported = _export(contiguous(rewritten), samples)
        try:
            model = ct.convert(
                exported,
                inputs=[ct.TensorType(name=name, shape=x.shape, dtype=_type(x)) for name, x in samples.items()],
                outputs=[ct.TensorType(name=name, dtype=np.float32) for name in outputs],
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, TARGETS[ios]),
                compute_precision=precision,
                skip_model_load=True,
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise _refused(type(module).__name__, error, exported) from error
    save(model, path)
    return counts


def _type(x: torch.Tensor) -> Any:
    return np.int32 if x.dtype == torch.int32 else np.float32


def _export(module: nn.Module, samples: Mapping[str, torch.Tensor]) -> Any:
    """The module's graph in core operations. Tracing with torch.jit would fail: coremltools' numpy is older."""
    try:
        exported = torch.export.export(module, (), dict(samples)).run_decompositions({})
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise PocketfusionError(
            f"torch.export cannot follow {type(module).__name__} ({_first(error)}): only the Stable Diffusion 1 and 2 "
            "families are known to convert"
        ) from error
    return _without_aliases(exported)


def _without_aliases(exported: Any) -> Any:
    """In place: coremltools has no operation for a tensor under another name, which CLIP's encoder brings."""
    graph = exported.graph_module.graph
    (results,) = graph.find_nodes(op="output")
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        if results not in node.users:  # those have a name in the program's signature
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _refused(network: str, error: Exception, exported: Any) -> PocketfusionError:
    """In a sentence: the operation, the path of its module, and what to do."""
    message = _first(error)
    found = _UNKNOWN.search(str(error))
    operation = next((name for name in found.groups() if name), "") if found else ""
    where = _module_of(exported, operation) if operation else ""
    place = f" of {where}" if where else ""
    what = f"the operation {operation}{place}" if operation else message
    return PocketfusionError(
        f"Core ML cannot express {what} in {network}: write that module with other operations as a rewrite "
        "(docs/mobile.md), or export with --target litert-gpu"
    )


def _module_of(exported: Any, operation: str) -> str:
    """Path of the module that the first such operation of the graph is in."""
    for node in exported.graph.nodes:
        named = str(node.target).removeprefix("aten.").partition(".")[0]
        if node.op == "call_function" and named == operation.rpartition("::")[2].partition(".")[0]:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            return str(stack[-1][0]) if stack else ""
    return ""


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
