"""The scene checker: pictures drawn here, and real scenes of all kinds, on which it must nearly always be right."""

import random

import numpy as np
import pytest
from fakes import ColourJudge

from pocketfusion.data.emoji.concepts import iter_drawings, load_concepts, name_index
from pocketfusion.data.emoji.drawings import DEFAULT_STYLES, fetch_packages
from pocketfusion.data.emoji.scenes import BACKGROUNDS, render_scene, sample_scene
from pocketfusion.data.shapes import COLOURS
from pocketfusion.evaluate.score.composition import border_colour, check_scenes, crop, cut, read_scene


def canvas(background: str = "white", size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), BACKGROUNDS[background], np.uint8)


def blot(image: np.ndarray, top: int, left: int, side: int, colour) -> np.ndarray:
    image[top : top + side, left : left + side] = colour
    return image


def scene(kind="relation", labels=("red thing", "blue thing"), background="white", relation="left of") -> dict:
    relation = relation if kind == "relation" else None
    return {"kind": kind, "style": "noto", "background": background, "labels": list(labels), "relation": relation}


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_background_is_the_nearest_name_even_with_noise(background):
    noise = np.random.default_rng(0).integers(-8, 9, (64, 64, 3))
    image = np.clip(blot(canvas(background), 20, 20, 20, 0) + noise, 0, 255).astype(np.uint8)
    assert read_scene(image).background == background


def test_border_colour_ignores_a_drawing_that_touches_a_corner():
    assert border_colour(blot(canvas("blue"), 0, 0, 20, 0)).tolist() == list(BACKGROUNDS["blue"])


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_number(count):
    image = canvas("pink")
    for top, left in [(6, 6), (6, 36), (36, 20)][:count]:
        blot(image, top, left, 22, (20, 20, 20))
    assert len(read_scene(image).boxes) == count


def test_loose_pieces_and_specks_are_not_drawings():
    image = blot(canvas(), 10, 10, 30, 0)
    blot(image, 50, 50, 8, 0)  # smaller than a fifth of the side
    image[5, 60] = 0
    assert read_scene(image).boxes == ((10, 40, 10, 40),)
    diagonal = blot(blot(canvas(), 10, 10, 20, 0), 28, 28, 20, 0)  # overlapping boxes: no empty band parts them
    assert len(read_scene(diagonal).boxes) == 1


def test_cut_splits_at_the_widest_band_first():
    mask = np.zeros((10, 10), bool)
    mask[0:3, 0:3] = mask[0:3, 5:8] = mask[7:10, 1:9] = True
    assert sorted(cut(mask, gap=2)) == [(0, 3, 0, 3), (0, 3, 5, 8), (7, 10, 1, 9)]
    assert cut(mask, gap=5) == [(0, 10, 0, 9)] and cut(mask & False, gap=1) == []


@pytest.mark.parametrize("relation", ["left of", "above"])
def test_relation(relation):
    first, second = ((22, 4), (22, 36)) if relation == "left of" else ((4, 22), (36, 22))
    image = blot(blot(canvas(), *first, 22, COLOURS["red"]), *second, 22, COLOURS["blue"])
    other = "above" if relation == "left of" else "left of"
    scenes = [
        scene(relation=relation),
        scene(relation=relation, labels=("blue thing", "red thing")),  # the judge sees them the other way round
        scene(relation=other),
    ]
    found = check_scenes(np.stack([image] * 3), scenes, ColourJudge())
    assert found["layout"].tolist() == [True, True, False]
    assert found["relation"].tolist() == [True, False, False]
    assert found["number"].tolist() == found["background"].tolist() == [True] * 3


def test_only_relation_scenes_have_relations():
    found = check_scenes(np.stack([canvas()]), [scene("count", ("red thing",) * 2)], ColourJudge())
    assert len(found["relation"]) == len(found["layout"]) == 0 and found["number"].tolist() == [False]


def test_a_crop_is_one_drawing_alone_and_enlarged():
    image = blot(blot(canvas("green"), 20, 4, 24, COLOURS["red"]), 20, 34, 24, COLOURS["blue"])
    alone = crop(image, (20, 44, 4, 28), np.array(BACKGROUNDS["green"]))
    assert alone.shape == (64, 64, 3) and alone[32, 32].tolist() == list(COLOURS["red"])
    assert alone[2, 2].tolist() == list(BACKGROUNDS["green"])
    assert not (np.abs(alone.astype(int) - COLOURS["blue"]).max(axis=-1) < 40).any()


@pytest.fixture(scope="module")
def real_scenes():
    """400 scenes over all styles, as `data emoji` composes them."""
    home, rng = fetch_packages(), random.Random(11)
    concepts = load_concepts(home)
    names = name_index(home, concepts)
    images, scenes = [], []
    for style in DEFAULT_STYLES:
        drawings = list(iter_drawings(home, style, concepts, names))
        for _ in range(50):
            composed, shown = sample_scene(drawings, rng)
            images.append(render_scene(composed, shown, 64))
            scenes.append(composed.as_dict())
    return np.stack(images), scenes


def test_it_is_right_on_real_scenes_and_wrong_on_other_captions(real_scenes):
    images, scenes = real_scenes
    found = check_scenes(images, scenes, ColourJudge())
    assert found["background"].mean() == 1.0
    assert found["number"].mean() >= 0.95
    assert found["layout"].mean() >= 0.93
    others = check_scenes(images, scenes[7:] + scenes[:7], ColourJudge())
    assert others["background"].mean() < 0.25 and others["number"].mean() < 0.5 and others["layout"].mean() < 0.4
