"""`doctor` says what is there and what is not, and itself needs nothing of it."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pocketfusion import doctor

SCRIPT = Path(sys.executable).with_name("pocketfusion")


@pytest.fixture
def bare(monkeypatch):
    """A machine that lacks everything: no program, no driver, no extra, neither memory nor disk to speak of."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: missing(name))
    monkeypatch.setattr("pocketfusion.mobile.delegate.stack.find_stacks", lambda: ())
    monkeypatch.setattr("pocketfusion.runtime.memory.available_memory", lambda: 1e8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Room", (), {"free": 5e8}))
    monkeypatch.setattr("pocketfusion.load", lambda: (_ for _ in ()).throw(ImportError("libGL.so.1 is missing")))
    monkeypatch.setitem(sys.modules, "torch", None)


def missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_a_machine_that_lacks_everything(bare):
    found = {(one.section, one.name): one for one in doctor.examine()}
    assert {name for (_, name), one in found.items() if one.state == "broken"} == {
        "memory",
        "disk here",
        "disk for temporary files",
        "libraries",
        "embedded bundle",
    }
    assert found["drawing", "embedded bundle"].text == "ImportError: libGL.so.1 is missing"
    assert found["extras", "[compress]"].cure == "pip install '.[compress]' in pocketfusion's clone"
    assert found["programs", "npm"].cure == "install npm"
    assert all(one.cure for one in found.values() if one.state != "ok" and one.text != "torch is not installed")


def test_what_cannot_be_looked_at_is_a_finding(monkeypatch):
    def fails():
        raise PermissionError(13, "Permission denied", "/proc/cpuinfo")
        yield

    monkeypatch.setattr(doctor, "_machine", fails)
    monkeypatch.setattr("pocketfusion.mobile.delegate.stack.find_stacks", lambda: ())
    first = doctor.examine()[0]
    assert first.state == "broken" and "/proc/cpuinfo: permission denied" in first.text


def test_a_version_that_nothing_was_tried_with_is_named():
    wanted = ["numpy>=1,<99", "Pillow<2", "nowhere-to-be-found; extra == 'x'", "rich>=99; extra == 'x'"]
    assert [one.split()[0] for one in doctor._wrong(wanted, "")] == ["Pillow"]
    assert list(doctor._wrong(wanted, "x")) == [
        "nowhere-to-be-found",
        f"rich {metadata.version('rich')} (wanted >=99)",
    ]


def test_the_command_prints_and_ends_well_here(cli):
    done = cli("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and {one["section"] for one in found} == set(
        ("machine", "drawing", "extras", "accelerators", "programs")
    )
    assert next(one for one in found if one["name"] == "embedded bundle")["text"].endswith("px drawn")


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
def test_completion_in_a_shell_that_is_not_known(option, tmp_path):
    done = subprocess.run(
        ["sh", "-c", f"{SCRIPT} {option}; exit $?"],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: this shell is ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_completion_in_bash_knows_the_commands(tmp_path):
    environment = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"_POCKETFUSION_COMPLETE": "complete_bash", "COMP_WORDS": "pocketfusion dist", "COMP_CWORD": "1"}
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["distill-steps", "distill-guidance", "distill-consistency", "distill-decoder"]
