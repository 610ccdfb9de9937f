"""The algebra against hand computation, diffusers, finite differences and the paper's own form."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from pocketfusion.distill import ddim
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import SchedulerSpec
from pocketfusion.runtime.samplers.sampler import Sampler

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def scheduler(**changes) -> DDIMScheduler:
    return DDIMScheduler(**{**SD, "prediction_type": "v_prediction", "set_alpha_to_one": False, **changes})


@pytest.fixture(scope="module")
def schedule():
    return ddim.NoiseSchedule(scheduler())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_schedule_is_the_schedulers_table(schedule):
    table = scheduler().alphas_cumprod
    at = schedule.at(torch.arange(1000), torch.zeros(1000, 1))
    torch.testing.assert_close(at.alpha[:, 0] ** 2, table, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(at.sigma[:, 0] ** 2, 1 - table, rtol=1e-5, atol=1e-7)
    end = schedule.at(torch.tensor([-1.0]), torch.zeros(1, 1))
    assert end.alpha.item() == pytest.approx(table[0].sqrt().item())
    clean = ddim.NoiseSchedule(scheduler(set_alpha_to_one=True)).at(torch.tensor([-1.0]), torch.zeros(1, 1))
    assert (clean.alpha.item(), clean.sigma.item()) == (1.0, 0.0)


def test_between_timesteps_the_angle_is_linear_and_outside_there_is_nothing(schedule):
    low, half, high = schedule.angle(torch.tensor([400.0, 400.5, 401.0]))
    assert half.item() == pytest.approx((low + high).item() / 2, rel=1e-12)
    for outside in (-1.1, 999.5):
        with pytest.raises(ValueError, match="leave"):
            schedule.angle(torch.tensor([outside]))


def test_conversions_by_hand():
    at = ddim.Level(torch.tensor(0.6), torch.tensor(0.8))
    x, noise = torch.tensor(2.0), torch.tensor(-1.0)
    z, v = ddim.add_noise(x, noise, at), ddim.v_of(x, noise, at)
    assert z.item() == pytest.approx(0.6 * 2 - 0.8) and v.item() == pytest.approx(-0.6 - 1.6)
    assert ddim.x_from_v(z, v, at).item() == pytest.approx(2.0)
    assert ddim.noise_from_v(z, v, at).item() == pytest.approx(-1.0)
    assert ddim.v_from_noise(z, noise, at).item() == pytest.approx(-2.2)
    assert ddim.v_from_x(z, x, at).item() == pytest.approx(-2.2)
    assert ddim.truncated_snr(at).item() == 1.0 and ddim.truncated_snr_in_v(at).item() == pytest.approx(0.64)
    late = ddim.Level(torch.tensor(0.8), torch.tensor(0.6))
    assert ddim.truncated_snr(late).item() == pytest.approx(16 / 9)
    assert ddim.truncated_snr_in_v(late).item() == pytest.approx(0.64)


def test_v_is_the_derivative_of_z_by_the_angle():
    """Finite differences: v = dz/dφ for fixed x and ε."""
    x, noise, h = draw(5).double(), draw(5, seed=1).double(), 1e-6
    for phi in (0.1, 0.7, 1.4):

        def z(angle):
            return math.cos(angle) * x + math.sin(angle) * noise

        at = ddim.Level(torch.tensor(math.cos(phi)).double(), torch.tensor(math.sin(phi)).double())
        torch.testing.assert_close((z(phi + h) - z(phi - h)) / (2 * h), ddim.v_of(x, noise, at), rtol=0, atol=1e-6)


def waves(z, t):
    """A made-up network's output for z [B, ...] at one time."""
    return torch.sin(z * 1.3 + float(t) / 700)


def numpy_runtime(stock) -> Sampler:
    known = {key: value for key, value in stock.config.items() if key in SchedulerSpec.model_fields}
    return Sampler("ddim", SchedulerSpec(**known))


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("to_one", [True, False])
def test_every_step_of_every_count_is_diffusers_and_the_runtimes(to_one, kind):
    """Step by step, from one to 64 steps: the times that are told, and where each step lands."""
    stock = scheduler(prediction_type=kind, set_alpha_to_one=to_one)
    runtime, ours = numpy_runtime(stock), ddim.NoiseSchedule(stock)
    for steps in range(1, 65):
        stock.set_timesteps(steps)
        grid = ddim.sampler_steps(steps, 1000)
        told = grid.begins.long().tolist()
        assert told == runtime.set_timesteps(steps).tolist() == stock.timesteps.tolist()[:steps]
        z, out = draw(2, steps, 4, 2, 2, seed=steps)
        at, to = ours.at(grid.begins, z), ours.at(grid.ends, z)
        v = out if kind == "v_prediction" else ddim.v_from_noise(z, out, at)
        made = ddim.ddim_step(z, v, at, to)
        theirs = torch.stack([stock.step(out[i], t, z[i]).prev_sample for i, t in enumerate(told)])
        runs = np.stack([runtime.step(out[i].numpy(), i, z[i].numpy(), noise=out.numpy) for i in range(steps)])
        torch.testing.assert_close(made, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made, torch.from_numpy(runs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [2, 3])
def test_a_student_on_the_targets_draws_what_the_teacher_draws(schedule, ratio):
    """Both by diffusers' own scheduler, N steps of the one and K N of the other, whatever the grids' rounding."""
    off = {}
    for steps in (1, 2, 3, 6, 8, 11, 16, 40, 48, 61):
        one, many = scheduler(), scheduler()
        one.set_timesteps(steps)
        many.set_timesteps(ratio * steps)
        start = draw(1, 4, 2, 2, seed=steps)
        theirs, z = start, start
        for t in many.timesteps[: ratio * steps]:
            theirs = many.step(waves(theirs, t), t, theirs).prev_sample
        for number, t in enumerate(one.timesteps[:steps]):
            span = ddim.spans(torch.tensor([number]), ratio * steps, steps, 1000)
            assert span.begins[0].item() == t
            z_end = ddim.rollout(lambda z, now: waves(z, now[0]), z, span.begins, span.ends, schedule)
            v = ddim.v_target(z, z_end, schedule.at(span.begins[0], z), schedule.at(span.end, z))
            z = one.step(v, t, z).prev_sample
        off[steps] = (z - theirs).abs().max().item()
    half = off.pop({2: 48, 3: 16}[ratio])  # there diffusers rounds a time of both to neighbours
    assert max(off.values()) < 2e-4 and half < 5e-3


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_one_student_step_on_the_target_lands_on_the_teachers_end(schedule, steps, discrete, ratio):
    generator = torch.Generator().manual_seed(steps)
    numbers = torch.rand(64, generator=generator) * steps
    numbers = numbers.floor() if discrete else numbers.clamp(max=steps - 1)
    span = ddim.spans(numbers, ratio * steps, steps, 1000, discrete)
    z = draw(64, 4, 3, 3, seed=steps)

    def teacher(z, now):
        return torch.tanh(z * 0.7 + now.float().view(-1, 1, 1, 1) / 500) * 1.5

    end = ddim.rollout(teacher, z, span.begins, span.ends, schedule)
    at, to = schedule.at(span.begins[0], z), schedule.at(span.end, z)
    v = ddim.v_target(z, end, at, to)
    torch.testing.assert_close(ddim.ddim_step(z, v, at, to), end, rtol=0, atol=1e-5)
    # the paper's form of the same target, in float64 because it divides by as little as 0.03
    double = [ddim.Level(level.alpha.double(), level.sigma.double()) for level in (at, to)]
    x = ddim.x_target(z.double(), end.double(), *double)
    torch.testing.assert_close(ddim.v_from_x(z.double(), x, double[0]).float(), v, rtol=1e-4, atol=1e-4)


def test_the_two_teacher_steps_are_the_papers_equation_seven(schedule):
    """Written out term by term for one sample."""
    t, t1, t2 = 999.0, 936.0, 874.0
    a, s = (value.item() for value in schedule.at(torch.tensor([t]), torch.zeros(1, 1)))
    a1, s1 = (value.item() for value in schedule.at(torch.tensor([t1]), torch.zeros(1, 1)))
    a2, s2 = (value.item() for value in schedule.at(torch.tensor([t2]), torch.zeros(1, 1)))
    z, v, v1 = 0.3, -1.1, 0.4
    z1 = a1 * (a * z - s * v) + s1 * (s * z + a * v)
    z2 = a2 * (a1 * z1 - s1 * v1) + s2 * (s1 * z1 + a1 * v1)
    said = iter([v, v1])
    end = ddim.rollout(
        lambda z, now: torch.full_like(z, next(said)),
        torch.full((1, 1), z),
        torch.tensor([[t], [t1]]),
        torch.tensor([[t1], [t2]]),
        schedule,
    )
    assert end.item() == pytest.approx(z2, abs=1e-6)
    target = (z2 - s2 / s * z) / (a2 - s2 / s * a)
    levels = (schedule.at(torch.tensor([t]), end), schedule.at(torch.tensor([t2]), end))
    assert ddim.x_target(torch.full((1, 1), z), end, *levels).item() == pytest.approx(target, rel=1e-4)


def test_grids():
    eight = ddim.sampler_steps(8, 1000)
    assert eight.begins.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert eight.ends.tolist() == [874, 749, 624, 499, 374, 249, 124, -1]
    sixteen = ddim.sampler_steps(16, 1000)  # steps of 62: what is left of 62.5 lies between them
    assert sixteen.begins[:3].tolist() == [999, 937, 874] and sixteen.ends[:3].tolist() == [937, 875, 812]
    assert ddim.sampler_steps(6, 1000).ends[-1] == 0  # 166 - 166: diffusers ends at alphas_cumprod[0] here too
    assert ddim.sampler_steps(16, 1000, discrete=False).begins[:3].tolist() == [999, 936.5, 874]
    span = ddim.spans(torch.tensor([0.0, 7.0]), 32, 8, 1000)
    assert span.begins.tolist() == [[999, 124], [968, 93], [937, 61], [905, 30]]
    assert span.ends.tolist() == [[968, 93], [937, 62], [906, 30], [874, -1]] and span.end.tolist() == [874, -1]
    half = ddim.spans(torch.tensor([1]), 48, 16, 1000)  # 48 steps have 936
    assert half.begins[:, 0].tolist() == [937, 916, 895] and half.end.tolist() == [875]
    continuous = ddim.spans(torch.tensor([0.5]), 16, 8, 1000, discrete=False)
    assert continuous.begins[:, 0].tolist() == [936.5, 874.0] and continuous.ends[:, 0].tolist() == [874.0, 811.5]
    assert continuous.end.tolist() == [811.5]


def test_steps_without_noise_to_take_away_are_refused(schedule):
    for steps, ends_at in ((500, -1), (1000, -1)):
        grid = ddim.sampler_steps(steps, 1000)
        assert grid.ends[-1] == ends_at
    with pytest.raises(PocketfusionError, match="1000 steps are finer than the noise schedule"):
        ddim.check_falling(schedule, grid.begins, grid.ends, "1000 steps")
    ddim.check_falling(schedule, *ddim.sampler_steps(500, 1000), "500 steps")


@pytest.mark.parametrize(("teacher", "student"), [(16, 16), (8, 16), (15, 8), (16, 0)])
def test_steps_that_do_not_divide_are_refused(teacher, student):
    with pytest.raises(PocketfusionError, match=f"{teacher} teacher steps do not divide into {student}"):
        ddim.step_ratio(teacher, student)


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_timesteps_are_refused(steps):
    with pytest.raises(PocketfusionError, match=f"number of steps is {steps}"):
        ddim.sampler_steps(steps, 1000)
