"""Styles travel from the model folder into the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.bundle_extras import styles_of, write_styles
from pocketfusion.runtime.manifest import Bundle, embedded_bundle

EMOJI = Path(__file__).parents[2] / "models" / "emoji" / "eight"


def test_the_embedded_bundle_has_its_folders_styles(tmp_path):
    (file,) = write_styles(EMOJI, tmp_path).values()
    bundle = Bundle.open(embedded_bundle())
    assert sha256_file(file) == bundle.manifest.files["styles"].sha256
    assert bundle.styles() == styles_of(EMOJI)
    assert {"noto style", "fluent 3d style"} < set(bundle.styles())
    drawings = [licence.what for licence in bundle.manifest.licences if licence.what.startswith("drawings-")]
    assert len(bundle.styles()) == len(drawings)


def test_a_folders_own_list_comes_first_and_none_is_written_without_one(tmp_path):
    assert write_styles(tmp_path, tmp_path) == {}
    (tmp_path / "styles.json").write_text('["in oil", "as a woodcut"]')
    (tmp_path / "licences").mkdir()
    (tmp_path / "licences" / "drawings-noto.txt").touch()
    assert styles_of(tmp_path) == ["in oil", "as a woodcut"]


@pytest.mark.parametrize(
    "content", ['{"a": 1}', "[1]", '[" x"]', '[""]', '["\\u001b"]', json.dumps(["x" * 61]), "[", "[" * 9999]
)
def test_what_is_no_list_of_styles_is_refused(tmp_path, content, bundle_with):
    (tmp_path / "styles.json").write_text(content)
    with pytest.raises(PocketfusionError, match="styles.json cannot be used"):
        styles_of(tmp_path)
    with pytest.raises(PocketfusionError, match="styles.json cannot be used"):
        bundle_with(content).styles()


@pytest.fixture
def bundle_with(tmp_path):
    """The embedded bundle's manifest beside another list of styles; nothing is verified."""

    def make(content: str) -> Bundle:
        folder = tmp_path / "bundle"
        folder.mkdir()
        (folder / "styles.json").write_text(content)
        bundle = Bundle.open(embedded_bundle())
        return Bundle(folder, bundle.manifest, bundle.hash)

    return make
