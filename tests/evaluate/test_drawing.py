"""What is drawn: the plan, a batch at a time into the store, resumed to the picture; what the store finds again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fakes import FakeSystem
from PIL import Image

from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.fid_clip.drawing import PictureStore, Plan, Shelf, Wanted, draw_missing, load
from pocketfusion.evaluate.generate import SamplerSettings
from pocketfusion.evaluate.reference import SetsReference
from pocketfusion.evaluate.sets import choose_sets, picture_seed

SETTINGS = SamplerSettings(1, 2.0)


class Stopping(FakeSystem):
    """Is killed after `pictures` of them; remembers the seeds that it drew."""

    batch = 3

    def __init__(self, pictures: int):
        super().__init__()
        self.left, self.drawn = pictures, []

    def draw(self, prompts, seeds, settings, on_batch=None):
        if self.left < len(seeds):
            raise KeyboardInterrupt
        self.left -= len(seeds)
        self.drawn += seeds
        return super().draw(prompts, seeds, settings)


@pytest.fixture
def reference(tiny_data):
    data = open_dataset(tiny_data, 64)
    return SetsReference(data, choose_sets(data, ["test_combo", "val_combo"], 8))


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "shelf", 64)


def test_every_caption_once_with_its_own_seed(reference):
    plan = Plan.of(reference, seed=5, prompts=0, images=4)
    assert [one.prompt for one in plan.pictures] == reference.captions and len(plan.pictures) == 16
    assert [one.seed for one in plan.pictures] == [picture_seed(5, key) for key in reference.ids]
    assert plan.again == () and plan.everything() == list(plan.pictures)


def test_prompts_for_diversity_begin_with_their_picture(reference):
    plan = Plan.of(reference, seed=5, prompts=3, images=4)
    assert [len(row) for row in plan.again] == [4, 4, 4]
    assert len({row[0].prompt for row in plan.again}) == 3  # the shapes' captions repeat: each prompt once
    for row in plan.again:
        assert row[0] in plan.pictures and len({one.seed for one in row}) == 4
        assert len({one.prompt for one in row}) == 1
    assert len(plan.everything()) == 16 + 3 * 3
    more = Plan.of(reference, seed=5, prompts=4, images=5)
    assert set(plan.everything()) < set(more.everything())  # asking for more keeps what is drawn


def test_a_killed_run_goes_on_at_the_picture(reference, shelf):
    wanted = Plan.of(reference, 0, 0, 4).everything()
    first, second = Stopping(7), Stopping(99)
    with pytest.raises(KeyboardInterrupt):
        draw_missing(lambda: first, shelf, wanted, SETTINGS)
    assert len(shelf.missing(wanted)) == 10  # two batches of three are on disk
    done: list[int] = []
    draw_missing(lambda: second, shelf, wanted, SETTINGS, done.append)
    assert sorted(first.drawn + second.drawn) == sorted(one.seed for one in wanted)
    assert done == [6, 3, 3, 3, 1] and shelf.missing(wanted) == []
    draw_missing(lambda: pytest.fail("opened for nothing"), shelf, wanted, SETTINGS)
    whole = FakeSystem().draw([one.prompt for one in wanted], [one.seed for one in wanted], SETTINGS)
    assert (load(shelf, wanted, "it") == whole).all()


def test_a_damaged_picture_is_drawn_again_alone(reference, shelf):
    wanted = Plan.of(reference, 0, 0, 4).everything()
    draw_missing(lambda: Stopping(99), shelf, wanted, SETTINGS)
    before = load(shelf, wanted, "it")
    shelf.file(wanted[4]).write_bytes(shelf.file(wanted[4]).read_bytes()[:200])
    with pytest.raises(
        PocketfusionError, match=r"base@8 at guidance 2: 1 of 16 pictures are not in .*shelf after drawing"
    ):
        load(shelf, wanted, "base@8 at guidance 2")
    again = Stopping(99)
    draw_missing(lambda: again, shelf, wanted, SETTINGS)
    assert again.drawn == [wanted[4].seed] and np.array_equal(load(shelf, wanted, "it"), before)


def test_shares_of_processes_are_all_pictures(reference, shelf):
    wanted = Plan.of(reference, 0, 3, 4).everything()
    for index in range(3):
        draw_missing(lambda: Stopping(99), shelf, wanted[index::3], SETTINGS)
    assert shelf.missing(wanted) == []


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
