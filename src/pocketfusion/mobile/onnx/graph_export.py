"""One network to one ONNX file with exact weights, by torch.onnx's exporter on torch.export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.devices import Target
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.rewrites.passes import contiguous
from pocketfusion.quiet import quiet

#: Version of the operations. Later ones bring nothing to these networks, and every runtime of 2025 has it.
OPSET = 20
GRAPH = "network.onnx"  #: in the folder of an exact network, the weights beside it
_OPERATION = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'")


def convert(
    module: nn.Module, samples: Mapping[str, torch.Tensor], path: Path, target: Target, dynamic: Any = None
) -> dict[str, int]:
    """Writes `module`, rewritten for `target`, into the folder `path`; returns the rewrites' counts.

    `samples`: sample inputs by name; shapes and types are fixed to theirs but for the axes that `dynamic` names, in
    torch.export's way. Inputs and outputs (a dict) keep their names. Weights lie beside the graph, as a protobuf ends
    at 2 GB.
    Raises PocketfusionError, with the module's path, if the network holds what ONNX cannot express.
    """
    rewritten, counts = rewrite(module, target)
    rewritten = contiguous(rewritten)
    with quiet(), torch.no_grad():
        outputs = list(rewritten(**samples))
        exported = _export(rewritten, samples, dynamic)
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise _refused(type(module).__name__, error, exported) from error
        assert program is not None
        with atomic_folder(path, overwrite=True) as partial:
            program.save(str(partial / GRAPH), external_data=True)
            _without_notes(partial / GRAPH)
    return counts


def _export(module: nn.Module, samples: Mapping[str, torch.Tensor], dynamic: Any) -> Any:
    try:
        return torch.export.export(module, (), dict(samples), dynamic_shapes=dynamic)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise PocketfusionError(
            f"torch.export cannot follow {type(module).__name__} ({_first(error)}): only the Stable Diffusion 1 and 2 "
            "families are known to convert"
        ) from error


def _without_notes(file: Path) -> None:
    """Drops the exporter's notes from the graph: paths of this machine's sources, more bytes than the graph itself."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.producer_name, model.producer_version = "pocketfusion", ""
    file.write_bytes(model.SerializeToString(deterministic=True))


def _refused(network: str, error: Exception, exported: Any) -> PocketfusionError:
    """In a sentence: the operation, the path of its module, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)  # type: ignore[arg-type]
    found = next((match for one in causes if (match := _OPERATION.search(str(one)))), None)
    operation = found[1] if found else ""
    where = _module_of(exported, operation) if operation else ""
    what = f"the operation {operation}{f' of {where}' if where else ''}" if operation else _first(causes[-1])
    return PocketfusionError(
        f"ONNX cannot express {what} in {network}: write that module with other operations as a rewrite "
        "(docs/mobile.md), or export with --target litert-cpu"
    )


def _module_of(exported: Any, operation: str) -> str:
    """Path of the module that the first such operation of the graph is in."""
    for node in exported.run_decompositions().graph.nodes:  # the exporter's operations
        if node.op == "call_function" and str(node.target).startswith(f"{operation}."):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            return str(stack[-1][0]) if stack else ""
    return ""


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
