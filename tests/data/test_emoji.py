"""The emoji data set: what is in it, that the split does not leak, and that building twice gives the same bytes."""

import json
import random
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pocketfusion.artefact import sha256_file
from pocketfusion.data.emoji.build import EmojiSettings, build_emoji
from pocketfusion.data.emoji.concepts import (
    Concept,
    Drawing,
    captions_for,
    iter_drawings,
    load_concepts,
    may_flip,
    name_index,
    plain_hex,
    with_article,
)
from pocketfusion.data.emoji.drawings import DEFAULT_STYLES, STYLES, fetch_packages
from pocketfusion.data.emoji.scenes import BACKGROUNDS, Scene, render_on, render_scene, sample_scene, scene_may_flip
from pocketfusion.data.emoji.split import assign_split, frozen_groups
from pocketfusion.errors import PocketfusionError

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="2" height="4" fill="#ff0000"/></svg>'
GOLDEN = json.loads((Path(__file__).parent / "emoji_counts.json").read_text())


def concept(label="red apple", tags=("fruit", "food", "apple"), group="food-drink", code="1F34E") -> Concept:
    return Concept(code, label, tags, group, base=code)


def drawing(label: str, style: str = "noto", colour: str = "#ff0000") -> Drawing:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="4" height="4" fill="{colour}"/></svg>'
    )
    return Drawing(concept(label, code=label), style, svg)


@pytest.fixture(scope="session")
def node_modules() -> Path:
    return fetch_packages()


def test_counts_and_split_are_the_frozen_ones(node_modules):
    concepts = load_concepts(node_modules)
    names, groups = name_index(node_modules, concepts), frozen_groups()
    assert len(concepts) == GOLDEN["concepts"]
    assert set(groups) == {c.hex for c in concepts}
    found = {s: list(iter_drawings(node_modules, s, concepts, names)) for s in DEFAULT_STYLES}
    assert {s: len(d) for s, d in found.items()} == GOLDEN["styles"]
    splits = {
        (d.concept.hex, s): assign_split(groups[d.concept.hex], STYLES[s].family)
        for s, ds in found.items()
        for d in ds
    }
    assert dict(Counter(splits.values())) == GOLDEN["splits"]

    where: dict[str, set] = {}
    families: dict[tuple, set] = {}
    for (code, style), split in splits.items():
        where.setdefault(groups[code], set()).add(split.endswith("concept") and split)
        families.setdefault((groups[code], STYLES[style].family), set()).add(split)
    assert all(len(kinds) == 1 for kinds in where.values()), "a look-alike group is in two concept sets"
    assert all(len(kinds) == 1 for kinds in families.values()), (
        "a look-alike style shares a held-out pair with training"
    )


def test_a_held_out_pair_is_known_in_another_style(node_modules):
    concepts = load_concepts(node_modules)
    names, groups = name_index(node_modules, concepts), frozen_groups()
    known, wanted = set(), set()
    for style in DEFAULT_STYLES:
        for d in iter_drawings(node_modules, style, concepts, names):
            split = assign_split(groups[d.concept.hex], STYLES[style].family)
            (known if split == "train" else wanted).add((groups[d.concept.hex], split))
    test_groups = {group for group, split in wanted if split == "test_combo"}
    orphans = test_groups - {group for group, _ in known}
    assert len(orphans) <= GOLDEN["orphan_test_combo_groups"]


def test_captions_say_label_and_style():
    captions = captions_for(concept(), "fluent-3d")
    assert captions[0] == "red apple, fluent 3d style"
    assert captions[1] == "a red apple, fluent 3d style"
    assert captions[2] == "fluent 3d emoji of red apple"
    assert captions[3] == "red apple (fruit, food), fluent 3d style" or captions[3].startswith(
        "red apple (food, fruit)"
    )
    assert captions[4] == "red apple"
    assert captions == captions_for(concept(), "fluent-3d")
    assert [with_article(n) for n in ("apple", "dog", "glasses", "bus", "Santa Claus")] == [
        "an apple",
        "a dog",
        "glasses",
        "a bus",
        "Santa Claus",
    ]


@pytest.mark.parametrize(
    ("label", "group", "fits"),
    [
        ("red apple", "food-drink", True),
        ("left arrow", "symbols", False),
        ("backhand index pointing right", "people-body", False),
    ],
)
def test_flip_only_where_the_caption_allows(label, group, fits):
    assert may_flip(concept(label, (), group)) is fits


@pytest.mark.parametrize(
    ("kind", "labels", "relation", "fits"),
    [
        ("background", ["dog face"], None, True),
        ("count", ["dog face", "dog face"], None, True),
        ("relation", ["dog face", "red apple"], "above", True),
        ("relation", ["dog face", "red apple"], "left of", False),
        ("relation", ["dog face", "clock"], "above", False),
        ("background", ["right arrow"], None, False),
    ],
)
def test_scenes_are_mirrored_where_caption_and_drawings_allow(kind, labels, relation, fits):
    scene = Scene(kind, "noto", "blue", tuple(labels), relation)
    assert scene_may_flip(scene, [drawing(label) for label in labels]) is fits


def test_rendering_flips_places_and_composites_exactly():
    plain = render_on(SQUARE, 16)
    assert (plain[:, :8] == (255, 0, 0)).all() and (plain[:, 8:] == 255).all()
    assert (render_on(SQUARE, 16, flip=True) == plain[:, ::-1]).all()
    small = render_on(SQUARE, 16, scale=0.5, offset=(0.25, 0.25), background=(0, 0, 255))
    assert (small[8:, 8:12] == (255, 0, 0)).all() and (small[:8] == (0, 0, 255)).all()


def test_scene_captions_are_true():
    left, right = drawing("left thing", colour="#ff0000"), drawing("right thing", colour="#00ff00")
    scene = Scene("relation", "noto", "blue", ("left thing", "right thing"), "left of")
    assert scene.caption == "a left thing left of a right thing on a blue background, noto style"
    picture = render_scene(scene, [left, right], 64).astype(int)
    assert (picture[0, 0] == BACKGROUNDS["blue"]).all()
    red, green = picture[..., 0] - picture[..., 1] > 100, picture[..., 1] - picture[..., 0] > 100
    red &= picture[..., 2] < 50
    green &= picture[..., 2] < 50
    assert np.nonzero(red)[1].max() < np.nonzero(green)[1].min()
    above = render_scene(Scene("relation", "noto", "blue", ("a", "b"), "above"), [left, right], 64).astype(int)
    assert (above[17, 32] == (255, 0, 0)).all() and (above[47, 32] == (0, 255, 0)).all()


def test_scenes_sample_every_kind_and_hold_some_out():
    rng = random.Random(0)
    scenes = [sample_scene([drawing(name) for name in "abcdefgh"], rng)[0] for _ in range(600)]
    assert {s.kind for s in scenes} == {"background", "count", "relation"}
    assert {s.number for s in scenes} == {1, 2, 3}
    share = np.mean([s.split == "test_scene" for s in scenes])
    assert 0.05 < share < 0.16


@pytest.fixture(scope="session")
def built(tmp_path_factory, node_modules) -> Path:
    out = tmp_path_factory.mktemp("emoji") / "data"
    build_emoji(out, EmojiSettings(styles=("fxemoji", "fluent-3d"), sizes=(16,), scenes=12, variants=1))
    return out


def test_building_twice_gives_the_same_bytes(built, tmp_path):
    again = tmp_path / "again"
    build_emoji(again, EmojiSettings(styles=("fxemoji", "fluent-3d"), sizes=(16,), scenes=12, variants=1))
    files = sorted(p.name for p in built.iterdir())
    assert files == sorted(p.name for p in again.iterdir())
    assert {f: sha256_file(built / f) for f in files} == {f: sha256_file(again / f) for f in files}


def test_what_is_built(built):
    from pocketfusion.data.packed import open_packed

    data = open_packed(built, 16, verify=True)
    kinds = Counter(row["kind"] for row in data.rows)
    train = sum(row["split"] == "train" and row["kind"] == "drawing" for row in data.rows)
    assert kinds == {
        "drawing": GOLDEN["styles"]["fxemoji"] + GOLDEN["styles"]["fluent-3d"],
        "variant": train,
        "scene": 12,
    }
    assert all(row["split"] == "train" for row in data.rows if row["kind"] == "variant")
    assert data.images.shape == (len(data), 16, 16, 3) and data.images.dtype == np.uint8
    assert "Mozilla" in (built / "LICENCES.md").read_text()
    assert (built / "contact_sheet.png").stat().st_size > 1000


def test_skin_tones_are_an_option(node_modules):
    toned = load_concepts(node_modules, skin_tones=True)
    assert len(toned) == GOLDEN["concepts_with_skin_tones"]
    waving = next(c for c in toned if c.label == "waving hand: light skin tone")
    assert waving.base == plain_hex("1F44B")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EmojiSettings(styles=("cubist",)), "no style 'cubist'"),
        (EmojiSettings(sizes=(8,)), "size of 8 px"),
        (EmojiSettings(scenes=-1), "--scenes -1"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, settings, words):
    with pytest.raises(PocketfusionError, match=words):
        build_emoji(tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_registry_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(PocketfusionError, match="npm could not fetch the emoji packages"):
        build_emoji(tmp_path / "out", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists() and list((tmp_path / "cache").iterdir()) == []


def test_npm_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PocketfusionError, match="npm was not found"):
        fetch_packages(tmp_path / "cache")


def test_the_default_styles_are_free_of_share_alike():
    assert len(DEFAULT_STYLES) == 8
    assert not any("SA" in STYLES[s].spdx for s in DEFAULT_STYLES)


def test_command_refuses_an_existing_folder(tmp_path, cli):
    (tmp_path / "out").mkdir()
    done: subprocess.CompletedProcess = cli("data", "emoji", tmp_path / "out")
    assert done.returncode == 2 and "exists already" in done.stderr and "Traceback" not in done.stderr
