"""The harness end to end with a judge that knows colours: perfect, copying and hopeless systems must look like it."""

import json

import numpy as np
import pytest
from fakes import ColourJudge, FakeSystem
from PIL import Image

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import SamplerSettings
from pocketfusion.evaluate.score.harness import score_system, write_outcome
from pocketfusion.evaluate.score.score_report import Report, markdown, remarks, scene_rows, score_rows, tables
from pocketfusion.evaluate.sets import choose_sets, picture_seed

JUDGE = {"name": "colours", "sha256": "1" * 64}


@pytest.fixture
def data(tiny_data) -> CaptionedImages:
    """The shapes with a test set of scenes: a red square left of a blue one, on white."""
    shapes = open_dataset(tiny_data, 64)
    images, rows = [*shapes.images], [*shapes.rows]
    for i, (first, second) in enumerate([("red", "blue"), ("blue", "red"), ("green", "red"), ("red", "green")]):
        whole = np.full((64, 64, 3), 255, np.uint8)
        small = {
            c: shapes.images[next(k for k, r in enumerate(rows) if r["label"] == f"{c} square")]
            for c in (first, second)
        }
        whole[:, :32], whole[:, 32:] = small[first][:, 16:48], small[second][:, 16:48]
        labels = [f"{first} square", f"{second} square"]
        scene = {"kind": "relation", "style": "noto", "background": "white", "labels": labels, "relation": "left of"}
        caption = f"a {labels[0]} left of a {labels[1]}"
        images.append(whole)
        rows.append({"id": f"s{i}", "split": "test_scene", "captions": [caption], "flip": False, "scene": scene})
    return CaptionedImages(np.stack(images), rows, "shapes", "f" * 32)


def run(data, system, names=("train", "test_combo", "test_scene"), samples=40):
    return score_system(
        system, data, ColourJudge(), choose_sets(data, names, samples), sampler=SamplerSettings(), judge_identity=JUDGE
    )


def truth(data, split) -> dict[str, np.ndarray]:
    return {data.rows[i]["captions"][0]: np.asarray(data.images[i]) for i in data.splits[split]}


def test_a_perfect_system_equals_real_pictures(data):
    outcome = run(
        data, FakeSystem(truth(data, "test_combo") | truth(data, "test_scene")), ["test_combo", "test_scene"]
    )
    combo, scenes, everything = outcome.report.sets
    assert combo.generated.clip_score == combo.real.clip_score and combo.generated.nearest == combo.real.nearest
    assert combo.share == {"clip_score": 1.0, "top1": 1.0, "top5": 1.0}
    assert combo.shuffled.clip_score.value < combo.real.clip_score.value
    assert scenes.scenes["generated"] == scenes.scenes["real"]
    assert scenes.scenes["real"].relation.value == 1.0 > scenes.scenes["shuffled"].relation.value
    assert everything.name == "all" and everything.count == combo.count + scenes.count == 12


def test_a_hopeless_system_is_at_the_floor(data):
    train, *_ = run(data, FakeSystem()).report.sets
    assert train.generated.clip_score.value < train.real.clip_score.value
    # noise says nothing of colour: two shapes of each of four colours tie, so 1 of 8 captions is found
    assert train.generated.top1.value == pytest.approx(train.chance_top1, abs=0.02) and train.chance_top1 == 1 / 8
    assert train.real.top1.value == pytest.approx(1 / 2)  # the right colour, either shape


def test_copying_shows(data):
    copies = FakeSystem({row["captions"][0]: np.asarray(data.images[0]) for row in data.rows})
    outcome = run(data, copies, ["test_combo"])
    (combo,) = outcome.report.sets
    assert combo.generated.nearest.rms_median == 0 and combo.generated.nearest.suspicious == 1.0
    assert combo.real.nearest.rms_median > 0 and combo.real.nearest.suspicious < 0.2
    assert all(pair.rms == 0 and (pair.generated == pair.training).all() for pair in outcome.pairs)


def test_frechet_distance_is_given_or_its_absence_explained(data):
    *_, combo, everything = run(data, FakeSystem(), ["train", "test_combo"], samples=6).report.sets
    assert combo.generated.frechet_real is None and "too few" in combo.frechet_absent  # 6 pictures, 4 features
    assert everything.frechet_absent is None and everything.real.frechet_train < everything.generated.frechet_train
    assert everything.generated.frechet_real > 0 and everything.shuffled.frechet_train is None


def test_seeds_are_the_pictures_own(data):
    system = FakeSystem()
    run(data, system, ["test_combo"], samples=4)
    first = choose_sets(data, ["test_combo"], 4)[0].indices[0]
    assert system.seeds[0] == picture_seed(0, data.rows[first]["id"]) and len(system.seeds) == 4 + 48


def test_results_are_written_and_read_back(data, tmp_path):
    outcome = run(data, FakeSystem())
    write_outcome(outcome, tmp_path)
    report = Report.model_validate_json((tmp_path / "scores.json").read_text())
    assert report == outcome.report
    protocol = json.loads((tmp_path / "scores.json").read_text())["protocol"]
    assert protocol["judge"] == JUDGE and protocol["data"]["fingerprint"] == "f" * 32
    assert len(protocol["sets"]["train"]) == 40 and protocol["sampler"]["num_inference_steps"] == 25
    for name in ("scores.png", "prompts.png", "nearest.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    page = (tmp_path / "scores.md").read_text()
    assert page == markdown(report) and "| shuffled captions |" in page and "guessing finds" in page


def test_tables_show_every_set_and_scene(data):
    report = run(data, FakeSystem()).report
    assert len(score_rows(report)) == 4 * 4 and len(scene_rows(report)) == 3
    assert len(tables(report)) == 2 and all(len(row) == 10 for row in score_rows(report))
    assert any("no Fréchet distance" in line for line in remarks(report))
    plain = run(data, FakeSystem(), ["train"]).report
    assert scene_rows(plain) == [] and len(tables(plain)) == len(plain.sets) == 1


def test_pictures_of_another_size_are_refused(data):
    system = FakeSystem()
    system.image_size = 128
    with pytest.raises(PocketfusionError, match="64 px but the model draws 128 px"):
        run(data, system)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_inference_steps": 0}, "--steps 0"), ({"guidance_scale": float("nan")}, "--guidance nan")],
)
def test_bad_sampler_settings(settings, message):
    with pytest.raises(PocketfusionError, match=message):
        SamplerSettings(**settings)
