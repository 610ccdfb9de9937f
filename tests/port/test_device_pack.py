"""A pack goes to a phone and its report comes back. No phone here: a fake `adb` stands for one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketfusion.errors import PocketfusionError
from pocketfusion.port.device_pack import INDEX, SCRIPT, SOURCES, write_device_pack
from pocketfusion.port.device_report import device_report, markdown, row
from pocketfusion.runtime.manifest import Bundle, embedded_bundle

ROOT = Path(__file__).parents[2]
LOG = """INFO: Replacing 12 out of 634 node(s) with delegate (XNNPack) node, yielding 5 partitions for subgraph 0.
INFO: Replacing 630 out of 634 node(s) with delegate (LITERT_CL) node, yielding 3 partitions for subgraph 0.
INFO: count=3 first=9000 curr=9000 min=9000 max=9000 avg=9000 std=0 median=9000
INFO: count=20 first=2600 curr=2500 min=2100 max=3300 avg=2490 std=13 p5=2100 median=2500 p95=3300
INFO: Inference timings in us: Init: 92318, First inference: 2600, Warmup (avg): 9000, Inference (avg): 2490
"""
#: The phone's own files lie in $PHONE; its commands are answered, and `draw` with a picture and its last line.
ADB = r"""#!/bin/sh
set -eu
echo "$@" >>"$PHONE/calls"
case "$1" in
    push) mkdir -p "$PHONE/$(dirname "$3")"; cp "$2" "$PHONE/$3" ;;
    pull) cp "$PHONE/$2" "$3" ;;
    shell) case "$2" in
        *product.manufacturer*) printf 'Acme\r\n' ;;
        *product.model*) printf 'Phone | 9\r\n' ;;
        *soc.model*) printf 'Chips\r\nSoC7\r\n' ;;
        *build.version*) printf '16\r\n' ;;
        *SurfaceFlinger*) printf 'x\nGLES: Acme, Mali-G999, OpenGL ES 3.2 v1.r40p0\n' ;;
        *meminfo*) printf 'MemTotal:    11784516 kB\nMemFree: 1 kB\n' ;;
        *unet.tflite*--use_gpu=true*) echo "ERROR: no GPU here"; exit 1 ;;
        *benchmark_model\ --graph*) cat "$PHONE/log" ;;
        *./draw*gpu.png*) echo "error: LiteRT cannot compile bundle/unet.tflite (status 3)"; exit 2 ;;
        *./draw*) cp "$PHONE/picture.png" "$PHONE/data/local/tmp/pocketfusion-device/cpu.png"
            echo "step 8 of 8: 9.0 ms"
            echo '{"format": "pocketfusion-draw", "unet": {"load_ms": 1.5, "where": "cpu", "run_ms": [9.0]}}' ;;
    esac ;;
esac
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("device") / "pack"
    write_device_pack(embedded_bundle(), out)
    return out


@pytest.fixture
def on_phone(pack: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs a copy of the pack's script against the fake phone."""
    here = Path(shutil.copytree(pack, tmp_path / "pack"))
    phone, tools, libraries = tmp_path / "phone", tmp_path / "bin", tmp_path / "libraries"
    for folder in (phone, tools, libraries):
        folder.mkdir()
    (phone / "log").write_text(LOG)
    picture = np.asarray(Image.open(pack / "reference.png")).copy()
    picture[0, 0, 0] ^= 2
    Image.fromarray(picture).save(phone / "picture.png")
    (tools / "adb").write_text(ADB)
    (tools / "adb").chmod(0o755)
    for name in ("draw", "libLiteRt.so", "benchmark_model"):
        (libraries / name).write_text(name)

    def run(*more: object) -> Path:
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PHONE": str(phone)}
        command = [str(here / SCRIPT), str(libraries / "benchmark_model"), *map(str, more)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        calls = (phone / "calls").read_text().splitlines()
        assert all(
            "/data/local/tmp/pocketfusion-device" in call
            or "getprop" in call
            or "dumpsys" in call
            or "meminfo" in call
            for call in calls
        )
        assert calls[-1] == "shell rm -rf /data/local/tmp/pocketfusion-device"
        return here

    run.libraries = libraries  # type: ignore[attr-defined]
    return run


def test_what_is_in_it(pack: Path) -> None:
    assert Bundle.open(pack / "bundle").hash == Bundle.open(embedded_bundle()).hash
    assert {path.name for path in (pack / "source").iterdir()} == {path.name for path in SOURCES.iterdir()}
    assert subprocess.run(["sh", "-n", str(pack / SCRIPT)], check=False).returncode == 0
    kinds = {path.suffix for path in pack.rglob("*") if path.is_file()}
    assert not kinds & {".so", ".apk", ".aar", ".bin"}
    named = (ROOT / "examples" / "cpp" / "CMakeLists.txt").read_text()
    assert SOURCES.relative_to(ROOT).as_posix() in named
    command = (pack / "README.md").read_text()
    assert "-ffp-contract=off" in command and "libLiteRt.so" in command and "{" not in command


def test_there_and_back(on_phone, run, tmp_path: Path) -> None:
    folder = on_phone(on_phone.libraries)
    code, out, err = run("device-report", folder, tmp_path / "report.md")
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"]["maker"] == "Acme" and report["device"]["soc"] == "Chips SoC7"
    assert report["device"]["driver"] == "Acme, Mali-G999, OpenGL ES 3.2 v1.r40p0"
    decoder = report["networks"]["decoder"]["gpu"]
    assert decoder["ms"] == {"median": 2.5, "min": 2.1, "max": 3.3, "runs": 20}
    assert decoder["nodes"] == {"delegated": 630, "all": 634, "partitions": 3}
    assert (
        report["networks"]["unet"]["gpu"]["ms"] is None
        and "no GPU here" in report["networks"]["unet"]["gpu"]["failure"]
    )
    pixels = 64 * 64 * 3
    assert report["pictures"]["cpu"]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / (4 / pixels)), abs=0.01)
    assert report["pictures"]["cpu"]["networks"]["unet"]["run_ms"] == [9.0]
    assert "LiteRT cannot compile" in report["pictures"]["gpu"]["failure"]
    page = (tmp_path / "report.md").read_text()
    assert row(report) in page and row(report) in " ".join(out.split("\n")) and "Acme Phone / 9" in page
    assert "2.5, failed, 2.5" in row(report) and "3, not told, 3" in row(report) and "gpu failed" in row(report)


def test_without_the_program(on_phone) -> None:
    report = device_report(on_phone())
    assert report["pictures"] == {"cpu": None, "gpu": None} and "not drawn" in markdown(report)


def test_an_equal_picture_is_called_equal(on_phone) -> None:
    folder = on_phone(on_phone.libraries)
    shutil.copyfile(folder / "reference.png", folder / "results" / "cpu.png")
    assert "cpu equal" in row(device_report(folder))
    Image.new("RGB", (8, 8)).save(folder / "results" / "cpu.png")
    assert device_report(folder)["pictures"]["cpu"]["psnr_db"] is None and "cpu failed" in row(device_report(folder))


def test_forms_that_are_none(on_phone, pack: Path, run, tmp_path: Path) -> None:
    folder = on_phone()
    form, good = folder / "results" / "form.txt", (folder / "results" / "form.txt").read_text()
    for content, said in (
        ("", "is not a form that run.sh filled"),
        ("hello", "is not a form that run.sh filled"),
        (good + "price=1\n", "is not a form that run.sh filled (price"),
        (good.replace("model=Phone | 9", "model="), "is not a form that run.sh filled (model"),
        ("pack=0\n" + good.partition("\n")[2], "is of another pack"),
        ("\x00\xff" * 9, "is not a form that run.sh filled"),
    ):
        form.write_text(content)
        code, _, err = run("device-report", folder, tmp_path / "r.md")
        assert code == 2 and said in " ".join(err.split()) and "Traceback" not in err, err
    form.unlink()
    with pytest.raises(PocketfusionError, match=r"form\.txt is missing: run the pack's run\.sh"):
        device_report(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(PocketfusionError, match="is not a device pack's"):
        device_report(folder)
    code, _, err = run("device-report", tmp_path, tmp_path / "r.md")
    assert code == 2 and "has no device-pack.json" in " ".join(err.split())
    assert run("device-report", pack, tmp_path / "r.txt")[0] == 2 and not (tmp_path / "r.md").exists()


def test_no_pack_over_something_else(run, pack: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    for arguments, said in (
        ((tiny_bundle, pack), "exists already"),
        ((tiny_bundle, other, "--overwrite"), "holds no device-pack: it is not replaced"),
        ((tmp_path, tmp_path / "new"), "is not a bundle"),
        ((tmp_path / "none", tmp_path / "new"), "there is no bundle"),
    ):
        code, _, err = run("device-pack", *arguments)
        assert code == 2 and said in " ".join(err.split()), err
    assert not (tmp_path / "new").exists() and (other / "bundle.json").is_file()


def test_the_table_of_devices_has_only_what_phones_said() -> None:
    """docs/devices.md: the head that reports have, and no row that does not come from one."""
    from pocketfusion.port.device_report import TABLE_HEAD

    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    at = lines.index(TABLE_HEAD[0])
    assert lines[at + 1] == TABLE_HEAD[1] and not lines[at + 2].startswith("|")
