"""Streams depend on the seed and every word of the role; global states are put back."""

import itertools
import random
from collections import Counter
from math import sqrt

import numpy as np
import pytest
import torch

from dgal_bench.core.seeding import TieBreak, isolated, rng_for, seed_for


def test_streams_differ_by_seed_and_by_each_word():
    roles = [
        (0, "query", 1),
        (1, "query", 1),
        (0, "query", 2),
        (0, "initial", 1),
        (0, "query", 1, 1),
        (0, "query", "1"),
    ]
    assert len({seed_for(*role) for role in roles}) == len(roles)
    assert rng_for(0, "query", 1).integers(2**62) == rng_for(0, "query", 1).integers(2**62)


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_isolated_is_seeded_and_leaves_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = global_states()
    with isolated(3, "weights", 0):
        first = draw()
    assert global_states() == before
    draw()
    with isolated(3, "weights", 0):
        assert draw() == first
    with isolated(3, "weights", 1):
        assert draw() != first


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1797, 100_000])
def test_tie_keys_are_ranks_of_a_permutation_that_goes_both_ways(size):
    ids, ties = torch.arange(size), TieBreak(5, size)
    assert ties(ids).sort().values.tolist() == ids.tolist()
    assert torch.equal(ties.at(ties(ids)), ids)
    some = torch.randperm(size)[:50]
    assert torch.equal(ties(some), ties(ids)[some])  # a rank belongs to the position alone
    assert size < 64 or not torch.equal(TieBreak(6, size)(ids), ties(ids))


def test_over_seeds_every_pair_of_points_comes_first_as_often():
    """Of 30 points: 870 ordered pairs, 5 times each expected; chi-square with 869 degrees of freedom."""
    pairs = Counter(tuple(TieBreak(seed_for(seed, "ties"), 30).at(torch.arange(2)).tolist()) for seed in range(4_350))
    deviation = sum((pairs[pair] - 5) ** 2 / 5 for pair in itertools.permutations(range(30), 2))
    assert deviation < 869 + 4 * sqrt(2 * 869)


def test_many_millions_of_positions_are_not_looked_through():
    first = TieBreak(7, 10**13).at(torch.arange(5))
    assert TieBreak(7, 10**13)(first).tolist() == [0, 1, 2, 3, 4]
