"""The measures against hand computation, repeated sampling and other people's code (torchmetrics, scipy)."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from pocketfusion.evaluate.metrics import (
    KID_SUBSETS,
    RealFeatures,
    bootstrap,
    clip_score,
    diversity,
    frechet_distance,
    frechet_estimate,
    kid,
    kid_subset_size,
    retrieval,
    too_few_for_frechet,
)

EYE = np.eye(4, dtype=np.float32)


def test_clip_score_is_a_hundred_cosines():
    images = np.array([[1.0, 0.0], [0.6, 0.8]])
    texts = np.array([[0.0, 1.0], [0.6, 0.8]])
    assert clip_score(images, texts) == pytest.approx([0.0, 100.0])


def test_retrieval_ranks_by_hand():
    texts = EYE[:3]
    images = np.array([[0.9, 0.5, 0.1, 0], [0.8, 0.6, 0.1, 0], [0.8, 0.7, 0.6, 0]])  # own caption 1st, 2nd, 3rd
    found = retrieval(images, texts, ["a", "b", "c"], ks=(1, 2))
    assert found.hits[1].tolist() == [1, 0, 0] and found.hits[2].tolist() == [1, 1, 0]
    assert found.chance == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)} and found.pool == 3


def test_equal_captions_are_one():
    texts = EYE[[0, 0, 1]]
    texts = texts + np.array([[0, 0, 0, 0], [0, 0, 0, 0.1], [0, 0, 0, 0]])  # the same words, embedded unequally
    found = retrieval(EYE[[0, 0, 1]], texts, ["same", "same", "other"], ks=(1,))
    assert found.hits[1].tolist() == [1, 1, 1] and found.chance[1] == pytest.approx(1 / 2)


def test_a_judge_that_says_the_same_of_everything_scores_chance():
    constant = np.ones((8, 2))
    found = retrieval(constant, constant, [str(i) for i in range(8)], ks=(1, 5))
    assert found.hits[1].mean() == pytest.approx(found.chance[1]) == pytest.approx(1 / 8)
    assert found.hits[5].mean() == pytest.approx(found.chance[5]) == pytest.approx(5 / 8)


def test_pools_are_of_one_size_and_in_order():
    captions = [str(i % 4) for i in range(10)]
    texts = EYE[[i % 4 for i in range(10)]]
    found = retrieval(texts, texts, captions, ks=(1,), pool=4)
    assert found.pool == 4 and found.hits[1].tolist() == [1] * 8  # the last two make no pool
    assert retrieval(texts[:3], texts[:3], captions[:3], pool=256).pool == 3


def test_k_of_all_captions_always_finds():
    rng = np.random.default_rng(0)
    found = retrieval(rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), list("abcdef"), ks=(6,))
    assert found.hits[6].tolist() == [1] * 6 and found.chance[6] == 1


def test_bootstrap_is_repeatable_and_covers():
    values = np.random.default_rng(1).normal(3, 1, 400)
    estimate = bootstrap(values)
    assert estimate == bootstrap(values) and estimate.low < estimate.value < estimate.high
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.high - estimate.low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert bootstrap(np.ones(5)) == (1.0, 1.0, 1.0)


def test_frechet_distance_closed_form_for_diagonal_gaussians():
    # Samples whose mean and covariance are exactly mu and diag(s²): whitened, then scaled.
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(200, 3))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    a_mean, a_std, b_mean, b_std = np.array([0, 1, 2]), np.array([1, 2, 3]), np.array([1, 1, 0]), np.array([2, 2, 0.5])
    by_hand = ((a_mean - b_mean) ** 2).sum() + ((a_std - b_std) ** 2).sum()  # 5 + 7.25
    assert by_hand == 12.25
    assert frechet_distance(white * a_std + a_mean, white * b_std + b_mean) == pytest.approx(by_hand, rel=1e-9)


def test_frechet_distance_against_scipy_and_torchmetrics():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    b = rng.normal(size=(250, 12)) @ rng.normal(size=(12, 12)) + 0.5
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    by_scipy = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    tensors = [torch.from_numpy(x) for x in (a.mean(0), cov_a, b.mean(0), cov_b)]
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(by_scipy, rel=1e-6) == pytest.approx(_compute_fid(*tensors).item(), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(ours, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(cov_a))


def test_frechet_distance_survives_dead_features():
    a = np.random.default_rng(3).normal(size=(50, 4))
    a[:, 2:] = 0.0  # singular covariance
    assert frechet_distance(a, a + [1, 0, 0, 0]) == pytest.approx(1.0, abs=1e-6)


def test_frechet_distance_refuses_too_few():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(np.zeros((1, 3)), np.zeros((9, 3)))
    assert too_few_for_frechet(768, 384) is None
    assert "at least 768" in too_few_for_frechet(767, 384)


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
