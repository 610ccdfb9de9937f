"""What the browser's tests stand on: node, the page's packages, Chromium; skipped by name where one is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parents[2] / "web"
CHROMIUM = os.environ.get("POCKETFUSION_CHROMIUM", "/usr/bin/chromium")


def missing(what: str) -> None:
    """Skips the test; fails it where the machine was made for it (POCKETFUSION_TEST_DRIVERS)."""
    if os.environ.get("POCKETFUSION_TEST_DRIVERS"):
        pytest.fail(f"{what}, which POCKETFUSION_TEST_DRIVERS promises")
    pytest.skip(what)


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder web/ with its npm packages."""
    if shutil.which("node") is None:
        missing("node is not installed (apt-get install npm)")
    if not (WEB / "node_modules" / ".bin" / "vitest").exists():
        missing("the page's packages are not installed (npm ci in web/)")
    return WEB


@pytest.fixture(scope="session")
def chromium() -> str:
    if not Path(CHROMIUM).exists():
        missing(f"{CHROMIUM} is not there (apt-get install chromium)")
    return CHROMIUM


@pytest.fixture(scope="session")
def vitest(packages: Path) -> Callable[..., None]:
    """`vitest(file, NAME=value…)` runs a file of tests under web/tests and fails with what failed there.

    `only` is a pattern of test names.
    """

    def run(file: str, only: str | None = None, **environment: str) -> dict[str, Any]:
        report = Path(environment["POCKETFUSION_VECTORS"]) / f"{Path(file).stem}-{os.getpid()}.json"
        command = [str(packages / "node_modules" / ".bin" / "vitest"), "run", file, "--reporter=json"]
        command += [f"--outputFile={report}", *(["-t", only] if only else [])]
        done = subprocess.run(
            command, cwd=packages, env={**os.environ, **environment}, capture_output=True, text=True, timeout=580
        )
        if not report.exists():
            pytest.fail(f"vitest did not run {file}:\n{(done.stdout + done.stderr)[-3000:]}", pytrace=False)
        result = json.loads(report.read_text())
        failed = [
            f"{test['fullName']}\n{message[:3000]}"
            for suite in result["testResults"]
            for test in [*suite["assertionResults"], {"status": suite["status"], "fullName": suite["name"], **suite}]
            if test["status"] == "failed"
            for message in (test.get("failureMessages") or [test.get("message", "")])
        ]
        if failed or not result["numPassedTests"]:
            pytest.fail("\n\n".join(failed) or f"no test ran in {file}", pytrace=False)
        return result

    return run


@pytest.fixture(scope="session")
def vectors(once: Callable, packages: Path) -> Path:
    """A folder with what Python computes of what the engine computes too."""
    from vectors import write

    return once("vectors", write)


@pytest.fixture(scope="session")
def drawn(once: Callable, forms: dict[str, Path], packages: Path) -> Path:
    """A folder of small bundles, and the pictures that Python draws with them and with the embedded one."""
    from drawn import make

    return once("drawn", lambda folder: make(folder, forms))
