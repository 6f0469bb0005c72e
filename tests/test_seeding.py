"""Streams depend on the seed and every word of the role; global states are put back."""

import random

import numpy as np
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


def test_tie_keys_are_distinct_and_belong_to_the_position():
    ids = torch.arange(100_000)
    keys = TieBreak(5)(ids)
    assert len(keys.unique()) == len(ids)
    order = torch.randperm(len(ids))
    assert torch.equal(TieBreak(5)(ids[order]), keys[order])
    assert not torch.equal(TieBreak(6)(ids), keys)
