"""A slice of the fuzzer on the tiny bundle, the whole of it, and proof that it sees what it counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def fuzz(bundle: Path, out: Path, *counts: str, timeout: float) -> dict:
    """The table that the command writes; its output is in the failure if it is not 0."""
    done = subprocess.run(
        [sys.executable, HERE / "fuzz.py", *counts, "--bundle", bundle, "--json", out],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    print(done.stdout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(out.read_text())["kinds"]


def test_a_slice_of_hostile_input_does_no_harm(tiny_bundle: Path, tmp_path: Path) -> None:
    counts = {"manifest": 120, "tflite": 25, "tokenizer": 20, "safetensors": 40, "recipe": 30, "latency": 40}
    table = fuzz(tiny_bundle, tmp_path / "a.json", *(f"{kind}={n}" for kind, n in counts.items()), timeout=500)
    assert {kind: row["cases"] for kind, row in table.items()} == counts
    assert all(row["refused"] for row in table.values())
    assert sum(row["sound"] for row in table.values()) > 10  # it gets beyond the door


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_all_hostile_input_does_no_harm(tiny_bundle: Path, tmp_path: Path) -> None:
    fuzz(tiny_bundle, tmp_path / "a.json", timeout=6 * 3600)


def test_the_fuzzer_sees_each_kind_of_harm(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(HERE))
    import fuzz as fuzzer
    from pocketfusion.errors import PocketfusionError

    world = fuzzer.World(tiny_bundle)

    def refuse() -> str:
        raise PocketfusionError("the bundle \x1b[31m is bad: get another")

    harms = {
        "traceback": lambda: [][1],
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: time.sleep(30),
        "outside": lambda: (world.outside / "canary").read_bytes() and "sound",
        "refused": refuse,
        "sound": lambda: "sound",
    }
    monkeypatch.setattr(fuzzer, "TIME", 1.0)
    try:
        for outcome, act in harms.items():
            monkeypatch.setitem(fuzzer.CASES, "manifest", lambda rng, world, act=act: act)
            found, detail = fuzzer.run_case("manifest", 0, 0, world)
            assert found == outcome, detail
        monkeypatch.setitem(fuzzer.CASES, "manifest", lambda rng, world: lambda: fuzzer.no_escapes("\x1b[31m") or "")
        assert fuzzer.run_case("manifest", 0, 0, world)[0] == "escape"
    finally:
        world.close()
        sys.path.remove(str(HERE))
