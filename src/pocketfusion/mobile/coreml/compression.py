"""A Core ML program's weights in smaller forms, by coremltools, and a program in two chunks.

`int8`: symmetric, a scale for each output channel. `palette6`, `palette4`: 64 or 16 values found by k-means (for iOS
18 on, of every 16 channels their own, where they divide so). `int4-block`: symmetric, a scale for each 32 inputs of
each output (iOS 18).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.coreml import mlpackage
from pocketfusion.mobile.flatbuffer import short_path
from pocketfusion.mobile.quantization.weight_forms import KEPT, MIN_WEIGHT_SQNR, rounding_sqnr
from pocketfusion.mobile.target_options import OLDEST
from pocketfusion.quiet import quiet
from pocketfusion.temporaries import scratch_folder

#: Weights of fewer elements stay as they are: scales and palettes would take what is saved.
SMALLEST = 2048
BLOCK = 32  #: inputs that share a scale of `int4-block`
GROUP = 16  #: channels that share a palette, for iOS 18 on


def compress(source: Path, target: Path, form: str, ios: int, module: nn.Module) -> None:
    """Writes the package `source` at `target` with its weights in `form`, atomically.

    `module` is what it was made from, for the names of the layers that stay in float16 (`quantize.KEPT`); so do, in
    int8, weights with outliers. Raises PocketfusionError if coremltools cannot.
    """
    with quiet():
        import coremltools as ct
        import coremltools.optimize.coreml as cto

        model = ct.models.MLModel(str(source), skip_model_load=True)
        kept = set(_kept(module)) | (set(_outliers(source)) if form == "int8" else set())
        names: dict[str, Any] = {}
        for name, values in _weights(source):
            if re.sub(r"_to_fp16$", "", name) in kept:
                names[name] = None
            elif len(values) % GROUP:  # no palettes of their own for every 16: coremltools would leave it as it is
                names[name] = _config(cto, form, OLDEST)
        config = cto.OptimizationConfig(_config(cto, form, ios), op_name_configs=names)
        change = cto.palettize_weights if form.startswith("palette") else cto.linear_quantize_weights
        try:
            smaller = change(model, config)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise PocketfusionError(
                f"coremltools cannot store {source.name}'s weights as {form} ({reason}): choose another form"
            ) from error
    mlpackage.save(smaller, target)


def _config(cto: Any, form: str, ios: int) -> Any:
    if form == "int8":
        return cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=SMALLEST)
    if form == "int4-block":
        return cto.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype="int4",
            granularity="per_block",
            block_size=BLOCK,
            weight_threshold=SMALLEST,
        )
    grouped = {"granularity": "per_grouped_channel", "group_size": GROUP} if ios >= 18 else {}
    nbits = int(form.removeprefix("palette"))
    return cto.OpPalettizerConfig(mode="kmeans", nbits=nbits, weight_threshold=SMALLEST, **grouped)


def _kept(module: nn.Module) -> Iterator[str]:
    """Names in the program of the weights that `quantize.KEPT` is of: torch.export's of a parameter, in lower case."""
    for name, child in module.named_modules():
        if KEPT.fullmatch(short_path(name)) and not isinstance(child, nn.Embedding):
            yield f"p_{name.replace('.', '_')}_weight".lower()


def _outliers(package: Path) -> Iterator[str]:
    for name, values in _weights(package):
        if rounding_sqnr(values.numpy()) < MIN_WEIGHT_SQNR:
            yield re.sub(r"_to_fp16$", "", name)


def _weights(package: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The constants that forms are for, by their names in the program."""
    constants = mlpackage.Constants(package)
    for operation in mlpackage.read_program(package)[1].operations:
        if operation.type != "const" or operation.attributes["val"].WhichOneof("value") != "blobFileValue":
            continue
        values = constants.value(operation.attributes["val"])
        if values.is_floating_point() and values.ndim > 1 and values.numel() > SMALLEST:
            yield operation.outputs[0].name, values


def in_chunks(package: Path, names: tuple[Path, Path]) -> None:
    """Writes the program `package` as two of about the same size, the second of which takes what the first gives."""
    with quiet(), scratch_folder("chunks", package.parent) as scratch:
        import coremltools as ct

        ct.models.utils.bisect_model(str(package), str(scratch), check_output_correctness=False)
        for number, path in enumerate(names, start=1):
            made = scratch / f"{package.stem}_chunk{number}.mlpackage"
            mlpackage.save(ct.models.MLModel(str(made), skip_model_load=True), path)
