"""Curves over guidance: the same captions and noise for all, points by hand, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from fakes import ColourJudge, FakeSystem
from PIL import Image

from pocketfusion.cli import main
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings
from pocketfusion.evaluate.metrics import frechet_distance
from pocketfusion.evaluate.sets import choose_sets, picture_seed
from pocketfusion.evaluate.sweep import PointCache, Reference, Sweep, parse_guidance, sweep
from pocketfusion.evaluate.sweep_run import labels, markdown, sweep_folders, write_sweep
from pocketfusion.folder import folder_hash
from pocketfusion.models.judge import JudgeModel

PROTOCOL = {"data": {"name": "shapes", "fingerprint": "f" * 32}, "judge": {"sha256": "1" * 64}, "seed": 0}
PROTOCOL |= {"image_size": 64, "num_inference_steps": 3}


class Guided(FakeSystem):
    """Shows the real picture of a caption the more often the higher the guidance; remembers what it was asked."""

    def __init__(self, pictures, calls, stop_after: int = 99):
        super().__init__(pictures)
        self.calls, self.stop_after, self.every = calls, stop_after, dict(pictures)

    def draw(self, prompts, seeds, settings, on_batch=None):
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(prompts), tuple(seeds), settings.guidance_scale))
        distinct = list(dict.fromkeys(prompts))
        self.pictures = {
            prompt: self.every[prompt] for prompt in distinct[: round(settings.guidance_scale / 4 * len(distinct))]
        }
        return super().draw(prompts, seeds, settings, on_batch)


@pytest.fixture
def data(tiny_data):
    return open_dataset(tiny_data, 64)


@pytest.fixture
def reference(data):
    return Reference.of(data, ColourJudge(), choose_sets(data, ["test_combo", "val_combo"], 8), seed=5)


@pytest.fixture
def truth(data):
    return {data.rows[i]["captions"][0]: np.asarray(data.images[i]) for i in data.splits["test_combo"]}


def go(reference, truth, folder, calls, names=("one", "two"), guidance=(0.0, 2.0, 4.0), stop_after=99, seen=None):
    systems = [(n, {"name": n, "sha256": n * 20}, lambda: Guided(truth, calls, stop_after)) for n in names]
    protocol = PROTOCOL | {"sets": {chosen.name: ["id"] * len(chosen.indices) for chosen in reference.sets}}
    progress = (lambda *what: seen.append(what)) if seen is not None else lambda *what: None
    sampler = SamplerSettings(num_inference_steps=3)
    return sweep(systems, ColourJudge(), reference, guidance, sampler, protocol, PointCache(folder), progress)


def test_every_system_gets_the_same_captions_and_noise(data, reference, truth, tmp_path):
    calls, seen = [], []
    result = go(reference, truth, tmp_path, calls, seen=seen)
    assert len({(prompts, seeds) for prompts, seeds, _ in calls}) == 1 and len(calls) == 6
    assert [scale for *_, scale in calls] == [0.0, 2.0, 4.0] * 2
    first = choose_sets(data, ["test_combo"], 8)[0].indices[0]
    assert calls[0][1][0] == picture_seed(5, data.rows[first]["id"]) and len(calls[0][0]) == 16
    assert [curve.points for curve in result.curves][0] == [curve.points for curve in result.curves][1]
    assert seen[-1][1:] == (96, 96) and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_points_are_what_the_metrics_say(reference, truth, tmp_path):
    (curve,) = go(reference, truth, tmp_path, [], names=("one",)).curves
    judge = ColourJudge()
    images = FakeSystem(truth).draw(reference.captions, reference.seeds, None)
    features, embeddings = judge.image_features(images)
    texts = judge.text_embeddings(list(reference.captions))
    full = curve.points[-1]
    assert full.frechet == frechet_distance(features, reference.features)
    assert full.clip_score.value == pytest.approx(
        100 * np.mean([a @ b for a, b in zip(embeddings, texts, strict=True)])
    )
    assert full.clip_score.low <= full.clip_score.value <= full.clip_score.high
    scores = [point.clip_score.value for point in curve.points]
    assert scores == sorted(scores) and scores[0] < scores[2] and curve.best is full


def test_a_killed_sweep_goes_on_and_draws_nothing_twice(reference, truth, tmp_path):
    whole = go(reference, truth, tmp_path / "whole", [])
    calls: list = []
    for stop in range(1, 6):
        with pytest.raises(KeyboardInterrupt):
            go(reference, truth, tmp_path / "run", calls, stop_after=stop)
        assert len(calls) == stop
    assert go(reference, truth, tmp_path / "run", calls) == whole and len(calls) == 6
    assert go(reference, truth, tmp_path / "run", calls) == whole and len(calls) == 6
    more = go(reference, truth, tmp_path / "run", calls, guidance=(0.0, 2.0, 3.0, 4.0))  # one more scale
    assert len(calls) == 8 and [p.guidance_scale for p in more.curves[0].points] == [0, 2, 3, 4]
    for file in (tmp_path / "run").glob("*.json"):
        file.write_text("{")  # damaged points are drawn again
    assert go(reference, truth, tmp_path / "run", calls) == whole and len(calls) == 14


def test_the_page_and_the_picture(reference, truth, tmp_path):
    result = go(reference, truth, tmp_path / "run", [])
    write_sweep(result, tmp_path)
    assert Sweep.model_validate_json((tmp_path / "curve.json").read_text()) == result
    page = (tmp_path / "curve.md").read_text()
    assert page == markdown(result) and page.count("(lowest)") == 2 and "| real pictures |" in page
    assert "16 pictures a point: test_combo (8), val_combo (8)" in page
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 300


def test_too_few_pictures_are_refused(data):
    with pytest.raises(PocketfusionError, match=r"test_combo: 6 pictures are too few for 4 features.*raise --samples"):
        Reference.of(data, ColourJudge(), choose_sets(data, ["test_combo"], 6), seed=0)


@pytest.mark.parametrize("text", ["", "1,", "1,two", "-1", "1,nan", "inf", "1,,2", "1;2"])
def test_bad_guidance_is_named(text):
    with pytest.raises(PocketfusionError, match="--guidance .* holds .*: give numbers with commas"):
        parse_guidance(text)


def test_guidance_is_sorted_and_has_no_doubles():
    assert parse_guidance(" 4.5, 1,0 ") == (0.0, 1.0, 4.5)
    with pytest.raises(PocketfusionError, match=r"holds 2.0 twice"):
        parse_guidance("2,1,2.0")


def test_labels_tell_folders_apart(tmp_path):
    assert labels([tmp_path / "a" / "base", tmp_path / "evolved"]) == ["base", "evolved"]
    assert labels([tmp_path / "a" / "base", tmp_path / "b" / "base"]) == ["a/base", "b/base"]
    with pytest.raises(PocketfusionError, match="named twice"):
        labels([tmp_path / "base", tmp_path / "a" / ".." / "base"])


@pytest.fixture(scope="module")
def judge(tiny_folder, tmp_path_factory):
    """An untrained judge over the tiny text encoder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "judge"
    text = {"source": str(tiny_folder), "max_length": 32}
    JudgeModel(image_size=64, widths=(8, 16), text_width=32, embed_dim=16, text=text).save_pretrained(path)
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `pocketfusion sweep ARGS` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketfusion", "sweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_on_two_folders(command, tiny_folder, tiny_data, judge, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    out = tmp_path / "curve"
    arguments = (tiny_folder, other, "--data", tiny_data, "--judge", judge, "--out", out)
    arguments += ("--guidance", "1,3", "--samples", 40, "--steps", 1)
    arguments += ("--sets", "train,test_combo,val_combo,val_concept")
    code, printed, said = command(*arguments)
    assert code == 0, said
    assert "real pictures" in printed and "written to" in printed and "other" in printed
    result = json.loads((out / "curve.json").read_text())
    assert [curve["label"] for curve in result["curves"]] == ["model", "other"]
    assert result["curves"][0]["system"]["sha256"] == folder_hash(tiny_folder)
    assert result["curves"][0]["points"] == result["curves"][1]["points"]  # the same weights
    assert result["curves"][0]["points"][0] != result["curves"][0]["points"][1]
    assert sorted(p.name for p in out.iterdir()) == ["curve.json", "curve.md", "curve.png"]
    assert list(result["protocol"]["sets"]) == ["train", "test_combo", "val_combo", "val_concept"]
    assert result["protocol"]["samples"] == 40 and len(result["protocol"]["sets"]["train"]) == 40

    code, _, said = command(*arguments)
    assert code == 2 and "exists already" in said and "Traceback" not in said
    monkeypatch.setattr(ModelFolder, "draw", None)  # all points are in OUT.run
    code, printed, _ = command(*arguments, "--overwrite", "--json")
    assert code == 0 and json.loads(printed) == result


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folders": ["nothing"]}, "there is no model folder at"),
        ({"data": "nothing"}, "there is no data folder at"),
        ({"judge": "nothing"}, "there is no judge at"),
        ({"samples": 1}, "at least 2"),
        ({"samples": 30}, "train: 30 pictures are too few for"),
        ({"sets": ["tests"]}, "no set named tests"),
        ({"out": "missing/curve"}, "does not exist"),
    ],
)
def test_bad_input_writes_nothing(tiny_folder, tiny_data, judge, tmp_path, changed, message):
    changed = {k: tmp_path / v if isinstance(v, str) else v for k, v in changed.items()}
    if "folders" in changed:
        changed["folders"] = [tiny_folder, tmp_path / "nothing"]
    arguments = {"folders": [tiny_folder], "data": tiny_data, "judge": judge, "out": tmp_path / "curve"} | changed
    sampler = SamplerSettings(num_inference_steps=1)
    with pytest.raises(PocketfusionError, match=message):
        sweep_folders(**({"sampler": sampler, "guidance": (1.0,), "samples": 40, "sets": ["train"]} | arguments))
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_wrong_in_one_sentence(command, tiny_folder, tiny_data, judge, tmp_path):
    arguments = (tiny_folder, "--data", tiny_data, "--judge", judge, "--out", tmp_path / "curve")
    code, _, said = command(*arguments, "--guidance", "1,x")
    assert code == 2 and "holds 'x'" in said and "Traceback" not in said
    code, _, said = command(*arguments, "--steps", 0)
    assert code == 2 and "--steps 0 is below 1" in said
    assert list(tmp_path.iterdir()) == []
