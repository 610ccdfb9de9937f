"""`evaluate --coco` with the standard networks (random weights) from end to end, and how it refuses."""

import json

import pytest
import torch
from coco_folder import make_coco
from inception_weights import seeded_weights

from pocketfusion.evaluate.inception import FidInception
from tiny_clip import make_clip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standard")
    shapes = {name: tuple(value.shape) for name, value in FidInception().state_dict().items() if value.dim()}
    torch.save(seeded_weights(shapes), folder / "inception.pth")
    make_clip(folder / "clip")
    make_coco(folder / "coco")
    return folder


def arguments(world, out):
    networks = ("--inception", world / "inception.pth", "--clip", world / "clip")
    few = ("--guidance", "2", "--steps", "1", "--diversity-prompts", "0", "--kid-only")
    return ("--coco", world / "coco", *networks, *few, "--out", out)


def test_a_curve_on_coco(cli, tiny_folder, world, tmp_path):
    done = cli("evaluate", tiny_folder, *arguments(world, tmp_path / "curve"), "--samples", "6", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "curve" / "curve.json").read_text())
    protocol = result["protocol"]
    assert protocol["data"]["annotations"] == "captions_val2014.json" and protocol["samples"] == 6
    assert protocol["image_size"] == 256 and protocol["image"]["jpeg_quality"] == 75
    assert protocol["feature_dimensions"] == 2048 and protocol["extractor"]["clip"]["name"] == "clip"
    (point,) = result["curves"][0]["points"]
    assert point["kid"]["value"] > 0 and -100 < point["clip_score"]["value"] < 100


def test_bad_input_is_one_sentence(cli, tiny_folder, world, tmp_path):
    out = tmp_path / "curve"
    done = cli("evaluate", tiny_folder, *arguments(world, out), "--samples", "13")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "13 captions were asked for, but captions_val2014.json has 12" in " ".join(done.stderr.split())
    bad = sorted((world / "coco" / "val2014").iterdir())[0]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:500])
    done = cli("evaluate", tiny_folder, *arguments(world, out), "--samples", "12")
    bad.write_bytes(whole)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not out.exists()
    assert f"{bad.name} is not a readable picture" in " ".join(done.stderr.split())
