"""SEALS: candidates are the union of the labeled points' neighbours, by brute force, within their bounds."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from dgal_bench.conformance import BATCH, ExampleQuery, example_config, run_in_process
from dgal_bench.core.types import Outputs
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Run
from dgal_bench.graph.knn import build_index
from dgal_bench.strategies import Resources, build
from dgal_bench.strategies.seals import ModelNeighbors, neighbor_mask


def brute_force(features, labeled, k):
    """A loop over labeled points and a full sort for each."""
    union = set()
    for point in labeled.tolist():
        distances = (features.double() - features[point].double()).norm(dim=1)
        order = [other for other in distances.argsort(stable=True).tolist() if other != point]
        union |= set(order[:k])
    return sorted(union - set(labeled.tolist()))


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("k", [1, 5, 40, 500])
def test_the_mask_is_the_brute_force_union(backend, k):
    features = torch.randn(120, 6, generator=torch.Generator().manual_seed(k))
    labeled = torch.tensor([3, 77, 8, 110])
    mask = neighbor_mask(labeled, features, build_index(features, backend), k)
    mask[labeled] = False
    assert torch.nonzero(mask).flatten().tolist() == brute_force(features, labeled, k)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_models_neighbours_are_exact_for_features_far_from_0_and_close_together(experiment, backend, shift):
    """Where |x|^2 + |y|^2 - 2 x.y in float32 would lose the order: by brute force in float64, above any limit too."""
    features = shift + torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    made = partial(build_index, backend=backend, exact_limit=10)
    pool = Pool(600, 10, torch.tensor([5, 77, 300]), torch.tensor([0, 1, 2]))

    def predict(indices, phase="infer"):
        return Outputs(torch.zeros(len(indices), 10), features[indices])

    query = replace(ExampleQuery(experiment, "seals").query, pool=pool, predict=predict)
    assert ModelNeighbors(new_index=made, seals_k=30)(query).tolist() == brute_force(features, pool.labeled, 30)


def test_a_point_is_no_neighbour_of_its_own_even_among_duplicates():
    features = torch.randn(10, 3).repeat_interleave(20, dim=0)
    labeled = torch.arange(0, 200, 20)
    mask = neighbor_mask(labeled, features, build_index(features), 5)
    assert not mask[labeled].any()  # the five nearest are copies of it, never the point itself
    assert int(mask.sum()) == 50


@pytest.mark.parametrize("n_labeled", [1, 12, 150])
@pytest.mark.parametrize("strategy", ["seals", "seals_margin"])
def test_the_models_neighbours_are_those_of_its_features_now(experiment, strategy, n_labeled):
    asked = ExampleQuery(experiment, strategy, n_labeled=n_labeled)
    candidates = asked.run.strategy.restrict(asked.query)
    features = asked.predict(torch.arange(experiment.data.size)).features
    assert candidates.tolist() == brute_force(features, asked.pool.labeled, 10)
    assert len(candidates) <= 10 * n_labeled
    assert asked.predict.n_scored == experiment.data.size  # embedded once, and not again by the criterion
    seconds = asked.clock.seconds
    assert {"embed", "index", "search"} <= seconds.keys()


@pytest.mark.parametrize("n_labeled", [1, 12, 150])
def test_the_graphs_neighbours_are_those_of_the_latents(experiment, n_labeled):
    asked = ExampleQuery(experiment, "vae_seals", n_labeled=n_labeled)
    candidates = asked.run.strategy.restrict(asked.query)
    assert candidates.tolist() == brute_force(experiment.prepared.features, asked.pool.labeled, 10)
    assert asked.predict.n_scored == 0


def test_the_graphs_neighbours_are_searched_once_for_each_label(experiment):
    """Over rounds: the same candidates with what was remembered as without it, and only new labels are searched."""
    asked = ExampleQuery(experiment, "vae_seals")
    searched, built = [], []

    def counting(features):
        built.append(len(features))
        search = build_index(features)

        def count(queries, k):
            searched.append(len(queries))
            return search(queries, k)

        return count

    run, pool, memory = asked.run, asked.pool, {}
    restrict = build(run.config.strategy, Resources(run.graph, experiment.prepared.features, counting)).restrict
    sizes = []
    for round_ in range(4):
        query = run.query(pool, asked.predict, asked.clock, round_, memory)
        candidates = restrict(query)
        assert candidates.tolist() == brute_force(experiment.prepared.features, pool.labeled, 10)
        sizes.append(len(candidates))
        memory = query.remembered
        pool = pool.annotate(candidates[:BATCH], experiment.data.labels[candidates[:BATCH]])
    assert searched == [12, 5, 5, 5]
    assert built == [200]
    assert all(later <= earlier + 10 * BATCH for earlier, later in itertools.pairwise(sizes))


@pytest.mark.parametrize("strategy", ["seals_matched", "vae_seals_matched"])
def test_matched_is_a_uniform_part_of_the_union(experiment, strategy):
    """20 of the union, every candidate about equally often: 300 rounds, within 6 deviations."""
    asked = ExampleQuery(experiment, strategy)
    whole = ExampleQuery(experiment, strategy.removesuffix("_matched")).run.strategy.restrict
    restrict = asked.run.strategy.restrict
    union = whole(asked.query)
    counts = torch.zeros(experiment.data.size)
    for round_ in range(300):
        drawn = restrict(asked.run.query(asked.pool, asked.predict, asked.clock, round_))
        assert len(drawn.unique()) == 20
        counts[drawn] += 1
    share = 20 / len(union)
    assert counts.sum() == counts[union].sum()
    assert (counts[union] / 300 - share).abs().max() < 6 * (share * (1 - share) / 300) ** 0.5


def test_ratio_gives_each_first_label_its_share_of_a_restriction():
    assert example_config("seals", "seals_k=ratio", "initial_size=4").strategy.restrict["seals_k"] == 5  # 20 / 4
    assert example_config("seals", "seals_k=ratio", "initial_size=100").strategy.restrict["seals_k"] == 1
    assert example_config("seals", "seals_k=100").strategy.restrict["seals_k"] == 100


@pytest.mark.parametrize("strategy", ["seals", "vae_seals", "dgmg"])
def test_fewer_candidates_than_the_batch_are_topped_up_uniformly_and_the_row_says_so(experiment, tmp_path, strategy):
    """One neighbour of one label, or a restricted_size below the batch: the rest is drawn from the unlabeled."""
    few = {"dgmg": "strategy.restrict.restricted_size=2"}.get(strategy, "seals_k=1")
    config = example_config(strategy, few, "initial_size=1")
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    assert rows[0].extra["topped_up"] == (3 if strategy == "dgmg" else 4)
    assert rows[0].n_candidates == BATCH
    assert len(set(rows[0].indices)) == BATCH
    chosen = set()
    for round_ in range(30):
        asked = ExampleQuery(experiment, strategy, n_labeled=1, round_=round_)
        selection = Run.of(config, experiment).strategy.select(asked.query, BATCH)
        asked.pool.check(selection.indices, BATCH)
        chosen |= set(selection.indices.tolist())
    assert len(chosen) > 60  # 30 rounds of 3 or 4 uniform draws of 199
