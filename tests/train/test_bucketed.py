"""Batches of one bucket each, a function of seed and step."""

import numpy as np
import pytest

from pocketfusion.train.batch import BatchPlan, BucketedPlan, in_buckets, of_one_bucket

BUCKETS = np.array([0] * 60 + [1] * 30 + [2] * 10)
POOLS = [(np.arange(0, 100, 2), 0.75), (np.arange(1, 100, 2), 0.25)]


def test_each_batch_is_of_one_bucket_and_depends_on_its_step_alone():
    plan = in_buckets(POOLS, 8, 3, BUCKETS)
    batches = [plan.indices(step) for step in range(300)]
    assert all(len(batch) == 8 and len(set(BUCKETS[batch])) == 1 for batch in batches)
    again = in_buckets(POOLS, 8, 3, BUCKETS)
    for step in (299, 7, 0, 255, 256):
        assert (again.indices(step) == batches[step]).all()
        assert (again.part(step, 1, 2).indices == batches[step][4:]).all()
    other = again.reseeded(4)
    assert any((other.indices(step) != batches[step]).any() for step in range(5))
    assert (again.reseeded(3).indices(9) == batches[9]).all()


def test_buckets_have_turns_by_their_samples():
    """In every cycle of 256 steps; within a bucket, pools keep their shares and every sample is drawn once a pass."""
    plan = in_buckets(POOLS, 8, 0, BUCKETS)
    for cycle in range(3):
        kinds = [BUCKETS[plan.indices(step)[0]] for step in range(256 * cycle, 256 * cycle + 256)]
        assert np.abs(np.bincount(kinds) - 256 * np.array([0.6, 0.3, 0.1])).max() <= 1
    drawn = np.concatenate([batch for step in range(768) if BUCKETS[(batch := plan.indices(step))[0]] == 1])
    assert np.isin(drawn[:8], POOLS[0][0]).sum() == 6
    first = drawn[np.isin(drawn, POOLS[0][0])]
    assert sorted(first[:15]) == sorted(first[15:30]) == list(range(60, 90, 2))


def test_a_rare_bucket_has_a_turn():
    buckets = np.array([0] * 5000 + [1])
    plan = in_buckets([(np.arange(5001), 1.0)], 2, 0, buckets)
    assert [BUCKETS.size and buckets[plan.indices(step)[0]] for step in range(256)].count(1) == 1


@pytest.mark.parametrize("buckets", [np.zeros(100, int), np.full(100, 2)])
def test_one_bucket_is_the_plan_without_buckets(buckets):
    plan, plain = in_buckets(POOLS, 8, 5, buckets), BatchPlan(POOLS, 8, 5)
    assert not isinstance(plan, BucketedPlan)
    assert all((plan.indices(step) == plain.indices(step)).all() for step in range(20))


def test_held_out_samples_are_of_the_largest_bucket():
    assert of_one_bucket(np.array([1, 61, 62, 95]), BUCKETS).tolist() == [61, 62]
