"""Text encoders of CLIP's class, as SD-1.x has: the states of the stock pipeline, pad tokens included."""

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from pocketfusion.models.text_encoder import TextEncoder, load_text_encoder
from pocketfusion.recipe import TextSettings, load_recipe
from pocketfusion.train.start import open_start
from tiny import tiny_pipeline
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
    ours = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, "")
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
