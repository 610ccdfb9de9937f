"""`evolve`, `remove` and `plot-drops` on a tiny random model, and what they refuse."""

import json
import shutil
import sys

import numpy as np
import pytest

from pocketfusion.artefact import sha256_folder
from pocketfusion.cli import main
from pocketfusion.evolve.actions import Action
from pocketfusion.evolve.figures import removal_drops
from pocketfusion.evolve.search import open_latency
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.loading import load_pipeline


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `pocketfusion ARGS` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketfusion", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def inputs(tiny_folder, tiny_recipe, tiny_data, judge, table):
    """Arguments of `evolve` on the tiny things, any of them replaced."""

    def arguments(folder=tiny_folder, **changed) -> list:
        given = {"recipe": tiny_recipe, "data": tiny_data, "judge": judge, "latency": table}
        given |= {"samples": 4, "steps": 1} | changed
        return ["evolve", folder, *(part for name, value in given.items() for part in (f"--{name}", value))]

    return arguments


def test_a_dry_run_ranks_and_changes_nothing(command, inputs, tmp_path, tiny_folder):
    before, out = folder_hash(tiny_folder), tmp_path / "ranking.json"
    code, printed, said = command(*inputs(), "--actions", "remove,self-attention", "--dry-run", "--out", out)
    assert code == 0, said
    assert "- up3.CA0 self-attention" in printed and "score lost" in printed and "written to" in printed
    ranked = json.loads(out.read_text())
    assert len(ranked["values"]) == 38 + 16 and ranked["seconds_per_evaluation"] > 0
    saved = {value["action"]["block"]: value["saved_ms"] for value in ranked["values"]}
    assert saved["mid_block.attentions.0"] == pytest.approx(1.0)  # the last action of that block: self-attention
    first, last = (ranked["values"][ranked["ranking"][i]] for i in (0, -1))
    assert max(0, first["drop"]) / first["saved_ms"] <= max(0, last["drop"]) / last["saved_ms"]
    assert folder_hash(tiny_folder) == before
    lines = (tmp_path / "ranking.json.run" / "evaluations.jsonl").read_text().splitlines()
    code, printed, _ = command(
        *inputs(), "--actions", "remove,self-attention", "--dry-run", "--out", out, "--overwrite"
    )
    assert code == 0 and json.loads(out.read_text()) == ranked
    assert (tmp_path / "ranking.json.run" / "evaluations.jsonl").read_text().splitlines() == lines
    code, _, said = command("plot-drops", out, out, "--out", tmp_path / "drops.png")
    assert code == 0 and (tmp_path / "drops.png").read_bytes()[:4] == b"\x89PNG"
    assert removal_drops({"rounds": [ranked, {}]}, "a search's log") == removal_drops(ranked, "a ranking")


def test_drops_are_ranked_as_the_network_without_them_draws_and_as_the_table_says(command, inputs, table, tiny_folder):
    code, printed, said = command(*inputs(samples=2), "--actions", "drop", "--dry-run", "--json")
    assert code == 0, said
    ranked = json.loads(printed)
    found = {value["action"]["block"]: value for value in ranked["values"]}
    assert {"mid_block", "down_blocks.3", "down_blocks.1.1+up_blocks.2.1"} <= found.keys()
    # of the level: 2 + 2 + 3 ResNets of 1 ms, the mid block's attention of 2, two samplers of 0.1
    assert found["down_blocks.3"]["saved_ms"] == pytest.approx(7 + 2 + 2 * 0.1)
    unet = load_elastic(tiny_folder)
    predict = open_latency(table, unet, False)
    for block, value in found.items():
        smaller = Action(kind="drop", block=block).apply(unet.architecture)
        assert value["saved_ms"] == pytest.approx(predict(unet.architecture) - predict(smaller)) and value["error"] > 0
        assert len(with_architecture(unet, smaller).state_dict()) < len(unet.state_dict())


def test_evolve_writes_a_model_folder_with_its_log(command, inputs, tmp_path, tiny_folder):
    out = tmp_path / "evolved"
    # 16 x 2 + 22 + what every network keeps; without half of the attention blocks' parts 0.8 are met, in one group
    more = ("--actions", "self-attention", "--group", 48, "--budget-ratio", 0.8, "--train-steps", 2, "--out", out)
    code, printed, said = command(*inputs(), *more)
    assert code == 0, said
    assert "budget met" in printed and "evaluations of" in printed
    provenance = read_provenance(out)
    assert provenance is not None and provenance.finished and provenance.results["latency_ratio"] <= 0.8
    assert provenance.parents["base"] == folder_hash(tiny_folder) and provenance.samples_seen == 2 * 4
    log = json.loads((out / "actions.json").read_text())
    assert len(log["rounds"]) == 2 and len(log["rounds"][0]["values"]) == 16
    points = json.loads((out / "frontier.json").read_text())["points"]
    assert [point["latency_ms"] for point in points] == [entry["latency_ms"] for entry in log["rounds"]]
    assert points[1]["actions"] == f"{len(log['rounds'][0]['taken'])} thinner"
    assert (out / "frontier.png").is_file()
    unet = load_elastic(out)
    thinned = {str(name) for name, block in unet.architecture.blocks() if not block.self_attention}
    assert thinned == {value["action"]["block"] for value in log["rounds"][0]["taken"]}
    trained = (tmp_path / "evolved.run" / "train-01" / "log.jsonl").read_text().splitlines()
    assert len([line for line in trained if "loss" in json.loads(line)]) == 2
    assert load_pipeline(out).unet.architecture == unet.architecture
    # the same command finds it finished; other inputs are refused
    before = sha256_folder(out)
    assert command(*inputs(), *more)[0] == 0 and sha256_folder(out) == before
    code, _, said = command(*inputs(), *more, "--seed", 1)
    assert code == 2 and "came from other inputs" in said


def test_minutes_over_says_how_to_go_on(command, inputs, tmp_path):
    out = tmp_path / "evolved"
    code, _, said = command(*inputs(), "--budget-ratio", 0.5, "--train-steps", 0, "--out", out, "--max-minutes", 1e-9)
    assert code == 0 and "run the same command to go on" in said and not out.exists()


@pytest.mark.parametrize(("method", "seed"), [("bk-sdm", 0), ("random", 3)])
def test_remove_writes_a_folder_that_draws(command, tiny_folder, table, tmp_path, method, seed):
    from diffusers import DDIMScheduler

    from pocketfusion.models.guided import sample_images
    from pocketfusion.models.text_encoder import TextEncoder

    out = tmp_path / method
    arguments = ("--latency", table, "--method", method, "--seed", seed, "--budget-ratio", 0.5, "--out", out)
    code, printed, said = command("remove", tiny_folder, *arguments, "--json")
    assert code == 0, said
    results = json.loads(printed)
    assert 0.5 - 2 / results["base_latency_ms"] < results["latency_ratio"] <= 0.5
    pipeline = load_pipeline(out)
    assert len(pipeline.unet.architecture.names()) == results["blocks"] < 38
    text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    image = sample_images(pipeline.unet, pipeline.vae, text, scheduler, ["a red disc"], [0], num_inference_steps=1)
    assert image.shape == (1, 64, 64, 3) and np.ptp(image) > 0
    code, _, said = command("remove", out, "--latency", table, "--budget-ratio", 0.4, "--out", tmp_path / "again")
    assert code == 2 and "is evolved already" in said


def test_bad_input_is_one_sentence_and_writes_nothing(command, inputs, tiny_folder, tiny_data, table, tmp_path):
    out = tmp_path / "out"

    def refused(message: str, *arguments) -> None:
        code, _, said = command(*arguments)
        assert code == 2 and message in said and "Traceback" not in said, said
        assert not out.exists() and said.count("error:") == 1

    budget = ("--budget-ratio", 0.5, "--out", out)
    refused("--out is missing", *inputs(), "--budget-ratio", 0.5)
    refused("either --budget-ms or --budget-ratio", *inputs(), "--out", out)
    refused("below what these actions can reach", *inputs(), "--budget-ratio", 0.01, "--out", out)
    refused("lower the budget", *inputs(), "--budget-ratio", 2, "--out", out, "--actions", "remove")
    refused("names no kind of action", *inputs(), *budget, "--actions", "prune")
    refused("--group 0 is below 1", *inputs(), *budget, "--group", 0)
    refused("there is no judge at", *inputs(judge=tmp_path / "nothing"), *budget)
    refused("open_clip", *inputs(judge="open_clip:ViT-g-14:nothing.safetensors"), *budget)  # it, or its weights
    refused("there is no data folder at", *inputs(data=tmp_path / "nothing"), *budget)
    refused("latency table", *inputs(latency=tmp_path / "nothing.json"), *budget)
    refused("there is no model folder at", "remove", tmp_path / "x", "--latency", table, *budget)
    refused("is not a readable JSON file", "plot-drops", tmp_path / "a.json", tmp_path / "b.json", "--out", out)
    ranking = tmp_path / "other.json"
    ranking.write_text('{"values": []}')
    refused("holds no removed blocks", "plot-drops", ranking, ranking, "--out", out)


def test_missing_validation_data_another_table_and_another_family(
    command, inputs, tiny_folder, tiny_data, table, tmp_path
):
    out = tmp_path / "out"
    budget = ("--budget-ratio", 0.5, "--out", out)
    data = shutil.copytree(tiny_data, tmp_path / "data")
    rows = (data / "index.jsonl").read_text().replace("val_combo", "test_combo")
    (data / "index.jsonl").write_text(rows)
    manifest = json.loads((data / "dataset.json").read_text())
    manifest["files"]["index.jsonl"]["size"] = len(rows)
    (data / "dataset.json").write_text(json.dumps(manifest))
    code, _, said = command(*inputs(data=data), *budget)
    assert code == 2 and "no validation pictures" in said

    other = tmp_path / "other.json"
    values = json.loads(table.read_text())
    values["base"]["block_out_channels"] = [320, 640, 1280, 1280]
    other.write_text(json.dumps(values))
    for arguments in (inputs(latency=other), ["remove", tiny_folder, "--latency", other]):
        code, _, said = command(*arguments, *budget)
        assert code == 2 and "block_out_channels is [320, 640, 1280, 1280], not [16, 16, 32, 32]" in said

    values = json.loads(table.read_text())
    values["settings"]["device"] = "Pixel 9"
    other.write_text(json.dumps(values))
    code, _, said = command(*inputs(latency=other), *budget)
    assert code == 2 and "the latency table is for the device Pixel 9, not " in said and "--force" in said
    code, _, _ = command("remove", tiny_folder, "--latency", other, "--force", "--budget-ratio", 0.5, "--out", out)
    assert code == 0
    shutil.rmtree(out)

    sdxl = shutil.copytree(tiny_folder, tmp_path / "sdxl")
    config = json.loads((sdxl / "unet" / "config.json").read_text()) | {"addition_embed_type": "text_time"}
    (sdxl / "unet" / "config.json").write_text(json.dumps(config))
    code, _, said = command(*inputs(folder=sdxl), *budget)
    assert code == 2 and "its addition_embed_type is 'text_time'" in said and not out.exists()


def test_the_command_in_a_process_of_its_own(cli, tmp_path):
    done = cli("evolve", tmp_path, "--recipe", tmp_path / "none.yaml", "--data", tmp_path, "--judge", tmp_path,
               "--latency", tmp_path, "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2 and "there is no recipe at" in done.stderr and "Traceback" not in done.stderr
