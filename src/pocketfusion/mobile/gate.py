"""The parity gate: an exported network must agree with PyTorch fp32, or the export fails.

Two measures. **SQNR**, 10 log10(|reference|^2 / |reference - exported|^2) over all inputs together, per network, and
for the UNet again when the exported text encoder feeds it. And the **guidance delta**: the standard deviation of the
conditional minus the unconditional prediction, exported over original, through the exported text encoder too. A
conversion can have a fair SQNR and still lose the prompt, which moves the prediction by a few per cent of its size
and is then multiplied by the guidance scale; this shows it. Of a UNet with embedded or folded guidance, the two are
single calls with the prompt and with the empty one at the same scale. With embedded guidance there is a second delta,
between the prompt's predictions at the bundle's default scale and at another, which shows a lost scale; the one that
is further from 1 counts.

The text encoder's states at padding have gates of their own. Nothing trained them, and they are ill-conditioned:
noise 60 dB below MiniLM's weights leaves 53 dB at the prompt's tokens and 36 dB at the padding (docs/export.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet

#: Least SQNR in dB, by the coarsest form among the network's weights.
MIN_SQNR = {
    **{"float32": 60.0, "float16": 45.0, "int8": 25.0, "int8-dynamic": 20.0, "palette6": 15.0},
    **{"palette4": 6.0, "int4-block": 6.0, "int4-dynamic": 6.0},
}
#: The same for the text encoder's states at padding.
MIN_PADDING_SQNR = {
    **{"float32": 60.0, "float16": 35.0, "int8": 12.0, "int8-dynamic": 8.0, "palette6": 6.0},
    **{"palette4": 0.0, "int4-block": 0.0, "int4-dynamic": 0.0},
}
#: Largest relative error of the guidance delta, by the coarser weights of text encoder and UNet.
MAX_GUIDANCE_ERROR = {
    **{"float32": 0.001, "float16": 0.01, "int8": 0.05, "int8-dynamic": 0.1, "palette6": 0.1},
    **{"palette4": 0.25, "int4-block": 0.25, "int4-dynamic": 0.25},
}
#: All forms of all targets, finest first.
FORMS = tuple(MIN_SQNR)


def sqnr(reference: np.ndarray, measured: np.ndarray) -> float:
    """Signal to quantisation noise ratio in dB, at most 200 (equal)."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(reference.astype(np.float64) - measured)))
    if not np.isfinite(noise):
        return float("-inf")
    if noise == 0:
        return 200.0
    return min(200.0, 10 * math.log10(signal / noise)) if signal else float("-inf")


def run(path: Path, inputs: list[dict[str, np.ndarray]], output: str, signature: str) -> np.ndarray:
    """Runs the file's signature on each of `inputs` (LiteRT CPU, 2 threads) and stacks the results."""
    with quiet():
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=2)
        runner = interpreter.get_signature_runner(signature)
        return np.stack([runner(**one)[output] for one in inputs])


def guidance_std(predictions: np.ndarray, other: int = 0) -> float:
    """Standard deviation of row 1, the conditional prediction, minus row `other`; `predictions` [N, rows, H, W, C].

    Row 0 is the unconditional prediction, row 2 (embedded guidance) the conditional one at another scale.
    """
    return float((predictions[:, 1] - predictions[:, other]).std())


def guidance_delta(reference: np.ndarray, measured: np.ndarray) -> float | None:
    """`guidance_std` of `measured` over that of `reference`, both [N, rows, H, W, C]: the ratio furthest from 1.

    None for a network that follows neither prompt nor scale: there is nothing to keep.
    """
    original = {other: guidance_std(reference, other) for other in range(reference.shape[1]) if other != 1}
    ratios = [guidance_std(measured, other) / value for other, value in original.items() if value > 0]
    return max(ratios, key=lambda ratio: abs(ratio - 1), default=None)


def check_sqnr(network: str, weights: str, value: float, gates: Mapping[str, float] = MIN_SQNR) -> None:
    """Raises PocketfusionError if `value` (dB) is below the gate of `weights`."""
    if not value >= gates[weights]:
        raise PocketfusionError(
            f"the exported {network} with {weights} weights differs from PyTorch: SQNR {value:.1f} dB, the gate is "
            f"{gates[weights]:.0f} dB; {_advice(weights)}"
        )


def check_guidance(weights: str, delta: float) -> None:
    """Raises PocketfusionError if the guidance delta (1 is perfect) is further from 1 than the gate of `weights`."""
    if not abs(delta - 1) <= MAX_GUIDANCE_ERROR[weights]:
        raise PocketfusionError(
            f"the exported networks with {weights} weights follow the prompt {delta:.3f} times as much as PyTorch's: "
            f"the gate is 1 ± {MAX_GUIDANCE_ERROR[weights]}; {_advice(weights)}"
        )


def _advice(weights: str) -> str:
    return "report this as a bug, with the folder" if weights == "float32" else "choose finer weights for it"
