"""Distances at equal CLIP score, by hand."""

import numpy as np
import pytest

from pocketfusion.evaluate.fid_clip.curves import Curve, Point, at_equal_clip
from pocketfusion.evaluate.fid_clip.curves_report import comparison


def curve(*points: tuple[float, float], label: str = "a") -> Curve:
    """A line through (CLIP score, distance) at guidance 1, 2, 3, …"""
    made = [
        Point(
            guidance_scale=i,
            num_inference_steps=8,
            sampler="DDIM",
            precision="fp32",
            pictures=4,
            frechet=(y, y, y),
            kid=(0, 0),
            clip_score=(x, x, x),
            top5=(0, 0, 0),
            diversity=None,
        )
        for i, (x, y) in enumerate(points, 1)
    ]
    return Curve(label=label, system={}, points=made)


def at(found, score: float) -> tuple[float, float]:
    i = int(np.abs(found.clip_score - score).argmin())
    assert found.clip_score[i] == pytest.approx(score)
    return found.a[i], found.b[i]


def test_straight_lines_cross_where_they_should():
    a, b = curve((10, 8), (20, 4)), curve((12, 9), (22, 1), label="b")
    found = at_equal_clip(a, b)
    assert (found.clip_score[0], found.clip_score[-1]) == (12, 20)
    assert at(found, 20) == pytest.approx((4, 2.6)) and at(found, 12) == pytest.approx((7.2, 9))
    ((low, high),) = found.at_or_beyond  # 8 - 0.4 (x - 10) = 9 - 0.8 (x - 12) at x = 16.5
    assert (low, high) == (pytest.approx(16.5, abs=0.05), 20)
    assert found.widest_lead == (pytest.approx(20), pytest.approx(1.4))
    said = comparison(a, b)
    assert said.startswith("b against a at equal CLIP score: at or below its distance at 16.5")
    assert said.endswith("of 12.00–20.00, by up to 1.4 (at 20.00).")


def test_a_curve_that_turns_back_counts_with_its_lowest_branch():
    a = curve((10, 9), (20, 3), (15, 7))  # at 16: 5.4 on the way there, 6.2 on the way back
    found = at_equal_clip(a, curve((16, 5.4)))
    assert found.clip_score.tolist() == [16] and found.a[0] == pytest.approx(5.4)
    assert at_equal_clip(a, curve((16, 5.3))).at_or_beyond == [(16, 16)]
    assert at_equal_clip(a, curve((16, 5.5))).at_or_beyond == []


def test_behind_everywhere_and_nothing_in_common():
    a = curve((10, 2), (20, 2))
    assert "behind everywhere on 12.00–18.00, by 1 or more (least at 18.00)" in comparison(
        a, curve((12, 4), (18, 3), label="b")
    )
    assert at_equal_clip(a, curve((21, 1), (25, 1))) is None
    assert "no CLIP score in common" in comparison(a, curve((21, 1), label="b"))


def test_two_separate_stretches():
    a, b = curve((0, 1), (10, 1)), curve((0, 0), (5, 3), (10, 0))
    first, second = at_equal_clip(a, b).at_or_beyond
    assert first == (0, pytest.approx(5 / 3, abs=0.06)) and second == (pytest.approx(25 / 3, abs=0.06), 10)


def test_equal_curves_are_at_each_other():
    a = curve((1, 3), (2, 2), (3, 4))
    found = at_equal_clip(a, a)
    assert found.at_or_beyond == [(1, 3)] and found.widest_lead[1] == 0
