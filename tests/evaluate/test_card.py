"""Model cards say what the provenance and the result files say."""

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.score.card import write_card
from pocketfusion.folder import Provenance, write_provenance


def test_a_card_is_made_of_provenance_and_scores(tmp_path):
    folder, scores = tmp_path / "base", tmp_path / "scores"
    folder.mkdir()
    scores.mkdir()
    settings = {"train": {"steps": 100, "batch_size": 8}}
    write_provenance(
        folder,
        Provenance(
            stage="train-teacher", settings=settings, samples_seen=400, finished=False, results={"a": {"b": 1.5}}
        ),
    )
    (scores / "scores.md").write_text("# Scores of base\n\n| top-5 |\n|---|\n| 0.25 |\n")
    (scores / "scores.json").write_text("{}")
    (scores / "prompts.png").write_bytes(b"png")
    (tmp_path / "notes.md").write_text("## What next\n\nmore steps\n")
    text = write_card(folder, scores, tmp_path / "notes.md").read_text()
    assert "400 of 800 in the recipe (50%); stopped before" in text
    assert "| a.b | 1.5 |" in text and "| 0.25 |" in text and "more steps" in text
    assert "![48 fixed prompts](prompts.png)" in text and (folder / "prompts.png").read_bytes() == b"png"


@pytest.mark.parametrize("settings", [{"train": {"steps": 100, "batch_size": 8}}, {"group": 4}])
def test_a_card_keeps_the_parents_samples_apart(tmp_path, settings):
    """An evolved model has seen more samples than its own stage's recipe, and a search has no such recipe."""
    parents = {"student": "a" * 64, "base": "b" * 64}
    write_provenance(tmp_path, Provenance(stage="recover", settings=settings, samples_seen=4000, parents=parents))
    text = write_card(tmp_path).read_text()
    assert "Samples seen: 4,000" in text and "%" not in text and "evolved UNet" in text
    assert ("this stage's recipe has 800" in text) == ("train" in settings)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(PocketfusionError, match="has no provenance.json"):
        write_card(tmp_path)
    write_provenance(tmp_path, Provenance(stage="x", settings={"train": {"steps": 1, "batch_size": 1}}))
    with pytest.raises(PocketfusionError, match=r"there is no .*scores.md"):
        write_card(tmp_path, tmp_path / "nowhere")
    assert not (tmp_path / "README.md").exists()
