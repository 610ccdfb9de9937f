"""The benchmark of docs/speed.md runs: a crash fails, no figure does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"


def test_the_speed_of_the_embedded_bundle_is_printed() -> None:
    done = subprocess.run([sys.executable, str(SPEED), "--runs", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| Convolution \(NHWC.* \| \d+ \| [\d.]+ \| \d+% \|$", done.stdout, re.M)) == 2
    assert len(re.findall(r"^\| \w+\.tflite \| [\d.]+ s \| [\d.]+ s \|$", done.stdout, re.M)) == 3
