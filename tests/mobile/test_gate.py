"""The gate's arithmetic against hand computation, and its thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import gate


def test_sqnr_by_hand() -> None:
    reference = np.array([3.0, 4.0], np.float32)  # power 25
    assert gate.sqnr(reference, np.array([3.0, 4.5])) == pytest.approx(20.0)  # noise 0.25
    assert gate.sqnr(reference, reference) == 200.0
    assert gate.sqnr(reference, np.array([np.nan, 4.0])) == -np.inf
    assert gate.sqnr(np.zeros(2), np.ones(2)) == -np.inf


def test_guidance_std_by_hand() -> None:
    predictions = np.zeros((1, 2, 1, 2, 1), np.float32)
    predictions[0, 0, 0, :, 0] = [1, 1]
    predictions[0, 1, 0, :, 0] = [2, 5]  # differences 1 and 4
    assert gate.guidance_std(predictions) == pytest.approx(1.5)


@pytest.mark.parametrize(("weights", "value"), [("float32", 59.9), ("float16", 44.0), ("int8", 24.0)])
def test_sqnr_gate(weights: str, value: float) -> None:
    with pytest.raises(PocketfusionError, match=rf"SQNR {value:.1f} dB, the gate is"):
        gate.check_sqnr("unet", weights, value)
    gate.check_sqnr("unet", weights, value + 1.1)


def test_nan_never_passes() -> None:
    with pytest.raises(PocketfusionError):
        gate.check_sqnr("unet", "int8", float("nan"))
    with pytest.raises(PocketfusionError):
        gate.check_guidance("int8", float("nan"))


def test_guidance_gate() -> None:
    gate.check_guidance("int8", 0.96)
    with pytest.raises(PocketfusionError, match="0.940 times"):
        gate.check_guidance("int8", 0.94)
    with pytest.raises(PocketfusionError):
        gate.check_guidance("float32", 1.01)
