"""Nearest training pictures: copies, mirrored copies and honest distances."""

import numpy as np
import pytest

from pocketfusion.evaluate.score.copying import Gallery, nearest_training, thumbnails

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (2100, 32, 32, 3), dtype=np.uint8)  # more than one block
FEATURES = RNG.normal(size=(2100, 8)).astype(np.float32)


def gallery(flip: bool = False, count: int = 2100) -> Gallery:
    return Gallery(np.arange(count) + 100, SMALL[:count], FEATURES[:count], np.full(count, flip))


def test_nearest_equals_plain_computation():
    query = np.clip(SMALL[[5, 2090, 40]].astype(int) + RNG.integers(-9, 10, (3, 32, 32, 3)), 0, 255).astype(np.uint8)
    queries = RNG.normal(size=(3, 8)).astype(np.float32)
    near = nearest_training(query, queries, gallery())
    plain = np.sqrt(((query[:, None].astype(float) - SMALL[None]) ** 2).mean(axis=(2, 3, 4)))
    assert near.position.tolist() == plain.argmin(axis=1).tolist() == [5, 2090, 40]
    assert near.rms == pytest.approx(plain.min(axis=1))
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(FEATURES, axis=1)[None]
    assert near.cosine == pytest.approx((queries @ FEATURES.T / norms).max(axis=1), abs=1e-5)


def test_an_exact_copy_is_at_zero():
    near = nearest_training(SMALL[[7]], FEATURES[[7]], gallery())
    assert near.rms[0] == 0 and near.position[0] == 7 and near.cosine[0] == pytest.approx(1, abs=1e-5)


def test_mirrored_copies_count_only_where_training_mirrored():
    mirrored = SMALL[[7], :, ::-1]
    assert nearest_training(mirrored, FEATURES[[7]], gallery(flip=True, count=50)).rms[0] == 0
    assert nearest_training(mirrored, FEATURES[[7]], gallery(flip=False, count=50)).rms[0] > 50


def test_a_real_training_picture_is_not_its_own_copy():
    near = nearest_training(SMALL[[7]], FEATURES[[7]], gallery(count=50), own=np.array([107]))
    assert near.position[0] != 7 and near.rms[0] > 50 and near.cosine[0] < 0.99


def test_thumbnails_are_box_means():
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    picture[0, ::2] = 200  # rows 200, 0, 200, 0, …
    assert (thumbnails(picture) == 100).all() and thumbnails(picture).shape == (1, 32, 32, 3)
