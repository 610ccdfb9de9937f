"""One network to one `.mlpackage`: torch.export, coremltools, fp16 with islands of fp32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.coreml.islands import in_half
from pocketfusion.mobile.coreml.packages import save
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.rewrites.base import contiguous
from pocketfusion.mobile.targets import Target
from pocketfusion.quiet import quiet

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
