"""Small pictures and shards for the tests of what people bring, some of them written by hand, byte for byte."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(colour=(255, 0, 0), size=(8, 8), mode="RGB") -> bytes:
    return encode(Image.new(mode, size, colour))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def hand_made_png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *chunks: tuple) -> bytes:
    """A PNG from the specification: `rows` are packed samples; `chunks` stand before the pixels (PLTE, tRNS)."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [_chunk(b"IHDR", header), *(_chunk(*one) for one in chunks), _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def photo(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth RGB, different in each corner, so that no turn or mirroring leaves it as it is."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + 2 * y) * 255 // (width + 2 * height)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return file


def photo_shards(folder: Path, shards: int, count: int, shapes: tuple = ((24, 16),)) -> Path:
    """Numbered webdataset shards of `count` photos each, of these sizes in turn; every third may be mirrored."""
    folder.mkdir(exist_ok=True)
    for number in range(shards):
        members: dict[str, bytes] = {}
        for i in range(count):
            picture = np.roll(np.asarray(photo(*shapes[i % len(shapes)])), number + 3 * i, axis=1)
            key = f"{number}_{i:04d}"
            members[f"{key}.png"] = encode(Image.fromarray(picture), compress_level=1)
            members[f"{key}.json"] = json.dumps({"caption": f"photo {i} of {number}", "flip": i % 3 == 0}).encode()
        shard(folder / f"{number:05d}.tar", members)
    return folder


def encode_means(pixels: np.ndarray, halved: bool) -> np.ndarray:
    """An autoencoder's place-holder of factor 8 and 4 channels: block means and how their columns differ; fp16."""
    side = 16 if halved else 8
    count, height, width, _ = pixels.shape
    blocks = pixels.reshape(count, height // side, side, width // side, side, 3).astype(np.float32) / 255
    means = blocks.mean((2, 4)).transpose(0, 3, 1, 2)
    slopes = (blocks * np.linspace(-1, 1, side)[:, None]).mean((2, 4)).transpose(0, 3, 1, 2)
    return np.concatenate([means, slopes, means[:, :1], slopes[:, :1]], 1).astype(np.float16)
