"""benchmarks/diffusion.py: a quick run has every row, and it notices a product that is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import diffusion, products, repetitions
from benchmarks.points import points
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import transition


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(diffusion, "bandwidth", lambda: 1e10)
    monkeypatch.setattr(repetitions.gc, "collect", lambda: 0)


def run(tmp_path, *words):
    out = tmp_path / "diffusion.json"
    words = ["--points", "1000", "--most-points", "4000", "--classes", "3", "--repeats", "1", "--out", str(out), *words]
    return diffusion.main(words), json.loads(out.read_text())


def test_a_run_compares_what_it_says(tmp_path, capsys):
    code, results = run(tmp_path, "--kinds", "clustered", "--points", "1000", "1500")
    assert code == 0
    assert [row["points"] for row in results["graphs"]] == [1000, 1500]
    for row in results["graphs"]:
        assert set(row["step_3"]["ms"]) == {
            products.OURS, products.BAGS, products.TORCH, products.TORCH_OURS, products.SCIPY
        }  # fmt: skip
        assert set(row["new_10"]) == set(row["new_50"]) == {products.FULL, products.INCREMENTAL, products.PEER}
        assert row["new_10"][products.FULL]["touched"] == 1
        assert 0 < row["new_10"][products.INCREMENTAL]["touched"] <= 1
    (tied,) = results["tied"]
    assert (tied["points"], tied["wrong"], set(tied["ms"])) == (4000, [], {products.OURS, diffusion.RANK_ALL})
    assert "x floor" in capsys.readouterr().out


def wrong(results):
    return {name for row in results["graphs"] for name in row["wrong"]}


def test_a_wrong_product_fails_the_run(tmp_path, monkeypatch):
    right = products.step
    monkeypatch.setattr(products, "step", lambda graph, values, out: right(graph, values, out).mul_(1 + 1e-6))
    code, results = run(tmp_path, "--kinds", "manifold")
    assert code == 1
    assert wrong(results) == {f"{name}, 3 classes" for name in (products.OURS, products.BAGS)}


def swapped(candidates):
    return candidates[[1, 0, *range(2, len(candidates))]]


def doubled(candidates):
    return candidates[[0, 0, *range(2, len(candidates))]]


@pytest.mark.parametrize("broken", [swapped, doubled, lambda candidates: candidates[:-1]])
@pytest.mark.parametrize("seen", [1, 3])
def test_a_restriction_that_goes_on_wrongly_fails_the_run_whenever_it_does(tmp_path, monkeypatch, broken, seen):
    """From the ``seen``-th time on, of which the first is for warmth."""
    times = []

    class Broken(products.Diffusion):
        def __call__(self, query):
            candidates = super().__call__(query)
            times.append(bool(query.memory))
            return broken(candidates) if query.memory and sum(times) >= seen else candidates

    monkeypatch.setattr(products, "Diffusion", Broken)
    code, results = run(tmp_path, "--kinds", "clustered", "--repeats", "3")
    assert code == 1
    assert wrong(results) == {f"{products.INCREMENTAL}, {new} new" for new in (10, 50)}


@pytest.mark.parametrize("kind", ["clustered", "manifold"])
def test_a_full_restriction_that_takes_other_points_is_found(tmp_path, monkeypatch, kind):
    """Even where ours would agree among themselves: the points that come after the hundred lowest."""

    class Next(products.Diffusion):
        def __call__(self, query):
            return replace(self, restricted_size=2 * self.restricted_size).lowest(query)[self.restricted_size :]

        def lowest(self, query):
            return products.Diffusion.__mro__[1].__call__(self, query)

    monkeypatch.setattr(products, "Diffusion", Next)
    code, results = run(tmp_path, "--kinds", kind)
    assert code == 1
    assert {products.FULL + ", 10 new", products.INCREMENTAL + ", 10 new"} <= wrong(results)


def test_a_peer_is_right_if_scores_within_rounding_are_and_wrong_otherwise():
    natural = products.Natural(transition(knn(torch.from_numpy(points("manifold", 1000, 10)), 20)))
    pool = products.pool_of(1000, 10, 70)
    right = products.right_candidates(natural, pool, 100)
    maker = products.restrictions(natural, products.pool_of(1000, 10, 60), pool, 100)[products.PEER]
    answer = maker()()
    assert right(products.PEER, answer)
    others = pool.unlabeled[~torch.isin(pool.unlabeled, answer.candidates)]
    highest = int(products.precise(natural, pool)[0][others].argmax())
    for place, point in ((0, others[highest]), (0, answer.candidates[1]), (99, pool.labeled[0])):
        candidates = answer.candidates.clone()
        candidates[place] = point
        assert not right(products.PEER, replace(answer, candidates=candidates))
