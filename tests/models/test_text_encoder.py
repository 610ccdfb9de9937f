"""Text encoders of CLIP's class, as SD-1.x has: the states of the stock pipeline, pad tokens included."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.text_encoder import TextEncoder, load_text_encoder
from pocketfusion.recipe import TextSettings, load_recipe
from pocketfusion.train import teacher
from pocketfusion.train.place import StageRun
from pocketfusion.train.start import open_start
from pocketfusion.train.teacher import train_teacher
from tiny import make_tiny_folder, tiny_pipeline
from tiny_clip import LENGTH, clip_tokenizer, make_text_encoder


def stock_states(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    """What stock diffusers hands to the UNet."""
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


def test_clip_states_are_the_stock_pipelines(tmp_path):
    folder = make_text_encoder(tmp_path / "sd")
    ours = load_text_encoder(TextSettings(source=str(folder), max_length=LENGTH))
    pipeline = tiny_pipeline()
    pipeline.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    pipeline.tokenizer = clip_tokenizer()
    for prompt in ("a red cat", "", "red " * 40):
        assert torch.equal(ours.encode([prompt])[0], stock_states(pipeline, prompt))
    assert ours.width == 32 and ours.max_length == LENGTH
    states, mask = ours.encode(["a red cat"])
    assert mask.sum() == 5  # begin, a, red, cat, end
    # the mask must not reach CLIP: the states of padding would change, and they feed the UNet
    masked = pipeline.text_encoder(
        ours.tokenizer(["a red cat"], padding="max_length", return_tensors="pt").input_ids, mask
    )[0]
    assert not torch.allclose(masked, states, atol=1e-4)


def test_berts_mask_still_reaches_it():
    pipeline = tiny_pipeline()
    ours = TextEncoder(pipeline.text_encoder, pipeline.tokenizer)
    assert torch.equal(ours.encode(["a red cat"])[0], stock_states(pipeline, "a red cat"))


def test_a_folder_with_clip_can_be_trained_on(tmp_path, tiny_recipe):
    """What `recipes/sd15.yaml` asks for, in miniature: the text section names the checkpoint's own folder."""
    make_text_encoder(tmp_path / "text")
    pipeline = tiny_pipeline()
    pipeline.text_encoder = CLIPTextModel.from_pretrained(tmp_path / "text" / "text_encoder")
    pipeline.tokenizer = clip_tokenizer()
    pipeline.register_modules(text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    pipeline.save_pretrained(tmp_path / "model")
    recipe = load_recipe(tiny_recipe)
    text = TextSettings(source=str(tmp_path / "model"), max_length=LENGTH)
    start = open_start(tmp_path / "model", recipe.model_copy(update={"text": text}))
    assert torch.equal(start.text.encode(["a cat"])[0], stock_states(pipeline, "a cat"))


def test_a_copy_in_half_precision_is_the_same_encoder(tmp_path):
    folder = make_text_encoder(tmp_path / "sd")
    text = load_text_encoder(TextSettings(source=str(folder), max_length=LENGTH))
    text.encoder.half().save_pretrained(tmp_path / "copy" / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "copy" / "tokenizer")  # as tokenizer.json; SD-1.5's has vocab and merges
    copy = load_text_encoder(TextSettings(source=str(tmp_path / "copy"), max_length=LENGTH))
    text.encode(["padded and cut"])  # leaves its traces in a fast tokenizer
    assert copy.identity == text.identity and copy.fingerprint == text.fingerprint


def other_weights(folder):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.layer.1.output.dense.weight"][0, 0] += 0.1
    save_file(tensors, file, {"format": "pt"})


def fewer_layers(folder):
    """Clip skip: as wide, but the last layer is left out."""
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))


def other_heads(folder):
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 2}))


def other_words(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"apple"', '"quince"'))


def other_length(folder):
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 16}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, "other weights"),
        (fewer_layers, "other weights"),
        (other_heads, "other weights"),
        (other_words, "other tokenizer"),
        (other_length, "max_length 32 is not 16"),
    ],
)
def test_a_recipe_with_another_text_encoder_is_refused(tiny_folder, tiny_recipe, tmp_path, change, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(PocketfusionError, match=f"is not .*model's own: {words}; set text.source to .*model and"):
        open_start(folder, load_recipe(tiny_recipe))


def test_a_base_is_known_by_its_text_encoder(trained, tiny_recipe, tiny_data, tmp_path, monkeypatch):
    """The same path with other weights in it is another input, so a finished base would not be taken for done."""
    folder = make_tiny_folder(tmp_path / "text")
    text, recipe = TextSettings(source=str(folder), max_length=32), load_recipe(tiny_recipe)
    data, found = open_dataset(tiny_data, 64), []
    monkeypatch.setattr(teacher, "run_stage", lambda *arguments: found.append(arguments[3]))
    for _ in range(2):
        stage = StageRun.at(tmp_path / f"out-{len(found)}")
        train_teacher(recipe.model_copy(update={"text": text}), data, trained / "autoencoder", stage)
        other_weights(folder)
    assert found[0]["settings"] == found[1]["settings"] and found[0]["parents"] != found[1]["parents"]


def test_a_base_is_not_trained_on_with_another_text_encoder(trained, tiny_recipe, tiny_data, tmp_path):
    recipe = load_recipe(tiny_recipe)
    text = TextSettings(source=str(make_tiny_folder(tmp_path / "other", seed=1)), max_length=32)
    recipe = recipe.model_copy(update={"text": text})
    stage = StageRun.at(tmp_path / "out")
    with pytest.raises(PocketfusionError, match="base's own: other weights"):
        train_teacher(recipe, open_dataset(tiny_data, 64), trained / "autoencoder", stage, init=trained / "base")
    assert not stage.out.exists() and not stage.run.exists()
