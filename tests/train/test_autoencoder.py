"""The autoencoder's losses, crops and whitened latents."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.dual_encoder import JudgeModel, load_judge
from pocketfusion.models.slim_autoencoder import to_tensor
from pocketfusion.recipe import PictureLossSettings, load_recipe
from pocketfusion.train.autoencoder import (
    AutoencoderTask,
    PictureLoss,
    TrainableAutoencoder,
    colour_loss,
    fold_whitening,
    gradient_loss,
    latent_statistics,
)


@pytest.fixture
def vae(tiny_recipe) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**load_recipe(tiny_recipe).autoencoder.config).double()


@pytest.fixture
def data() -> CaptionedImages:
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    rows = [{"captions": ["a"], "split": "val_combo" if i >= 8 else "train", "flip": False} for i in range(12)]
    return CaptionedImages(images, rows, "noise", "0")


def test_whitening_changes_the_latents_and_not_the_pictures(vae):
    x, noise = torch.rand(2, 3, 32, 32).double() * 2 - 1, torch.randn(2, 4, 4, 4).double()
    mean, std = torch.randn(4).double(), torch.rand(4).double() * 3 + 0.1
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        drawn = vae.decode(before.mean + before.std * noise).sample
        fold_whitening(vae, mean, std)
        after = vae.encode(x).latent_dist
        again = vae.decode(after.mean + after.std * noise).sample
    column = (slice(None), None, None)
    torch.testing.assert_close(after.mean, (before.mean - mean[column]) / std[column], rtol=0, atol=1e-12)
    torch.testing.assert_close(after.std, before.std / std[column], rtol=0, atol=1e-12)
    torch.testing.assert_close(again, drawn, rtol=0, atol=1e-12)


def test_whitened_training_latents_are_alike_in_every_channel(vae, data):
    vae.float()
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([3.0, -1.0, 0.5, 0.0])
        vae.quant_conv.weight[0] *= 7
    fold_whitening(vae, *latent_statistics(vae, data)[:2])
    with torch.no_grad():
        latents = vae.encode(to_tensor(data.images[:8])).latent_dist.mean
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=1e-4)


def test_latents_without_the_two_convolutions_cannot_be_whitened(tiny_recipe):
    config = load_recipe(tiny_recipe).autoencoder.config | {"use_quant_conv": False, "use_post_quant_conv": False}
    with pytest.raises(PocketfusionError, match="use_quant_conv"):
        fold_whitening(AutoencoderKL(**config), torch.zeros(4), torch.ones(4))


def test_the_gradient_loss_by_hand():
    a = torch.zeros(1, 1, 2, 2)
    b = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])  # across: 1, 3, mean 2; down: 0, 2, mean 1
    wide = [value.repeat_interleave(4, 2).repeat_interleave(4, 3) for value in (a, b)]
    across, down = (2.0 * 1 / 7, 1.0 * 1 / 7)  # one of seven steps carries the difference
    half_across, half_down = (2.0 * 1 / 3, 1.0 * 1 / 3)
    assert gradient_loss(*wide).item() == pytest.approx((across + down + half_across + half_down) / 4)
    assert gradient_loss(b.repeat(1, 1, 4, 4), b.repeat(1, 1, 4, 4) + 0.7).item() == pytest.approx(0, abs=1e-6)


def test_the_colour_loss_sees_flat_colours_alone():
    a = torch.rand(2, 3, 16, 16)
    checker = 0.3 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2 - 1)
    assert colour_loss(a, a + checker).item() == pytest.approx(0, abs=1e-6)  # detail without a mean
    shift = torch.tensor([0.1, -0.2, 0.0])[:, None, None]
    assert colour_loss(a, a + shift + checker).item() == pytest.approx(0.1, abs=1e-5)


def test_terms_have_their_weights_and_parts_average_to_the_whole():
    torch.manual_seed(0)
    judge = JudgeModel(image_size=16, widths=(8, 8), text_width=8, embed_dim=8, for_losses=True)
    settings = PictureLossSettings(
        mse_weight=0.5, l1_weight=2.0, gradient_weight=3.0, colour_weight=4.0, feature_weight=5.0, feature_start=0.5
    )
    loss = PictureLoss(settings, judge)
    a, b = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    total, terms = loss(a, b, 0.5)
    assert set(terms) == {"mse", "l1", "gradient", "colour", "features"}
    weights = {"mse": 0.5, "l1": 2.0, "gradient": 3.0, "colour": 4.0, "features": 5.0}
    assert total.item() == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-5)
    assert terms["mse"] == pytest.approx((a - b).square().mean().item(), rel=1e-5)
    assert "features" not in loss(a, b, 0.49)[1]
    halves = [loss(a[part], b[part], 1.0)[0].item() for part in (slice(0, 2), slice(2, 4))]
    assert sum(halves) / 2 == pytest.approx(loss(a, b, 1.0)[0].item(), rel=1e-5)
    assert loss(a, a, 1.0)[0].item() == pytest.approx(0, abs=1e-6)
    a.requires_grad_(True), b.requires_grad_(True)
    loss.feature_distance(a, b).backward()
    assert a.grad is not None and a.grad.abs().sum() > 0 and b.grad is None


def test_what_scores_is_never_trained_against(tmp_path):
    scores = JudgeModel(image_size=16, widths=(8, 8), text_width=8, embed_dim=8)
    with pytest.raises(PocketfusionError, match="must not be trained against"):
        PictureLoss(PictureLossSettings(feature_weight=0.1), scores)
    with pytest.raises(PocketfusionError, match="needs a judge for losses"):
        PictureLoss(PictureLossSettings(feature_weight=0.1))
    scores.save_pretrained(tmp_path / "scores")
    JudgeModel(image_size=16, widths=(8, 8), text_width=8, embed_dim=8, for_losses=True).save_pretrained(
        tmp_path / "losses"
    )
    with pytest.raises(PocketfusionError, match="must not be trained against"):
        load_judge(tmp_path / "scores", for_losses=True)
    with pytest.raises(PocketfusionError, match="must not score"):
        load_judge(tmp_path / "losses")


def task_of(recipe, vae, data, **changes) -> AutoencoderTask:
    settings = recipe.autoencoder.model_copy(update={"crop_size": 32, "crop_until": 0.5, **changes})
    return AutoencoderTask(recipe.model_copy(update={"autoencoder": settings}), data, vae)


def test_crops_are_parts_of_their_pictures_on_the_latents_grid_and_then_whole(tiny_recipe, vae, data):
    recipe = load_recipe(tiny_recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"flip": False, "scene_share": 0.0})})
    task = task_of(recipe, vae, data)
    seen = set()
    for step in range(3):  # of 6: crop_until is 0.5
        batch = task.plan.part(step, 0, 1)
        for crop, index in zip(task.pictures(batch), batch.indices, strict=True):
            whole = to_tensor(data.images[[index]])[0]
            places = [
                (y, x)
                for y in range(0, 33, 8)
                for x in range(0, 33, 8)
                if torch.equal(whole[:, y : y + 32, x : x + 32], crop)
            ]
            assert len(places) == 1
            seen |= {*places}
    assert len(seen) > 4
    assert task.pictures(task.plan.part(3, 0, 1)).shape == (4, 3, 64, 64)
    whole, halves = (torch.cat([task.pictures(task.plan.part(1, i, n)) for i in range(n)]) for n in (1, 2))
    assert torch.equal(whole, halves)


@pytest.mark.parametrize("crop", [20, 72])
def test_a_crop_that_does_not_fit_is_refused(tiny_recipe, vae, data, crop):
    with pytest.raises(PocketfusionError, match=f"crop_size {crop} does not fit"):
        task_of(load_recipe(tiny_recipe), vae, data, crop_size=crop)


def test_the_kl_is_the_gaussian_one(tiny_recipe, vae, data):
    task = task_of(load_recipe(tiny_recipe), vae.float(), data, crop_size=None, kl_weight=1.0)
    mean, logvar = torch.full((4, 4, 8, 8), 0.5), torch.full((4, 4, 8, 8), -1.0)
    batch = task.plan.part(5, 0, 1)
    drawn = task.pictures(task.plan.part(5, 0, 1))

    def model(pixels, noise):
        return SimpleNamespace(mean=mean, logvar=logvar), drawn, None

    model.config = vae.config
    loss, logged = task.loss(model, batch)
    assert logged["kl"] == pytest.approx(0.5 * (0.25 + np.exp(-1.0) - 1 + 1), rel=1e-5)
    assert loss.item() == pytest.approx(logged["kl"], rel=1e-5)  # the pictures are equal


def test_colours_are_read_in_the_latents(tiny_recipe, vae, data):
    """The term by hand, and that its gradient gives an encoder a hue that it lacks."""
    recipe = load_recipe(tiny_recipe)
    model = TrainableAutoencoder(vae.float(), colour=True)
    task = task_of(recipe, model, data, crop_size=None, kl_weight=0.0, latent_colour_weight=0.5)
    batch = task.plan.part(5, 0, 1)
    pixels = task.pictures(task.plan.part(5, 0, 1))
    loss, logged = task.loss(task.model, batch)
    loss.backward()
    assert task.model.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    means = pixels.double().reshape(4, 3, 8, 8, 8, 8).mean((3, 5))
    batch = task.plan.part(5, 0, 1)
    task.pictures(batch)  # draws what comes before the noise
    noise = batch.randn(4, 8, 8)
    with torch.no_grad():
        posterior, image, colours = task.model(pixels, noise)
        z = posterior.mean + posterior.std * noise
        by_hand = torch.einsum("bchw,oc->bohw", z, task.model.colour.weight[:, :, 0, 0])
    by_hand = by_hand + task.model.colour.bias[None, :, None, None]
    assert torch.allclose(by_hand, colours, atol=1e-5)
    assert logged["latent_colour"] == pytest.approx((by_hand - means).abs().mean().item(), rel=1e-4)
    without = task.picture_loss(image, pixels, 5 / 6)[0].item()
    assert loss.item() == pytest.approx(without + 0.5 * logged["latent_colour"], rel=1e-4)
