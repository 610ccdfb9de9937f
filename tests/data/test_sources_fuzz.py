"""Damaged inputs of every kind, hundreds of them: each is read or refused in one sentence, and none of them hangs."""

import io
import json
import os
import random
import tarfile
import time
import zlib

import pytest
from made_pictures import add, encode, hand_made_png, photo, png
from PIL import Image

from pocketfusion.data.pictures import open_picture
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.coco import open_coco

TRIES = int(os.environ.get("FUZZ_TRIES", "120"))  #: of each kind
SECONDS = 5.0  #: of the processor, the most that one input may take
_PIECES = [
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"\n",
    b",",
    b"\\ud800",
    b"\xff\xd8",
    b"\xe2\x80\xa8",
    b"1e999",
    b"-1",
]
_PIECES += [b"null", b"true", b"../", b"\0" * 512, b"9" * 5000, b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"[" * 3000]


def mutated(data: bytes, random_: random.Random) -> bytes:
    """One to four changes: bits, pieces put in or over, parts removed, doubled or cut off."""
    made = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 4))):
        at, span = random_.randrange(len(made) + 1), random_.choice((1, 2, 8, 64, 512))
        kind = random_.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            made[at:at] = random_.choice(_PIECES)
        elif kind == 2:
            piece = random_.choice(_PIECES)
            made[at : at + len(piece)] = piece
        elif kind == 3:
            del made[at : at + span]
        elif kind == 4:
            made[at:at] = made[at : at + span]
        elif random_.random() < 0.3:
            del made[at:]
    return bytes(made)


def repaired(data: bytes) -> bytes:
    """With the checksums of PNG chunks and tar headers right again, so that what stands behind them is read too."""
    made = bytearray(data)
    at = 8
    while data[1:4] == b"PNG" and at + 12 <= len(made):
        end = at + 8 + int.from_bytes(made[at : at + 4], "big")
        made[end : end + 4] = zlib.crc32(made[at + 4 : end]).to_bytes(4, "big") if end + 4 <= len(made) else b""
        at = end + 4
    for at in range(0, len(made) - 511, 512):
        if made[at + 257 : at + 262] == b"ustar":
            made[at + 148 : at + 156] = b" " * 8
            made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def attempt(action) -> bool:
    """Whether it was read; any exception but ours fails the test, and so does slowness."""
    start = time.process_time()
    try:
        action()
        return True
    except PocketfusionError as error:
        assert str(error).strip()
        return False
    finally:
        assert time.process_time() - start < SECONDS


def pictures() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animated = {"save_all": True, "append_images": frames[1:]}
    return {
        "png": encode(photo(), "PNG", exif=exif),
        "palette": hand_made_png(3, 1, 2, 3, [b"\x18"], (b"PLTE", bytes(range(9))), (b"tRNS", b"\xff\0")),
        "grey": hand_made_png(2, 1, 16, 0, [b"\0\1\2\3"], (b"tRNS", b"\0\1")),
        "apng": encode(frames[0], "PNG", **animated),
        "jpg": encode(photo(), "JPEG", exif=exif),
        "progressive": encode(photo(), "JPEG", progressive=True),
        "cmyk": encode(photo().convert("CMYK"), "JPEG"),
        "gif": encode(frames[0], "GIF", **animated),
        "bmp": encode(photo(), "BMP"),
        "tiff": encode(photo(), "TIFF", exif=exif, compression="tiff_lzw"),
        "raw_tiff": encode(photo().convert("RGBA"), "TIFF"),
        "webp": encode(frames[0], "WEBP", **animated),
    }


@pytest.mark.parametrize("kind", pictures())
def test_pictures(kind, monkeypatch):
    monkeypatch.setattr("pocketfusion.data.pictures.MAX_PIXELS", 2_000_000)  # a changed width may come near the limit
    data, random_ = pictures()[kind], random.Random(kind)
    assert attempt(lambda: open_picture(data, "it"))
    for number in range(TRIES):
        one = mutated(data, random_)
        one = repaired(one) if number % 2 else one
        attempt(lambda one=one: open_picture(one, "it").resize((4, 4)))


def _tar(format_: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
        for name in ("a", "b" * 120, "c/é.v1"):
            add(tar, f"{name}.png", png())
            add(tar, f"{name}.json", b'{"caption": "red", "split": "train", "flip": true}')
        add(tar, "link", type=tarfile.SYMTYPE, linkname="a.png")
    return stream.getvalue()


_LINE = json.dumps({"file_name": "a.png", "text": "red", "split": "train", "flip": False})
FILES = {
    "metadata.jsonl": (_LINE + "\n" + _LINE.replace("a.png", "b.png")).encode(),
    "metadata.csv": b'file_name,text,flip\na.png,"a ""red"" one",true\nb.png,blue,\n',
    "a.txt": "a café\n".encode(),
    "pax.tar": _tar(tarfile.PAX_FORMAT),
    "gnu.tar": _tar(tarfile.GNU_FORMAT),
}


@pytest.mark.parametrize("name", FILES)
def test_captions_tables_and_shards(tmp_path, name):
    random_ = random.Random(name)
    if not name.endswith(".tar"):
        for stem in "ab":
            (tmp_path / f"{stem}.png").write_bytes(png())
            (tmp_path / f"{stem}.txt").write_text("red")
    read = refused = 0
    for number in range(TRIES):
        one = mutated(FILES[name], random_)
        (tmp_path / name).write_bytes(repaired(one) if number % 4 else one)
        refused += not attempt(lambda: open_dataset(tmp_path, 8))
        rows: list = []
        read += attempt(lambda rows=rows: rows.extend(open_dataset(tmp_path, 8, skip_bad=True).rows))
        for row in rows:
            assert all(isinstance(text, str) and text.strip() and text.encode() for text in row["captions"])
            assert isinstance(row["split"], str) and isinstance(row["flip"], bool) and row["id"].encode()
    assert read and refused


@pytest.mark.parametrize("name", ["dataset.json", "index.jsonl", "images_64.npy"])
def test_packed_arrays(tiny_data, tmp_path, name):
    for file in tiny_data.iterdir():
        if file.name != name:
            os.link(file, tmp_path / file.name)
    random_, manifest = random.Random(name), json.loads((tiny_data / "dataset.json").read_text())
    head = (tiny_data / name).read_bytes()
    for _ in range(TRIES // 3):
        one = mutated(head[:400], random_) + head[400:] if name.endswith(".npy") else mutated(head, random_)
        (tmp_path / name).write_bytes(one)
        if name != "dataset.json":  # so that the contents are looked at
            manifest["files"][name]["size"] = len(one)
            (tmp_path / "dataset.json").unlink()
            (tmp_path / "dataset.json").write_text(json.dumps(manifest))
        attempt(lambda: open_dataset(tmp_path, 64).images[0].sum())


def test_coco(tmp_path):
    (tmp_path / "val2014").mkdir()
    entries: dict = {"images": [], "annotations": []}
    for id_ in range(3):
        (tmp_path / "val2014" / f"{id_}.jpg").write_bytes(encode(photo(), "JPEG"))
        entries["images"].append({"id": id_, "file_name": f"{id_}.jpg"})
        entries["annotations"].append({"id": 10 + id_, "image_id": id_, "caption": f"of {id_}"})
    file, files, random_ = tmp_path / "captions_val2014.json", json.dumps(entries).encode(), random.Random("coco")
    file.write_bytes(files)
    assert attempt(lambda: open_coco(tmp_path, None, 2, size=32))
    for skip_bad in (False, True):
        for _ in range(TRIES // 2):
            file.write_bytes(mutated(files, random_))
            attempt(lambda skip_bad=skip_bad: open_coco(tmp_path, None, 2, size=32, skip_bad=skip_bad).images([0, 1]))
