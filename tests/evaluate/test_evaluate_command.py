"""`pocketfusion evaluate`: points by hand, one harness for folders and bundles, resuming, processes, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.extractors import open_judge
from pocketfusion.evaluate.fid_clip.curves import Curves, parse_guidance
from pocketfusion.evaluate.fid_clip.curves_report import markdown
from pocketfusion.evaluate.fid_clip.drawing import Plan
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings
from pocketfusion.evaluate.metrics import clip_score, diversity, frechet_distance, kid
from pocketfusion.evaluate.reference import SetsReference
from pocketfusion.evaluate.sets import choose_sets
from pocketfusion.folder import folder_hash
from pocketfusion.models.sampling import Sampling, write_sampling
from processes import launch_two

SETS = "train,test_combo,val_combo,val_concept"  # 64 pictures: twice the judge's 32 features


@pytest.fixture
def common(tiny_data, judge):
    """Options of every run."""
    return ("--data", tiny_data, "--judge", judge, "--samples", 40, "--sets", SETS, "--steps", 1)


@pytest.fixture
def few(tiny_data, judge):
    """Options of a run of 8 pictures without FID."""
    return (
        "--data",
        tiny_data,
        "--judge",
        judge,
        "--samples",
        8,
        "--steps",
        1,
        "--kid-only",
        "--diversity-prompts",
        0,
    )


def drawn(store) -> set[str]:
    return {file.relative_to(store).as_posix() for file in store.rglob("g*/*.png")}


def test_points_are_what_the_measures_say(pocketfusion, tiny_folder, tiny_data, judge, common, tmp_path):
    out = tmp_path / "curve"
    more = ("--guidance", 3, "--diversity-prompts", 2, "--diversity-images", 3, "--seed", 4)
    code, printed, said = pocketfusion(
        "evaluate", f"{tiny_folder}@1", f"{tiny_folder}@2", *common, "--out", out, *more
    )
    assert code == 0, said
    assert "model@1" in printed and "…" not in printed and "at equal CLIP score" in printed
    result = Curves.model_validate_json((out / "curve.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["curve.json", "curve.md", "curve.png", "pictures.png"]
    assert [curve.label for curve in result.curves] == ["model@1", "model@2"]
    assert result.curves[1].system["sha256"] == folder_hash(tiny_folder)

    data, scorer = open_dataset(tiny_data, 64), open_judge(judge)
    reference = SetsReference(data, choose_sets(data, SETS.split(","), 40))
    plan = Plan.of(reference, 4, 2, 3)

    def features(wanted):
        images = ModelFolder(tiny_folder).draw(
            [w.prompt for w in wanted], [w.seed for w in wanted], SamplerSettings(2, 3)
        )
        return scorer.image_features(images)

    (drawn_features, embeddings), point = features(plan.pictures), result.curves[1].points[0]
    real, _ = scorer.image_features(reference.images(range(64)))
    assert (point.num_inference_steps, point.precision, point.pictures) == (2, "fp32", 64)
    assert point.frechet.value == pytest.approx(frechet_distance(drawn_features, real), rel=0.02)
    assert point.kid == pytest.approx(kid(drawn_features, real), rel=0.05)
    texts = scorer.text_embeddings(reference.captions)
    assert point.clip_score.value == pytest.approx(clip_score(embeddings, texts).mean(), abs=0.05)
    rows = np.stack([features(row)[0] for row in plan.again])
    assert point.diversity.value == pytest.approx(diversity(rows).value, rel=0.02)

    page = (out / "curve.md").read_text()
    assert (
        page == markdown(result) and page.count("*") >= 2 and "64 pictures a point: train (40), test_combo (8)" in page
    )
    for name in ("curve.png", "pictures.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300

    code, _, said = pocketfusion("evaluate", f"{tiny_folder}@1", *common, "--out", out)
    assert code == 2 and "exists already" in said and "Traceback" not in said


def test_a_folder_its_copy_and_its_bundle_in_one_run(pocketfusion, tiny_folder, tiny_bundle, few, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    write_sampling(copy, Sampling(num_inference_steps=1, guidance_scale=2, guidance="folded"))
    out, store = tmp_path / "curve", tmp_path / "store"
    systems = (tiny_folder, copy, tiny_bundle)
    code, printed, said = pocketfusion(
        "evaluate", *systems, *few, "--guidance", "1,2", "--out", out, "--store", store, "--json"
    )
    assert code == 0, said
    result = json.loads(printed)
    folder, folded, bundle = result["curves"]
    assert result == json.loads((out / "curve.json").read_text())
    assert [len(curve["points"]) for curve in (folder, folded, bundle)] == [2, 1, 2]
    assert folded["points"][0]["guidance_scale"] == 2 and folder["points"][0]["frechet"] is None
    assert folder["points"][0]["clip_score"] == pytest.approx(bundle["points"][0]["clip_score"], abs=0.1)
    assert len(drawn(store)) == 5 * 8 and not (tmp_path / "curve.run" / "pictures").exists()


def test_a_killed_run_goes_on_and_draws_nothing_twice(pocketfusion, tiny_folder, few, tmp_path, monkeypatch):
    def run(name):
        out = tmp_path / name
        code, printed, said = pocketfusion("evaluate", tiny_folder, *few, "--guidance", "1,2", "--out", out, "--json")
        return code, printed and json.loads(printed)["curves"], said

    _, whole, _ = run("whole")
    asked: list[int] = []
    plain = ModelFolder.draw

    def killed(self, prompts, seeds, settings, on_batch=None):
        if len(asked) >= 9:
            raise KeyboardInterrupt
        asked.extend(seeds)
        return plain(self, prompts, seeds, settings, on_batch)

    monkeypatch.setattr(ModelFolder, "batch", 3)
    monkeypatch.setattr(ModelFolder, "draw", killed)
    code, *_ = run("run")
    store = tmp_path / "run.run" / "pictures"
    assert code == 130 and not (tmp_path / "run").exists() and len(drawn(store)) == len(asked)
    victim = store / sorted(drawn(store))[0]  # damaged on top of it
    victim.write_bytes(victim.read_bytes()[:50])
    redrawn: list[int] = []

    def counting(self, prompts, seeds, settings, on_batch=None):
        redrawn.extend(seeds)
        return plain(self, prompts, seeds, settings, on_batch)

    monkeypatch.setattr(ModelFolder, "draw", counting)
    code, resumed, said = run("run")
    assert code == 0, said
    assert len(redrawn) == 16 - len(asked) + 1
    for old, new in zip(whole[0]["points"], resumed[0]["points"], strict=True):
        assert new["clip_score"] == pytest.approx(old["clip_score"], abs=0.05)
    monkeypatch.setattr(ModelFolder, "draw", None)  # all is there
    shutil.rmtree(tmp_path / "run")
    assert run("run")[1] == resumed
    (tmp_path / "run.run" / "points").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "run")
    assert run("run")[1] == resumed  # scored again from the pictures


def test_two_processes_give_what_one_gives(pocketfusion, tiny_folder, few, tmp_path):
    more = (*few[:-2], "--diversity-prompts", 2, "--guidance", 2)
    code, *_ = pocketfusion("evaluate", tiny_folder, *more, "--out", tmp_path / "one")
    assert code == 0
    launch_two("-m", "pocketfusion", "evaluate", tiny_folder, *more, "--out", tmp_path / "two", port=29541)
    one, two = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("one", "two"))
    assert one["protocol"] == two["protocol"] and one["real"] == two["real"]
    (first,), (second,) = one["curves"][0]["points"], two["curves"][0]["points"]
    assert second["clip_score"] == pytest.approx(first["clip_score"], abs=0.05)
    assert second["kid"] == pytest.approx(first["kid"], rel=0.02, abs=1e-4)
    stores = [tmp_path / f"{name}.run" / "pictures" for name in ("one", "two")]
    assert drawn(stores[0]) == drawn(stores[1]) and len(drawn(stores[0])) == 8 + 2 * 3
    for name in drawn(stores[0]):
        a, b = (np.asarray(Image.open(store / name)).astype(int) for store in stores)
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--data": "nothing"}, "there is no data folder at"),
        ({"--judge": "nothing"}, "there is no judge at"),
        ({"--samples": "1"}, "at least 2"),
        (
            {"--samples": "30", "--sets": "train"},
            "30 pictures are too few for 32 features: at least 64 are needed; raise",
        ),
        ({"--samples": "2", "--sets": "train", "--kid-only": None}, "are too few for KID"),
        ({"--sets": "tests"}, "no set named tests"),
        ({"--out": "missing/curve"}, "does not exist"),
        ({"--guidance": "1,x"}, "holds 'x'"),
        ({"--steps": "0"}, "holds '0'"),
        ({"--precision": "int8"}, "--precision int8 is unknown"),
        ({"--coco": "coco"}, "give either --data FOLDER or --coco FOLDER"),
        ({"--clip": "clip"}, "two ways to score"),
        ({"--store": "broken/bundle.json"}, "is a file: give a folder"),
        ({"--store": "missing/store"}, "does not exist"),
        ({"--diversity-images": "1"}, "have no pairs"),
        ({"systems": ["M", "M"]}, "named twice"),
        ({"systems": ["M", "nothing"]}, "there is no model folder at"),
        ({"systems": ["M", "broken"]}, "is not valid JSON"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    pocketfusion, tiny_folder, tiny_data, judge, tmp_path, monkeypatch, changed, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bundle.json").write_text("{")
    options = {
        "--data": tiny_data,
        "--judge": judge,
        "--out": "curve",
        "--samples": "40",
        "--sets": SETS,
        "--steps": "1",
    }
    systems = [str(name).replace("M", str(tiny_folder)) for name in changed.pop("systems", ["M"])]
    arguments = [part for pair in (options | changed).items() for part in pair if part is not None]
    code, _, said = pocketfusion("evaluate", *systems, *arguments)
    assert code == 2 and message in " ".join(said.split()) and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_systems_of_two_sizes_are_refused(pocketfusion, tiny_folder, few, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    code, _, said = pocketfusion("evaluate", tiny_folder, copy, *few, "--out", tmp_path / "curve")
    assert code == 2 and "copy draws 128 px but" in " ".join(said.split())


def test_nan_stops_the_run_and_keeps_what_is_drawn(pocketfusion, tiny_folder, few, tmp_path, monkeypatch):
    def nan_above_one(self, values, network, settings):
        if settings.guidance_scale > 1:
            values = values * float("nan")
        return plain(self, values, network, settings)

    plain = ModelFolder._check
    monkeypatch.setattr(ModelFolder, "_check", nan_above_one)
    out = tmp_path / "curve"
    code, _, said = pocketfusion("evaluate", tiny_folder, *few, "--guidance", "1,2", "--out", out)
    assert code == 2 and "model: its UNet gave NaN or infinity at guidance 2" in " ".join(said.split())
    assert not out.exists() and len(drawn(tmp_path / "curve.run" / "pictures")) == 8


@pytest.mark.parametrize("text", ["", "1,", "1,two", "-1", "1,nan", "inf", "1,,2", "1;2"])
def test_bad_guidance_is_named(text):
    with pytest.raises(PocketfusionError, match="--guidance .* holds .*: give numbers with commas"):
        parse_guidance(text)


def test_guidance_is_sorted_and_has_no_doubles():
    assert parse_guidance(" 4.5, 1,0 ") == (0.0, 1.0, 4.5)
    with pytest.raises(PocketfusionError, match=r"holds 2.0 twice"):
        parse_guidance("2,1,2.0")
