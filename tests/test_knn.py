"""Tiles and lists against brute force; what is recorded is what is found; threads and grouping change no bit."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgal_bench.config.compose import compose
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.system import on_threads, workers
from dgal_bench.graph import exact_knn as searches
from dgal_bench.graph.exact_knn import (
    _SIZES,
    _Sizes,
    all_exact,
    candidates,
    closest,
    distance_table,
    exact,
    merge_rankings,
    nearest_to,
    smallest_columns,
)
from dgal_bench.graph.ivf import (
    InvertedLists,
    assign,
    by_distance,
    fewest_probes,
    plan_lists,
    recall_by_probes,
    search_lists,
    train,
)
from dgal_bench.graph.knn import _all_exact_faiss, build_index, knn, measure_recall

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
FAST = ("islands", "unbalanced")


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
    """Distances are those of the ids, ascending; nobody is his own neighbour, or another's twice."""
    _, found = true_distances(features, k)
    torch.testing.assert_close(neighbors.distances.double(), found.gather(1, neighbors.ids), atol=1e-3, rtol=1e-4)
    assert (neighbors.distances.diff(dim=1) >= 0).all()
    assert (neighbors.ids != torch.arange(len(features))[:, None]).all()
    assert (neighbors.ids.sort(dim=1).values.diff(dim=1) > 0).all()


def share_found(features, neighbors, k):
    true, _ = true_distances(features, k)
    return float((neighbors.distances <= true[:, -1:] * (1 + 1e-5) + 1e-3).double().mean())


@given(st.integers(1, 6), st.integers(1, 5000), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_smallest_of_each_row_are_found_with_and_without_groups(n_rows, n, w, ties, seed):
    values = cloud(n_rows, n, seed)
    values = values.mul(2).round() if ties else values
    w = min(w, n)
    found = smallest_columns(values, w)
    assert torch.equal(values.gather(1, found).sort(1).values, values.sort(1).values[:, :w])
    assert (found.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.slow
@given(st.integers(1, 700), st.integers(1, 70), st.sampled_from([(1, 8), (7, 32), (64, 256)]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_candidates_of_several_tiles_are_distinct_and_have_the_nearest(n, w, tile, seed):
    """Whatever the sizes of tiles, and where the last is cut short; many points lie at equal distances."""
    base, queries, w = cloud(n, 3, seed).round(), cloud(50, 3, seed + 1).round(), min(w, n)
    distances = torch.cdist(queries, base, compute_mode="donot_use_mm_for_euclid_dist")
    for whole in (10**6, 0):  # one tile, then several
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_SIZES, "cpu", _Sizes(whole, 1000, *tile))
            columns = distance_table(base)
            found = candidates(queries, columns, w)
            assert torch.equal(closest(queries, columns), distances.square().argmin(1))
        assert columns.reach == base.square().sum(1).max().sqrt()
        assert found.shape[1] >= w
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


@pytest.mark.parametrize("name", KINDS)
def test_some_points_are_answered_as_all_are(name, monkeypatch):
    features = KINDS[name]
    monkeypatch.setattr("dgal_bench.graph.exact_knn._BLOCK", 300 * features.shape[1])
    some = torch.arange(0, len(features), 97)
    with workers() as each:
        _, distances = exact(features, some, 6, each)
    true, _ = true_distances(features, 6)
    torch.testing.assert_close(distances.double(), true[some], atol=1e-3, rtol=1e-4)


def all_probed(features, n_lists):
    with workers() as each:
        centroids = train(features, n_lists, each)
        owner = assign(features, centroids, each)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), owner.bincount(minlength=n_lists).cumsum(0)])
    return InvertedLists(
        owner.argsort(stable=True), offsets, by_distance(centroids, torch.arange(n_lists)), centroids, 1.0
    )


def check_exact(features, ids, distances, points=slice(None)):
    """Every distance and that of every id, to some units of rounding: any point that was missed is far off."""
    true, found = true_distances(features, ids.shape[1])
    torch.testing.assert_close(distances.double(), true[points], atol=0, rtol=1e-5)
    torch.testing.assert_close(found[points].gather(1, ids), true[points], atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes", [None, pytest.param(_Sizes(0, 1000, 64, 32), marks=pytest.mark.slow)], ids=["one tile", "several"]
)
@pytest.mark.parametrize("name", HARD)
def test_what_the_products_cannot_tell_apart_is_found_all_the_same(name, sizes, monkeypatch):
    if sizes:
        monkeypatch.setitem(_SIZES, "cpu", sizes)
    features = HARD[name] - HARD[name].mean(0)
    with workers() as each:
        check_exact(features, *all_exact(features, 9, each))
        some = torch.arange(0, len(features), 7)
        check_exact(features, *exact(features, some, 9, each), some)
    plan = all_probed(features, 4)
    positions, ids, distances = search_lists(plan, features[plan.order], 0, 4, 9)
    check_exact(features, ids, distances, positions)
    check_exact(features, *_all_exact_faiss(features, build_index(features, "faiss"), 9))


@pytest.mark.parametrize("features", [islands(3000), sheet(3000), cloud(3000, 32), cloud(100).repeat(30, 1)], ids=str)
def test_ordinary_points_are_searched_once(features, monkeypatch):
    monkeypatch.delattr(searches, "_around")
    with workers() as each:
        all_exact(features, 20, each)


def test_a_pile_far_from_others_is_searched_again_but_once(monkeypatch):
    times, around = [], searches._around
    monkeypatch.setattr(searches, "_around", lambda base, *rest: times.append(len(base)) or around(base, *rest))
    features = torch.cat([cloud(500) * 0.02, torch.full((3000, 5), 1e3)])
    assert (knn(features, 20).distances[500:] == 0).all()
    assert sum(times) < 5 * len(features)


def test_the_nearest_to_queries_that_are_no_points_are_brute_force(monkeypatch):
    monkeypatch.setattr(searches, "_BLOCK", 1000)
    monkeypatch.setattr(searches, "_ROWS", 64)
    base, queries = torch.cat([tight(200), torch.zeros(3, 5)]), torch.cat([tight(200, 150), torch.zeros(1, 5)]) + 0.001
    with workers() as each:
        ids, distances = nearest_to(base, queries, 6, each)
    found = torch.cdist(queries.double(), base.double(), compute_mode="donot_use_mm_for_euclid_dist")
    true = found.topk(6, largest=False).values
    torch.testing.assert_close(distances.double(), true, atol=0, rtol=1e-5)
    torch.testing.assert_close(found.gather(1, ids), true, atol=0, rtol=1e-5)
    assert ids[-1, :3].tolist() == [1000, 1001, 1002]  # equally near: in order of position


def test_numbers_whose_squares_overflow_are_refused_in_one_line():
    assert torch.isfinite(knn(cloud(50) * 1e16, 5).distances).all()
    with pytest.raises(ConfigError, match=r"features up to .*e\+25: squared distances would overflow; scale them") as e:
        knn(cloud(50) * 1e25, 5)
    assert "\n" not in str(e.value)


def test_a_recall_is_measured_but_for_rounding_and_said_where_it_is_below_the_target(monkeypatch, caplog):
    features = islands(1000)
    with workers() as each:
        distances = all_exact(features, 5, each)[1]
    assert measure_recall(features, distances * (1 + 2e-7)) == 1.0
    assert measure_recall(features, distances * (1 + 1e-2)) < 0.9
    monkeypatch.setattr("dgal_bench.graph.knn.measure_recall", lambda *arrays: 0.5)
    knn(features, 5, exact_limit=100)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "recall is 0.5000, below graph.recall_target=0.99 (lists" in said
    assert "graph.exact_limit" in said


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("elements", [10**6, 3000])
def test_all_lists_probed_is_exact_in_one_part_or_many(name, elements, monkeypatch):
    monkeypatch.setattr("dgal_bench.graph.ivf._ELEMENTS", elements)
    monkeypatch.setattr("dgal_bench.graph.ivf._QUERIES", 700)
    features = KINDS[name][:1500]
    plan = all_probed(features, 8)
    positions, ids, distances = search_lists(plan, features[plan.order], 0, 8, 7)
    assert torch.equal(positions.sort().values, torch.arange(len(features)))
    true, found = true_distances(features, 7)
    torch.testing.assert_close(distances.double(), true[positions], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found[positions].gather(1, ids), true[positions], atol=1e-3, rtol=1e-4)


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
        assert neighbors.recall == pytest.approx(found, abs=0.01)


def test_islands_are_searched_in_few_lists_and_what_has_no_lists_exactly():
    assert knn(islands(4000), 10, exact_limit=100).method.startswith("lists 16/")
    assert knn(cloud(1500, 60), 10, exact_limit=100).method == "tiles"
    assert knn(torch.ones(1500, 3), 10, exact_limit=100).method == "tiles"  # they are all in one list


@pytest.mark.parametrize("limit", [10, 10_000])
@pytest.mark.parametrize("name", ["islands", "duplicates"])
def test_one_thread_and_two_give_the_same_bits(name, limit):
    answers = []
    for count in (1, 2):
        with on_threads(count):
            answers.append(knn(KINDS[name], 9, exact_limit=limit))
            assert torch.get_num_threads() == count
    one, two = answers
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.distances, two.distances)
    assert (one.method, one.recall) == (two.method, two.recall)


@given(st.sets(st.integers(1, 15)))
@settings(max_examples=8, deadline=None)
def test_however_lists_are_grouped_the_answer_is_the_same(cuts):
    features = KINDS["unbalanced"][::3]
    plan = plan_lists(features, 5)
    ends = [0, *sorted(cut for cut in cuts if cut < plan.n_lists), plan.n_lists]
    in_order = features[plan.order]
    whole = search_lists(plan, in_order, 0, plan.n_lists, 5)
    parts = [search_lists(plan, in_order, *between, 5) for between in pairwise(ends)]
    for together, alone in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(alone), together)


def test_a_list_with_too_few_points_around_it_probes_more():
    features = torch.cat([cloud(3, 2), cloud(60, 2, seed=1) + 50, cloud(60, 2, seed=2) + 90])
    offsets = torch.tensor([0, 3, 63, 123])
    centroids = torch.stack([features[a:b].mean(0) for a, b in pairwise(offsets)])
    plan = InvertedLists(torch.arange(123), offsets, torch.arange(3)[:, None], centroids, 0.5)
    _, ids, distances = search_lists(plan, features, 0, 1, 10)
    assert torch.isfinite(distances).all()
    assert (ids >= 0).all()
    torch.testing.assert_close(distances.double(), true_distances(features, 10)[0][:3], atol=1e-3, rtol=1e-4)


def test_the_recall_of_so_many_probes_in_closed_form():
    centroids = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    recalls = recall_by_probes(centroids, torch.tensor([0, 3]), torch.tensor([[0, 1, 1, 3], [3, 3, 2, 0]]))
    assert recalls.tolist() == [[0.25, 0.75, 0.75, 1.0], [0.5, 0.75, 0.75, 1.0]]
    assert fewest_probes(recalls, 0.7) == (2, 0.75)
    assert fewest_probes(recalls, 1.0) == (4, 1.0)
    # the mean of one probe is 0.375, but its error is too large for a target just below
    assert fewest_probes(recalls, 0.37)[0] == 2


def test_rankings_are_merged_by_distance_and_then_by_id():
    ids, distances = torch.tensor([[9, 4, 7, 2]]), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert merge_rankings(ids, distances, 3)[0].tolist() == [[9, 2, 4]]


@pytest.mark.parametrize("target", [0.0, -0.5, 1.01, float("nan")])
def test_a_target_that_is_no_share_is_refused_in_one_line(target):
    for call in (
        lambda: knn(cloud(50), 5, recall_target=target),
        lambda: plan_lists(cloud(50), 5, target),
        lambda: compose(CHOICES, [f"graph.recall_target={target}"]),
    ):
        with pytest.raises(ConfigError, match=r"graph.recall_target=.* is no share: use more than 0") as e:
            call()
        assert "\n" not in str(e.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lists_on_the_gpu_find_what_they_find_on_the_cpu():
    features = islands(6000)
    here, there = (knn(features, 10, "torch", 100, torch.device(name)) for name in ("cpu", "cuda"))
    assert here.method == there.method
    assert (here.ids == there.ids).double().mean() > 0.999
    torch.testing.assert_close(here.distances, there.distances, atol=1e-4, rtol=1e-4)
