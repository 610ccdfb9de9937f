"""`kill -9` in the middle of `evaluate`: nothing half-written, and the same command goes on."""

from __future__ import annotations

import json

import pytest

from command import leftovers


def test_a_killed_evaluation_goes_on(kill, end, tiny_folder, tiny_data, judge, tmp_path):
    common = ("--data", tiny_data, "--judge", judge, "--samples", 8, "--steps", 1, "--kid-only")

    def arguments(name: str) -> tuple:
        return (
            "evaluate",
            tiny_folder,
            *common,
            "--diversity-prompts",
            0,
            "--guidance",
            "1,2",
            "--out",
            tmp_path / name,
        )

    end(*arguments("whole"))
    kill("pocketfusion.evaluate.fid_clip.drawing:Shelf.put", 9, *arguments("cut"))
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut.run").rglob("*.png")}
    assert len(pictures) == 9 and not (tmp_path / "cut").exists()
    kill("pocketfusion.evaluate.fid_clip.curves:PointCache.put", 1, *arguments("cut"))
    (point,) = (tmp_path / "cut.run" / "points").iterdir()
    measured = point.stat().st_mtime_ns
    kill("pocketfusion.evaluate.fid_clip.curves_report:plot_curves", 1, *arguments("cut"))
    assert not (tmp_path / "cut").exists() and len(leftovers(tmp_path)) == 1
    end(*arguments("cut"))
    assert {path: path.stat().st_mtime_ns for path in pictures} == pictures  # none was drawn twice
    assert point.stat().st_mtime_ns == measured and not leftovers(tmp_path)
    whole, cut = (json.loads((tmp_path / name / "curve.json").read_text())["curves"] for name in ("whole", "cut"))
    for one, other in zip(whole[0]["points"], cut[0]["points"], strict=True):
        for measure in ("clip_score", "top5", "kid"):  # other batches round other pixels
            assert other[measure] == pytest.approx(one[measure], abs=0.05)
