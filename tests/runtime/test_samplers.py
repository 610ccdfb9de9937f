"""Samplers in numpy: by hand, by the exact solution of a Gaussian, and step by step against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
from stepwise import PREDICTIONS, SPACINGS, ends, errors, reference, spec

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.denoise import NoiseStream, seeded_noise
from pocketfusion.runtime.samplers.linear_step import NoiseLevels
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import SAMPLERS, most_steps

# betas 0.1, 0.2: alphas_cumprod 0.9, 0.72
TINY = {"num_train_timesteps": 2, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear", "steps_offset": 0}
ONE, HALF = np.ones(1, np.float32), np.full(1, 0.5, np.float32)


def no_noise():
    raise AssertionError("a deterministic step asked for noise")


def sampler(name: str, steps: int, **changes) -> Sampler:
    result = Sampler(name, spec(**changes))
    result.set_timesteps(steps)
    return result


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_two_epsilon_steps_by_hand(name):
    ours = sampler(name, 2, **TINY)
    np.testing.assert_allclose(NoiseLevels(ours.spec).alphas_cumprod, [0.9, 0.72])
    assert ours.timesteps.tolist() == [1, 0]
    x = ours.step(HALF, 0, ours.start(ONE), no_noise)
    assert x.dtype == np.float32
    # x_0 = (1 - sqrt(.28) / 2) / sqrt(.72) = 0.866707; sqrt(.9) x_0 + sqrt(.1) / 2
    np.testing.assert_allclose(x, 0.980344, atol=1e-6)
    # DDIM ends at alphas_cumprod[0], so with epsilon the last step changes nothing; Euler at x_0
    np.testing.assert_allclose(ours.step(HALF, 1, x, no_noise), x if name == "ddim" else 0.866707, atol=1e-6)


def test_two_v_steps_by_hand():
    ours = sampler("ddim", 2, **TINY, prediction_type="v_prediction", set_alpha_to_one=True)
    # x_0 = sqrt(.72) - sqrt(.28) / 2 = 0.583953; epsilon = sqrt(.72) / 2 + sqrt(.28) = 0.953414
    np.testing.assert_allclose(ours.step(HALF, 0, ONE, no_noise), 0.855482, atol=1e-6)
    # ends at x_0 = sqrt(.9) - sqrt(.1) / 2
    np.testing.assert_allclose(ours.step(HALF, 1, ONE, no_noise), 0.790569, atol=1e-6)


def test_noise_of_the_stochastic_ones_by_hand():
    ancestral = sampler("euler-ancestral", 2, **TINY)
    # sigma 0.623610 to 0.333333: up = 0.333333 sqrt(0.388889 - 0.111111) / 0.623610 = 0.281718, down = 0.178174;
    # (x_0 + down / 2 + 2 up) / sqrt(1 + 0.111111), x_0 as above
    np.testing.assert_allclose(ancestral.step(HALF, 0, ONE, lambda: 2 * ONE), 1.441268, atol=1e-6)
    np.testing.assert_allclose(ancestral.step(HALF, 1, ONE, no_noise), 1.054093 - 0.5 / 3, atol=1e-6)
    lcm = sampler("lcm", 2, **TINY)
    # c_skip = .25 / 100.25, c_out = 10 / sqrt(100.25); sqrt(.9) (c_out x_0 + c_skip) + 2 sqrt(.1)
    np.testing.assert_allclose(lcm.step(HALF, 0, ONE, lambda: 2 * ONE), 1.456025, atol=1e-6)


def test_timesteps_by_hand():
    def of(name, steps, spacing="leading"):
        return sampler(name, steps, timestep_spacing=spacing).timesteps.tolist()

    assert of("ddim", 4) == of("euler", 4) == [751, 501, 251, 1] and of("ddim", 1) == [1]
    assert of("ddim", 4, "trailing") == of("dpmpp-2m", 4, "trailing") == [999, 749, 499, 249]
    assert of("ddim", 1, "trailing") == [999]
    assert of("ddim", 3, "linspace") == [999, 500, 0] and of("euler", 3, "linspace") == [999, 499.5, 0]
    assert of("dpmpp-2m", 4) == [801, 601, 401, 201] and of("dpmpp-2m", 3, "linspace") == [999, 666, 333]
    assert of("lcm", 4) == of("tcd", 4, "linspace") == [999, 759, 499, 259]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_equal_diffusers_for_every_step_count(name, spacing):
    settings = {"timestep_spacing": spacing}
    ours, theirs = Sampler(name, spec(**settings)), reference(name, **settings)
    most = most_steps(name, ours.spec)
    assert most == {"lcm": 50, "tcd": 50, "dpmpp-2m": 999}.get(name, 1000)
    for n in sorted({*range(1, min(most, 62)), *range(62, most, 67), most - 1, most}):
        timesteps = ours.set_timesteps(n)
        assert len(timesteps) == n and timesteps.min() >= 0 and timesteps.max() <= 999
        theirs.set_timesteps(n)
        expected = theirs.timesteps.numpy()
        assert set(expected[n:]) <= {-1}  # for some n, diffusers' trailing spacing adds a step at -1
        if expected[0] == 1000:  # its leading spacing begins beyond its own table where as many steps are taken
            expected = expected - 1
        if name == "dpmpp-2m-karras":
            # halves may round apart, as diffusers' sigmas are float32; several steps may share a timestep
            np.testing.assert_allclose(timesteps, expected[:n], atol=1)
        else:
            assert (timesteps == expected[:n]).all() and (np.diff(timesteps) < 0).all()
        for step in ours.schedule.steps:
            assert np.isfinite(step.coefficients("epsilon")).all() and np.isfinite(step.previous_x_0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(name, prediction, spacing, monkeypatch):
    settings = {"prediction_type": prediction, "timestep_spacing": spacing}
    for end in ends(name):
        for steps in (1, 4, 25):
            # float32's rounding, in diffusers' tables and on both ways, adds up to more than 1e-5 with Karras' sigmas
            assert max(errors(name, steps, monkeypatch, **settings, **end)) < 2e-5
            assert max(errors(name, steps, monkeypatch, "float64", **settings, **end)) < 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.55, 1.0])
def test_every_eta_of_tcd_equals_diffusers(eta, prediction, monkeypatch):
    for steps in (1, 4, 25):
        for dtype, bound in (("float32", 2e-5), ("float64", 1e-5)):
            assert max(errors("tcd", steps, monkeypatch, dtype, prediction_type=prediction, eta=eta)) < bound
    assert sampler("tcd", 4, eta=eta).adds_noise == (eta > 0) and not sampler("tcd", 1, eta=eta).adds_noise


def test_the_pages_formulas_give_the_weights():
    """docs/samplers.md's table, computed here in plain Python, of 4 steps with `trailing` spacing."""
    first, last, bars, product = 0.00085**0.5, 0.012**0.5, [], 1.0
    for i in range(1000):
        product *= 1 - (first + (last - first) * i / 999) ** 2
        bars.append(product)
    size = 4

    def alpha(s):
        return 1 / (s * s + 1) ** 0.5

    def check(name, rows, **changes):
        ours = sampler(name, size, timestep_spacing="trailing", **changes)
        steps = [(x.alpha, x.sigma, x.x_0, x.epsilon, x.noise, x.previous_x_0) for x in ours.schedule.steps]
        np.testing.assert_allclose(steps, rows, rtol=1e-9, atol=1e-12)

    s = [((1 - bars[t]) / bars[t]) ** 0.5 for t in (999, 749, 499, 249)] + [0.0]
    low = ((1 - bars[0]) / bars[0]) ** 0.5
    euler, ancestral, multistep = [], [], []
    for k, (now, then) in enumerate(zip(s, [*s[1:4], low], strict=False)):
        scale = alpha(then) if k < 3 else 1
        euler.append((alpha(now), now * alpha(now), scale, then * scale, 0, 0))
    for k, (now, then) in enumerate(zip(s, s[1:], strict=False)):
        scale, up = alpha(then), then * (now**2 - then**2) ** 0.5 / now
        ancestral.append((alpha(now), now * alpha(now), scale, scale * (then**2 - up**2) ** 0.5, scale * up, 0))
        c = scale * (1 - then / now) * np.log(now / then) / (2 * np.log(s[k - 1] / now)) if k in (1, 2) else 0
        multistep.append((alpha(now), now * alpha(now), scale + c, then * scale, 0, -c))
    check("euler", euler, final_sigmas_type="sigma_min")
    check("euler-ancestral", ancestral)
    check("dpmpp-2m", multistep)
    times = [20 * (50 - 50 * k // size) - 1 for k in range(size)]
    lcm, tcd = [], []
    for k, t in enumerate(times):
        a, sigma = bars[t] ** 0.5, (1 - bars[t]) ** 0.5
        then = bars[times[k + 1]] if k < 3 else 1
        skip, out = 0.25 / (100 * t * t + 0.25), 10 * t / (100 * t * t + 0.25) ** 0.5
        lcm.append((a, sigma, then**0.5 * (out + skip * a), then**0.5 * skip * sigma, (1 - then) ** 0.5, 0))
        later = times[k + 1] if k < 3 else 0
        r = bars[int(0.7 * later)]
        q = bars[later] / r
        tcd.append((a, sigma, (q * r) ** 0.5, (q * (1 - r)) ** 0.5, (1 - q) ** 0.5, 0))
    check("lcm", lcm)
    check("tcd", tcd)


WIDTH = 0.6  #: standard deviation of the pictures of a model whose answer is known


def draw(name: str, steps: int, sample: np.ndarray, prediction: str = "epsilon", **changes) -> np.ndarray:
    """Draws with the exact prediction for pictures x_0 ~ N(0, WIDTH^2)."""
    ours = sampler(name, steps, prediction_type=prediction, timestep_spacing="trailing", **changes)
    generator = np.random.default_rng(1)
    x = ours.start(sample)
    for k, step in enumerate(ours.schedule.steps):
        variance = step.alpha**2 * WIDTH**2 + step.sigma**2
        epsilon, x_0 = step.sigma / variance * x, step.alpha * WIDTH**2 / variance * x
        output = epsilon if prediction == "epsilon" else step.alpha * epsilon - step.sigma * x_0
        x = ours.step(output, k, x, lambda: generator.standard_normal(sample.shape))
    return x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "ratio"), [("ddim", 2), ("euler", 2), ("dpmpp-2m", 3), ("dpmpp-2m-karras", 4)])
def test_twice_the_steps_are_as_much_nearer_to_the_exact_flow(name, ratio, prediction):
    """The flow maps x_T to x_T times the ratio of standard deviations. The error of first-order steps halves, that of
    second-order ones is quartered; by timesteps the last ones are still too long in log(sigma) for all of that."""
    levels = NoiseLevels(spec())
    first, last = levels.at(999), levels.at(0)
    end = {} if name == "ddim" else {"final_sigmas_type": "sigma_min"}
    exact = (last[0] ** 2 * WIDTH**2 + last[1] ** 2) ** 0.5 / (first[0] ** 2 * WIDTH**2 + first[1] ** 2) ** 0.5
    if name == "euler":  # begins at sigma epsilon, and ends with x_0 at weight 1
        exact *= first[1] / last[0]
    error = [abs(float(draw(name, n, np.ones(1), prediction, **end)[0]) / exact - 1) for n in (50, 100)]
    assert error[1] < 0.03 and error[0] / error[1] == pytest.approx(ratio, rel=0.06)


def test_ancestral_pictures_are_as_wide_as_the_models():
    start = np.random.default_rng(0).standard_normal(20_000)
    assert draw("euler-ancestral", 200, start).std() == pytest.approx(WIDTH, rel=0.05)


def test_noise_goes_on_where_the_starting_noise_ends():
    stream = NoiseStream(7, 4, 4, 2)
    both = np.random.Generator(np.random.PCG64(7)).standard_normal(64, np.float32)
    np.testing.assert_array_equal(np.concatenate([stream.draw(), stream.draw()]).ravel(), both)
    np.testing.assert_array_equal(seeded_noise(7, 4, 4, 2).ravel(), both[:32])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_count_out_of_range(steps):
    with pytest.raises(PocketfusionError, match=f"number of steps is {steps}: choose 1 to 1000$"):
        sampler("ddim", steps)


@pytest.mark.parametrize(("name", "steps", "most"), [("lcm", 51, 50), ("tcd", 51, 50), ("dpmpp-2m", 1000, 999)])
def test_step_count_that_a_sampler_lacks(name, steps, most):
    with pytest.raises(PocketfusionError, match=f"number of steps is {steps}: choose 1 to {most} with {name}$"):
        sampler(name, steps)
