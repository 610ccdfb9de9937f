"""A tiny folder in MS-COCO's official layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT = "val2014"
IDS = (42, 73, 74, 133, 136, 139, 143, 164, 192, 196, 208, 241)


def file_name(id_: int, split: str = SPLIT) -> str:
    """As 2014 names its pictures (with the split in front) and 2017 (without)."""
    return f"COCO_{split}_{id_:012d}.jpg" if split.endswith("2014") else f"{id_:012d}.jpg"


def picture(id_: int) -> Image.Image:
    """Smooth, of a size and colours of its own; every fifth one is grey."""
    width, height = 60 + id_ % 31, 40 + id_ % 17
    y, x = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin((x * (1 + k) + y + id_) / 9) for k in range(3)]
    made = Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))
    return made.convert("L") if IDS.index(id_) % 5 == 4 else made


def annotations(split: str = SPLIT) -> dict:
    """Five captions a picture, some with the line ends and double spaces that the real ones have."""
    images = [{"id": id_, "file_name": file_name(id_, split), "height": 1, "width": 1, "license": 1} for id_ in IDS]
    captions = [
        {"id": 1000 * number + id_, "image_id": id_, "caption": f"A picture  of thing {id_}, said way {number}.\n"}
        for id_ in IDS
        for number in range(5)
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": captions}


def make_coco(folder: Path, split: str = SPLIT) -> Path:
    """Writes `folder` and returns it."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    for id_ in IDS:
        picture(id_).save(folder / split / file_name(id_, split), quality=90)
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(annotations(split)))
    return folder
