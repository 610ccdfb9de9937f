"""FID with its interval, KID and diversity: against hand computation, repeated sampling and torchmetrics."""

import numpy as np
import pytest
import torch

from pocketfusion.evaluate.distances import (
    KID_SUBSETS,
    RealFeatures,
    diversity,
    frechet_estimate,
    kid,
    kid_subset_size,
)
from pocketfusion.evaluate.metrics import frechet_distance


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_frechet_is_the_plain_distance(rng):
    mix = rng.normal(size=(6, 6))
    a, b = rng.normal(size=(80, 6)) @ mix + 0.3, rng.normal(size=(120, 6))
    estimate = frechet_estimate(a.astype(np.float32), RealFeatures(b.astype(np.float32)))
    assert estimate.value == pytest.approx(frechet_distance(a, b), rel=1e-5)
    assert estimate.low < estimate.value < estimate.high
    real = RealFeatures(b)
    assert frechet_estimate(b, real).value == pytest.approx(0, abs=1e-9)


def test_frechet_interval_is_as_wide_as_repeated_drawing(rng):
    """Four features, 500 pictures, 60 times anew: the interval's width against the distances' own spread."""
    mix = np.diag([1.0, 2.0, 0.5, 1.5])
    real = RealFeatures(rng.normal(size=(4000, 4)))
    estimates = [frechet_estimate(rng.normal(size=(500, 4)) @ mix + 0.4, real, seed=i) for i in range(60)]
    spread = np.std([estimate.value for estimate in estimates])
    widths = [estimate.high - estimate.low for estimate in estimates]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.25)
    truth = frechet_distance(rng.normal(size=(200_000, 4)) @ mix + 0.4, real.features)
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    assert covered >= 0.85


def test_kid_is_torchmetrics_over_the_same_subsets(rng):
    from torchmetrics.image.kid import poly_mmd

    drawn, real = (rng.normal(size=(n, 24)).astype(np.float32) + shift for n, shift in ((60, 0.2), (90, 0.0)))
    ours = kid(drawn, real, seed=3)
    order, expected = np.random.default_rng(3), []
    for _ in range(KID_SUBSETS):
        x, y = drawn[order.permutation(60)[:30]], real[order.permutation(90)[:30]]
        expected.append(float(poly_mmd(torch.tensor(y).double(), torch.tensor(x).double())))
    assert ours.value == pytest.approx(np.mean(expected), rel=1e-4)
    assert ours.std == pytest.approx(np.std(expected), rel=1e-4)


def test_kid_does_not_depend_on_the_count(rng):
    """Unbiased: equal distributions give 0 on average, with few pictures too, where the Fréchet distance does not."""
    few = [kid(rng.normal(size=(20, 8)), rng.normal(size=(20, 8)), seed=i).value for i in range(30)]
    assert abs(np.mean(few)) < 2 * np.std(few) / np.sqrt(30) + 1e-3
    assert kid_subset_size(20) == 10 and kid_subset_size(30_000) == 1000


def test_diversity_by_hand():
    one = [[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]  # distances 5, 0, 5
    two = [[1.0, 1.0]] * 3
    estimate = diversity(np.array([one, two], np.float32))
    assert estimate.value == pytest.approx((10 / 3 + 0) / 2)
    assert diversity(np.array([two] * 4, np.float32)) == (0, 0, 0)
