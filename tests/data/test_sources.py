"""Any folder of captioned pictures: packed arrays, shards, picture files, and the ways they can be broken."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pocketfusion.data.sources import open_dataset, square
from pocketfusion.errors import PocketfusionError


def png(colour=(255, 0, 0), size=(8, 8), mode="RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "PNG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_shards(tmp_path):
    with tarfile.open(tmp_path / "a-000.tar", "w") as tar:
        add(tar, "one.png", png())
        add(tar, "one.txt", b" a red square \n")
        add(tar, "two.png", png((0, 255, 0)))
        add(tar, "two.json", json.dumps({"caption": "a green square", "split": "test_combo", "flip": True}).encode())
    data = open_dataset(tmp_path, 16)
    assert [row["captions"] for row in data.rows] == [["a red square"], ["a green square"]]
    assert data.images.shape == (2, 16, 16, 3)
    assert (data.images[1] == (0, 255, 0)).all()
    assert data.rows[1]["split"] == "test_combo" and data.rows[1]["flip"] is True


def test_pictures_with_caption_files_or_a_table(tmp_path):
    (tmp_path / "one.png").write_bytes(png())
    (tmp_path / "one.txt").write_text("a red square")
    (tmp_path / "two.png").write_bytes(png((0, 0, 255)))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "two.png", "text": "a blue square"}) + "\n")
    data = open_dataset(tmp_path, 16)
    assert [row["captions"][0] for row in data.rows] == ["a red square", "a blue square"]
    assert open_dataset(tmp_path, 16).fingerprint == data.fingerprint


def test_square_crops_the_middle_and_makes_transparency_white():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    assert (square(Image.fromarray(wide), 4) == 200).all()
    assert (square(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), 4) == 255).all()


def test_a_truncated_shard_is_named(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        add(tar, "one.png", png(size=(64, 64)))
        add(tar, "one.txt", b"x" * 2000)
    data = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "whole.tar").write_bytes(data[:1300])
    with pytest.raises(PocketfusionError, match="whole.tar"):
        open_dataset(tmp_path, 16)


def test_a_broken_picture_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "one.png", png()[:30])
        add(tar, "one.txt", b"x")
    with pytest.raises(PocketfusionError, match="sample 'one' is not a readable picture"):
        open_dataset(tmp_path, 16)


def test_a_missing_caption_is_named(tmp_path):
    (tmp_path / "one.png").write_bytes(png())
    with pytest.raises(PocketfusionError, match=r"one.png has no caption: write one.txt"):
        open_dataset(tmp_path, 16)


def test_a_broken_table_line_is_named(tmp_path):
    (tmp_path / "one.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "one.png"}\n')
    with pytest.raises(PocketfusionError, match="line 1 is not JSON with 'file_name' and 'text'"):
        open_dataset(tmp_path, 16)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(PocketfusionError, match="no dataset.json, no .tar shards"):
        open_dataset(tmp_path, 16)
    with pytest.raises(PocketfusionError, match="there is no data folder"):
        open_dataset(tmp_path / "nowhere", 16)


def test_packed_folder_checks(tiny_data, tmp_path):
    import shutil

    data = open_dataset(tiny_data, 64)
    assert set(data.splits) >= {"train", "val_combo", "test_combo", "train_scene"}
    with pytest.raises(PocketfusionError, match="no pictures of 128 px"):
        open_dataset(tiny_data, 128)
    with pytest.raises(PocketfusionError, match="no split named test_moon"):
        data.indices(["test_moon"])
    copy = shutil.copytree(tiny_data, tmp_path / "copy")
    with (copy / "images_64.npy").open("r+b") as f:
        f.truncate(1000)
    with pytest.raises(PocketfusionError, match="missing or truncated"):
        open_dataset(copy, 64)
    (copy / "dataset.json").write_text("{")
    with pytest.raises(PocketfusionError, match="not valid JSON"):
        open_dataset(copy, 64)
