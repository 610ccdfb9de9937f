"""Any folder of captioned pictures: packed arrays, shards, picture files, and the ways they can be broken."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made_pictures import add, encode, photo, png, shard
from PIL import Image

from pocketfusion.data.buckets import fit
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError


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


def test_fitting_crops_the_middle():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    assert (fit(Image.fromarray(wide), 4, 4) == 200).all()


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
    with pytest.raises(PocketfusionError, match="metadata.jsonl line 1 has no caption: give it a 'text'"):
        open_dataset(tmp_path, 16)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(PocketfusionError, match="no dataset.json, no .tar shards"):
        open_dataset(tmp_path, 16)
    with pytest.raises(PocketfusionError, match="there is no data folder"):
        open_dataset(tmp_path / "nowhere", 16)


def one(folder, text="a red square", name="a", **row):
    """A folder of one picture whose caption is in a table's line."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(png())
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"{name}.png", "text": text, **row}))
    return folder


def refused(folder, match, skippable=True):
    """Refused in one sentence; with skip_bad it is counted, or there is nothing left."""
    with pytest.raises(PocketfusionError, match=match) as caught:
        open_dataset(folder, 8)
    assert "\n" not in str(caught.value) and str(caught.value).count("--skip-bad") == skippable
    if not skippable:
        with pytest.raises(PocketfusionError, match=match):
            open_dataset(folder, 8, skip_bad=True)


def left_out(folder, count, match):
    data = open_dataset(folder, 8, skip_bad=True)
    assert data.name.endswith(f"({count} bad samples left out)")
    assert f"{count} bad samples were left out (" in data.notes[0] and match in data.notes[0]
    return [row["id"] for row in data.rows]


def test_names_are_only_names(tmp_path, monkeypatch):
    names = ["photo v1.5", "IMG.2041", "{a,b}", "a;touch PWNED", "[x]", "$(touch PWNED)", "100%", "a b", "-o", "é"]
    loose = tmp_path / "loose"
    loose.mkdir()
    for name in names:
        (loose / f"{name}.png").write_bytes(png())
        (loose / f"{name}.txt").write_text(f"of {name}")
    tars = tmp_path / "tars"
    tars.mkdir()
    for number, name in enumerate(["x.{000..002}", "pipe:touch PWNED; echo ", "gs://a", "http:", "a::b"]):
        members = {f"{n}{number}.{kind}": data for n in names for kind, data in (("png", png()), ("txt", b"red"))}
        shard(tars / f"{name.replace('/', '_')}.tar", members)
    monkeypatch.chdir(tars)
    assert sorted(row["id"] for row in open_dataset(loose, 8).rows) == sorted(names)
    assert len(open_dataset(type(tmp_path)("."), 8)) == 5 * len(names)
    assert not list(tmp_path.rglob("PWNED"))


def test_a_picture_without_caption_and_the_reverse(tmp_path):
    one(tmp_path)
    (tmp_path / "b.png").write_bytes(png())
    refused(tmp_path, "b.png has no caption: write b.txt")
    assert left_out(tmp_path, 1, "b.png has no caption") == ["a"]
    (tmp_path / "c.txt").write_text("of nothing")
    (tmp_path / "d.heic").write_bytes(b"x")
    (tmp_path / "d.txt").write_text("of a telephone")
    assert left_out(tmp_path, 3, "c.txt is a caption without a picture") == ["a"]
    (tmp_path / "b.png").unlink()
    refused(tmp_path, "c.txt is a caption without a picture of its name")
    (tmp_path / "c.txt").unlink()
    refused(tmp_path, r"d.txt is a caption without a picture of a type that is read: save d.heic as PNG")
    (tmp_path / "d.txt").unlink()
    refused(tmp_path, "d.heic is a picture of a type that is not read")
    (tmp_path / "d.heic").unlink()
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "list.xyz").write_text("1")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    assert open_dataset(tmp_path, 8).notes == ["1 files of other types were not read (list.xyz)."]
    (tmp_path / "metadata.jsonl").open("a").write('\n{"file_name": "gone.png", "text": "x"}')
    refused(tmp_path, "lists gone.png, which is not there")
    assert left_out(tmp_path, 1, "gone.png") == ["a"]


def test_in_a_shard_too(tmp_path):
    whole = {"a.png": png(), "a.txt": b"red"}
    shard(tmp_path / "0.tar", whole | {"b.png": png()})
    refused(tmp_path, r"0.tar: sample 'b' has no caption")
    assert left_out(tmp_path, 1, "sample 'b'") == ["a"]
    for more, match in (
        ({"b.txt": b"red"}, "sample 'b' has a caption without a picture"),
        ({"b.json": b'{"caption": "red"}'}, "sample 'b' has a caption without a picture"),
        ({"b.heic": b"x", "b.txt": b"red"}, r"sample 'b' has a picture of a type that is not read \(b.heic\)"),
        ({"b.png": png(), "b.jpg": png(), "b.txt": b"x"}, "sample 'b' has 2 pictures"),
        ({"b.png": png(), "b.txt": b" \n"}, "sample 'b' has an empty caption"),
        ({"b.png": png(), "b.txt": "caf\u00e9".encode("cp1252")}, r"'b' \(.txt\) is not UTF-8 .*it would read 'café'"),
        ({"b.png": png(), "b.json": b'{"caption": null}'}, "sample 'b' has null as its caption"),
        ({"b.png": png(), "b.json": b'{"caption": "x", "flip": 1}'}, "sample 'b' has 1 for 'flip'"),
        ({"b.png": png(), "b.json": b'{"caption": "x", "caption": "y"}'}, "it gives 'caption' twice"),
        ({"b.png": png(), "b.json": b"[" * 100_000}, "nests too deeply"),
        ({"../b.png": png()}, r"holds the path '../b.png'"),
        ({"/b.png": png()}, r"holds the path '/b.png'"),
    ):
        shard(tmp_path / "0.tar", whole | more)
        refused(tmp_path, match)
        assert left_out(tmp_path, 1, "0.tar") == ["a"]
    # fields that webdataset has and this reader has no use for; macOS's hidden twins
    more = {"a.seg.png": png(), "a.cls": b"3", "m.json": b"{}", "._a.png": b"x", "./d.npy": b""}
    shard(tmp_path / "0.tar", whole | more | {"a.b.png": png(), "a.b.txt": b"blue"})
    assert [row["id"] for row in open_dataset(tmp_path, 8).rows] == ["a", "a.b"]


def test_members_that_are_no_files(tmp_path):
    for kind, said in (
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "device or FIFO"),
        (tarfile.FIFOTYPE, "device or FIFO"),
    ):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            add(tar, "a.png", png())
            add(tar, "a.txt", b"red")
            add(tar, "b.txt", type=kind, linkname="/etc/passwd")
        refused(tmp_path, f"0.tar holds the {said} 'b.txt'")
        assert left_out(tmp_path, 1, said) == ["a"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for text in (b"red", b"blue"):
            add(tar, "a.png", png())
            add(tar, "a.txt", text)
    refused(tmp_path, "holds 'a.png' twice")
    for name in (".", "./"):  # of a plain file
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            add(tar, name, b"x")
            add(tar, "a.png", png())
            add(tar, "a.txt", b"red")
        refused(tmp_path, "0.tar holds a file without a name")
        assert left_out(tmp_path, 1, "without a name") == ["a"]  # and not the rest of the shard


def test_damaged_archives(tmp_path):
    whole = shard(tmp_path / "0.tar", {f"{n}.{k}": d for n in "abc" for k, d in (("png", png()), ("txt", b"red"))})
    data = whole.read_bytes()
    assert len(open_dataset(tmp_path, 8)) == 3
    second = bytearray(data)
    second[1024 * 2 + 150] ^= 1  # a bit of the third header: its checksum is wrong
    for broken, match in (
        (bytes(second), "no end mark"),
        (data[:4096], "no end mark"),
        (data[:1200], "damaged|cut short"),
        (data + data, "data follows its end, as in archives joined by cat"),
        (b"", "damaged"),
        (b"\x1f\x8b" + data, "damaged .*uncompressed"),
    ):
        whole.write_bytes(broken)
        refused(tmp_path, match)
    whole.write_bytes(bytes(second))
    assert left_out(tmp_path, 1, "no end mark") == ["a"]
    # of a negative size, a header leads back to itself: tarfile would read it for ever
    info = tarfile.TarInfo("a.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole.write_bytes(bytes(header) * 4 + bytes(1024))
    refused(tmp_path, "damaged|too large|end mark")
    (tmp_path / "1.tar.gz").write_bytes(b"x")
    refused(tmp_path, "1.tar.gz is a compressed shard|0.tar")


def test_keys_that_several_shards_count_anew(tmp_path):
    for name in "01":
        shard(tmp_path / f"{name}.tar", {"000.png": png(), "000.txt": b"red"})
    data = open_dataset(tmp_path, 8)
    assert [row["id"] for row in data.rows] == ["0/000", "1/000"]
    assert data.notes == ["1 samples have a key that another shard has too: their shards' names tell them apart."]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_json_line(tmp_path, mark):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    lines = [{"file_name": "a.png", "text": f"a{mark}b", "x": mark}, {"file_name": "b.png", "text": "b"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [row["captions"] for row in open_dataset(tmp_path, 8).rows] == [["a b"], ["b"]]


@pytest.mark.parametrize(
    ("encoding", "match"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", "is UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("cp1252", "Windows-1252"),
    ],
)
def test_encodings_of_captions_and_tables(tmp_path, encoding, match):
    text = "a café, “red”"
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt/a.png").write_bytes(png())
    (tmp_path / "txt/a.txt").write_text(text, encoding=encoding)
    jsonl = one(tmp_path / "jsonl")
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (jsonl / "metadata.jsonl").write_text(line, encoding=encoding)
    table = one(tmp_path / "csv")
    (table / "metadata.jsonl").unlink()
    (table / "metadata.csv").write_text('file_name,text\na.png,"a café, “red”"\n', encoding=encoding)
    for folder in (tmp_path / "txt", jsonl, table):
        if match is None:
            assert open_dataset(folder, 8).rows[0]["captions"] == [text]
        else:
            refused(folder, rf"(a.txt|metadata.jsonl|metadata.csv) .*{match}.* UTF-8", skippable=folder.name == "txt")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text": None}, "line 1 has null as its caption"),
        ({"text": 7}, "has a number as its caption"),
        ({"text": True}, "has a boolean as its caption"),
        ({"text": {"en": "red"}}, "has an object as its caption"),
        ({"text": []}, "an empty list of captions"),
        ({"text": ["red", None]}, "has null as its caption"),
        ({"text": ["red", ""]}, "has an empty caption"),
        ({"text": " \u2028"}, "has an empty caption"),
        ({"text": "\ud800"}, "half a surrogate pair"),
        ({"flip": "no"}, "has 'no' for 'flip': give true or false"),
        ({"flip": 1}, "has 1 for 'flip'"),
        ({"split": 3}, "has the split 3"),
        ({"split": "../x"}, "has the split '../x'"),
        ({"split": ""}, "has the split ''"),
        ({"file_name": "../a.png"}, "names '../a.png': give a path below"),
        ({"file_name": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"file_name": "x\\a.png"}, "with /"),
        ({"file_name": "a\0.png"}, "below the table's folder"),
        ({"file_name": 5}, "has no 'file_name'"),
        ({"caption": "another"}, "has another 'text' than 'caption'"),
    ],
)
def test_types_are_checked(tmp_path, values, match):
    refused(one(tmp_path, **values) if "text" in values else one(tmp_path, "red", **values), match)
    (tmp_path / "b.png").write_bytes(png())
    (tmp_path / "b.txt").write_text("blue")
    # a line that names its picture is counted once; else the picture is one without caption besides
    assert left_out(tmp_path, 2 if "file_name" in values else 1, "line 1") == ["b"]


def test_what_is_well_formed_is_taken(tmp_path):
    one(tmp_path, ["red", " a  red\none "], split=None, flip=None, other=[1])
    assert open_dataset(tmp_path, 8).rows == [
        {"id": "a", "split": "train", "flip": False, "captions": ["red", "a red one"]}
    ]
    one(tmp_path, "red", split="validation", flip=True)
    assert open_dataset(tmp_path, 8).rows[0] | {} == {
        "id": "a",
        "split": "val_combo",
        "flip": True,
        "captions": ["red"],
    }
    for line, match in (
        ('{"file_name": "a.png", "text": "x", "text": "y"}', "it gives 'text' twice"),
        ('["a.png"]', "has no 'file_name'"),
        ("null", "has no 'file_name'"),
        ('{"file_name": "a.png"', "line 1 is not valid JSON"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "y"}', "lists a.png twice"),
        ("[" * 100_000, "nests too deeply"),
        ("{" + ",".join(f'"{i}":0' for i in [*range(50_000), 49_999]) + "}", "it gives '49999' twice"),
    ):
        (tmp_path / "metadata.jsonl").write_text(line)
        refused(tmp_path, match)


def test_a_csv_table(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png())
    table = tmp_path / "metadata.csv"
    table.write_bytes(
        b'text,file_name,split,flip\r\n"red, ""big""",a.png,,TRUE\r\nblue,b.png,test,\r\n"a\r\nb",c.png,,\r\n'
    )
    rows = open_dataset(tmp_path, 8).rows
    assert [row["captions"][0] for row in rows] == ['red, "big"', "blue", "a b"]
    assert [row["flip"] for row in rows] == [True, False, False] and rows[1]["split"] == "test_combo"
    for text, match, skippable in (
        ("file_name;text\na.png;red\n", r"needs the columns file_name and text.* \(it has file_name;text\)", False),
        ("file_name,text,text\na.png,x,y\n", "each once", False),
        ("", "needs the columns", False),
        ('file_name,text\na.png,"red\n', "is not valid CSV", False),
        ("file_name,text\na.png,red,blue\n", "row 2 has 3 values for 2 columns", False),
        ("file_name,text\na.png,\n", "row 2 has an empty caption", True),
        ("file_name,text,flip\na.png,red,no\n", "row 2 has 'no' for 'flip'", True),
        ("file_name,label\na.png,red\n", "row 2 has no caption", True),
    ):
        table.write_text(text)
        refused(tmp_path, match, skippable)
    table.unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    refused(tmp_path, "metadata.parquet is not read: write it as metadata.jsonl")


def test_sub_folders_as_the_hub_has_them(tmp_path):
    """Tables lie beside their pictures or above them; folders state the split."""
    for name in ("train/a", "train/deep/b", "validation/c", "test/d", "e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "train/metadata.csv").write_text("file_name,text\na.png,of a\ndeep/b.png,of b\n")
    (tmp_path / "validation/metadata.jsonl").write_text('{"file_name": "c.png", "text": "of c"}\n')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "test/d.png", "text": "of d"}')
    (tmp_path / "e.txt").write_text("of e")
    rows = open_dataset(tmp_path, 8).rows
    assert {row["id"]: (row["captions"][0], row["split"]) for row in rows} == {
        "train/a": ("of a", "train"),
        "train/deep/b": ("of b", "train"),
        "validation/c": ("of c", "val_combo"),
        "test/d": ("of d", "test_combo"),
        "e": ("of e", "train"),
    }
    (tmp_path / "again").symlink_to(tmp_path / "train")
    refused(tmp_path, "(again|train) is a link to a folder that is read already")
    (tmp_path / "again").unlink()
    (tmp_path / "test/up").symlink_to(tmp_path)
    assert len(left_out(tmp_path, 1, "is a link to a folder")) == 5


def test_decomposed_names_of_macos(tmp_path):
    one(tmp_path, name="cafe\u0301")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "caf\u00e9.png", "text": "x"}', encoding="utf-8")
    assert len(open_dataset(tmp_path, 8)) == 1


def test_splits_of_shards(tmp_path):
    for name in ("train-000", "val-000", "test_1", "contest"):
        shard(tmp_path / f"{name}.tar", {f"{name}/x.png": png(), f"{name}/x.txt": b"red"})
    rows = open_dataset(tmp_path, 8).rows
    assert [row["split"] for row in rows] == ["train", "test_combo", "train", "val_combo"]  # by name: contest first


@pytest.mark.parametrize("count", [2, 3, 4, 6, 10, 40, 200])
def test_a_small_set_has_held_out_pictures(tmp_path, count):
    shard(tmp_path / "0.tar", {f"{i}.{k}": d for i in range(count) for k, d in (("png", png()), ("txt", b"red"))})
    held = [row["id"] for row in open_dataset(tmp_path, 8).rows if row["split"] == "val_combo"]
    assert len(held) >= min(2, count // 2) and count - len(held) >= count / 2
    assert open_dataset(tmp_path, 8).indices(["train"]).size == count - len(held)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
    one(tmp_path)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("x")
    refused(tmp_path, "b.png is a FIFO, socket or device and no file")
    assert left_out(tmp_path, 1, "b.png is a FIFO") == ["a"]
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").mkdir()
    refused(tmp_path, "b.png is a folder with the name of a file")
    (tmp_path / "b.png").rmdir()
    (tmp_path / "b.png").write_bytes(png())
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    refused(tmp_path, "b.txt is a FIFO")
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "metadata.jsonl")
    refused(tmp_path, "metadata.jsonl is a FIFO", skippable=False)
    (tmp_path / "tars").mkdir()
    os.mkfifo(tmp_path / "tars/0.tar")
    refused(tmp_path / "tars", "0.tar is a FIFO")


def test_shards_beside_pictures(tmp_path):
    one(tmp_path)
    shard(tmp_path / "0.tar", {"x.png": png(), "x.txt": b"red"})
    refused(tmp_path, "holds shards .0.tar. and pictures .a.png.: give each a folder of its own", skippable=False)


def test_names_that_are_not_utf_8(tmp_path):
    one(tmp_path)
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(png())
    refused(tmp_path, "holds a name that is not UTF-8")
    assert left_out(tmp_path, 1, "not UTF-8") == ["a"]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "\udcff.png", png())
    refused(tmp_path / "tars", "holds a name that is not UTF-8")


def test_two_pictures_of_one_name(tmp_path):
    one(tmp_path)
    (tmp_path / "a.jpg").write_bytes(encode(photo(), "JPEG"))
    (tmp_path / "a.txt").write_text("a photo")
    assert [(row["id"], row["captions"][0]) for row in open_dataset(tmp_path, 8).rows] == [
        ("a.jpg", "a photo"),
        ("a.png", "a red square"),
    ]


def test_the_fingerprint_depends_on_what_is_said(tmp_path):
    first = open_dataset(one(tmp_path), 8).fingerprint
    assert open_dataset(one(tmp_path, "another"), 8).fingerprint != first
    assert open_dataset(one(tmp_path, flip=True), 8).fingerprint != first
    assert open_dataset(one(tmp_path), 8).fingerprint == first


def test_everything_is_bad(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text("red")
    with pytest.raises(PocketfusionError, match=r"no pictures with captions \(3 bad samples, first: .*a.png is not"):
        open_dataset(tmp_path, 8, skip_bad=True)


def test_every_command_that_reads_data_takes_skip_bad():
    import inspect

    from pocketfusion.cli import app, commands  # noqa: F401  (registers them)

    reading = {}
    for command in app.registered_commands:
        parameters = inspect.signature(command.callback).parameters
        if "data" in parameters or "coco" in parameters:
            reading[command.name] = "skip_bad" in parameters
    assert len(reading) >= 13 and all(reading.values()), reading


def test_skip_bad_reaches_the_trainers_and_is_told(tmp_path, capsys):
    from pocketfusion.cli.train_commands import begin

    data = one(tmp_path / "data")
    (data / "b.png").write_bytes(b"x")
    (data / "b.txt").write_text("blue")
    recipe = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
    with pytest.raises(PocketfusionError, match="b.png is not a readable picture .*--skip-bad"):
        begin(recipe, data, tmp_path / "out", None, None, False, False, None)
    _, images, _ = begin(recipe, data, tmp_path / "out", None, None, False, True, None)
    assert "data (1 bad samples left out): 1 bad samples were left out (" in capsys.readouterr().err
    with pytest.raises(PocketfusionError, match="no split named val_combo.*of two pictures or more without one"):
        images.indices(["val_combo"])


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
    with pytest.raises(PocketfusionError, match="was not made by this version"):
        (copy / "dataset.json").write_text('["x"]')
        open_dataset(copy, 64)


def test_a_packed_folder_of_other_types(tiny_data, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_data, tmp_path / "copy")
    manifest, index = json.loads((copy / "dataset.json").read_text()), (copy / "index.jsonl").read_bytes()

    def changed(lines=index, **values):
        (copy / "index.jsonl").write_bytes(lines)
        files = manifest["files"] | {"index.jsonl": {"size": len(lines), "sha256": "0" * 64}}
        (copy / "dataset.json").write_text(json.dumps(manifest | {"files": files} | values))

    rows = [json.loads(line) for line in index.decode().split("\n") if line]
    rows[0]["captions"] = ["a red\u2028square"]
    changed("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert open_dataset(copy, 64).rows[0]["captions"] == ["a red\u2028square"]
    for arguments, match in (
        ({"sizes": None}, "is damaged"),
        ({"files": {"../../x": {"size": 1}}}, "missing or truncated"),
        ({"files": {}}, "is damaged"),
        ({"licences": [{"x": 1}]}, "is damaged"),
        ({"lines": index + b"{}\n"}, "lacks id, captions, split or flip"),
        ({"lines": index.replace(b'"flip": true', b'"flip": "no"', 1)}, "lacks id, captions, split or flip"),
        ({"lines": index + index.split(b"\n")[0] + b"\n"}, "do not fit"),
    ):
        changed(**arguments)
        with pytest.raises(PocketfusionError, match=match):
            open_dataset(copy, 64)
