"""The image protocols by hand, and our own data under the same interface."""

import io

import numpy as np
from PIL import Image

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.evaluate.reference import CaptionedReference, ImageProtocol, SetsReference
from pocketfusion.evaluate.sets import choose_sets


def scene(width, height):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


def as_file(picture, quality=75):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_bk_sdm_protocol_is_two_files_and_a_bicubic_resize():
    protocol = ImageProtocol(256, jpeg_quality=75)
    drawn = Image.fromarray(scene(512, 512))
    expected = np.asarray(as_file(as_file(drawn).resize((256, 256), Image.Resampling.BICUBIC)))
    assert np.array_equal(protocol.generated(np.asarray(drawn)[None])[0], expected)
    # a real picture comes from a file already; its sides are stretched and nothing is cut off
    real = Image.fromarray(scene(640, 427))
    assert np.array_equal(protocol.real(real), np.asarray(as_file(real.resize((256, 256), Image.Resampling.BICUBIC))))
    assert protocol.real(real.convert("L")).shape == (256, 256, 3)


def test_other_sizes_have_no_files_in_between():
    protocol = ImageProtocol(512)
    drawn = scene(512, 512)[None]
    assert protocol.generated(drawn) is drawn
    small = scene(64, 64)[None]
    expected = np.asarray(Image.fromarray(small[0]).resize((512, 512), Image.Resampling.BICUBIC))
    assert np.array_equal(protocol.generated(small)[0], expected)


def test_sets_of_our_own_data_are_a_reference():
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    rows = [{"id": f"p{i}", "captions": [f"thing {i}", "x"], "split": "ab"[i % 2], "flip": False} for i in range(8)]
    data = CaptionedImages(images, rows, "things", "f" * 32)
    sets = choose_sets(data, ["a", "b"], 3)
    reference: CaptionedReference = SetsReference(data, sets)
    assert len(reference.ids) == len(reference.captions) == reference.real_count == 6
    assert {id_[1:] for id_ in reference.ids[:3]} <= {"0", "2", "4", "6"}
    for place, (id_, caption) in enumerate(zip(reference.ids, reference.captions, strict=True)):
        assert caption == f"thing {id_[1:]}"
        assert np.array_equal(reference.images([place])[0], images[int(id_[1:])])
        assert np.array_equal(reference.real_images([place])[0], images[int(id_[1:])])
    assert reference.prepare(images).shape == (8, 32, 32, 3)
    assert reference.prepare(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, 32, 32, 3)
    assert reference.fingerprint != SetsReference(data, sets[:1]).fingerprint
    assert reference.fingerprint == SetsReference(data, choose_sets(data, ["a", "b"], 3)).fingerprint
