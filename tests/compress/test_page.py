"""What the report shows of a chain, from what its stages left."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pocketfusion import html_page
from pocketfusion.compress import page
from pocketfusion.compress.chain import chain_of
from pocketfusion.compress.records import Record, Records
from pocketfusion.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.yaml"


def labels(svg: str) -> list[str]:
    return re.findall(r'text-anchor="end">([^<]*)<', svg)[:2]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(1.0074, 1.0083, ["1.008", "1.007"]), (0.1, 25.3, ["25.3", "0.1"]), (1e-5, 2e-5, None)],
)
def test_the_ends_of_an_axis_differ_when_its_values_do(low, high, shown):
    found = labels(html_page.plot("val_mse", [(4, low), (6, high)]))
    assert found[0] != found[1] and shown in (None, found)


def test_a_level_curve_lies_in_the_middle_with_one_label():
    drawn = html_page.plot("val_top5", [(4, 1.0), (6, 1.0)])
    heights = {float(y) for y in re.findall(r"[\d.]+,([\d.]+)", drawn.split('points="')[1].split('"')[0])}
    assert len(heights) == 1 and html_page.HEIGHT * 0.3 < heights.pop() < html_page.HEIGHT * 0.6
    assert labels(drawn)[0] == "1" and labels(drawn).count("1") == 1


def write(out: Path, name: str, **results: object) -> None:
    (out / name).mkdir(parents=True)
    for file, content in results.items():
        if file == "check":
            (out / name / "check.json").write_text(json.dumps(content))
        else:
            Image.new("RGB", (4, 4), content).save(out / name / f"{file}.png")
    out.joinpath("_stages").mkdir(exist_ok=True)
    Records(out).put(name, Record(key={"kind": name}, state="finished"))


def test_what_came_out_stands_first_and_a_refusal_has_its_reason(tmp_path):
    chain, out = chain_of(load_recipe(RECIPE)), tmp_path / "out"
    refused = [{"reason": "int8 weights", "cure": "weights `float16`"}] * 3 + [{"reason": "odd", "cure": None}]
    graph = {"network": "unet", "operations": 9, "refused": refused, "passed": False, "failure": ""}
    write(out, "base", preview="red")
    write(out, "distill-decoder", preview="green")
    write(out, "check", check={"target": "litert-cpu", "graphs": [graph]})
    shown = page.write_page(chain, out).read_text()
    first = shown.index("<img")
    assert shown.index("</h1>") < first < shown.index("<table")
    assert "distill-decoder" in shown[first - 400 : shown.index("</figure>")]
    assert "Held-out latents decoded by the teacher, and below by the small decoder" in shown
    assert "int8 weights" in shown and "weights `float16`" in shown and "False" not in shown
    write(out, "evaluate", pictures="blue")
    again = page.write_page(chain, out).read_text()
    assert "The same captions" in again[again.index("<img") : again.index("</figure>")]
