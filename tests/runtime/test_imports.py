"""The runtime is light: no torch, and quick to import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "litert_torch", "safetensors", "matplotlib", "scipy")
EXTRAS = ("onnxruntime", "openvino")  #: which drawing with LiteRT does without


def loaded_by(code: str) -> set[str]:
    """Top-level modules that `code` loads in a fresh process."""
    script = f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


RUN = """
sys.argv = ["pocketfusion", *{}]
from pocketfusion.cli import main
try:
    main()
except SystemExit:
    pass
"""
TIME = """
import time
start = time.process_time()
import pocketfusion.runtime.pipeline
print(time.process_time() - start)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import pocketfusion",
        "import pocketfusion.runtime.pipeline, pocketfusion.runtime.result, pocketfusion.runtime.output",
        RUN.format(["--help"]),
        RUN.format(["generate", "--help"]),
    ],
)
def test_no_torch(code):
    assert loaded_by(code).isdisjoint((*HEAVY, *EXTRAS))


def test_generating_loads_no_torch(tiny_bundle, tmp_path):
    arguments = ["generate", "cat", "-o", str(tmp_path / "a.png"), "--bundle", str(tiny_bundle), "--steps", "1"]
    assert loaded_by(RUN.format(arguments)).isdisjoint((*HEAVY, *EXTRAS))
    assert (tmp_path / "a.png").is_file()


def test_package_and_help_load_neither_litert_nor_numpy():
    assert loaded_by("import pocketfusion").isdisjoint({"numpy", "ai_edge_litert", "pydantic", "PIL"})
    assert loaded_by(RUN.format(["--help"])).isdisjoint({"numpy", "ai_edge_litert", "PIL"})


def test_runtime_imports_in_little_processor_time():
    times = [
        float(subprocess.run([sys.executable, "-c", TIME], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.8  # about 0.25 s; torch alone takes 1.5
