"""Laws over the whole registry: every strategy in conf/strategy, whatever it is made of."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from dgal_bench.config.compose import group_names
from dgal_bench.config.schema import StrategyConfig
from dgal_bench.conformance import BATCH, LAWS, ExampleQuery, example_config
from dgal_bench.core.errors import ConfigError
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Run
from dgal_bench.graph import knn as backends
from dgal_bench.graph.diffusion import diffuse, score
from dgal_bench.strategies import ACQUISITIONS, RESTRICTIONS, Resources, build, resolve_parts

STRATEGIES = group_names("strategy")

# Points passed through the task network: by criterion, given the m candidates and the labeled; by restriction before.
N_SCORED = {
    "random": lambda m, labeled: 0,
    "adversary": lambda m, labeled: 0,
    "k_center": lambda m, labeled: m + labeled,
}


@pytest.mark.parametrize("law", LAWS)
def test_every_strategy_keeps_every_law(experiment, strategy, law):
    LAWS[law](experiment, strategy)


def test_seed_and_round_matter(experiment, strategy):
    """Over several seeds and rounds the batches differ: nothing is drawn from one stream twice."""
    batches = {
        tuple(ExampleQuery(experiment, strategy, seed, round_=round_).select().indices.tolist())
        for seed in (0, 1)
        for round_ in (0, 1)
    }
    assert len(batches) == 4


def test_the_streams_of_a_round_belong_to_seed_and_round_alone(experiment):
    """The query's draws and its order of ties: another seed or round has others, another strategy the same."""
    ids = torch.arange(5)

    def streams(strategy, seed, round_):
        query = ExampleQuery(experiment, strategy, seed, round_=round_).query
        return query.rng.random(), tuple(query.ties(ids).tolist())

    rounds = [streams("random", seed, round_) for seed in (0, 1) for round_ in (0, 1)]
    for stream in zip(*rounds, strict=True):
        assert len(set(stream)) == 4
    assert rounds == [streams("dgmg", seed, round_) for seed in (0, 1) for round_ in (0, 1)]


def everything_reachable(root):
    """Every object that references lead to, short of modules, classes and code."""
    stop = (type(gc), type, type(everything_reachable), property, staticmethod)
    seen, stack = {id(root): root}, [root]
    while stack:
        for child in gc.get_referents(stack.pop()):
            if id(child) not in seen and not isinstance(child, stop):
                seen[id(child)] = child
                stack.append(child)
    return seen.values()


def test_no_unlabeled_label_is_readable(experiment, strategy):
    """No tensor or array that a query leads to tells more labels of the pool than are known."""
    asked = ExampleQuery(experiment, strategy)
    truth, unlabeled = experiment.data.labels, asked.pool.unlabeled
    for thing in everything_reachable([asked.query, asked.run.strategy]):
        if isinstance(thing, torch.Tensor | np.ndarray) and thing.shape == (len(truth),):
            values = torch.as_tensor(np.asarray(thing))
            assert (values[unlabeled] == truth[unlabeled]).float().mean() < 0.5, "true labels are in reach"


def test_points_scored_are_those_of_the_specification(experiment, strategy):
    asked = ExampleQuery(experiment, strategy)
    candidates = asked.select().candidates
    config = asked.run.config.strategy
    n_u = len(asked.pool.unlabeled)
    scored = N_SCORED.get(config.acquire["kind"], lambda m, labeled: m)(len(candidates), 12)
    assert asked.predict.n_scored == (experiment.data.size if config.restrict["kind"] == "model_neighbors" else scored)
    if config.restrict["kind"] == "everything":
        assert len(candidates) == n_u
    elif config.restrict.get("restricted_size"):
        assert len(candidates) == 20
    else:
        assert BATCH <= len(candidates) <= 12 * config.restrict["seals_k"]
    if config.acquire["kind"] == "adversary":
        assert asked.query.notes["aux_scored"]() == n_u


def test_every_part_is_in_some_strategy():
    used = [resolve_parts(example_config(name).strategy) for name in STRATEGIES]
    assert {config.restrict["kind"] for config in used} == set(RESTRICTIONS)
    assert {config.acquire["kind"] for config in used} == set(ACQUISITIONS)


def criterion(name, probs):
    """Small = take it; by numpy, one point at a time."""
    ranked = np.sort(probs)[::-1]
    return {
        "margin": ranked[0] - ranked[1],
        "least_confidence": ranked[0],
        "entropy": sum(p * np.log(p) for p in probs if p > 0),
    }[name]


@pytest.mark.parametrize("name", ["margin", "lc", "entropy"])
def test_uncertainty_is_the_sort_of_its_formula(experiment, name):
    asked = ExampleQuery(experiment, name)
    unlabeled = asked.pool.unlabeled
    kind = asked.run.config.strategy.acquire["kind"]
    scores = [criterion(kind, row) for row in asked.predict(unlabeled).probs.double().numpy()]
    expected = unlabeled[np.argsort(scores, kind="stable")[:BATCH].copy()]
    assert asked.select().indices.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["ova_min", "ova_norm", "confidence", "margin", "negentropy", "normalised"])
def test_diffusion_takes_the_smallest_scores_ties_by_hash(experiment, name):
    asked = ExampleQuery(experiment, "dgmg")
    run = Run.of(
        example_config("dgmg", f"strategy.restrict.score={name}", "strategy.restrict.diffusion_steps=2"), experiment
    )
    pool, query = asked.pool, asked.query
    heat = diffuse(run.graph, pool.labeled, pool.labels, 10, 2)
    scores, keys = score(name)(heat).tolist(), query.ties(torch.arange(pool.size)).tolist()
    expected = sorted(pool.unlabeled.tolist(), key=lambda i: (scores[i], keys[i]))[:20]
    assert run.strategy.restrict(query).tolist() == expected
    taken = [scores[i] for i in expected]
    left = [scores[i] for i in set(pool.unlabeled.tolist()) - set(expected)]
    share = taken.count(max(taken)) / 20 if max(taken) in left else 0.0
    assert query.notes["ties"]() == pytest.approx(share)
    forgets = replace(run.strategy.restrict, memory_limit=0)  # by the whole product, and the scores of all points
    assert forgets(query).tolist() == expected


def test_labeled_points_are_no_candidates_where_all_scores_are_equal(experiment):
    """With one class every point is as certain as a labeled one, and as many are asked for as there are points."""
    asked = ExampleQuery(experiment, "dgmg")
    pool = Pool(asked.pool.size, 1, asked.pool.labeled, torch.zeros_like(asked.pool.labels))
    restrict = Run.of(example_config("dgmg", "strategy.restrict.score=confidence"), experiment).strategy.restrict
    for limit in (restrict.memory_limit, 0):
        greedy = replace(restrict, restricted_size=pool.size, memory_limit=limit)
        assert sorted(greedy(replace(asked.query, pool=pool)).tolist()) == pool.unlabeled.tolist()


def test_diffusion_breaks_ties_by_position_where_told(experiment):
    """After one step most of the pool is unreached, so all of it ties: the first of the data set are taken."""
    asked = ExampleQuery(experiment, "dgmg")
    settings = ("strategy.restrict.tie_break=position", "strategy.restrict.diffusion_steps=1")
    run = Run.of(example_config("dgmg", *settings), experiment)
    pool, query = asked.pool, asked.query
    scores = score("ova_min")(diffuse(run.graph, pool.labeled, pool.labels, 10, 1)).tolist()
    expected = sorted(pool.unlabeled.tolist(), key=lambda i: (scores[i], i))[:20]
    assert run.strategy.restrict(query).tolist() == expected
    assert query.notes["ties"]() > 0.5


def test_uniform_restriction_is_uniform(experiment):
    """Each of 188 points is among 20 candidates with chance 0.106; 400 rounds, within 6 deviations of 0.0154."""
    counts = torch.zeros(experiment.data.size)
    asked = ExampleQuery(experiment, "rsmg")
    for round_ in range(400):
        counts[asked.run.strategy.restrict(asked.run.query(asked.pool, asked.predict, asked.clock, round_))] += 1
    rates = counts[asked.pool.unlabeled] / 400
    assert rates.mean() == pytest.approx(20 / 188, abs=1e-6)
    assert (rates - 20 / 188).abs().max() < 0.093


class TestConfiguration:
    def build(self, restrict=None, acquire=None):
        config = StrategyConfig("mine", restrict or {"kind": "everything"}, acquire or {"kind": "margin"})
        return resolve_parts(config)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (
                {"kind": "diffusoin", "restricted_size": 5},
                "unknown strategy.restrict.kind 'diffusoin'; did you mean 'diffusion'",
            ),
            (
                {"kind": "diffusion", "restricted_size": 5, "step": 3},
                "strategy.restrict.step is no setting of 'diffusion'",
            ),
            (
                {"kind": "diffusion", "restricted_size": 5, "score": "marign"},
                "unknown score 'marign'; did you mean 'margin'",
            ),
            (
                {"kind": "diffusion", "restricted_size": 5, "tie_break": "positon"},
                "unknown tie_break 'positon'; did you mean 'position'",
            ),
            ({"kind": "diffusion", "restricted_size": 5, "diffusion_steps": 0}, "diffusion_steps=0 is too small"),
            (
                {"kind": "uniform", "restricted_size": "many"},
                "strategy.restrict.restricted_size='many' is not of type int",
            ),
            ({"kind": "uniform"}, "needs restricted_size"),
            ({"restricted_size": 5}, "strategy.restrict has no kind"),
        ],
    )
    def test_a_mistake_is_named(self, part, message):
        with pytest.raises(ConfigError) as caught:
            self.build(restrict=part)
        assert message in str(caught.value)

    def test_defaults_are_written_out(self):
        part = self.build(restrict={"kind": "diffusion", "restricted_size": 5}).restrict
        assert part == {
            "kind": "diffusion",
            "restricted_size": 5,
            "diffusion_steps": None,
            "score": "ova_min",
            "p": 2.0,
            "tie_break": "hash",
            "memory_limit": 8 << 30,
        }

    def test_equal_settings_have_equal_hashes(self):
        whole, broken = (example_config("dgmg", f"strategy.restrict.p={p}") for p in ("2", "2.0"))
        assert whole.hash == broken.hash == example_config("dgmg").hash

    def test_the_graph_is_handed_in(self, experiment):
        config = self.build(restrict={"kind": "diffusion", "restricted_size": 5})
        resources = Resources(experiment.prepared.graph, experiment.prepared.features, backends.build_index)
        assert build(config, resources).restrict.graph is experiment.prepared.graph
