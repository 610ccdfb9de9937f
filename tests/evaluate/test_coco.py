"""MS-COCO's layout, the fixed caption list, and every way in which a folder can be wrong."""

import json
import os
import shutil

import numpy as np
import pytest
from coco_folder import IDS, annotations, file_name, make_coco
from PIL import Image

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.coco import Annotations, list_sha256, open_coco
from pocketfusion.evaluate.reference import CaptionedReference

#: of the list of 6 captions of `coco_folder.annotations`, seed 0: published lists must not change with the code
GOLDEN = "24d45e1eca11741fa5541ac88f93bb000fc52405fdb4f64558664c8cd6e0c521"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco") / "coco")


@pytest.fixture
def own(coco, tmp_path):
    return shutil.copytree(coco, tmp_path / "coco")


def rewrite(folder, change):
    file = folder / "annotations" / "captions_val2014.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_the_list_is_a_function_of_file_and_seed(coco, tmp_path):
    whole = Annotations(coco / "annotations" / "captions_val2014.json")
    chosen = whole.choose(6, seed=0)
    assert list_sha256(chosen) == GOLDEN
    assert len({entry.image_id for entry in chosen}) == 6  # one caption an image
    texts = {entry["id"]: entry for entry in annotations()["annotations"]}
    for entry in chosen:
        assert texts[entry.caption_id]["image_id"] == entry.image_id
        assert entry.text == f"A picture of thing {entry.image_id}, said way {entry.caption_id // 1000}."
    assert whole.choose(12, seed=0)[:6] == chosen  # a smaller list begins a larger one
    assert list_sha256(whole.choose(6, seed=1)) != GOLDEN
    # neither the order of the entries nor the pictures that are there matter
    values = annotations()
    values["images"].reverse()
    values["annotations"].reverse()
    (tmp_path / "captions.json").write_text(json.dumps(values))
    assert Annotations(tmp_path / "captions.json").choose(6, seed=0) == chosen


def test_the_official_layout(coco):
    reference = open_coco(coco, None, samples=6)
    assert reference.name == "MS-COCO captions_val2014" and reference.image_size == 256
    assert len(reference.ids) == len(reference.captions) == 6 and reference.real_count == 12
    assert reference.ids[0].startswith("COCO_val2014_0000") and reference.notes == []
    protocol = reference.protocol()
    assert protocol["list_sha256"] == GOLDEN and protocol["real"] == "all" and protocol["real_count"] == 12
    assert protocol["image"] | {"resize": ""} == {"size": 256, "resize": "", "jpeg_quality": 75}
    assert json.loads(json.dumps(protocol)) == protocol


def test_pictures_are_those_of_the_captions(coco):
    reference: CaptionedReference = open_coco(coco, None, samples=12, size=64)
    images = reference.images([3, 0])
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    for image, place in zip(images, (3, 0), strict=True):
        with Image.open(coco / "val2014" / f"{reference.ids[place]}.jpg") as file:
            expected = file.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(image, np.asarray(expected))
    # FID's real side is in the order of file names
    assert np.array_equal(reference.real_images([IDS.index(int(reference.ids[3][-12:]))])[0], images[0])


def test_fid_against_the_listed_pictures_alone(coco):
    reference = open_coco(coco, None, samples=4, size=64, real="listed")
    assert reference.real_count == 4 and reference.protocol()["real"] == "listed"
    assert np.array_equal(reference.real_images(range(4)), reference.images(range(4)))
    assert reference.fingerprint != open_coco(coco, None, samples=4, size=64).fingerprint


def test_2017_and_flat_folders(coco, tmp_path):
    newer = open_coco(make_coco(tmp_path / "new", "val2017"), None, samples=3)
    assert all(len(id_) == 12 for id_ in newer.ids)
    flat = tmp_path / "flat"
    shutil.copytree(coco / "val2014", flat)
    shutil.copy(coco / "annotations" / "captions_val2014.json", flat)
    for reference in (
        open_coco(flat, None, samples=6),
        open_coco(coco / "val2014", flat / "captions_val2014.json", samples=6),
    ):
        assert reference.fingerprint == open_coco(coco, None, samples=6).fingerprint


def test_training_captions_beside_do_not_confuse(own):
    file = own / "annotations" / "captions_val2014.json"
    shutil.copy(file, own / "annotations" / "captions_train2014.json")
    assert open_coco(own, None, samples=6).protocol()["list_sha256"] == GOLDEN
    shutil.copy(file, own / "annotations" / "captions_val2017.json")
    with pytest.raises(PocketfusionError, match=r"has captions_val2014.json, captions_val2017.json\): give"):
        open_coco(own, None, samples=6)
    assert open_coco(own, file, samples=6).protocol()["list_sha256"] == GOLDEN


def test_what_does_not_match_is_counted_and_named(own):
    listed = open_coco(own, None, samples=6)
    spare = sorted({file_name(id_) for id_ in IDS} - {f"{id_}.jpg" for id_ in listed.ids})
    for name in spare[:4]:
        (own / "val2014" / name).unlink()
    shutil.copy(own / "val2014" / f"{listed.ids[0]}.jpg", own / "val2014" / "holiday.jpg")
    rewrite(own, lambda values: values["annotations"].append({"id": 7, "image_id": 999, "caption": "of nothing"}))
    reference = open_coco(own, None, samples=6)
    assert reference.chosen == listed.chosen and reference.real_count == 8
    assert reference.notes == [
        f"4 captioned images have no picture here ({spare[0]}, {spare[1]}, {spare[2]}, …).",
        "1 pictures have no caption and are not in the list (holiday.jpg).",
        "1 image ids have captions but no entry in 'images' (999).",
    ]
    assert reference.fingerprint != listed.fingerprint
    (own / "val2014" / f"{listed.ids[2]}.jpg").unlink()
    with pytest.raises(PocketfusionError, match=f"1 of the 6 listed captions have no picture .*{listed.ids[2]}"):
        open_coco(own, None, samples=6)


def test_a_picture_without_caption_is_never_listed(own):
    def drop(values):
        values["annotations"] = [entry for entry in values["annotations"] if entry["image_id"] != 42]

    rewrite(own, drop)
    reference = open_coco(own, None, samples=11)
    assert file_name(42)[:-4] not in reference.ids
    assert reference.real_count == 12  # it is one of the set's pictures all the same
    assert reference.notes == [f"1 pictures have no caption and are not in the list ({file_name(42)})."]
    with pytest.raises(PocketfusionError, match="12 captions were asked for, but .* has 11 captioned images"):
        open_coco(own, None, samples=12)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_corrupt_picture_is_named_and_skipped_only_on_request(own, damage):
    whole = open_coco(own, None, samples=6, size=64)
    bad = own / "val2014" / f"{whole.ids[1]}.jpg"
    bad.write_bytes(bad.read_bytes()[:700] if damage == "cut" else b"not a picture")
    with pytest.raises(PocketfusionError, match=f"{bad.name} is not a readable picture"):
        open_coco(own, None, samples=6, size=64).images(range(6))
    heard = []
    reference = open_coco(own, None, samples=6, size=64, skip_bad=True, on_checked=lambda *at: heard.append(at))
    assert reference.ids == [id_ for id_ in whole.ids if id_ != whole.ids[1]] and reference.real_count == 11
    assert reference.notes == [f"1 unreadable pictures were left out ({bad.name})."]
    assert heard[-1] == (12, 12)
    assert reference.images(range(5)).shape == (5, 64, 64, 3)
    assert reference.real_images(range(11)).shape == (11, 64, 64, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("annotations"), "has no list 'annotations'"),
        (lambda v: v.update(images=[]), "has no list 'images'"),
        (lambda v: v["images"][3].pop("file_name"), "an entry of 'images' has no file_name"),
        (lambda v: v["annotations"][5].pop("caption"), "an entry of 'annotations' has no caption"),
        (lambda v: v["annotations"][5].update(image_id="42"), "an entry of 'annotations' has no image_id"),
        (lambda v: v["annotations"].insert(0, "text"), "an entry of 'annotations' has no id"),
        (lambda v: v["images"].append(v["images"][0]), "lists the image id 42 twice"),
        (lambda v: v["images"][0].update(file_name="../../etc/secret.jpg"), "a plain file name is needed"),
        (lambda v: v["images"][0].update(file_name="a\0.jpg"), "a plain file name is needed"),
        (lambda v: v["images"][0].update(file_name="\ud800.jpg"), "a plain file name is needed"),
        (lambda v: v["images"][0].update(id=True), "an entry of 'images' has no id"),
        (lambda v: v["annotations"][5].update(image_id=True), "an entry of 'annotations' has no image_id"),
        (lambda v: v["annotations"][5].update(caption="\udfff"), "the annotation .* half a surrogate pair"),
    ],
)
def test_a_file_of_another_kind_is_refused(own, change, message):
    rewrite(own, change)
    with pytest.raises(PocketfusionError, match=message):
        open_coco(own, None, samples=3)


@pytest.mark.parametrize(
    ("encoding", "match"),
    [("utf-8-sig", None), ("utf-16", "is UTF-16"), ("cp1252", "Windows-1252 it would read .*café")],
)
def test_encodings_of_the_captions_file(own, encoding, match):
    rewrite(own, lambda values: values["annotations"][0].update(caption="a café"))
    file = own / "annotations" / "captions_val2014.json"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False), encoding=encoding)
    if match is None:
        assert len(open_coco(own, None, samples=12).captions) == 12
    else:
        with pytest.raises(PocketfusionError, match=match):
            open_coco(own, None, samples=12)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nests too deeply"),
        ('{"images": [], "images": []}', "it gives 'images' twice"),
        ("[]", "no list"),
    ],
)
def test_hostile_json(own, text, match):
    (own / "annotations" / "captions_val2014.json").write_text(text)
    with pytest.raises(PocketfusionError, match=match):
        open_coco(own, None, samples=3)


def test_pictures_come_through_the_same_door_as_training_data(own):
    """tests/data/test_pictures.py has every kind; here, that this is where they come through."""
    reference = open_coco(own, None, samples=3, size=64)
    upright, lying, alpha = (own / "val2014" / f"{id_}.jpg" for id_ in reference.ids)
    with Image.open(upright) as file:
        wanted = file.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted.transpose(Image.Transpose.ROTATE_90).save(lying, "PNG", exif=exif)
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(alpha, "PNG")
    images = open_coco(own, None, samples=3, size=64).images(range(3))
    assert np.array_equal(images[0], images[1]) and (images[2] == 255).all()


def test_what_is_no_file_is_never_waited_for(own):
    whole = open_coco(own, None, samples=6, size=64)
    fifo, folder = (own / "val2014" / f"{id_}.jpg" for id_ in whole.ids[:2])
    for path in (fifo, folder):
        path.unlink()
    os.mkfifo(fifo)
    folder.mkdir()
    with pytest.raises(PocketfusionError, match=f"{fifo.name} is a FIFO, .*--skip-bad"):
        open_coco(own, None, samples=6, size=64).images([0])
    reference = open_coco(own, None, samples=6, size=64, skip_bad=True)
    assert reference.ids == whole.ids[2:] and "2 unreadable pictures were left out" in reference.notes[0]


def test_bad_paths_and_numbers(own, tmp_path):
    with pytest.raises(PocketfusionError, match="there is no COCO folder at"):
        open_coco(tmp_path / "nowhere", None, samples=3)
    with pytest.raises(PocketfusionError, match="there is no annotation file at"):
        open_coco(own, own / "captions.json", samples=3)
    with pytest.raises(PocketfusionError, match=r"should hold one captions_\*.json \(it has none\)"):
        open_coco(own / "val2014", None, samples=3)
    for count in (1, 13):
        with pytest.raises(PocketfusionError, match=f"{count} captions were asked for, but .* from 2 to 12"):
            open_coco(own, None, samples=count)
    with pytest.raises(PocketfusionError, match="pictures of 16 px are too small"):
        open_coco(own, None, samples=3, size=16)
    (own / "annotations" / "captions_val2014.json").write_text("{" * 20)
    with pytest.raises(PocketfusionError, match="captions_val2014.json is not valid JSON"):
        open_coco(own, None, samples=3)
    shutil.rmtree(own / "val2014")
    (own / "val2014").mkdir()
    (own / "annotations" / "captions_val2014.json").write_text(json.dumps(annotations()))
    with pytest.raises(PocketfusionError, match="val2014 holds no pictures"):
        open_coco(own, None, samples=3)
