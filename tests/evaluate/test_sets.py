"""Which pictures are scored."""

import numpy as np
import pytest

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.sets import KNOWN_WORDS, NEW_WORDS, choose_sets, members, picture_seed, shuffled_order


def row(key: str, split: str, label: str) -> dict:
    return {"id": key, "split": split, "label": label, "captions": [f"{label}, noto style"], "flip": False}


@pytest.fixture
def data() -> CaptionedImages:
    rows = [row(f"t{i}", "train", label) for i, label in enumerate(["red apple", "green book", "Open box"])]
    rows += [row(f"k{i}", "test_concept", label) for i, label in enumerate(["green apple", "open book"])]
    rows += [row(f"n{i}", "test_concept", label) for i, label in enumerate(["purple apple", "box-car", "train"])]
    rows += [row(f"v{i}", "val_combo", "red apple") for i in range(20)]
    rows += [row("lonely", "test_combo", "red apple")]
    return CaptionedImages(np.zeros((len(rows), 4, 4, 3), np.uint8), rows, "words", "f" * 32)


def test_test_concepts_are_parted_by_whether_their_words_are_known(data):
    named = members(data)
    assert [data.rows[i]["id"] for i in named[KNOWN_WORDS]] == ["k0", "k1"]
    assert [data.rows[i]["id"] for i in named[NEW_WORDS]] == ["n0", "n1", "n2"]
    assert "test_combo" not in named  # one picture cannot be ranked


def test_default_sets_are_those_that_the_data_has(data):
    assert [chosen.name for chosen in choose_sets(data, None, 9)] == ["train", KNOWN_WORDS, NEW_WORDS]


def test_a_smaller_choice_is_the_beginning_of_a_larger_one(data):
    small, large = (choose_sets(data, ["val_combo"], n)[0] for n in (5, 15))
    assert len(large.indices) == 15 and large.indices[:5].tolist() == small.indices.tolist()
    assert sorted(large.indices) != large.indices.tolist()  # not simply the first rows
    assert large.captions == tuple(data.rows[i]["captions"][0] for i in large.indices)


@pytest.mark.parametrize("samples", [1, 0, -3])
def test_too_few_samples(data, samples):
    with pytest.raises(PocketfusionError, match="at least 2"):
        choose_sets(data, None, samples)


def test_unknown_set_is_named(data):
    with pytest.raises(PocketfusionError, match="no set named test_combi: it has .*test_concept_known"):
        choose_sets(data, ["train", "test_combi"], 4)


def test_shuffled_order_leaves_no_one_their_words_where_it_can():
    assert sorted(shuffled_order(list("abcdef"))) == list(range(6))
    captions = list("aabbaabb")  # half a turn would change nothing
    assert all(captions[i] != captions[j] for i, j in enumerate(shuffled_order(captions)))
    assert shuffled_order(["x", "y"]).tolist() == [1, 0]


def test_seeds_follow_the_picture_and_the_run():
    assert picture_seed(0, "noto/1F34E") == picture_seed(0, "noto/1F34E")
    assert len({picture_seed(seed, key) for seed in (0, 1) for key in ("a", "b")}) == 4
