"""Runs a saved Core ML program (`.mlpackage`, ML Program) in torch, operation by operation, weights as stored.

It proves the graph and the weights of a package on any machine, in two arithmetics: float32 throughout, and with
each operation's result rounded to the type that the program gives it, which is what fp16 costs at least. Apple's
kernels are not run: in which order they add up, and what they keep inside an operation, is theirs.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.coreml.mil_operations import OPERATIONS
from pocketfusion.mobile.coreml.mlpackage import FLOAT16, Constants, read_program

Arithmetic = Literal["float32", "rounded"]


class Executor:
    """The program of one package, or of several that follow one another: a chunk takes what those before it gave."""

    def __init__(self, packages: Path | Sequence[Path], arithmetic: Arithmetic = "float32") -> None:
        """Reads and unpacks the weights. Raises PocketfusionError for a damaged package and an unknown operation."""
        paths = [packages] if isinstance(packages, Path) else list(packages)
        self._programs = [_Program(path, arithmetic) for path in paths]

    @property
    def operations(self) -> dict[str, int]:
        """How many of each operation are computed, constants apart."""
        counts: dict[str, int] = {}
        for program in self._programs:
            for operation in program.operations:
                counts[operation.type] = counts.get(operation.type, 0) + 1
        return counts

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what must be given, by name."""
        made: set[str] = set()
        found: dict[str, tuple[int, ...]] = {}
        for program in self._programs:
            found |= {name: shape for name, shape in program.inputs.items() if name not in made}
            made |= set(program.outputs)
        return found

    @property
    def outputs(self) -> list[str]:
        """Names of what the last program gives."""
        return self._programs[-1].outputs

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of the last program by name, float32 or int32; `inputs` have the program's names and shapes."""
        known = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in inputs.items()}
        for program in self._programs:
            outputs = program.run(known)
            known |= outputs
        return {name: values.numpy() for name, values in outputs.items()}


class _Program:
    def __init__(self, path: Path, arithmetic: Arithmetic) -> None:
        self.path, self._rounds = path, arithmetic == "rounded"
        function, block = read_program(path)
        self._constants = constants = Constants(path)
        self.inputs = {one.name: tuple(_shape(one.type)) for one in function.inputs}
        self.outputs = list(block.outputs)
        self._held: dict[str, Any] = {}
        self.operations: list[Any] = []
        with torch.no_grad():
            for operation in block.operations:
                if operation.type == "const":
                    self._held[operation.outputs[0].name] = constants.value(operation.attributes["val"])
                elif operation.type.startswith("constexpr_"):
                    given = {name: constants.value(v) for name, v in operation.attributes.items() if name != "name"}
                    self._held |= self._compute(operation, self._held, given)
                elif operation.type not in OPERATIONS:
                    raise PocketfusionError(
                        f"{path} has the operation {operation.type} ({operation.outputs[0].name}), which this "
                        "version cannot run: report it, or export the model again without what brings it"
                    )
                else:
                    self.operations.append(operation)
        # what only unpacked weights were made of is not kept
        used = set(self.outputs).union(*(_names(operation) for operation in self.operations))
        self._held = {name: value for name, value in self._held.items() if name in used}
        self._last = {name: index for index, operation in enumerate(self.operations) for name in _names(operation)}

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Any] = {}
        for name, shape in self.inputs.items():
            if name not in inputs or tuple(inputs[name].shape) != shape:
                given = list(inputs[name].shape) if name in inputs else "nothing"
                raise PocketfusionError(f"{self.path} takes {name} {list(shape)}, not {given}: export it again")
            values[name] = inputs[name]
        for index, operation in enumerate(self.operations):
            values |= self._compute(operation, ChainMap(values, self._held))
            for name in _names(operation):
                if self._last[name] == index and name not in self.outputs:
                    values.pop(name, None)
        return {name: values[name] if name in values else self._held[name] for name in self.outputs}

    def _compute(
        self, operation: Any, values: Mapping[str, Any], given: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The operation's outputs by name: of their type, and of the shape that the program says."""
        if operation.type not in OPERATIONS:
            raise PocketfusionError(
                f"{self.path} stores weights by {operation.type}, which this version cannot read: report it"
            )
        try:
            arguments = {name: self._argument(argument, values) for name, argument in operation.inputs.items()}
            found = OPERATIONS[operation.type](**arguments, **(given or {}))
        except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise PocketfusionError(
                f"{self.path}: the operation {operation.type} ({operation.outputs[0].name}) cannot be run here "
                f"({reason}): report it, or export the model again"
            ) from None
        results = dict(zip([one.name for one in operation.outputs], _each(found), strict=True))
        for one in operation.outputs:
            if list(results[one.name].shape) != (shape := _shape(one.type)):
                raise PocketfusionError(
                    f"{self.path}: {operation.type} gives {one.name} {list(results[one.name].shape)}, where the "
                    f"program says {shape}: the package is damaged, or this version runs it wrongly"
                )
            if self._rounds and one.type.tensorType.dataType == FLOAT16:
                results[one.name] = results[one.name].half().float()
        return results

    def _argument(self, argument: Any, values: Mapping[str, Any]) -> Any:
        found = [
            values[one.name] if one.WhichOneof("binding") == "name" else self._constants.value(one.value)
            for one in argument.arguments
        ]
        return found[0] if len(found) == 1 else found


def _shape(kind: Any) -> list[int]:
    return [int(one.constant.size) for one in kind.tensorType.dimensions]


def _names(operation: Any) -> Iterable[str]:
    """The values that the operation reads."""
    for argument in operation.inputs.values():
        for one in argument.arguments:
            if one.WhichOneof("binding") == "name":
                yield one.name


def _each(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)
