"""The picture store: what a picture's name depends on, and that damage is noticed."""

import json

import numpy as np
import pytest
from PIL import Image

from pocketfusion.evaluate.store import PictureStore, Shelf, Wanted

WITH = {"networks": "a" * 64, "num_inference_steps": 8}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_a_picture_comes_back_to_the_byte_and_tells_its_prompt(tmp_path, image):
    shelf = Shelf(tmp_path / "g2.0", 16)
    apple = Wanted("ein Apfel, 林檎", 2**47)
    assert shelf.get(apple) is None and shelf.missing([apple, apple]) == [apple]
    shelf.put(apple, image)
    assert (shelf.get(apple) == image).all() and shelf.missing([apple]) == []
    with Image.open(shelf.file(apple)) as picture:
        assert picture.text == {"prompt": "ein Apfel, 林檎", "seed": str(2**47)}
    assert [file.name for file in shelf.folder.iterdir()] == [shelf.file(apple).name]  # nothing partial stays


def test_names_depend_on_prompt_and_seed(tmp_path):
    shelf = Shelf(tmp_path, 16)
    wanted = [Wanted("a", 1), Wanted("a", 2), Wanted("b", 1), Wanted("1|a", 1), Wanted("a", 11)]
    assert len({shelf.file(one) for one in wanted}) == 5
    assert Shelf(tmp_path, 16).file(wanted[0]) == shelf.file(wanted[0])


@pytest.mark.parametrize("damage", ["truncated", "bytes", "other size", "no picture", "empty"])
def test_a_damaged_picture_counts_as_missing(tmp_path, image, damage):
    shelf, apple = Shelf(tmp_path, 16), Wanted("apple", 1)
    shelf.put(apple, image)
    content = shelf.file(apple).read_bytes()
    spoiled = {
        "truncated": content[: len(content) // 2],
        "bytes": content[:300] + bytes(100) + content[400:],
        "no picture": b"hello",
        "empty": b"",
    }
    if damage == "other size":
        Image.fromarray(image[:8]).save(shelf.file(apple))
    else:
        shelf.file(apple).write_bytes(spoiled[damage])
    assert shelf.get(apple) is None and shelf.missing([apple]) == [apple]
    shelf.put(apple, image)
    assert (shelf.get(apple) == image).all()


def test_a_shelf_is_found_under_any_name_and_only_for_the_same_drawing(tmp_path):
    store = PictureStore(tmp_path)
    shelf = store.shelf("base@8", WITH, 4.5, 16)
    assert shelf.folder.name == "g4.5" and shelf.folder.parent.name.startswith("base@8-")
    assert json.loads((shelf.folder.parent / "drawn_with.json").read_text()) == WITH
    assert store.shelf("renamed@8", WITH, 4.5, 16).folder == shelf.folder
    others = [store.shelf("base@8", WITH, 4.0, 16), store.shelf("base@8", WITH | {"num_inference_steps": 9}, 4.5, 16)]
    assert len({shelf.folder, *(other.folder for other in others)}) == 3
