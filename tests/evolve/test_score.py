"""The scorer draws and scores what `evaluate` does, repeats itself, and its shortcuts are exact."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.clip import OpenClip
from pocketfusion.evaluate.extractors import open_judge
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings
from pocketfusion.evaluate.metrics import clip_score
from pocketfusion.evaluate.sets import picture_seed
from pocketfusion.evolve.score import JudgeScorer, ScoreSettings, validation_set
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import load_elastic


@pytest.fixture(scope="module")
def data(tiny_data):
    return open_dataset(tiny_data, 64)


@pytest.fixture(scope="module")
def system(tiny_folder):
    return ModelFolder(tiny_folder)


@pytest.fixture(scope="module")
def scorer(system, judge, data):
    settings = ScoreSettings(num_inference_steps=2, guidance_scale=3.0, batch=4)
    return JudgeScorer(system, open_judge(judge), validation_set(data, 6, seed=5), settings)


def test_scores_are_those_of_evaluates_own_pictures(scorer, system, judge, data, tiny_folder):
    ours = scorer.score(load_elastic(tiny_folder))
    rows = [data.rows[i] for i in data.splits["val_combo"]]
    by_caption = {row["captions"][0]: row for row in rows}
    chosen = [by_caption[caption] for caption in validation_set(data, 6, seed=5).captions]
    prompts = [row["captions"][0] for row in chosen]
    seeds = [picture_seed(5, row["id"]) for row in chosen]
    sampler = SamplerSettings(num_inference_steps=2, guidance_scale=3.0, batch=6)
    drawn = system.draw(prompts, seeds, sampler)
    loaded = open_judge(judge)
    theirs = clip_score(loaded.image_features(drawn)[1], loaded.text_embeddings(prompts))
    assert len(ours) == 6 and np.allclose(ours, theirs, atol=0.02)


def test_scores_repeat_and_pair(scorer, tiny_folder):
    unet = load_elastic(tiny_folder)
    first, again = scorer.score(unet), scorer.score(unet)
    assert np.array_equal(first, again)
    block = "up_blocks.3.resnets.2"
    removed = scorer.score(with_architecture(unet, unet.architecture.remove(block)))
    unet.skipped = frozenset({block})
    assert np.array_equal(removed, scorer.score(unet)) and not np.array_equal(removed, first)


def test_lower_precision_draws_nearly_the_same(system, judge, data, tiny_folder, scorer):
    settings = ScoreSettings(num_inference_steps=2, guidance_scale=3.0, batch=4, precision="bf16")
    reduced = JudgeScorer(system, open_judge(judge), validation_set(data, 6, seed=5), settings)
    unet = load_elastic(tiny_folder)
    exact, near = scorer.score(unet), reduced.score(unet)
    assert not np.array_equal(exact, near) and np.allclose(exact, near, atol=1.0)


def test_validation_pictures_are_never_test_pictures(data):
    captions = {data.rows[i]["captions"][0] for i in data.splits["val_combo"]}
    chosen = validation_set(data, 256, seed=0)
    assert set(chosen.captions) == captions and len(chosen.captions) == 8
    few = validation_set(data, 3, seed=0)
    assert few.captions == chosen.captions[:3] and few.seeds == chosen.seeds[:3]
    assert validation_set(data, 3, seed=1).seeds != few.seeds


def test_bad_settings_are_refused(data):
    with pytest.raises(PocketfusionError, match="--steps 0 is below 1"):
        ScoreSettings(num_inference_steps=0)
    with pytest.raises(PocketfusionError, match="at least 2"):
        validation_set(data, 1, seed=0)


_OPEN_CLIP = """
import torch
class Model(torch.nn.Linear):
    def encode_image(self, x): return self(x)
    def encode_text(self, x): return self(x)
def create_model_and_transforms(name, pretrained):
    return Model(3, 2), None, lambda picture: torch.tensor(picture.getpixel((0, 0))).float()
def get_tokenizer(name): return lambda texts: torch.tensor([[len(t), 1.0, 0.0] for t in texts])
"""


def test_open_clip_is_a_judge_too(tmp_path, stand_in):
    checkpoint = tmp_path / "model.safetensors"
    if not _installed():
        with pytest.raises(PocketfusionError, match="needs open_clip: pip install open_clip_torch"):
            OpenClip("ViT-g-14", checkpoint)
    stand_in("open_clip", _OPEN_CLIP)
    with pytest.raises(PocketfusionError, match="there are no weights of open_clip's ViT-g-14 at"):
        OpenClip("ViT-g-14", checkpoint)
    save_file({"weight": torch.eye(3)[:2].contiguous()}, checkpoint)
    with pytest.raises(PocketfusionError, match="is no checkpoint of open_clip's ViT-g-14"):
        OpenClip("ViT-g-14", checkpoint)
    save_file({"weight": torch.eye(3)[:2].contiguous(), "bias": torch.zeros(2)}, checkpoint)
    judge = OpenClip("ViT-g-14", checkpoint, batch=2)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[:, 0, 0] = [[3, 4, 9], [1, 0, 0], [0, 2, 0]]
    features, embeddings = judge.image_features(images)
    assert np.allclose(features, [[3, 4], [1, 0], [0, 2]]) and np.allclose(embeddings, [[0.6, 0.8], [1, 0], [0, 1]])
    assert np.allclose(
        judge.text_embeddings(["abc", "a", ""]), np.array([[3, 1], [1, 1], [0, 1]]) / [[10**0.5], [2**0.5], [1]]
    )


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("open_clip") is not None
