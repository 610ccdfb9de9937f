"""examples/android: compiled with Kotlin's own compiler against stubs of what it calls, and run against the port kits.

Slow: needs POCKETFUSION_KOTLIN, npm's package kotlin-compiler unpacked, and Java. Gradle and Android are not here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_kotlin(forms: dict[str, Path], tmp_path: Path) -> None:
    from kits import make_kits, make_tokenizers

    package = os.environ.get("POCKETFUSION_KOTLIN")
    if package is None or shutil.which("java") is None:
        pytest.skip("POCKETFUSION_KOTLIN names no compiler, or there is no Java: see examples/README.md")
    library = Path(package).resolve() / "lib"
    compiler = ["compiler", "stdlib", "script-runtime", "reflect", "daemon-client"]
    jars = [*(library / f"kotlin-{name}.jar" for name in compiler), library / "annotations-13.0.jar"]
    coroutines = library / "kotlinx-coroutines-core-jvm.jar"
    sources = [ROOT / "examples/android/app/src/main/kotlin/pocketfusion", ROOT / "tests/port/kotlin"]
    command = ["java", "-Xmx900m", "-cp", ":".join(map(str, [*jars, coroutines]))]
    command += ["org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-kotlin-home", str(library.parent), "-no-reflect"]
    command += [
        "-Werror",
        "-cp",
        str(coroutines),
        "-jvm-target",
        "17",
        *map(str, sources),
        "-d",
        str(tmp_path / "classes"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    make_kits(tmp_path, forms)
    make_tokenizers(tmp_path)
    classes = ":".join(map(str, [tmp_path / "classes", library / "kotlin-stdlib.jar", coroutines]))
    for bundle in sorted((tmp_path / "bundles").iterdir()):
        arguments = map(str, [bundle, tmp_path / "kits" / bundle.name, tmp_path / "tokenizers"])
        done = subprocess.run(
            ["java", "-cp", classes, "CheckKt", *arguments], capture_output=True, text=True, timeout=300
        )
        assert done.stdout.strip() == "good", f"{bundle.name}: {done.stderr[-3000:]}"
