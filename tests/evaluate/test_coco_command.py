"""`evaluate --coco` with the standard networks (random weights) from end to end, and how it refuses."""

import json

import numpy as np
import pytest
import torch
from coco_folder import make_coco
from inception_weights import seeded_weights
from PIL import Image

from pocketfusion.evaluate.clip import TransformersClip
from pocketfusion.evaluate.inception import FidInception
from pocketfusion.evaluate.metrics import clip_score
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
    # the tiny model draws 64 px; 256 px would enlarge them, which is refused
    few = ("--guidance", "2", "--steps", "1", "--diversity-prompts", "0", "--kid-only", "--size", "64")
    return ("--coco", world / "coco", *networks, *few, "--out", out)


def test_a_curve_on_coco(cli, tiny_folder, world, tmp_path):
    done = cli("evaluate", tiny_folder, *arguments(world, tmp_path / "curve"), "--samples", "6", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "curve" / "curve.json").read_text())
    protocol = result["protocol"]
    assert protocol["data"]["annotations"] == "captions_val2014.json" and protocol["samples"] == 6
    assert protocol["image_size"] == 64 and protocol["image"]["jpeg_quality"] is None and protocol["real_count"] == 12
    assert protocol["feature_dimensions"] == 2048 and protocol["extractor"]["clip"]["name"] == "clip"
    (point,) = result["curves"][0]["points"]
    # the score by another way: every kept picture with the prompt that its file states
    clip = TransformersClip(world / "clip")
    scores = []
    for file in (tmp_path / "curve.run").rglob("*.png"):
        with Image.open(file) as picture:
            seen = clip.image_features(np.asarray(picture)[None])[1]
            scores.append(clip_score(seen, clip.text_embeddings([picture.text["prompt"]]))[0])
    assert len(scores) == 6 and point["clip_score"][0] == pytest.approx(np.mean(scores), abs=1e-3)


def test_bad_input_is_one_sentence(cli, tiny_folder, world, tmp_path):
    out = tmp_path / "curve"
    done = cli("evaluate", tiny_folder, *arguments(world, out), "--samples", "13")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "13 captions were asked for, but captions_val2014.json has 12" in " ".join(done.stderr.split())
    assert not out.exists()
