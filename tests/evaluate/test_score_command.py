"""`pocketfusion score` on a tiny random model and judge, and what it refuses."""

import json
import shutil

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import SamplerSettings
from pocketfusion.evaluate.score.harness import score_folder
from pocketfusion.folder import folder_hash
from pocketfusion.models.dual_encoder import JudgeModel


@pytest.fixture
def call(tiny_folder, tiny_data, judge, tmp_path):
    """score_folder on the tiny things, any of them replaced."""

    def run(**changed):
        sampler = SamplerSettings(num_inference_steps=1)
        arguments = {"folder": tiny_folder, "data": tiny_data, "judge": judge, "out": tmp_path / "scores"} | changed
        return score_folder(**({"sampler": sampler, "samples": 4} | arguments))

    return run


def test_the_command_scores_and_writes(pocketfusion, tiny_folder, tiny_data, judge, tmp_path):
    out = tmp_path / "scores"
    code, printed, _ = pocketfusion(
        "score",
        *(tiny_folder, "--data", tiny_data, "--judge", judge, "--out", out),
        *("--steps", 2, "--samples", 8, "--sets", "train,test_combo", "--guidance", 2),
    )
    assert code == 0
    for part in ("test_combo", "shuffled captions", "generated ÷ real", "guessing finds", "written to"):
        assert part in printed
    assert "…" not in printed  # nothing is cut at 80 columns
    report = json.loads((out / "scores.json").read_text())
    assert [entry["name"] for entry in report["sets"]] == ["train", "test_combo", "all"]
    protocol = report["protocol"]
    assert protocol["system"]["sha256"] == folder_hash(tiny_folder) and protocol["samples"] == 8
    assert protocol["sampler"] == {"num_inference_steps": 2, "guidance_scale": 2.0}
    assert "no provenance" in report["notes"][0]
    assert sorted(p.name for p in out.iterdir()) == [
        "nearest.png",
        "prompts.png",
        "scores.json",
        "scores.md",
        "scores.png",
    ]


def test_the_command_says_what_is_wrong_in_one_sentence(pocketfusion, tiny_data, judge, tmp_path):
    out = tmp_path / "scores"
    code, _, said = pocketfusion("score", tmp_path / "nothing", "--data", tiny_data, "--judge", judge, "--out", out)
    assert code == 2 and "there is no model folder at" in said and "Traceback" not in said
    assert not out.exists()


def test_json_is_the_result_file(pocketfusion, tiny_folder, tiny_data, judge, tmp_path):
    out = tmp_path / "scores"
    arguments = ("--data", tiny_data, "--judge", judge, "--out", out, "--steps", 1, "--sets", "test_combo", "--json")
    code, printed, _ = pocketfusion("score", tiny_folder, *arguments)
    assert code == 0 and json.loads(printed) == json.loads((out / "scores.json").read_text())


def test_same_seed_same_scores(call, tmp_path):
    first, again = (call(out=tmp_path / name, seed=3, sets=["train"]) for name in "ab")
    other = call(out=tmp_path / "c", seed=4, sets=["train"])
    assert first == again and first.sets[0].generated != other.sets[0].generated
    assert first.sets[0].real == other.sets[0].real


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "nothing"}, "there is no data folder at"),
        ({"judge": "nothing"}, "there is no judge at"),
        ({"samples": 1}, "at least 2"),
        ({"sets": ["tests"]}, "no set named tests"),
        ({"out": "missing/scores"}, "does not exist"),
    ],
)
def test_bad_input_writes_nothing(call, tmp_path, changed, message):
    changed = {k: tmp_path / v if isinstance(v, str) else v for k, v in changed.items()}
    with pytest.raises(PocketfusionError, match=message):
        call(**changed)
    assert list(tmp_path.iterdir()) == []


def test_a_judge_of_another_text_encoder_is_refused(call, judge, tmp_path):
    config = json.loads((judge / "config.json").read_text())
    JudgeModel(image_size=64, widths=(8, 16), text_width=48, embed_dim=16, text=config["text"]).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(PocketfusionError, match="text encoder of width 48, not 32"):
        call(judge=tmp_path / "other")


def test_a_truncated_judge_is_refused(call, judge, tmp_path):
    broken = shutil.copytree(judge, tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PocketfusionError, match="damaged"):
        call(judge=broken)


def test_an_existing_result_is_kept_unless_told(call, tmp_path):
    out = tmp_path / "scores"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(PocketfusionError, match="exists already"):
        call(out=out)
    with pytest.raises(PocketfusionError, match="holds other things"):
        call(out=out, overwrite=True)
    assert (out / "mine.txt").read_text() == "kept"
    (out / "scores.json").write_text("{}")  # an earlier result
    call(out=out, overwrite=True, sets=["test_combo"])
    assert not (out / "mine.txt").exists() and (out / "scores.json").read_text() != "{}"
