"""Colours of latents without a decoder: by hand, on bundles with and without the map, and in every mode."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.specs import LinearPreview

BY_HAND = LinearPreview(matrix=[[0.5, 0.0, 0.0], [0.0, 0.25, -2.0]], bias=[0.5, 0.0, 0.0], psnr_db=20.0, r2=0.9)


def test_colours_and_picture_by_hand():
    latents = np.float32([[[[1.0, 0.0], [-1.0, 1.0]]]])
    np.testing.assert_array_equal(BY_HAND.colours(latents), [[[[1, 0, 0], [0, 0.25, -1]]]])
    picture = BY_HAND.image(latents, (2, 1))
    np.testing.assert_array_equal(np.asarray(picture), [[[255, 128, 128], [128, 159, 0]]])
    assert BY_HAND.image(latents, (16, 8)).size == (16, 8)


def test_a_bundle_says_how_and_one_of_before_opens_too(bundle, edit):
    manifest = Bundle.open(bundle).manifest
    assert len(manifest.preview.matrix) == manifest.latents.channels
    pipeline = Pipeline.load(bundle, num_threads=1, mode="sequential")
    seen = []
    pipeline.generate("cat", num_inference_steps=2, callback=lambda k, t, z: seen.append(pipeline.preview(z)) and None)
    assert [picture.size for picture in seen] == [(64, 64)] * 2
    edit(lambda m: m.pop("preview"))
    with pytest.raises(PocketfusionError, match="no preview"):
        Pipeline.load(bundle, num_threads=1).preview(np.zeros((1, 8, 8, 4), np.float32))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda preview: preview["matrix"].pop(), "preview.matrix has 3 rows for 4 channels"),
        (lambda preview: preview["matrix"][0].pop(), "preview.matrix.0: List should have at least 3"),
        (lambda preview: preview["bias"].append(0.0), "preview.bias: List should have at most 3"),
        (lambda preview: preview.update(bias=[1e5, 0.0, 0.0]), "preview.bias.0"),
        (lambda preview: preview.update(bias=[float("nan"), 0.0, 0.0]), "preview.bias.0"),
        (lambda preview: preview.update(r2=1.5), "preview.r2"),
        (lambda preview: preview.update(gamma=2), "preview.gamma"),
    ],
)
def test_a_map_that_does_not_fit(bundle, edit, change, match):
    edit(lambda m: change(m["preview"]))
    with pytest.raises(PocketfusionError, match=match):
        Bundle.open(bundle)


def test_it_is_in_the_manifest_as_plain_numbers_and_info_shows_it(run, tiny_bundle):
    preview = json.loads((tiny_bundle / "bundle.json").read_text())["preview"]
    assert sorted(preview) == ["bias", "matrix", "psnr_db", "r2"]
    code, printed, _ = run("info", tiny_bundle)
    assert code == 0 and f"preview     linear, {preview['psnr_db']:.1f} dB" in printed


def test_generate_previews_by_the_map(run, bundle, edit, tmp_path):
    picture, folder = tmp_path / "a.png", tmp_path / "steps"
    command = ("generate", "cat", "-o", picture, "--bundle", bundle, "--steps", 2, "--seed", 1)
    code, _, _ = run(*command, "--preview", folder, "--preview-by", "linear", "--mode", "sequential")
    assert code == 0 and sorted(file.name for file in folder.iterdir()) == ["step_1.png", "step_2.png"]
    pipeline, seen = Pipeline.load(bundle, num_threads=1), []
    pipeline.generate("cat", num_inference_steps=2, seed=1, callback=lambda k, t, z: seen.append(z) and None)
    assert np.asarray(Image.open(folder / "step_2.png")).tobytes() == np.asarray(pipeline.preview(seen[1])).tobytes()
    picture.unlink()
    for given, match in (
        (("--preview", folder, "--preview-by", "ear"), "--preview-by is 'ear': choose decoder or linear"),
        (("--preview-by", "linear"), "--preview-by is linear without previews"),
        (("--preview", folder, "--mode", "sequential"), "--preview needs the decoder beside the UNet"),
    ):
        code, _, error = run(*command, *given)
        assert code == 2 and match in error and not picture.exists()
    edit(lambda m: m.pop("preview"))
    code, _, error = run(*command, "--preview", folder, "--preview-by", "linear")
    assert code == 2 and "has no preview" in error and not picture.exists()
