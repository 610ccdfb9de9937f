"""Contact sheets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pocketfusion.runtime.result import contact_sheet


def squares(n: int, size: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (10 * i, 200, 100)) for i in range(n)]


def test_every_picture_is_there_enlarged_by_whole_pixels():
    sheet = np.asarray(contact_sheet(squares(5), columns=3))
    assert sheet.shape == (2 * 136 + 8, 3 * 136 + 8, 3)
    for i in range(5):
        y, x = 8 + i // 3 * 136, 8 + i % 3 * 136
        assert (sheet[y : y + 128, x : x + 128] == (10 * i, 200, 100)).all()
    assert (sheet[8 + 136 :, 8 + 2 * 136 :] == 255).all()  # the free place


def test_captions_take_room_and_leave_ink_below_their_picture_only():
    plain, captioned = contact_sheet(squares(2)), contact_sheet(squares(2), ["", "a red apple"])
    assert captioned.height > plain.height
    below = np.asarray(captioned.convert("L"))[8 + 128 : -4]
    assert (below[:, : 8 + 128] == 255).all() and (below[:, 8 + 136 :] < 128).any()


@pytest.mark.parametrize("caption", ["word " * 500, "w" * 5000, "สวัสดี 🍎", "\ud800", "", "a\nb"])
def test_any_caption_stays_in_its_cell(caption):
    sheet = np.asarray(contact_sheet(squares(2), [caption, ""]).convert("L"))
    assert (sheet[8 + 128 :, 8 + 128 + 4 :] == 255).all()
    assert sheet.shape[0] <= 8 + 136 + 3 * 15 + 2


def test_about_square_by_default_and_big_pictures_keep_their_size():
    assert contact_sheet(squares(8)).width == 3 * 136 + 8
    assert contact_sheet(squares(4)).width == 2 * 136 + 8
    assert contact_sheet(squares(1, size=256)).size == (272, 272)


def test_nothing_to_show_and_captions_that_do_not_match():
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        contact_sheet(squares(2), ["one"])
