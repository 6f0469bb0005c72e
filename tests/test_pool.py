"""Labeled and unlabeled points partition the pool; every bad batch is caught; the initial set is shared."""

import pytest
import torch

from dgal_bench.core.errors import ConfigError, StrategyError
from dgal_bench.data.pool import Pool, initial_set


def pool_of(labeled, size=10):
    return Pool(size, 3, torch.tensor(labeled), torch.zeros(len(labeled), dtype=torch.int64))


def test_annotate_moves_points_and_keeps_the_partition():
    pool = pool_of([7, 2]).annotate(torch.tensor([0, 9]), torch.tensor([2, 1]))
    assert pool.labeled.tolist() == [7, 2, 0, 9]
    assert pool.labels.tolist() == [0, 0, 2, 1]
    assert sorted(pool.labeled.tolist() + pool.unlabeled.tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 3, 4], "picked 3 points where the batch size is 2"),
        ([1, 1], "1 of 2 points twice"),
        ([1, 7], "1 of 2 points that are labeled already"),
        ([1, 10], r"picked \[10\], outside the pool of 10"),
        ([-1, 1], r"picked \[-1\], outside"),
    ],
)
def test_check_distrusts_a_batch(batch, message):
    with pytest.raises(StrategyError, match=message):
        pool_of([7, 2]).check(torch.tensor(batch), 2)


def test_check_wants_positions():
    with pytest.raises(StrategyError, match="int64"):
        pool_of([7]).check(torch.tensor([0.0, 1.0]), 2)


LABELS = torch.arange(3).repeat_interleave(40)


def test_initial_set_depends_on_the_seed_alone():
    first = initial_set(LABELS, 3, 12, seed=0)
    assert torch.equal(first, initial_set(LABELS, 3, 12, seed=0))
    assert not torch.equal(first, initial_set(LABELS, 3, 12, seed=1))
    assert len(first.unique()) == 12
    # Uniform: it does not look at the labels.
    assert torch.equal(first, initial_set(LABELS.flip(0), 3, 12, seed=0))


@pytest.mark.parametrize("size", [3, 4, 11, 30])
def test_balanced_initial_set_is_as_even_as_can_be(size):
    counts = torch.bincount(LABELS[initial_set(LABELS, 3, size, seed=0, balanced=True)], minlength=3)
    assert counts.max() - counts.min() <= 1


def test_initial_set_must_leave_something_to_query():
    with pytest.raises(ConfigError, match="initial_size=120, but the pool has 120 points: use 1 to 119"):
        initial_set(LABELS, 3, 120, seed=0)
    with pytest.raises(ConfigError, match="no point in the pool"):
        initial_set(LABELS, 4, 30, seed=0, balanced=True)
