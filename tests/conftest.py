"""Fixtures shared by all tests: one tiny model folder and the bundle the real exporter makes of it, built once."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web"
CHROMIUM = os.environ.get("POCKETFUSION_CHROMIUM", "/usr/bin/chromium")
#: Minutes in one test: begun first, so that no worker is left alone with it at the end.
LONGEST = "test_compress_command.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.hookimpl(trylast=True)  # below the table of durations
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says at the end what was skipped, and which package brings what it needs."""
    skipped = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    for reason, count in skipped.most_common():
        terminalreporter.line(f"{count} skipped: {reason}")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """`stand_in(name, source)`: a module found before the installed one, forgotten with the test."""
    real: dict[str, ModuleType | None] = {}
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        real.setdefault(name, sys.modules.get(name))
        sys.modules.pop(name, None)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    yield write
    for name, module in real.items():  # else every later test of this worker finds the stand-in
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: the folder that `make` fills, once for all of xdist's workers. Read only."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with FileLock(root / f"once-{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def tiny_folder(once: Callable) -> Path:
    """A tiny random model folder. Read only: a test that alters it copies it first."""
    from tiny import make_tiny_folder

    return once("tiny", lambda root: make_tiny_folder(root / "model")) / "model"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path, once: Callable) -> Path:
    """The tiny folder's fp32 bundle, made by the real exporter. Read only, as above."""
    from pocketfusion.mobile.export import export

    return once("bundle", lambda root: export(tiny_folder, root / "tiny", name="tiny")) / "tiny"


@pytest.fixture(scope="session")
def forms(tiny_bundle: Path, once: Callable) -> dict[str, Path]:
    """Small bundles of every form of UNet (`small_unet`), by its name. Read only."""
    from small_unet import make_bundles, make_embedded

    def make(root: Path) -> None:
        make_bundles(tiny_bundle, root)
        make_embedded(tiny_bundle, root / "embedded")

    root = once("forms", make)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def tiny_data(once: Callable) -> Path:
    """A packed data set of 72 captioned 64-px squares and discs in all splits. Read only."""
    from pocketfusion.data.shapes import make_shapes

    return once("shapes", lambda root: make_shapes(root / "data")) / "data"


@pytest.fixture(scope="session")
def tiny_recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/tiny.yaml with the tiny folder's text encoder."""
    import yaml

    recipe = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    recipe["text"] = {"source": str(tiny_folder), "max_length": 32}
    recipe["teacher"]["unet"]["cross_attention_dim"] = 32
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))  # the order of stages counts
    return path


@pytest.fixture(scope="session")
def shallow_recipe(tiny_recipe: Path) -> Path:
    """The tiny recipe with a UNet of two levels, for what exports it: tracing is most of an export."""
    import yaml

    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["teacher"]["unet"] |= {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
    }
    path = tiny_recipe.with_name("shallow.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def compressed(once: Callable, shallow_recipe: Path, cli) -> Path:
    """What `compress` makes of the shallow recipe, undisturbed. Read only."""

    def make(root: Path) -> None:
        done = cli("compress", shallow_recipe, root / "out", timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        (root / "output.txt").write_text(done.stdout + done.stderr)

    return once("compressed", make) / "out"


@pytest.fixture(scope="session")
def cli():
    """Runs `pocketfusion ARGS` in a process of its own and returns it, with its output as text (`run_command`)."""
    from command import run_command

    def run(
        *arguments: object, timeout: float = 240, die: tuple[str, int] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return run_command([str(argument) for argument in arguments], timeout, environment, die)

    return run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a `pocketfusion` command in this process: exit code, stdout, stderr."""

    from pocketfusion.cli import main

    def apply(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pocketfusion", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return apply


@pytest.fixture
def kill(cli):
    """Runs a command that is killed at the end of a function's `number`-th call."""

    def run(at: str, number: int, *arguments: object) -> None:
        done = cli(*arguments, die=(at, number))
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr

    return run


@pytest.fixture
def end(cli):
    """Runs a command to its good end."""

    def run(*arguments: object) -> None:
        done = cli(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def epsilon(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, said to predict ε (it is barely trained: what it predicts is anybody's guess). Read only."""
    out = shutil.copytree(trained / "base", tmp_path_factory.mktemp("epsilon") / "model")
    file = out / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))
    return out


@pytest.fixture(scope="session")
def trained(once: Callable, tiny_recipe: Path, tiny_data: Path, cli) -> Path:
    """What the training commands make of the tiny recipe, once: folders autoencoder, judge and base. Read only."""
    return once("trained", lambda root: _train(root, tiny_recipe, tiny_data, cli))


def _train(root: Path, tiny_recipe: Path, tiny_data: Path, cli: Callable) -> None:
    for command, out, more in (
        ("train-autoencoder", "autoencoder", ()),
        ("train-judge", "judge", ()),
        ("train-teacher", "base", ("--autoencoder", root / "autoencoder")),
    ):
        done = cli(command, tiny_recipe, "--data", tiny_data, "--out", root / out, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished" in done.stdout and "UNEXPECTED" not in done.stdout + done.stderr


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
def onnxruntime_web() -> Path:
    """Where ONNX Runtime Web is installed, apart from what the page needs."""
    folder = WEB / "tests" / "onnx" / "node_modules" / "onnxruntime-web"
    if not folder.is_dir():
        missing("ONNX Runtime Web is not installed (npm ci in web/tests/onnx)")
    return folder


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
