"""The door for pictures: every kind that people bring, against pixels computed by hand."""

import io
import os
import struct
import time

import numpy as np
import pytest
from made_pictures import encode, hand_made_png, photo, png
from PIL import Image

from pocketfusion.data.pictures import MAX_PIXELS, open_picture, read_picture
from pocketfusion.errors import PocketfusionError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def pixels(data: bytes) -> list:
    """Rows of RGB triples."""
    picture = open_picture(data, "it")
    assert picture.mode == "RGB"
    return [[tuple(int(v) for v in pixel) for pixel in row] for row in np.asarray(picture)]


#: EXIF 2.3's table: value → how the upright array is stored
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("tag", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_a_picture_is_turned_upright(kind, tag):
    upright = np.asarray(photo())
    exif = Image.Exif()
    exif[0x0112] = tag
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(STORED[tag](upright))), kind, exif=exif, **lossless)
    got = np.asarray(open_picture(data, "it")).astype(int)
    assert got.shape == upright.shape
    assert np.abs(got - upright).max() <= (24 if kind == "JPEG" else 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 40])
def test_damaged_exif_does_not_cost_the_picture(exif):
    assert open_picture(encode(photo(), "JPEG", exif=exif), "it").size == (24, 16)


def test_an_orientation_that_does_not_exist_is_none():
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        assert open_picture(encode(photo(), "PNG", exif=exif), "it").size == (24, 16)


def test_16_bit_grey_is_scaled():
    values = [0, 128, 257, 32896, 65535]
    data = hand_made_png(5, 1, 16, 0, [struct.pack(">5H", *values)])
    assert pixels(data)[0] == [(v,) * 3 for v in (0, 0, 1, 128, 255)]
    tiff = encode(Image.fromarray(np.array([values], np.uint16)), "TIFF")
    assert pixels(tiff) == pixels(data)
    big_endian = io.BytesIO()
    Image.fromarray(np.array([values], ">u2")).save(big_endian, "TIFF")
    assert pixels(big_endian.getvalue()) == pixels(data)


def test_16_bit_colour_and_grey_with_alpha():
    assert pixels(hand_made_png(1, 1, 16, 2, [struct.pack(">3H", 65535, 257 * 7, 0)])) == [[(255, 7, 0)]]
    assert pixels(hand_made_png(2, 1, 16, 4, [struct.pack(">4H", 257 * 9, 65535, 5, 0)])) == [[(9, 9, 9), WHITE]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "expected"),
    [
        (1, 0, b"\x40", (1,), [(0, 0, 0), WHITE]),
        (1, 0, b"\x40", (0,), [WHITE, WHITE]),
        (2, 0, b"\x60", (1,), [WHITE, (170,) * 3]),
        (4, 0, b"\x3a", (3,), [WHITE, (170,) * 3]),
        (8, 0, b"\x03\x04", (3,), [WHITE, (4, 4, 4)]),
        (16, 0, struct.pack(">2H", 1000, 1001), (1000,), [WHITE, (4, 4, 4)]),
        (8, 2, bytes(RED + BLUE), BLUE, [RED, WHITE]),
        (16, 2, struct.pack(">6H", 65535, 0, 0, 0, 0, 65535), (0, 0, 65535), [RED, WHITE]),
    ],
)
def test_a_colour_key_becomes_white(depth, colour, row, key, expected):
    data = hand_made_png(2, 1, depth, colour, [row], (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    assert pixels(data) == [expected]


def test_palettes_and_their_transparency():
    palette = bytes(RED + BLUE + (10, 20, 30))
    plain = hand_made_png(3, 1, 8, 3, [b"\0\1\2"], (b"PLTE", palette))
    assert pixels(plain) == [[RED, BLUE, (10, 20, 30)]]
    clear = hand_made_png(3, 1, 8, 3, [b"\0\1\2"], (b"PLTE", palette), (b"tRNS", b"\xff\0"))
    assert pixels(clear) == [[RED, WHITE, (10, 20, 30)]]
    half = hand_made_png(3, 1, 2, 3, [b"\x18"], (b"PLTE", palette), (b"tRNS", b"\xff\x80"))
    assert pixels(half) == [[RED, (127, 127, 255), (10, 20, 30)]]
    indexed = Image.new("P", (2, 1))
    indexed.putpalette(list(RED + BLUE))
    indexed.putpixel((1, 0), 1)
    assert pixels(encode(indexed, "GIF")) == [[RED, BLUE]]
    assert pixels(encode(indexed, "GIF", transparency=1)) == [[RED, WHITE]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_becomes_white(mode):
    clear = (9, 9, 9, 0) if mode == "RGBA" else (9, 0)
    half = (0, 0, 0, 128) if mode == "RGBA" else (0, 128)
    assert pixels(png(clear, (1, 1), mode)) == [[WHITE]]
    assert pixels(png(half, (1, 1), mode)) == [[(127, 127, 127)]]


def test_cmyk_grey_and_black_and_white():
    for kind in ("JPEG", "TIFF"):
        ((pixel,),) = pixels(encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), kind))
        assert np.abs(np.array(pixel) - RED).max() <= 3
    assert pixels(encode(Image.new("L", (1, 1), 77))) == [[(77, 77, 77)]]
    assert pixels(encode(Image.new("1", (2, 1), 1), "BMP")) == [[WHITE, WHITE]]
    assert pixels(encode(Image.new("YCbCr", (1, 1), (76, 85, 255)), "TIFF"))[0][0][0] > 250


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (24, 16)])
def test_every_type_at_every_size(kind, size):
    assert open_picture(encode(photo().resize(size), kind), "it").size == size


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[0][0] == RED


def test_too_large_is_told_by_the_header_alone():
    side = int(MAX_PIXELS**0.5) + 1
    for width, height in ((side, side), (100_000, 100_000), (2**31 - 1, 2**31 - 1)):
        start = time.monotonic()
        with pytest.raises(PocketfusionError, match=r"^it is too large \(over 128 million pixels\)"):
            open_picture(hand_made_png(width, height, 8, 2, [b"\0" * 9]), "it")
        assert time.monotonic() - start < 1


def test_scans_without_end_are_refused():
    data = encode(photo(), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0])]
    with pytest.raises(PocketfusionError, match="thousands of scans"):
        open_picture(data[:start] + scan * 2000 + data[start:], "it")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "JPEG", "PNG"])
def test_truncated_at_any_byte(kind):
    data = encode(photo(), kind)
    for length in range(0, len(data) * 3 // 4, max(1, len(data) // 40)):
        with pytest.raises(PocketfusionError, match="^it is not a readable picture"):
            open_picture(data[:length], "it")


def test_other_types_are_not_tried():
    postscript = encode(photo(), "EPS")
    for data in (postscript, encode(photo(), "PPM"), b"<svg/>", b"", b"GIF89a"):
        with pytest.raises(PocketfusionError, match="it is no PNG, JPEG, WebP, GIF, BMP or TIFF|readable"):
            open_picture(data, "it")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_of_unknown_range(mode):
    with pytest.raises(PocketfusionError, match="32-bit grey"):
        open_picture(encode(Image.new(mode, (2, 2)), "TIFF"), "it")


def test_what_is_no_file_never_blocks(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "through.png").symlink_to(tmp_path / "fifo.png")
    for name, said in (
        ("fifo", "FIFO, socket or device"),
        ("through", "FIFO, socket or device"),
        ("device", "FIFO, socket or device"),
        ("folder", "is a folder and no file"),
        ("dangling", "No such file"),
    ):
        with pytest.raises(PocketfusionError, match=f"{name}.png .*{said}"):
            read_picture(tmp_path / f"{name}.png")
    (tmp_path / "real.png").write_bytes(png())
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")  # as the Hub's cache has them
    assert read_picture(tmp_path / "link.png").size == (8, 8)
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PocketfusionError, match="hole.png is too large"):
        read_picture(tmp_path / "hole.png")
