"""Which teachers are refused, and that the sentence names what differs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketfusion.distill.compatible import check_teacher
from pocketfusion.errors import PocketfusionError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def teacher(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "teacher")


def set_config(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_weight(folder, file, name, value):
    tensors = load_file(folder / file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_the_same_family_passes(tiny_folder, teacher):
    check_teacher(tiny_folder, tiny_folder)
    set_weight(teacher, UNET, "conv_in.weight", 3.0)  # another UNet
    set_weight(teacher, VAE, "decoder.conv_in.weight", 3.0)  # a distilled decoder
    set_config(teacher, "scheduler/scheduler_config.json", timestep_spacing="leading")  # only where it is sampled
    halves = {name: tensor.half() for name, tensor in load_file(teacher / TEXT).items() if tensor.is_floating_point()}
    save_file({**load_file(teacher / TEXT), **halves}, teacher / TEXT, metadata={"format": "pt"})
    check_teacher(tiny_folder, teacher)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: set_weight(f, TEXT, "embeddings.word_embeddings.weight", 2.0), "differ in text encoder:"),
        (lambda f: set_config(f, "text_encoder/config.json", use_attention_mask=False), "differ in text encoder:"),
        (lambda f: set_config(f, "tokenizer/tokenizer_config.json", model_max_length=16), "differ in tokenizer:"),
        (lambda f: set_weight(f, VAE, "encoder.conv_in.weight", 3.0), "differ in autoencoder's encoder:"),
        (lambda f: set_config(f, "vae/config.json", scaling_factor=0.5), r"scaling_factor \(0.7 and 0.5\)"),
        (lambda f: set_config(f, "vae/config.json", latent_channels=8), r"latent channels \(4 and 8\)"),
        (lambda f: set_config(f, "unet/config.json", sample_size=16), r"latents' size \(8 and 16\)"),
        (
            lambda f: set_config(f, "scheduler/scheduler_config.json", prediction_type="epsilon"),
            r"prediction_type \(v_prediction and epsilon\)",
        ),
        (lambda f: set_config(f, "scheduler/scheduler_config.json", beta_end=0.02), r"beta_end \(0.012 and 0.02\)"),
        (
            lambda f: set_config(f, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
            r"rescale_betas_zero_snr \(False and True\)",
        ),
    ],
)
def test_what_differs_is_named(tiny_folder, teacher, change, words):
    change(teacher)
    with pytest.raises(PocketfusionError, match=f"teacher cannot teach .*{words}"):
        check_teacher(tiny_folder, teacher)


def test_everything_that_differs_is_named(tiny_folder, teacher):
    set_config(teacher, "scheduler/scheduler_config.json", prediction_type="epsilon", num_train_timesteps=100)
    with pytest.raises(PocketfusionError, match=r"prediction_type .*num_train_timesteps \(1000 and 100\)"):
        check_teacher(tiny_folder, teacher)


@pytest.mark.parametrize(("file", "weight"), [(UNET, "conv_out.bias"), (VAE, "decoder.conv_in.bias")])
def test_nan_in_either_is_named(tiny_folder, teacher, file, weight):
    set_weight(teacher, file, weight, float("nan"))
    for pair in ((tiny_folder, teacher), (teacher, tiny_folder)):
        with pytest.raises(PocketfusionError, match=rf"teacher/.*the weight {weight} holds NaN"):
            check_teacher(*pair)


def test_what_is_no_model_folder_or_damaged(tiny_folder, teacher):
    with pytest.raises(PocketfusionError, match="there is no model folder"):
        check_teacher(tiny_folder, teacher / "no")
    (teacher / UNET).write_bytes((teacher / UNET).read_bytes()[:1000])
    with pytest.raises(PocketfusionError, match="is damaged"):
        check_teacher(tiny_folder, teacher)


def test_bf16_weights_are_checked_too(tiny_folder, teacher):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(teacher / UNET).items()}
    tensors["conv_out.bias"][0] = torch.inf
    save_file(tensors, teacher / UNET, metadata={"format": "pt"})
    with pytest.raises(PocketfusionError, match="conv_out.bias holds NaN or infinity"):
        check_teacher(tiny_folder, teacher)
