"""Selection without a sort equals the sort; ties never depend on place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgal_bench.core.errors import UserError
from dgal_bench.core.seeding import TieBreak
from dgal_bench.core.types import margins, smallest, tied_share

levels = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, float("inf")]), min_size=1, max_size=60)


@given(levels, st.integers(0, 2**62), st.data())
def test_smallest_is_the_head_of_a_full_sort(values, seed, data):
    scores = torch.tensor(values)
    size = data.draw(st.integers(0, len(values)))
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[: len(values)]
    ties = TieBreak(seed, int(ids.max()) + 1)
    keys = ties(ids).tolist()
    truth = sorted(range(len(values)), key=lambda place: (values[place], keys[place]))[:size]
    assert smallest(scores, size, ids, ties).tolist() == truth


@given(levels, st.integers(0, 2**62), st.data())
def test_which_points_are_taken_does_not_depend_on_their_order(values, seed, data):
    scores, ids = torch.tensor(values), torch.arange(len(values))
    size = data.draw(st.integers(0, len(values)))
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    taken = ids[smallest(scores, size, ids, TieBreak(seed, int(ids.max()) + 1))]
    again = ids[shuffled][smallest(scores[shuffled], size, ids[shuffled], TieBreak(seed, int(ids.max()) + 1))]
    assert taken.tolist() == again.tolist()


def test_ties_in_a_pool_stored_class_by_class_do_not_pick_one_class():
    """10,000 unreached points of score 0: positions would take class 0 alone, the hash takes all ten."""
    classes = torch.arange(10).repeat_interleave(1000)
    chosen = smallest(torch.zeros(10_000), 100, torch.arange(10_000), TieBreak(7, 10_000))
    counts = torch.bincount(classes[chosen], minlength=10)
    assert counts.min() >= 1  # the chance that a uniform draw misses some class is 10 x 0.9^100 = 3e-4
    assert counts.max() <= 25  # 10 expected, 5 standard deviations above


def test_nan_and_too_many_are_refused():
    with pytest.raises(UserError, match="1 of 3 scores are NaN"):
        smallest(torch.tensor([0.0, float("nan"), 1.0]), 1, torch.arange(3), TieBreak(0, 3))
    with pytest.raises(ValueError, match="4 of 3"):
        smallest(torch.zeros(3), 4, torch.arange(3), TieBreak(0, 3))


def test_tied_share_counts_what_the_hash_decided():
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    assert tied_share(scores, torch.tensor([0, 1, 2])) == pytest.approx(2 / 3)  # one 1.0 was left behind
    assert tied_share(scores, torch.tensor([0, 1, 2, 3])) == 0.0  # the level fitted whole
    assert tied_share(scores, torch.tensor([], dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("n_classes", [2, 3, 26])
def test_margins_are_the_difference_of_the_two_largest_of_a_sort(n_classes):
    values = torch.rand(200, n_classes)
    values[:50] = values[:50].round(decimals=1)  # with ties for the first place
    ordered = values.sort(dim=1, descending=True).values
    assert torch.equal(margins(values), ordered[:, 0] - ordered[:, 1])
