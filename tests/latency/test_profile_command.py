"""`pocketfusion profile` as a user calls it: what it writes, and one sentence with exit code 2 on bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from pocketfusion.latency.table import LatencyTable


def test_profile_writes_table_and_picture(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "latency.json"
    settings = ("--backend", "torch", "--runs", "2", "--threads", "1", "--validate", "1", "--batch", "2,1")
    run([str(tiny_folder), "--out", str(out), *settings], monkeypatch)
    printed = capsys.readouterr().out
    for text in ("cross-attention", "Up-3", "text encoder", "ms b=2", "removal saves most", "prediction error"):
        assert text in printed
    table = LatencyTable.load(out)
    assert set(table.overhead) == {1, 2} and len(table.validation) == 1
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "--out is missing"),
        (("--out", "x.json", "--batch", "1,two"), "--batch is '1,two': give numbers with commas"),
        (("--out", "x.json", "--runs", 0), "--runs is 0"),
        (("--out", "x.json", "--pack", "p", "--import", "q"), "--pack and --import exclude each other"),
        (("--out", "no/x.json"), "no does not exist"),
        (("--out", "x.json", "--import", "q"), "q has no pack.json"),
    ],
)
def test_bad_arguments(arguments: tuple, match: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert match in refused(["nowhere", *map(str, arguments)], tmp_path, monkeypatch, capsys)


def test_missing_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    assert "no model folder at nowhere" in refused(["nowhere", "--out", "x.json"], tmp_path, monkeypatch, capsys)


def test_existing_table_is_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "x.json").write_text("mine")
    assert "x.json exists already" in refused(["nowhere", "--out", "x.json"], tmp_path, monkeypatch, capsys)
    assert (tmp_path / "x.json").read_text() == "mine"


def test_another_family_is_refused(tiny_folder: Path, tmp_path: Path, cli) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"resnet_time_scale_shift": "scale_shift"}))
    done = cli("profile", folder, "--out", tmp_path / "x.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "resnet_time_scale_shift" in done.stderr and not (tmp_path / "x.json").exists()


def run(arguments: list[str], monkeypatch) -> None:
    """The command in this process: an import of torch is saved."""
    from pocketfusion.cli import main

    monkeypatch.setattr(sys, "argv", ["pocketfusion", "profile", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    if ended.value.code:
        raise SystemExit(ended.value.code)


def refused(arguments: list[str], folder: Path, monkeypatch, capsys) -> str:
    """The sentence that the command ends with; asserts exit code 2 and nothing written."""
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        run(arguments, monkeypatch)
    assert ended.value.code == 2 and sorted(folder.iterdir()) == before
    return " ".join(capsys.readouterr().err.split())
