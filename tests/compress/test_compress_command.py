"""`pocketfusion compress` on the shallow tiny recipe: the whole chain, killed and not, and what it tells."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from command import _child
from pocketfusion.compress.chain import chain_of
from pocketfusion.compress.kinds import KINDS
from pocketfusion.compress.overview import standings
from pocketfusion.compress.records import Record, Records
from pocketfusion.recipe import load_recipe

pytestmark = pytest.mark.timeout(1500)  # the chain is a minute of one core, which may have much else to do


def hashes(out: Path) -> dict[str, object]:
    """Of every stage: what it holds, or where it holds times and paths its scores; `bench` only measures time."""
    found: dict[str, object] = {}
    for file in (out / "_stages").glob("*.json"):
        record = Record.model_validate_json(file.read_text())
        assert record.state == "finished", file.stem
        found[file.stem] = record.scores if file.stem in ("check", "evaluate") else record.sha256
    found.pop("bench", None)
    return found


def test_the_whole_chain_gives_what_its_kinds_promise(compressed, shallow_recipe):
    chain, records = chain_of(load_recipe(shallow_recipe)), Records(compressed)
    for stage in chain.stages:
        scores = records.get(stage.name).scores
        promised = set(KINDS[stage.kind].scores)
        assert promised <= set(scores) | {"lead"}, stage.name  # curves of one point need not meet
    assert records.get("autoencoder").gate_met is True
    assert all(one.state == "done" for one in standings(chain, compressed))
    for name in ("weights.yaml", "networks.json"):
        assert (compressed / "quantize" / name).is_file()


def test_no_library_speaks_while_it_runs(compressed):
    told = (compressed.parent / "output.txt").read_text()
    assert "16 stages run" in told and "Warning" not in told and "\n\n" not in told


def test_a_second_run_changes_nothing_and_says_so(cli, compressed, shallow_recipe):
    before = {file: file.stat().st_mtime_ns for file in (compressed / "_stages").iterdir()}
    done = cli("compress", shallow_recipe, compressed)
    assert done.returncode == 0 and "0 stages run, 16 unchanged" in done.stdout, done.stderr
    assert {file: file.stat().st_mtime_ns for file in (compressed / "_stages").iterdir()} == before
    status = cli("compress", shallow_recipe, compressed, "--status", COLUMNS="200")
    assert status.returncode == 0 and "nobody at work" in status.stdout
    assert re.search(r"autoencoder +done +6 of 6 .*val_psnr_db .*gate: val_psnr_db ≥ 1", status.stdout)
    plan = cli("compress", shallow_recipe, compressed, "--dry-run")
    assert plan.returncode == 0 and len(re.findall(r" done\b", plan.stdout)) == 16


def test_the_report_is_whole_and_alone(compressed):
    page = (compressed / "report.html").read_text()
    assert page.count("<section") == 16 and page.count("data:image/png;base64,") >= 10
    assert page.count("<svg") >= 8 and "val_psnr_db ≥ 1" in page and "train-teacher" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "http" not in re.sub(
        r"<pre>.*?</pre>", "", page, flags=re.S
    )


def test_what_it_will_take_is_told_before(cli, shallow_recipe, tmp_path, monkeypatch):
    plan = cli("compress", shallow_recipe, tmp_path / "out", "--dry-run")
    assert plan.returncode == 0 and not (tmp_path / "out").exists()
    assert re.search(r"base +run +24 .* GB", plan.stdout) and "in all" in plan.stdout
    from pocketfusion.compress import forecast
    from pocketfusion.errors import PocketfusionError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(PocketfusionError, match=r"the chain needs about .* for .*out and 1 MB are free"):
        forecast.check_disk(chain_of(load_recipe(shallow_recipe)), tmp_path / "out")


def test_bad_input_is_one_sentence(cli, shallow_recipe, tmp_path):
    recipe = yaml.safe_load(shallow_recipe.read_text())
    recipe["stages"]["judge"] = {"gate": {"val_psnr": 3}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = cli("compress", tmp_path / "bad.yaml", tmp_path / "out")
    assert done.returncode == 2 and "the gate of judge names 'val_psnr'" in done.stderr and "Trace" not in done.stderr
    assert not (tmp_path / "out").exists()


def killed_again_and_again(recipe: Path, out: Path, times: int, longest: float) -> int:
    """Runs `compress` and kills it at random moments, then lets it end; how often it was killed."""
    kills, rng = 0, random.Random(times)
    context = multiprocessing.get_context("forkserver")
    while True:
        state = (os.getcwd(), dict(os.environ), str(out.with_suffix(".out")), str(out.with_suffix(".err")), None)
        process = context.Process(target=_child, args=(["compress", str(recipe), str(out)], *state))
        process.start()
        process.join(rng.uniform(0.2, longest) if kills < times else 1200)
        if not process.is_alive():
            assert process.exitcode == 0, out.with_suffix(".err").read_text()
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1


def measured_once(recipe: Path, compressed: Path, tmp_path: Path) -> Path:
    """The recipe with the undisturbed run's latency table, since a table is never measured twice the same."""
    values = yaml.safe_load(recipe.read_text())
    shutil.copytree(compressed / "profile", tmp_path / "table")
    values["stages"]["profile"] = {"from": str(tmp_path / "table")}
    path = tmp_path / "measured.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def seconds_of(compressed: Path) -> float:
    files = (compressed / "_stages").glob("*.json")
    return sum(json.loads(file.read_text())["seconds"] for file in files)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_kill_9_at_random_moments_changes_no_hash(compressed, shallow_recipe, tmp_path, times):
    recipe = measured_once(shallow_recipe, compressed, tmp_path)
    longest = 2 * seconds_of(compressed) / times if times > 2 else seconds_of(compressed) / 2
    began = time.monotonic()
    kills = killed_again_and_again(recipe, tmp_path / "out", times, longest)
    print(f"{kills} kills, {time.monotonic() - began:.0f} s")
    assert kills >= times // 2
    undisturbed, disturbed = hashes(compressed), hashes(tmp_path / "out")
    assert {**undisturbed, "profile": None} == {**disturbed, "profile": None}
