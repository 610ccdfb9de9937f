"""examples/ios: compiled with a Swift compiler for Linux against a stub of what it calls, and run against the kits.

Slow: needs POCKETFUSION_SWIFT, a swiftc. SwiftUI and Apple's systems are not here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_swift(forms: dict[str, Path], tmp_path: Path) -> None:
    from kits import make_kits, make_tokenizers

    compiler = os.environ.get("POCKETFUSION_SWIFT")
    if compiler is None:
        pytest.skip("POCKETFUSION_SWIFT names no compiler: see examples/README.md")

    def compiled(*arguments: object) -> None:
        command = [compiler, "-swift-version", "5", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    here = ROOT / "tests/port/swift"
    module = ["-emit-module", "-emit-library", "-static", "-parse-as-library", "-module-name", "LiteRT"]
    compiled(*module, here / "LiteRT.swift", "-o", "libLiteRT.a", "-emit-module-path", "LiteRT.swiftmodule")
    sources = sorted((ROOT / "examples/ios/Sources/Pocketfusion").glob("*.swift"))
    compiled("-O", "-I", ".", "-L", ".", "-lLiteRT", *sources, here / "main.swift", "-o", "check")
    make_kits(tmp_path, forms)
    make_tokenizers(tmp_path)
    for bundle in sorted((tmp_path / "bundles").iterdir()):
        arguments = map(str, [bundle, tmp_path / "kits" / bundle.name, tmp_path / "tokenizers"])
        done = subprocess.run([tmp_path / "check", *arguments], capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == "good", f"{bundle.name}: {done.stderr[-3000:]}"
