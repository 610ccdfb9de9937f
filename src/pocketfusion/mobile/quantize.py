"""Smaller weights for a `.tflite` file: float16 or int8, computed in float32.

`int8` is symmetric, one scale per output channel (or embedding row), dequantised when the file is loaded. Weights
that int8 would hold badly, because one outlier sets their channel's scale, stay float16 (`MIN_WEIGHT_SQNR`). Dynamic
range quantisation (activations rounded to 8 bits too) is faster on CPUs but cost 8 dB on MiniLM and 20 dB of the
guidance direction on a UNet (docs/export.md), so it is not what `int8` means here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from pocketfusion.artefact import atomic_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.flatbuffer import WEIGHT_OPERATIONS, slim, weights
from pocketfusion.mobile.gate import sqnr
from pocketfusion.quiet import quiet

Weights = Literal["float32", "float16", "int8"]
WEIGHTS: tuple[str, ...] = get_args(Weights)
#: Weights whose int8 rounding alone keeps less than this, in dB, stay float16. Well-behaved layers keep 40 to 48 dB.
MIN_WEIGHT_SQNR = 34.0


def rounding_sqnr(values: np.ndarray) -> float:
    """SQNR in dB of symmetric int8 rounding of `values`, one scale per index of the first axis."""
    rows = values.reshape(values.shape[0], -1)
    scale = np.abs(rows).max(1, keepdims=True) / 127
    scale[scale == 0] = 1
    return sqnr(rows, np.round(rows / scale) * scale)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Writes `source` (fp32) at `target` with weights of `kind`, atomically.

    Raises PocketfusionError for a file that the quantizer cannot treat (its weights lie outside the flatbuffer when
    it is over 2 GB).
    """
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

    casting = algorithm_manager.AlgorithmName.FLOAT_CASTING
    names = qtyping.TFLOperationName
    try:
        with quiet():
            worker = quantizer.Quantizer(str(source))
            for operation in map(names, WEIGHT_OPERATIONS):
                if kind == "float16":
                    worker.add_weight_only_config(".*", operation, 16, algorithm_key=casting)
                elif operation == names.EMBEDDING_LOOKUP:
                    # Looked up in int8: same values, and the table is not unpacked to float32 in memory.
                    worker.add_dynamic_config(".*", operation, 8)
                else:
                    worker.add_weight_only_config(".*", operation, 8)
            if kind == "int8":
                for weight in weights(source):
                    if weight.operation != "EMBEDDING_LOOKUP" and rounding_sqnr(weight.values) < MIN_WEIGHT_SQNR:
                        regex = rf"(^|;){re.escape(weight.output)}(;|$)"
                        worker.add_weight_only_config(regex, names(weight.operation), 16, algorithm_key=casting)
            result = worker.quantize(enable_progress_bar=False, enable_progress_report=False)
            assert result.quantized_model is not None
            with atomic_file(target) as partial:
                partial.write_bytes(result.quantized_model)
                slim(partial)
    except OSError:
        raise
    except Exception as error:  # the quantizer raises what its flatbuffer reader does
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PocketfusionError(
            f"{source.name} cannot be given {kind} weights ({reason[:200]}): export it with float32 weights"
        ) from error
