"""The algebra against hand computation, diffusers, finite differences and the paper's own form."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from pocketfusion.distill import ddim
from pocketfusion.errors import PocketfusionError

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


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 50, 100])
def test_sampling_is_diffusers(steps, kind):
    """The whole chain from noise, at step counts that divide 1000, with a made-up network."""
    stock = scheduler(prediction_type=kind, set_alpha_to_one=True)
    stock.set_timesteps(steps)
    times = ddim.timesteps(steps, 1000)
    assert times[:-1].long().tolist() == stock.timesteps.tolist() and times[-1] == -1
    ours, z = ddim.NoiseSchedule(stock), draw(3, 4, 2, 2)
    theirs = z.clone()
    columns = times[:, None].expand(-1, 3)

    def output(z, t):
        return torch.sin(z * 1.3 + t.float().mean() / 700)

    def predict(z, now):
        made = output(z, now)
        return made if kind == "v_prediction" else ddim.v_from_noise(z, made, ours.at(now, z))

    ours_end = ddim.rollout(predict, z, columns, ours)
    for t in stock.timesteps:
        theirs = stock.step(output(theirs, t), t, theirs).prev_sample
    torch.testing.assert_close(ours_end, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_one_student_step_on_the_target_lands_on_the_teachers_end(schedule, steps, discrete, ratio):
    generator = torch.Generator().manual_seed(steps)
    numbers = torch.rand(64, generator=generator) * steps
    numbers = numbers.floor() if discrete else numbers.clamp(max=steps - 1)
    times = ddim.spans(numbers, ratio * steps, steps, 1000, discrete)
    z = draw(64, 4, 3, 3, seed=steps)

    def teacher(z, now):
        return torch.tanh(z * 0.7 + now.float().view(-1, 1, 1, 1) / 500) * 1.5

    end = ddim.rollout(teacher, z, times, schedule)
    at, to = schedule.at(times[0], z), schedule.at(times[-1], z)
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
        torch.tensor([[t], [t1], [t2]]),
        schedule,
    )
    assert end.item() == pytest.approx(z2, abs=1e-6)
    target = (z2 - s2 / s * z) / (a2 - s2 / s * a)
    levels = (schedule.at(torch.tensor([t]), end), schedule.at(torch.tensor([t2]), end))
    assert ddim.x_target(torch.full((1, 1), z), end, *levels).item() == pytest.approx(target, rel=1e-4)


def test_grids():
    assert ddim.timesteps(8, 1000).tolist() == [999, 874, 749, 624, 499, 374, 249, 124, -1]
    assert ddim.timesteps(16, 1000, discrete=False)[:3].tolist() == [999, 936.5, 874]
    student, teacher = ddim.timesteps(8, 1000), ddim.timesteps(16, 1000)
    assert teacher[::2].tolist() == student.tolist()
    times = ddim.spans(torch.tensor([0.0, 7.0]), 32, 8, 1000)
    assert times.shape == (5, 2) and times[0].tolist() == [999, 124] and times[-1].tolist() == [874, -1]
    continuous = ddim.spans(torch.tensor([0.5]), 16, 8, 1000, discrete=False)
    assert continuous[:, 0].tolist() == [936.5, 874.0, 811.5]


@pytest.mark.parametrize(("teacher", "student"), [(16, 16), (8, 16), (15, 8), (16, 0)])
def test_steps_that_do_not_divide_are_refused(teacher, student):
    with pytest.raises(PocketfusionError, match=f"{teacher} teacher steps do not divide into {student}"):
        ddim.step_ratio(teacher, student)


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_timesteps_are_refused(steps):
    with pytest.raises(PocketfusionError, match=f"number of steps is {steps}"):
        ddim.timesteps(steps, 1000)
