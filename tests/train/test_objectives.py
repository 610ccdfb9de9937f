"""Targets and weights against hand computation and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from pocketfusion.train.teacher import DenoisingObjective

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_by_hand():
    # one timestep with alpha_bar 0.64: alpha 0.8, sigma 0.6, SNR 16/9
    objective = DenoisingObjective(torch.tensor([0.64]), "v_prediction", 1.0)
    x, noise, t = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([0])
    assert objective.add_noise(x, noise, t).item() == pytest.approx(0.8 * 2 - 0.6)
    assert objective.target(x, noise, t).item() == pytest.approx(0.8 * -1 - 0.6 * 2)
    assert objective.weight(t).item() == pytest.approx(1 / (16 / 9 + 1))
    loss, mse = objective.loss(torch.zeros(1, 1), x, noise, t)
    assert mse.item() == pytest.approx(4.0) and loss.item() == pytest.approx(4 / (25 / 9))
    epsilon = DenoisingObjective(torch.tensor([0.64]), "epsilon", 1.0)
    assert epsilon.target(x, noise, t).item() == -1 and epsilon.weight(t).item() == pytest.approx(9 / 16)
    assert DenoisingObjective(torch.tensor([0.64]), "epsilon", None).weight(t).item() == 1


def test_against_diffusers():
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(64, 4, 8, 8, generator=g) for _ in range(2))
    t = torch.randint(1000, (64,), generator=g)
    objective = DenoisingObjective(SCHEDULER.alphas_cumprod, "v_prediction", 5.0)
    assert torch.allclose(objective.add_noise(x, noise, t), SCHEDULER.add_noise(x, noise, t), atol=1e-5)
    assert torch.allclose(objective.target(x, noise, t), SCHEDULER.get_velocity(x, noise, t), atol=1e-5)
    snr = compute_snr(SCHEDULER, t)
    assert torch.allclose(objective.weight(t), snr.clamp(max=5) / (snr + 1), rtol=1e-4)


def test_both_weightings_weigh_the_error_of_x_alike():
    """min(SNR, gamma) times the error of x, whatever is predicted: the identity that min-SNR is built on."""
    t = torch.tensor([3, 250, 700, 990])
    alpha = SCHEDULER.alphas_cumprod.sqrt()[t]
    sigma = (1 - SCHEDULER.alphas_cumprod).sqrt()[t]
    v = DenoisingObjective(SCHEDULER.alphas_cumprod, "v_prediction", 5.0).weight(t)
    eps = DenoisingObjective(SCHEDULER.alphas_cumprod, "epsilon", 5.0).weight(t)
    # an error d in x is an error d / sigma in v and d alpha / sigma in epsilon
    assert torch.allclose(v / sigma**2, eps * alpha**2 / sigma**2, rtol=1e-3)
    assert torch.allclose(v / sigma**2, ((alpha / sigma) ** 2).clamp(max=5.0), rtol=1e-3)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'sample' is not one of epsilon, v_prediction"):
        DenoisingObjective(SCHEDULER.alphas_cumprod, "sample", None)
