"""Exact and approximate neighbours against brute force; a recall is reached or an error; threads change no bit."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgal_bench.config.compose import compose
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.system import on_threads, workers
from dgal_bench.graph import ivf
from dgal_bench.graph.exact_knn import (
    all_exact,
    candidates,
    distance_table,
    exact,
    merge_rankings,
    nearest_to,
    smallest_columns,
)
from dgal_bench.graph.knn import knn

CHOICES = {"dataset": "digits", "representation": "vae", "profile": "cpu", "strategy": "dgmg"}


def cloud(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def islands(n, d=8, n_islands=12):
    centres = cloud(n_islands, d, seed=9) * 6
    return cloud(n, d) + centres[torch.arange(n) % n_islands]


def sheet(n, d=10):
    return torch.sin(torch.rand(n, 2, generator=torch.Generator().manual_seed(4)) @ cloud(2, d, seed=5) * 3)


KINDS = {
    "islands": islands(2000),
    "sheet": sheet(2000),
    "uniform": torch.rand(1500, 4, generator=torch.Generator().manual_seed(6)),
    "duplicates": islands(40).repeat(60, 1),
    "unbalanced": torch.cat([cloud(1500, 6) * 0.01, cloud(300, 6, seed=2) * 30]),
    "all equal": torch.ones(1500, 3),
    "far away": islands(1500) + 5000,
}
FAST = ("islands", "duplicates")


def tight(separation, n=1000, n_islands=2):
    """Islands so far apart that |x|^2 - 2xy cannot tell their points apart."""
    return cloud(n) * 0.02 + separation * (torch.arange(n) % n_islands)[:, None]


HARD = {
    "50": tight(50),
    "200": tight(200),
    "1000": tight(1000),
    "many": tight(300, n_islands=30),
    "islands of islands": tight(10, n_islands=4) + 5000 * (torch.arange(1000) // 500)[:, None],
    "an outlier": torch.cat([cloud(900), torch.full((1, 5), 1e6)]),
    "all scales": cloud(900) * 10 ** (torch.rand(900, 1, generator=torch.Generator().manual_seed(7)) * 12 - 6),
    "duplicates": torch.cat([cloud(50).repeat(12, 1) * 0.02, tight(400, 300)]),
    "a pile far away": torch.cat([tight(0, 500), torch.full((300, 5), 1e3)]),
}


def true_distances(features, k):
    found = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return found.fill_diagonal_(torch.inf).topk(k, largest=False).values, found


def check_neighbors(features, neighbors, k):
    """Distances are those of the ids, ascending; no point is its own neighbour, or another's twice."""
    _, found = true_distances(features, k)
    torch.testing.assert_close(neighbors.distances.double(), found.gather(1, neighbors.ids), atol=1e-3, rtol=1e-4)
    assert (neighbors.distances.diff(dim=1) >= 0).all()
    assert (neighbors.ids != torch.arange(len(features))[:, None]).all()
    assert (neighbors.ids.sort(dim=1).values.diff(dim=1) > 0).all()


def share_found(features, neighbors, k):
    true, _ = true_distances(features, k)
    rounding = 2**-22 * float(features.abs().max())  # of float32, when the features are centred
    return float((neighbors.distances <= true[:, -1:] * (1 + 1e-5) + rounding).double().mean())


@given(st.integers(1, 6), st.integers(1, 5000), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_smallest_of_each_row_are_found_with_and_without_groups(n_rows, n, w, ties, seed):
    values = cloud(n_rows, n, seed)
    values = values.mul(2).round() if ties else values
    w = min(w, n)
    found = smallest_columns(values, w)
    assert torch.equal(values.gather(1, found).sort(1).values, values.sort(1).values[:, :w])
    assert (found.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("n", [1, 600, 8192, 8193, 9300])
def test_candidates_of_one_tile_or_several_are_distinct_and_have_the_nearest(n):
    """More columns than 8,192 are compared in tiles, of which the last is cut short; many distances are equal."""
    base, queries, w = cloud(n, 3).round(), cloud(50, 3, 1).round(), min(n, 28)
    distances = torch.cdist(queries, base, compute_mode="donot_use_mm_for_euclid_dist")
    columns = distance_table(base)
    found = candidates(queries, columns, w)
    assert columns.reach == base.square().sum(1).max().sqrt()
    ordered = found.sort(1).values
    assert ((ordered.diff(dim=1) > 0) | (ordered[:, 1:] == -1)).all()
    reached = distances.gather(1, found.clamp(min=0)).masked_fill(found < 0, torch.inf).sort(1).values[:, :w]
    assert torch.equal(reached, distances.sort(1).values[:, :w])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rankings_are_merged_by_distance_then_id(m, w, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(m, 100, generator=generator).argsort(1)[:, :w] * 40_000_000
    distances = torch.randint(0, 5, (m, w), generator=generator).float() / 4
    missing = torch.rand(m, w, generator=generator) < 0.2
    ids, distances = ids.masked_fill(missing, -1), distances.masked_fill(missing, torch.inf)
    found = merge_rankings(ids, distances, 10)
    for row in range(m):
        pairs = zip(distances[row].tolist(), ids[row].tolist(), strict=True)
        expected = sorted(pairs, key=lambda pair: (pair[0], pair[1] % 2**40))[:10]
        assert list(zip(found[1][row].tolist(), found[0][row].tolist(), strict=True)) == expected


@pytest.mark.parametrize("size", [2, 3, 30, 31, 700])
def test_tiles_are_brute_force_up_to_every_other_point(size):
    features = cloud(size, 3) + 100
    for k in {1, min(5, size - 1), size - 1}:
        neighbors = knn(features, k)
        true, _ = true_distances(features, k)
        torch.testing.assert_close(neighbors.distances.double(), true, atol=1e-3, rtol=1e-4)
        check_neighbors(features, neighbors, k)


def check_exact(features, ids, distances, points=slice(None)):
    """Every distance and that of every id, to some units of rounding: any point that was missed is far off."""
    true, found = true_distances(features, ids.shape[1])
    torch.testing.assert_close(distances.double(), true[points], atol=0, rtol=1e-5)
    torch.testing.assert_close(found[points].gather(1, ids), true[points], atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", HARD)
def test_what_the_products_cannot_tell_apart_is_found_all_the_same(name):
    features = HARD[name] - HARD[name].mean(0)
    with workers() as each:
        check_exact(features, *all_exact(features, 9, each))
        some = torch.arange(0, len(features), 7)
        check_exact(features, *exact(features, some, 9, each), some)


def test_the_nearest_to_queries_that_are_no_points_are_brute_force():
    """In two blocks of points, and more queries than are answered at once."""
    base, queries = cloud(9000, 64), cloud(2100, 64, 1)
    base[[5, 8000, 8999]] = queries[-1] = 0
    with workers() as each:
        ids, distances = nearest_to(base, queries, 6, each)
    found = torch.cdist(queries.double(), base.double(), compute_mode="donot_use_mm_for_euclid_dist")
    true = found.topk(6, largest=False).values
    torch.testing.assert_close(distances.double(), true, atol=0, rtol=1e-5)
    torch.testing.assert_close(found.gather(1, ids), true, atol=0, rtol=1e-5)
    assert ids[-1, :3].tolist() == [5, 8000, 8999]  # equally near: in order of position


def test_numbers_whose_squares_overflow_are_refused_in_one_line():
    assert torch.isfinite(knn(cloud(50) * 1e16, 5).distances).all()
    with pytest.raises(ConfigError, match=r"features up to .*e\+25: squared distances would overflow; scale them") as e:
        knn(cloud(50) * 1e25, 5)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", KINDS)
def test_all_lists_probed_is_exact(name):
    features = KINDS[name]
    lists = ivf.plan(features, 7, 0.9)
    ids, distances = ivf.search(features, replace(lists, n_probes=lists.n_lists), 7, silent)
    true, found = true_distances(features, 7)
    torch.testing.assert_close(distances.double(), true, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.gather(1, ids), true, atol=1e-3, rtol=1e-4)


def silent(what, done, of):
    pass


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name not in FAST)]
)
def test_lists_reach_the_target_and_record_what_they_find(name):
    features = KINDS[name]
    for target in (0.9, 0.99):
        neighbors = knn(features, 10, exact_limit=100, recall_target=target)
        check_neighbors(features, neighbors, 10)
        found = share_found(features, neighbors, 10)
        assert found >= target - 0.005  # the sample's error is at most that
        assert target <= neighbors.recall == pytest.approx(found, abs=0.01)


def test_a_higher_target_takes_more_probes_and_what_has_no_lists_is_searched_exactly():
    plans = [ivf.plan(KINDS["sheet"], 10, target) for target in (0.5, 0.9, 0.99, 1.0)]
    assert [plan.n_lists for plan in plans] == [67] * 4  # 1.5 sqrt(N)
    probes = [plan.n_probes for plan in plans]
    assert probes == sorted(set(probes))
    for features in (cloud(1500, 60), torch.ones(1500, 3)):  # all lists are near; all points are in one list
        assert knn(features, 10, exact_limit=100).method == "tiles"


def test_a_point_with_too_few_others_in_its_lists_is_compared_with_all():
    features = torch.cat([cloud(20, 2), cloud(600, 2, seed=1) + 50, cloud(600, 2, seed=2) + 90])
    lists = ivf.plan(features, 100, 0.5)
    ids, distances = ivf.search(features, replace(lists, n_probes=1), 100, silent)
    true, found = true_distances(features, 100)
    torch.testing.assert_close(distances[:20].double(), true[:20], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.gather(1, ids), distances.double(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in HARD if name != "all scales"])
def test_lists_find_what_products_cannot_tell_apart(name):
    """Against distances in double precision: in tight islands only centred products have digits left."""
    features = HARD[name]
    neighbors = knn(features, 10, exact_limit=100)
    true, found = true_distances(features, 10)
    share = (found.gather(1, neighbors.ids) <= true[:, -1:] * (1 + 1e-5) + 1e-9).double().mean()
    assert neighbors.method.startswith("lists")
    assert neighbors.recall == pytest.approx(float(share), abs=0.005)
    assert share > 0.985


def test_a_recall_that_is_not_reached_is_one_line_with_what_was(monkeypatch):
    plan = ivf.plan
    monkeypatch.setattr(ivf, "plan", lambda *given: replace(plan(*given), n_probes=1))
    with pytest.raises(ConfigError, match=r"recall is 0\.\d{4}, below graph\.recall_target=0\.99 \(lists ") as e:
        knn(HARD["200"], 10, exact_limit=100)
    assert "raise graph.exact_limit above 1,000" in str(e.value)
    assert "\n" not in str(e.value)


def test_duplicates_are_in_order_of_position_by_lists_too():
    features = cloud(300, 4).repeat(5, 1)  # five copies of each, at positions 300 apart
    ids = knn(features, 4, exact_limit=100, recall_target=0.9).ids
    copies = torch.arange(300)[:, None] + torch.arange(0, 1500, 300)
    assert torch.equal(ids[:300], copies[:, 1:])
    assert torch.equal(ids[1200:], copies[:, :-1])


@pytest.mark.parametrize("limit", [10, 100_000])
@pytest.mark.parametrize("features", [islands(20_000), islands(40).repeat(60, 1)], ids=["islands", "duplicates"])
def test_one_thread_and_two_give_the_same_bits(features, limit):
    answers = []
    for count in (1, 2):
        with on_threads(count):
            answers.append(knn(features, 9, exact_limit=limit))
            assert torch.get_num_threads() == count
    one, two = answers
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.distances, two.distances)
    assert (one.method, one.recall) == (two.method, two.recall)


def test_mapped_features_give_the_same_bits_and_progress_is_told_in_silence(tmp_path, capfd):
    np.save(tmp_path / "x.npy", islands(20_000).double().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    told = []
    found = knn(mapped, 9, exact_limit=100, progress=lambda *how: told.append(how))
    whole = knn(mapped.clone(), 9, exact_limit=100)
    assert torch.equal(found.ids, whole.ids)
    assert torch.equal(found.distances, whole.distances)
    assert told == [("neighbours", n, 2) for n in range(3)]
    assert capfd.readouterr() == ("", "")  # FAISS would print a line for every list


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_above_the_exact_limit_faiss_is_needed(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"1,500 points are more than graph.exact_limit=1,000, .*about 0 s") as e:
        knn(cloud(1500), 5, backend, exact_limit=1000)
    assert "pip install faiss-cpu" in str(e.value)
    assert "\n" not in str(e.value)


def test_rankings_are_merged_by_distance_and_then_by_id():
    ids, distances = torch.tensor([[9, 4, 7, 2]]), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert merge_rankings(ids, distances, 3)[0].tolist() == [[9, 2, 4]]


@pytest.mark.parametrize("target", [0.0, -0.5, 1.01, float("nan")])
def test_a_target_that_is_no_share_is_refused_in_one_line(target):
    for call in (
        lambda: knn(cloud(50), 5, recall_target=target),
        lambda: compose(CHOICES, [f"graph.recall_target={target}"]),
    ):
        with pytest.raises(ConfigError, match=r"graph.recall_target=.* is no share: use more than 0") as e:
            call()
        assert "\n" not in str(e.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lists_on_the_gpu_find_what_they_find_on_the_cpu():
    features = islands(6000)
    here, there = (knn(features, 10, "faiss", 100, torch.device(name)) for name in ("cpu", "cuda"))
    assert there.method.split()[1:] == here.method.split()[1:]
    assert (here.ids == there.ids).double().mean() > 0.999
    torch.testing.assert_close(here.distances, there.distances, atol=1e-4, rtol=1e-4)
