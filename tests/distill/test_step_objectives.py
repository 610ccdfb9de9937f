"""Step distillation's losses by hand and by finite differences."""

import numpy as np
import pytest
import torch

from pocketfusion.distill.ddim import Level, v_from_x, x_from_v
from pocketfusion.distill.objectives import (
    CFGAware,
    Mixed,
    Vanilla,
    distillation_loss,
    dynamic_scale,
    evenly_shared,
    step_objective,
)
from pocketfusion.models.guided import guided_prediction
from pocketfusion.train.batch import BatchPlan


def batch(size=4000, part=0, parts=1):
    return BatchPlan([(np.arange(size), 1.0)], size, seed=0).part(3, part, parts)


def test_the_three_draws_of_guidance():
    assert step_objective(0, 2, 14) == Vanilla() and step_objective(1, 2, 14) == CFGAware(2, 14)
    assert Vanilla().guidance_scale(batch()).unique().tolist() == [1.0]
    scale = CFGAware(2, 14).guidance_scale(batch())
    assert scale.min() >= 2 and scale.max() <= 14 and scale.mean().item() == pytest.approx(8, abs=0.2)
    mixed = step_objective(0.1, 2, 14)
    assert mixed == Mixed(0.1, CFGAware(2, 14))
    scale = mixed.guidance_scale(batch())
    assert (scale != 1).float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert scale[scale != 1].min() >= 2


def test_parts_of_a_batch_draw_what_the_whole_draws():
    mixed = step_objective(0.3, 2, 14)
    halves = [mixed.guidance_scale(batch(64, part, 2)) for part in range(2)]
    assert torch.equal(torch.cat(halves), mixed.guidance_scale(batch(64)))


def test_the_loss_in_v_is_the_papers_loss_in_x():
    """max(SNR, 1) |x̂ − x̃|² by hand, in float64, for late and early times."""
    generator = torch.Generator().manual_seed(0)
    z, v, target = (torch.randn(3, 4, 2, 2, generator=generator).double() for _ in range(3))
    phi = torch.tensor([0.2, 0.9, 1.5]).double().view(-1, 1, 1, 1)
    at = Level(phi.cos(), phi.sin())
    weight = np.maximum(np.cos([0.2, 0.9, 1.5]) ** 2 / np.sin([0.2, 0.9, 1.5]) ** 2, 1)
    error = (x_from_v(z, v, at) - x_from_v(z, target, at)).square().flatten(1).mean(1).numpy()
    assert distillation_loss(v, target, at).item() == pytest.approx((weight * error).mean(), rel=1e-6)
    torch.testing.assert_close(v_from_x(z, x_from_v(z, v, at), at), v)


def test_a_loss_normalised_by_guidance_by_hand():
    at = Level(*(torch.tensor(value).view(1, 1, 1, 1).expand(3, 1, 1, 1) for value in (0.6, 0.8)))
    v, target = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    w = torch.tensor([1.0, 2.0, 14.0])
    assert distillation_loss(v, target, at).item() == pytest.approx(0.64 * (1 + 4 + 9) / 3)
    assert distillation_loss(v, target, at, w).item() == pytest.approx(0.64 * (1 + 4 / 5 + 9 / 365) / 3)


def test_a_share_is_spread_evenly_and_never_nothing():
    assert evenly_shared(8, 0.25).tolist() == [False] * 3 + [True] + [False] * 3 + [True]
    assert evenly_shared(4, 1.0).all() and evenly_shared(1000, 0.1).sum() == 100
    assert evenly_shared(4, 0.1).tolist() == [True, False, False, False]


def test_the_scale_of_the_original_loss():
    assert dynamic_scale(torch.tensor(0.03), torch.tensor(0.6)) == pytest.approx(0.05)
    assert dynamic_scale(torch.tensor(0.03), torch.tensor(0.0)) < float("inf")


class TwoBranches(torch.nn.Module):
    """A network whose branches are known: condition and null condition each have a parameter of their own."""

    def __init__(self):
        super().__init__()
        self.cond, self.null, self.rows = (
            torch.nn.Parameter(torch.tensor(0.3)),
            torch.nn.Parameter(torch.tensor(-0.2)),
            0,
        )
        self.config = type("Config", (), {"time_cond_proj_dim": None})()

    def forward(self, z, t, states):
        self.rows += len(z)
        is_cond = states[:, :1, :1, None]
        value = z * (is_cond * self.cond + (1 - is_cond) * self.null) + t.view(-1, 1, 1, 1) * 0.01
        return type("Output", (), {"sample": value})()


def test_guided_prediction_by_hand_and_its_gradient_by_finite_differences():
    net = TwoBranches()
    z, t = torch.ones(3, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0])
    states, null, w = torch.ones(3, 2, 2), torch.zeros(2, 2), torch.tensor([1.0, 3.0, 7.5])
    made = guided_prediction(net, z, t, states, null, w)
    assert net.rows == 5  # the sample with w = 1 has no unconditional row
    expected = [
        w_ * (0.3 + 0.01 * t_) - (w_ - 1) * (-0.2 + 0.01 * t_) for w_, t_ in zip((1, 3, 7.5), (1, 2, 3), strict=True)
    ]
    torch.testing.assert_close(made.flatten(), torch.tensor(expected))
    made.square().sum().backward()
    for name, parameter in net.named_parameters():
        with torch.no_grad():
            values = []
            for h in (1e-2, -2e-2):
                parameter += h
                values.append(guided_prediction(net, z, t, states, null, w).square().sum().item())
            parameter += 1e-2
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-3), name
    assert net.null.grad.item() != 0  # the gradient goes through both branches
