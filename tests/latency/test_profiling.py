"""Rounds, backends and the tables that they fill, on the tiny network."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketfusion.errors import PocketfusionError
from pocketfusion.latency import profiling as module
from pocketfusion.latency.part_modules import Empty, with_random_weights
from pocketfusion.latency.profiling import WARMUP, PartJobs, measure, rounds, time_jobs
from pocketfusion.latency.target import Target, validation_architectures
from pocketfusion.latency.timing_backends import Job, make_backend
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.sd_configs import CONFIGS
from tiny import MAX_LENGTH, tiny_pipeline


@pytest.fixture(scope="module")
def target() -> Target:
    return Target("tiny", tiny_pipeline())


def test_rounds_take_turns() -> None:
    calls: list[str] = []
    times = rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=4)
    assert calls == ["a", "b"] * (WARMUP + 8)
    assert times["a"].runs == 4 and 0 <= times["a"].min <= times["a"].median <= times["a"].max


def test_disturbed_rounds_do_not_count() -> None:
    number = 0

    def run() -> None:
        nonlocal number
        number += 1
        time.sleep(0.02 if number in (WARMUP + 1, WARMUP + 4) else 0)

    assert rounds({"a": run}, runs=2)["a"].max < 20


def test_torch_table(target: Target, tmp_path: Path) -> None:
    """A whole table, with its validation, without an export."""
    backend = make_backend("torch", "float32", 1, tmp_path)
    found = validation_architectures(target.config, 2)
    seen: list[str] = []
    table = measure(
        target, backend, batches=[1, 2], runs=2, validation=found, progress=lambda stage, *_: seen.append(stage)
    )
    assert [check.name for check in table.validation] == list(found) and table.validation[0].batch == 2
    check = table.validation[1]
    architecture = Architecture.model_validate(check.architecture)
    assert check.predicted == pytest.approx(table.predict(target.config, architecture), abs=1e-3)
    assert check.error == pytest.approx(check.predicted / check.measured.median - 1, abs=1e-4)
    assert all(set(entry.ms) == {1, 2} for entry in table.parts.values())
    assert set(table.networks) == {"text_encoder", "decoder"}
    # the base and the base without any block are predicted as they were measured: that is what the overhead is
    base, overhead = Architecture.stock(target.config), table.overhead[2]
    assert table.predict(target.config, base) == pytest.approx(overhead.whole.median, abs=1e-2)
    assert table.predict(target.config, module.bare(target.config)) == pytest.approx(
        overhead.bare.whole.median, abs=1e-2
    )
    assert table.settings.runtime.startswith("torch ") and "batch 2: timing" in seen
    unet = tiny_pipeline().unet
    counted = [table.parts[p.key].parameters for p in module.list_parts(target.config, base, MAX_LENGTH)]
    assert sum(counted) == sum(p.numel() for p in unet.parameters())


def test_bfloat16_runs(tmp_path: Path) -> None:
    job = Job("linear", lambda: torch.nn.Linear(4, 4, device="meta"), {"input": torch.ones(1, 4)})
    make_backend("torch", "bfloat16", 1, tmp_path).load(job)()


def test_what_is_missing_is_said_before_measuring(target: Target, tmp_path: Path) -> None:
    backend = make_backend("torch", "float32", 1, tmp_path)
    thin = {"thin": Architecture.stock(target.config).without_self_attention("mid_block.attentions.0")}
    with pytest.raises(PocketfusionError, match=r"no entry for mid_block.attentions.0 .*without --base-only"):
        measure(target, backend, batches=[2], runs=1, base_only=True, validation=thin)


def test_whole_networks_apart_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[list[str]] = []

    class Fake:
        def prepare(self, job: Job) -> None: ...

        def load(self, job: Job):
            return lambda: None

    jobs = {key: Job(key, lambda: torch.nn.Linear(8, 8), {}) for key in ("unet", "unet: other", "a", "b")}
    original = rounds
    monkeypatch.setattr(
        module,
        "rounds",
        lambda runners, *a: loaded.append(list(runners)) or original(runners, *a),  # type: ignore[func-returns-value]
    )
    assert time_jobs(Fake(), jobs, 1, module.quiet_progress, "")[1]  # type: ignore[arg-type]
    monkeypatch.setattr(module, "available_memory", lambda: 10.0)
    times, together = time_jobs(Fake(), jobs, 1, module.quiet_progress, "")  # type: ignore[arg-type]
    assert not together and set(times) == set(jobs)
    assert loaded == [["unet", "unet: other", "a", "b"], ["a", "b"], ["unet"], ["unet: other"]]


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_litert_runs_what_torch_computes(target: Target, tmp_path: Path, weights: str) -> None:
    """The timed file is the part: same numbers as PyTorch, exported once, then taken from the cache."""
    from ai_edge_litert.interpreter import Interpreter

    jobs = PartJobs(target, base_only=True)
    key = next(key for key, (part, _) in jobs.parts.items() if part.name == "up_blocks.2.resnets.0")
    job = jobs.job(key, 2)
    backend = make_backend("litert-cpu", weights, 1, tmp_path)
    backend.load(job)()
    path = backend.prepare(job)
    assert path is not None
    interpreter = Interpreter(str(path))
    got = interpreter.get_signature_runner()(**{name: x.numpy() for name, x in job.samples.items()})["y"]
    with torch.no_grad():
        expected = with_random_weights(job.module())(**job.samples)["y"].numpy()
    assert np.abs(got - expected).max() < (1e-4 if weights == "float32" else 0.05) * np.abs(expected).max()
    before = path.stat().st_mtime_ns
    assert backend.prepare(job) == path and path.stat().st_mtime_ns == before
    assert backend.prepare(jobs.job(key, 1)) != path


def test_no_gpu_is_one_sentence(tmp_path: Path) -> None:
    backend = make_backend("litert-gpu", "float32", 1, tmp_path)
    try:
        backend.check()
    except PocketfusionError as error:
        assert "use a device with a GPU driver" in str(error) and "\n" not in str(error)
    else:  # a machine with one
        backend.load(Job("empty", Empty, {"x": torch.zeros(1, 8)}))()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("npu", "float32", 1), "--backend is 'npu': choose litert-cpu, litert-gpu, torch"),
        (("litert-cpu", "bfloat16", 1), "--weights is 'bfloat16': LiteRT takes float32, float16, int8"),
        (("torch", "int8", 1), "--weights is 'int8': PyTorch takes float32, bfloat16"),
        (("torch", "float32", 0), "--threads is 0"),
    ],
)
def test_settings(arguments: tuple, match: str, tmp_path: Path) -> None:
    with pytest.raises(PocketfusionError, match=match):
        make_backend(*arguments, tmp_path)


@pytest.mark.parametrize(("name", "parameters"), [("sd-1.5", 859_520_964), ("sd-2.1", 865_910_724)])
def test_full_size_configurations(name: str, parameters: int) -> None:
    """The published counts."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[name]["unet"])
    assert sum(p.numel() for p in unet.parameters()) == parameters
    parts = {part.key for part in module.list_parts(unet.config, Architecture.stock(unet.config), 77)}
    assert any(f"heads{8 if name == 'sd-1.5' else 20}," in key for key in parts)
