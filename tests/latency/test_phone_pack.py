"""A pack goes to a phone and its logs come back. No phone here: a fake `adb` prints what benchmark_model documents."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.phone_pack import LOGS, MANIFEST, SCRIPT, import_pack, read_log, write_pack
from pocketfusion.latency.target import Target
from pocketfusion.latency.timing_backends import Job, make_backend
from pocketfusion.latency.unet_parts import list_parts
from pocketfusion.models.elastic.architecture import Architecture
from tiny import MAX_LENGTH, tiny_pipeline

#: The lines of the tool's documented output that matter, with its warm-up statistics before the timed ones.
LOG = """INFO: STARTING!
INFO: Num threads: [4]
INFO: Loaded model /data/local/tmp/m.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: The input model file size (MB): 3.06409
INFO: Initialized session in 92.318ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=3 first=235158 curr=200386 min=199462 max=235158 avg=211669 std=16613 p5=199462 median=200386 p95=235158

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=25 first=187533 curr=140990 min=140071 max=195121 avg=145528 std=13583 p5=140545 median=141253 p95=187533

INFO: Inference timings in us: Init: 92318, First inference: 235158, Warmup (avg): 211669, Inference (avg): 145528
INFO: Memory footprint delta from the start of the tool (MB): init=54.2852 overall=73.4102
"""

ADB = """#!/bin/sh
# pushes go to "$PHONE"; benchmark_model answers with its size-dependent time
echo "$@" >>"$PHONE/calls"
case "$1" in
    push) cp "$2" "$PHONE/$(basename "$3")" ;;
    shell) case "$2" in
        *getprop*) echo "Acme Phone 9, SoC7, Android 16" ;;
        */benchmark_model\\ --graph*) sed "s/141253/${MEDIAN:-2000}/" "$PHONE/log" ;;
    esac ;;
esac
"""


class FakeExport:
    """Files of the right names instead of minutes of conversion."""

    def __init__(self, folder: Path):
        self.settings = make_backend("litert-cpu", "int8", 1, folder).settings
        self.folder, self.count = folder, 0

    def check(self) -> None: ...

    def prepare(self, job: Job) -> Path:
        self.count += 1
        path = self.folder / f"{self.count}.bin"
        path.write_bytes(job.key.encode())
        return path

    def load(self, job: Job):
        raise AssertionError("a pack measures nothing")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    write_pack(Target("tiny", tiny_pipeline()), FakeExport(folder), folder / "pack", batches=[1, 2], base_only=True)
    return folder / "pack"


@pytest.fixture
def measured(pack: Path, tmp_path: Path) -> Path:
    """The pack after its script ran against the fake phone."""
    phone, tools = tmp_path / "phone", tmp_path / "bin"
    phone.mkdir()
    tools.mkdir()
    (phone / "log").write_text(LOG)
    (tools / "adb").write_text(ADB)
    (tools / "adb").chmod(0o755)
    (tools / "benchmark_model").write_text("a tool")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PHONE": str(phone)}
    command = [str(pack / SCRIPT), str(tools / "benchmark_model"), "gpu", "6", "40"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = (phone / "calls").read_text()
    assert "--num_threads=6 --num_runs=40" in calls and "--use_gpu=true" in calls
    return pack


def test_pack_and_import(measured: Path) -> None:
    table = import_pack(measured)
    assert table.settings.device == "Acme Phone 9, SoC7, Android 16"
    assert (table.settings.backend, table.settings.threads, table.settings.weights) == (
        "benchmark_model gpu",
        6,
        "int8",
    )
    assert table.settings.runtime.startswith("benchmark_model sha256 ")
    config = Target("tiny", tiny_pipeline()).config
    base = Architecture.stock(config)
    used = list_parts(config, base, MAX_LENGTH)
    for batch in (1, 2):  # every log says 2 ms
        assert table.overhead[batch].whole.median == 2 and table.overhead[batch].parts == 2 * len(used)
        assert table.predict(config, base, batch) == pytest.approx(2)
    assert table.networks["decoder"].ms[1].median == 2 and table.networks["decoder"].parameters > 1000
    assert sum(table.parts[part.key].parameters for part in used) == sum(
        p.numel() for p in tiny_pipeline().unet.parameters()
    )


def test_files_are_the_parts(pack: Path) -> None:
    names = sorted(path.name for path in pack.glob("*.tflite"))
    assert any(name.endswith("-unet-batch2.tflite") for name in names)
    assert any("-text_encoder-batch1" in name for name in names) and any("-empty-" in name for name in names)
    assert subprocess.run(["sh", "-n", str(pack / SCRIPT)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "median", "low", "runs"),
    [
        (LOG, 141.253, 140.071, 25),
        ("INFO: count=50 first=33228 curr=33130 min=32687 max=33239 avg=33071.8 std=129\n"
         "INFO: Inference timings in us: Init: 3501, First inference: 156677, Warmup (avg): 43268.1, "
         "Inference (avg): 33071.8", 33.0718, 32.687, 50),
        ("count=1 curr=40000\nInference timings in us: Init: 1, First inference: 2, Warmup (avg): 3, "
         "Inference (avg): 40000", 40.0, 40.0, 1),
        ("count=5 curr=100 (all same)\nInference timings in us: Init: 1", 0.1, 0.1, 5),
    ],
)  # fmt: skip
def test_logs_of_old_and_new_tools(text: str, median: float, low: float, runs: int, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    timing = read_log(tmp_path / "log")
    assert (timing.median, timing.min, timing.runs) == (median, low, runs)


@pytest.mark.parametrize(
    "text", ["", "ERROR: Failed to apply GPU delegate.\nBenchmarking failed.\n", LOG.partition("INFO: Inference")[0]]
)
def test_garbled_logs(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text(text)
    with pytest.raises(PocketfusionError, match=r"x\.log holds no result of benchmark_model .*run\.sh again"):
        read_log(tmp_path / "x.log")


def test_missing_pieces_are_named(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(PocketfusionError, match="has no pack.json"):
        import_pack(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(PocketfusionError, match="is damaged"):
        import_pack(tmp_path)
    (tmp_path / MANIFEST).write_bytes((pack / MANIFEST).read_bytes())
    with pytest.raises(PocketfusionError, match=r"settings\.txt is missing: run the pack's run\.sh"):
        import_pack(tmp_path)
    (tmp_path / LOGS).mkdir()
    (tmp_path / LOGS / "settings.txt").write_text("device=x\n")
    with pytest.raises(PocketfusionError, match="is not what run.sh writes"):
        import_pack(tmp_path)
    (tmp_path / LOGS / "settings.txt").write_text("device=x\nbackend=b\nruntime=r\nthreads=4\n")
    with pytest.raises(PocketfusionError, match=r"\.log is missing: run the pack's run\.sh again"):
        import_pack(tmp_path)


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("keep")
    for overwrite, match in ((False, "exists already"), (True, "is not a pack")):
        with pytest.raises(PocketfusionError, match=match):
            write_pack(
                Target("tiny", tiny_pipeline()), FakeExport(tmp_path), tmp_path / "mine", batches=[1],
                overwrite=overwrite, base_only=True,
            )  # fmt: skip
    assert (tmp_path / "mine" / "x").read_text() == "keep"


def test_torch_makes_no_pack(tmp_path: Path) -> None:
    with pytest.raises(PocketfusionError, match="use --backend litert-cpu"):
        write_pack(
            Target("tiny", tiny_pipeline()), make_backend("torch", "float32", 1, tmp_path), tmp_path / "p", batches=[1]
        )
    assert not (tmp_path / "p").exists() and torch.is_grad_enabled()
