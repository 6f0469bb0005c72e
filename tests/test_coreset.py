"""CoreSet: the incremental greedy is the exhaustive one, and its cover is at most twice the best there is."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgal_bench.conformance import BATCH, ExampleQuery
from dgal_bench.core.seeding import TieBreak
from dgal_bench.strategies import coreset
from dgal_bench.strategies.coreset import farthest_first
from tests import reference


def picked(features, centres, batch_size, seed=0):
    return farthest_first(features, centres, batch_size, torch.arange(len(features)), TieBreak(seed, len(features)))


def points(n_points, n_features, seed, shift=0.0):
    return shift + torch.randn(n_points, n_features, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(0, 10_000), st.sampled_from([0.0, 30.0]))
def test_it_equals_the_exhaustive_greedy(n_points, n_features, n_centres, seed, shift):
    features, centres = points(n_points, n_features, seed, shift), points(n_centres, n_features, seed + 1, shift)
    batch_size = min(n_points, 12)
    places, n_indistinct = picked(features, centres, batch_size)
    assert places.tolist() == reference.k_center(features.double().numpy(), centres.double().numpy(), batch_size)
    assert n_indistinct == 0


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_it_equals_the_exhaustive_greedy_in_clusters_much_tighter_than_they_are_apart(spread):
    """Two clusters around +-50 in 50 dimensions: the expansion of squared distances alone would lose their insides."""
    rng = torch.Generator().manual_seed(1)
    centre = torch.where(torch.rand(200, 1, generator=rng) < 0.5, -50.0, 50.0)
    features = centre + 50 * spread * torch.randn(200, 50, generator=rng)
    places, n_indistinct = picked(features, features[:3], 12)
    assert places.tolist() == reference.k_center(features.double().numpy(), features[:3].double().numpy(), 12)
    assert n_indistinct == 0


def test_the_first_centres_may_come_in_blocks(monkeypatch):
    features, centres = points(500, 8, 0), points(37, 8, 1)
    whole = picked(features, centres, 20)[0]
    monkeypatch.setattr(coreset, "BLOCK", 100)
    assert torch.equal(picked(features, centres, 20)[0], whole)


@pytest.mark.parametrize("seed", range(10))
def test_its_radius_is_at_most_twice_the_best_there_is(seed):
    """10 points, 1 labeled, 3 picks: the optimum over all 84 choices."""
    space = points(10, 2, seed).double().numpy()
    centre, rest = space[:1], space[1:]

    def radius(picks):
        centres = np.concatenate([centre, rest[list(picks)]])
        return np.linalg.norm(rest[:, None] - centres[None], axis=2).min(axis=1).max()

    best = min(radius(picks) for picks in itertools.combinations(range(9), 3))
    found = picked(torch.from_numpy(rest).float(), torch.from_numpy(centre).float(), 3)[0].tolist()
    assert best <= radius(found) <= 2 * best


def test_the_radius_never_grows_from_pick_to_pick():
    features, centres = points(200, 5, 3), points(4, 5, 4)
    places = picked(features, centres, 50)[0]
    radii = []
    for n in range(50):
        distances = torch.cdist(features, torch.cat([centres, features[places[:n]]]))
        radii.append(float(distances.amin(dim=1).max()))
    assert radii == sorted(radii, reverse=True)


def test_points_that_coincide_are_picked_once_each_by_the_hash_and_counted():
    features = points(1, 6, 0, shift=50.0).repeat(40, 1)
    firsts = set()
    for seed in range(20):
        places, n_indistinct = picked(features, features[:1], 10, seed)
        assert len(set(places.tolist())) == 10
        assert n_indistinct == 10
        firsts.add(int(places[0]))
    assert len(firsts) > 10


def test_copies_of_a_pick_come_last():
    features = points(15, 6, 5).repeat_interleave(4, dim=0)
    places, n_indistinct = picked(features, features[:1], 16)
    assert sorted((places[:14] // 4).tolist()) == list(range(1, 15))
    assert n_indistinct == 2


def test_it_starts_from_the_labeled_features(experiment):
    """By the exhaustive greedy on the network's own features, labeled points as first centres."""
    asked = ExampleQuery(experiment, "coreset")
    indices = asked.select().indices
    unlabeled, labeled = asked.pool.unlabeled, asked.pool.labeled
    features = asked.predict(torch.arange(experiment.data.size)).features.double().numpy()
    expected = reference.k_center(features[unlabeled], features[labeled], BATCH)
    assert indices.tolist() == unlabeled[expected].tolist()
    assert asked.query.notes["indistinct"]() == 0


@pytest.mark.parametrize("strategy", ["badge", "coreset"])
def test_a_pool_of_one_image_many_times_is_still_a_batch(experiment, strategy):
    """Duplicated images: all distances are 0, and which are picked is up to the seed."""
    from dataclasses import replace

    same = experiment.data.images[:1].expand_as(experiment.data.images).contiguous()
    twins = replace(experiment, data=replace(experiment.data, images=same))
    batches = set()
    for seed in range(4):
        asked = ExampleQuery(twins, strategy, seed)
        batch = asked.select().indices
        asked.pool.check(batch, BATCH)
        assert asked.query.notes["indistinct"]() >= BATCH - 1
        batches.add(tuple(batch.tolist()))
    assert len(batches) == 4
