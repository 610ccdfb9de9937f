"""Tiled decoding: every pixel from a tile, no seams, equal to the untiled picture away from them."""

from __future__ import annotations

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.tiles import OVERLAP, check_tile, decode_tiled, starts


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 8, 16, 31])
@pytest.mark.parametrize("length", [31, 32, 64, 97])
def test_tiles_cover_an_extent_with_enough_overlap(length, tile):
    firsts = starts(length, tile)
    assert firsts[0] == 0 and firsts[-1] == length - tile
    steps = np.diff(firsts)
    assert (steps <= max(1, tile - int(tile * OVERLAP))).all() and (steps > 0).all()


def blur(latents):
    """A decoder of factor 2 whose pixels see one latent to each side: 3x3 means with zeros outside, then doubled."""
    padded = np.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = latents.shape[1:3]
    mean = sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / np.float32(9)
    return mean.repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize(("height", "width", "tile"), [(20, 20, (8, 8)), (13, 30, (8, 8)), (8, 21, (8, 5))])
def test_equal_to_untiled_beyond_the_receptive_field_of_a_tile_s_edge(height, width, tile):
    latents = np.random.default_rng(0).standard_normal((1, height, width, 3)).astype(np.float32)
    calls = []

    def decode(part):
        calls.append(part.shape)
        return blur(part)

    image, whole = decode_tiled(decode, latents, tile), blur(latents)
    assert image.shape == whole.shape == (1, 2 * height, 2 * width, 3) and image.dtype == np.float32
    assert set(calls) == {(1, *tile, 3)}
    near = np.zeros((height, width), bool)  # latents at a tile's inner edge, where it misses what the whole has
    for axis, (length, size) in enumerate(zip((height, width), tile, strict=True)):
        for start in starts(length, size):
            for edge in ([start] if start else []) + ([start + size - 1] if start + size < length else []):
                near[(slice(None),) * axis + (edge,)] = True
    away = ~near.repeat(2, 0).repeat(2, 1)
    assert away.mean() > 0.2
    np.testing.assert_allclose(image[:, away], whole[:, away], atol=1e-6)
    assert np.abs(image - whole).max() > 1e-3  # and near them it may differ


def test_blending_is_smooth_where_tiles_disagree():
    """Each tile is one constant: the picture then ramps from one to the next, by no more than the overlap asks."""
    values = iter(np.linspace(0, 1, 3))
    latents = np.zeros((1, 8, 20, 1), np.float32)
    image = decode_tiled(lambda part: np.full((1, 16, 16, 1), next(values), np.float32), latents, (8, 8))
    row = image[0, 0, :, 0]
    assert row[0] == 0 and row[-1] == 1
    assert (np.diff(row) >= 0).all() and np.diff(row).max() < 0.5 / 4 + 1e-6  # an overlap of 2 latents is 4 pixels


def test_latents_of_one_tile_are_decoded_as_they_are():
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
    assert (decode_tiled(blur, latents, (8, 8)) == blur(latents)).all()


@pytest.mark.parametrize(
    ("tile", "match"),
    [(0, "tile is 0 latents: choose 1 to 8"), (-4, "tile is -4"), (9, "tile is 9 latents and the picture has 8x12")],
)
def test_a_tile_that_is_none(tile, match):
    check_tile(8, 8, 12)
    with pytest.raises(PocketfusionError, match=match):
        check_tile(tile, 8, 12)


def test_a_bundle_whose_decoder_is_smaller_than_its_latents(bundle):
    """The tiny decoder as the tile of pictures of 12 x 16 latents, which the UNet here never sees."""
    pipeline = Pipeline.load(bundle, 1)
    pipeline.manifest = pipeline.manifest.model_copy(
        update={
            "latents": pipeline.manifest.latents.model_copy(update={"height": 12, "width": 16}),
            "image": pipeline.manifest.image.model_copy(update={"height": 96, "width": 128}),
        }
    )
    latents = pipeline.noise(0)
    picture = pipeline.decode(latents)
    assert picture.size == (128, 96)
    small = Pipeline.load(bundle, 1)
    corner = np.asarray(small.decode(latents[:, :8, :8]))
    # the corner tile alone where no other reaches, to the pixel
    first_row, first_column = starts(12, 8)[1], starts(16, 8)[1]
    part = np.s_[: 8 * first_row, : 8 * first_column]
    assert (np.asarray(picture)[part] == corner[part]).all()


def test_a_decoder_larger_than_the_latents(run, bundle, edit, tmp_path):
    edit(lambda m: m["latents"].update(height=4))
    code, printed, notes = run("generate", "cat", "-o", tmp_path / "a.png", "--bundle", bundle)
    assert code == 2 and printed == "" and "larger than the picture's 4x8" in notes and notes.count("\n") == 1
