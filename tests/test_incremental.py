"""What goes on from round to round has the bits and the picks of what is computed anew, whatever memory it is given."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.errors import ConfigError, UserError
from dgal_bench.core.seeding import TieBreak
from dgal_bench.data.pool import Pool
from dgal_bench.graph import diffusion
from dgal_bench.graph import incremental as frontier
from dgal_bench.graph import incremental as ranking
from dgal_bench.graph.diffusion import clamped_diffusion, diffuse, product, score, step
from dgal_bench.graph.graph import Graph
from dgal_bench.graph.incremental import DiffusionSettings, Scratch, UndoLog, lowest_scores, rank_scores, score_rows
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import diagnostics, from_affinity, transition
from dgal_bench.results.rows import choice
from dgal_bench.strategies import restrict
from dgal_bench.strategies.base import Query
from dgal_bench.strategies.restrict import Diffusion


class Clock:
    """Does not measure."""

    def phase(self, name):
        return nullcontext()


def random_graph(seed, size, symmetric=True):
    """Some 4 edges a node; a tenth of them isolated, some duplicates with the same edges; in a random order."""
    rng = np.random.default_rng(seed)
    weights = sparse.random_array((size, size), density=min(1, 4 / size), rng=rng, format="lil")
    weights[:, : size // 5] = weights[:, [0] * (size // 5)]
    gone = rng.permutation(size)[: size // 10]
    weights[gone], weights[:, gone] = 0, 0
    weights.setdiag(0)
    weights = sparse.csr_array(weights)
    weights = sparse.csr_array(weights + weights.T) if symmetric else weights
    weights.eliminate_zeros()
    weights.sort_indices()
    return from_affinity(weights, graph_k=4)


def asked(strategy, pool, memory, ties=7):
    query = Query(pool, None, None, None, TieBreak(ties, pool.size), Clock(), memory=memory)
    return strategy(query), query


def plain_heat(graph, pool, steps):
    nodes = graph.nodes[pool.labeled]
    return clamped_diffusion(graph, nodes, pool.labels, pool.n_classes, steps)


def bytes_of(kept):
    """Of every tensor that a state holds, also for its way back, each memory counted once."""
    tensors = [*kept.tensors.tensors, kept.scratch.places]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@pytest.fixture
def large(monkeypatch):
    """Sets from which share of the edges on the whole product takes over: 0 never goes on, 1 never gives up."""
    return lambda share: monkeypatch.setattr(frontier, "LARGE", share)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_of_memories_gives_the_bits_and_picks_of_the_whole_product(data):
    """Fresh, repeated, older and foreign ones, with new labels, with none, or with labels that were another's."""
    size, n_classes = data.draw(st.integers(2, 130)), data.draw(st.sampled_from([1, 2, 10, 40]))
    seed, steps = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, 4))
    graph, rng = random_graph(seed, size), torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=rng)
    labels = torch.randint(0, n_classes, (size,), generator=rng)
    other = torch.randint(0, n_classes, (size,), generator=rng)
    score = data.draw(st.sampled_from(["ova_min", "margin", "normalised"]))
    limit = DiffusionSettings(graph, n_classes, steps, score, 2.0).n_bytes
    own = Diffusion(graph, data.draw(st.integers(1, 20)), steps, score, memory_limit=limit)
    foreign = [
        replace(own, graph=random_graph(seed + 1, size)),
        replace(own, graph=replace(graph)),
        replace(own, diffusion_steps=steps + 1),
        replace(own, score="ova_norm"),
        replace(own, score="ova_norm", p=3.0),
    ]
    memories, n_labeled = [{}], data.draw(st.integers(1, size))
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(data.draw(st.integers(1, 8))):
            patch.setattr(frontier, "LARGE", data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
            n_labeled = data.draw(st.integers(1, size) | st.integers(n_labeled, min(size, n_labeled + 5)))
            known = data.draw(st.sampled_from([labels, labels, other]))
            pool = Pool(size, n_classes, order[:n_labeled], known[order[:n_labeled]])
            pool = data.draw(st.sampled_from([pool, pool, replace(pool, n_classes=n_classes + 1)]))
            memory = data.draw(st.sampled_from([memories[-1], memories[-1], *memories]))
            strategy = data.draw(st.sampled_from([own, own, own, replace(own), *foreign]))
            strategy = replace(strategy, memory_limit=10 * limit) if strategy is not own else strategy
            candidates, query = asked(strategy, pool, memory)
            expected, _ = asked(replace(strategy, memory_limit=0), pool, {})
            assert candidates.tolist() == expected.tolist()
            assert len(candidates) == min(strategy.restricted_size, size - n_labeled)
            if (kept := query.remembered.get("diffusion")) is not None:
                heat = plain_heat(strategy.graph, pool, strategy.diffusion_steps)
                assert torch.equal(kept.tensors[strategy.diffusion_steps], heat)
                assert bytes_of(kept) <= kept.settings.n_bytes
                memories.append(query.remembered)


def rounds(n_points=1000, n_rounds=5, batch=3, n_classes=10):
    order = torch.randperm(n_points, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n_points) % n_classes
    for n in range(5, 5 + n_rounds * batch, batch):
        yield Pool(n_points, n_classes, order[:n], labels[order[:n]])


@pytest.fixture(scope="module")
def cloud():
    return transition(knn(torch.randn(1000, 3, generator=torch.Generator().manual_seed(3)), 8))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_classes", [1, 10, 1000])
def test_rounds_of_a_run_on_any_number_of_threads(cloud, threads, n_classes, large):
    large(0.5)
    torch.set_num_threads(threads)
    strategy, memory, shares = Diffusion(cloud, 50, 3), {}, []
    for pool in rounds(n_classes=n_classes):
        candidates, query = asked(strategy, pool, memory)
        torch.set_num_threads(3 - threads)
        assert candidates.tolist() == asked(replace(strategy, memory_limit=0), pool, {})[0].tolist()
        assert torch.equal(query.remembered["diffusion"].tensors[3], plain_heat(cloud, pool, 3))
        torch.set_num_threads(threads)
        memory = query.remembered
        shares.append(query.notes["touched"]())
    assert max(shares) < 0.3


def test_the_same_memory_again_and_again_costs_what_it_did_the_first_time(cloud, large):
    """As when a query is timed several times; and the memory after it goes on from the last of them."""
    large(0.5)
    first, second, third, *_ = rounds()
    strategy = Diffusion(cloud, 50, 2)
    memory = asked(strategy, first, {})[1].remembered
    again = [asked(strategy, second, memory) for _ in range(4)]
    assert len({tuple(candidates.tolist()) for candidates, _ in again}) == 1
    assert len({query.notes["touched"]() for _, query in again}) == 1
    assert again[0][1].notes["touched"]() < 0.2
    assert asked(strategy, third, again[-1][1].remembered)[1].notes["touched"]() < 0.2
    stale, _ = asked(strategy, third, again[0][1].remembered)  # three turns ago: anew, from no label
    assert stale.tolist() == asked(replace(strategy, memory_limit=0), third, {})[0].tolist()


def test_no_new_label_touches_nothing(cloud):
    pool = next(rounds())
    strategy = Diffusion(cloud, 50, 2)
    candidates, query = asked(strategy, pool, {})
    again, later = asked(strategy, pool, query.remembered)
    assert again.tolist() == candidates.tolist()
    assert later.notes["touched"]() == 0


def test_a_turn_that_was_broken_off_is_undone(cloud, monkeypatch, large):
    large(0.5)
    first, second, *_ = rounds()
    strategy = Diffusion(cloud, 50, 3)
    memory = asked(strategy, first, {})[1].remembered
    write, n_writes = UndoLog.write, iter([True, True, False])

    def dies(undo_log, *words):
        write(undo_log, *words)
        if not next(n_writes):
            raise KeyboardInterrupt

    monkeypatch.setattr(UndoLog, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        asked(strategy, second, memory)
    monkeypatch.setattr(UndoLog, "write", write)
    _, query = asked(strategy, second, memory)
    assert query.notes["touched"]() < 1
    assert torch.equal(query.remembered["diffusion"].tensors[3], plain_heat(cloud, second, 3))


@pytest.mark.parametrize(("share", "n_done"), [(0.0, 0), (0.5, 0), (0.5, 3)])
def test_a_way_back_that_was_broken_off_is_gone_to_its_end(cloud, monkeypatch, large, share, n_done):
    """Also one that is broken off again and again; and no half of it is taken for the end of a turn."""
    large(share)
    first, second, third, *_ = rounds()
    strategy = Diffusion(cloud, 50, 3)
    memory = asked(strategy, first, {})[1].remembered
    after = asked(strategy, second, memory)[1].remembered
    index_copy_ = torch.Tensor.index_copy_
    for _ in range(2):
        left = iter([True] * n_done + [False])

        def dies(tensor, *words, left=left):
            if not next(left):
                raise KeyboardInterrupt
            return index_copy_(tensor, *words)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "index_copy_", dies)
            with pytest.raises(KeyboardInterrupt):
                memory["diffusion"].tensors.begin(memory["diffusion"].version)
    assert not after["diffusion"].tensors.begin(after["diffusion"].version)
    _, query = asked(strategy, third, memory)
    assert torch.equal(query.remembered["diffusion"].tensors[3], plain_heat(cloud, third, 3))
    assert (query.notes["touched"]() < 0.5) == (share > 0)


def test_a_state_that_cannot_go_on_is_given_back_before_another_is_made(cloud, monkeypatch):
    first, second, *_ = rounds()
    strategy, held = Diffusion(cloud, 50, 2), []
    dead = asked(strategy, second, {})[1].remembered

    def looks(settings, make=restrict.blank_state):
        held.append(len(dead["diffusion"].tensors.tensors))
        return make(settings)

    monkeypatch.setattr(restrict, "blank_state", looks)
    candidates, _ = asked(strategy, first, dead)  # fewer labels than are known to it
    assert candidates.tolist() == asked(replace(strategy, memory_limit=0), first, {})[0].tolist()
    assert held == [0]


def test_nothing_is_remembered_beyond_the_limit_or_where_edges_have_no_way_back():
    graph, pool = random_graph(0, 50), Pool(50, 4, torch.arange(5), torch.arange(5) % 4)
    fits = DiffusionSettings(graph, 4, 2, "ova_min", 2.0).n_bytes
    for limit, remembers in ((fits, True), (fits - 1, False), (0, False)):
        _, query = asked(Diffusion(graph, 5, 2, memory_limit=limit), pool, {})
        assert ("diffusion" in query.remembered) == remembers
    directed = random_graph(0, 50, symmetric=False)
    assert not directed.symmetric
    candidates, query = asked(Diffusion(directed, 50, 2), pool, {})
    assert query.remembered == {}
    assert sorted(candidates.tolist()) == list(range(5, 50))
    with pytest.raises(ConfigError, match="memory_limit=-1 is too small"):
        Diffusion(graph, 5, memory_limit=-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.sampled_from([1, 2, 10, 100, 1000]), st.booleans())
def test_a_row_has_the_same_bits_whatever_rows_it_is_computed_with(seed, size, n_classes, symmetric):
    graph, rng = random_graph(seed, size, symmetric), torch.Generator().manual_seed(seed)
    values = torch.randn(size, n_classes, generator=rng)
    nodes = torch.randperm(size, generator=rng)[: 1 + seed % size]
    counts = graph.indptr[nodes + 1] - graph.indptr[nodes]
    edges = torch.cat([torch.arange(graph.indptr[node], graph.indptr[node + 1]) for node in nodes])
    pointers = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    some = product(pointers, graph.indices[edges], graph.weights[edges], values)
    assert torch.equal(some, step(graph, values)[nodes])


@pytest.mark.parametrize("n_classes", [1, 3, 1000])
def test_a_step_in_blocks_has_the_bits_of_one_product(n_classes, monkeypatch):
    graph = random_graph(1, 300)
    values = torch.rand(300, n_classes, generator=torch.Generator().manual_seed(0))
    whole = product(graph.indptr, graph.indices, graph.weights, values)
    for rows in (1, 7, 299, 300, 301):
        monkeypatch.setattr(diffusion, "WHOLE", 0)
        monkeypatch.setattr(diffusion, "BLOCK", rows * n_classes)
        assert torch.equal(step(graph, values), whole)
        assert torch.equal(step(graph, values, torch.full_like(values, torch.nan)), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 200), st.booleans())
def test_the_order_of_nodes_is_one_and_changes_no_bit(seed, size, symmetric):
    graph = random_graph(seed, size, symmetric)
    assert graph.points.sort().values.tolist() == list(range(size))
    assert torch.equal(graph.points[graph.nodes], torch.arange(size))
    counts = (graph.indptr[1:] - graph.indptr[:-1])[graph.nodes]
    indices = torch.cat([graph.neighbors(point) for point in range(size)])
    assert all(row.tolist() == sorted(row.tolist()) for row in indices.split(counts.tolist()))
    edges = [slice(graph.indptr[node], graph.indptr[node + 1]) for node in graph.nodes]
    weights = torch.cat([graph.weights[row] for row in edges])
    pointers = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    by_position = Graph(
        pointers, indices.int(), weights, graph.degrees[graph.nodes], torch.arange(size), 4, graph.symmetric
    )
    labeled, labels = torch.arange(size)[::3], torch.arange(size)[::3] % 5
    assert torch.equal(diffuse(graph, labeled, labels, 5, 3), diffuse(by_position, labeled, labels, 5, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 3000), st.data())
def test_lowest_is_the_head_of_a_full_sort(seed, size, data):
    """By (score, key of the position), labeled ones left out, in any blocks; and how much the keys have decided."""
    rng, ties = torch.Generator().manual_seed(seed), TieBreak(seed, size)
    points, no_edges = torch.randperm(size, generator=rng), torch.zeros(size + 1, dtype=torch.int32)
    graph = replace(random_graph(3, 2), points=points, indptr=no_edges)
    levels = data.draw(st.sampled_from([1, 3, 1000]))
    heat = torch.randint(0, levels, (size, 1), generator=rng) / 8
    labeled = torch.randperm(size, generator=rng)[: data.draw(st.integers(0, size))]
    n_picks = data.draw(st.integers(0, min(100, size - len(labeled))))
    ranks = rank_scores(lambda heat: heat[:, 0], heat, labeled)
    found, tied = lowest_scores(graph, *ranks, n_picks, ties)
    keys, left = ties(graph.points).tolist(), sorted(set(range(size)) - set(labeled.tolist()))
    truth = sorted(left, key=lambda node: (float(heat[node]), keys[node]))
    assert found.tolist() == graph.points[truth[:n_picks]].tolist()
    last = heat[truth[n_picks - 1]] if n_picks else None
    cut = 0 < n_picks < len(truth) and heat[truth[n_picks]] == last
    assert tied() == (sum(heat[node] == last for node in truth[:n_picks]) / n_picks if cut else 0)


def test_a_score_that_is_no_number_is_refused():
    graph = random_graph(3, 400)
    heat = torch.zeros(400, 1)
    heat[123] = torch.nan
    ranks = rank_scores(lambda heat: heat[:, 0], heat, torch.arange(100))
    with pytest.raises(UserError, match="1 of 300 scores are NaN"):
        lowest_scores(graph, *ranks, 3, TieBreak(0, graph.size))


@pytest.mark.parametrize("name", ["ova_min", "ova_norm", "confidence", "margin", "negentropy", "normalised"])
@pytest.mark.parametrize("n_classes", [1, 2, 10, 1000])
def test_a_points_score_has_the_same_bits_in_any_block(name, n_classes, monkeypatch):
    heat = torch.rand(400, n_classes, generator=torch.Generator().manual_seed(0)) / n_classes
    heat[::7] = 0
    whole = score(name)(heat)
    for rows in (16, 17, 64):
        monkeypatch.setattr(ranking, "SCORED", rows * n_classes)
        assert torch.equal(score_rows(score(name), heat), whole)
        for some in (torch.arange(0), torch.arange(1), torch.arange(5, 20), torch.arange(99, 120)):
            assert torch.equal(score_rows(score(name), heat[some]), whole[some])


def test_distinct_is_the_set():
    numbers = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(0))
    assert sorted(Scratch(50, torch.device("cpu")).distinct(numbers).tolist()) == numbers.unique().tolist()


def test_components_are_ranges_of_nodes():
    for symmetric in (True, False):
        graph = random_graph(5, 120, symmetric)
        parts = (graph.weights.numpy(), graph.indices.numpy(), graph.indptr.numpy())
        matrix = sparse.csr_array(parts, shape=(120, 120))
        n_parts, part = sparse.csgraph.connected_components(matrix, connection="weak")
        facts = diagnostics(knn(torch.randn(120, 2), 3), graph)
        assert facts["components"] == n_parts > 10
        assert facts["outside_largest"] == pytest.approx(1 - np.bincount(part).max() / 120)


def test_a_run_that_remembers_picks_as_one_that_does_not_also_after_a_stop(experiment, tmp_path):
    config, forgets = (
        example_config("dgmg", "rounds=4"),
        example_config("dgmg", "rounds=4", "strategy.restrict.memory_limit=0"),
    )
    path = tmp_path / "a" / "seed-0.jsonl"
    rows, others = (
        run_in_process(experiment, path, config),
        run_in_process(experiment, tmp_path / "b" / "seed-0.jsonl", forgets),
    )
    assert [choice(row) for row in rows] == [choice(row) for row in others]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    resumed = run_in_process(experiment, path, config)
    assert [choice(row) for row in resumed] == [choice(row) for row in rows]
    assert [row.extra["touched"] for row in resumed[:-1]] == [row.extra["touched"] for row in rows[:-1]]
    assert config.hash == forgets.hash


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_classes", [10, 100, 1000])
@pytest.mark.parametrize("batch", [1, 3, 15])
def test_rounds_on_the_gpu_stay_there_and_have_the_bits_of_the_whole_product(cloud, large, n_classes, batch):
    large(0.5)
    graph = cloud.to(torch.device("cuda"))
    strategy, memory = Diffusion(graph, 50, 3), {}
    for pool in rounds(batch=batch, n_classes=n_classes):
        candidates, query = asked(strategy, pool, memory)
        kept = query.remembered["diffusion"]
        assert kept.tensors[3].device == graph.device
        assert torch.equal(kept.tensors[3], plain_heat(graph, pool, 3))
        assert candidates.tolist() == asked(replace(strategy, memory_limit=0), pool, {})[0].tolist()
        memory = query.remembered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ova_min", "ova_norm", "confidence", "margin", "negentropy", "normalised"])
@pytest.mark.parametrize("n_classes", [10, 100, 1000])
def test_a_few_points_have_their_scores_bits_on_the_gpu(name, n_classes):
    heat = (torch.rand(400, n_classes, generator=torch.Generator().manual_seed(0)) / n_classes).cuda()
    whole = score_rows(score(name), heat)
    for n_rows in (1, 3, 15):
        assert torch.equal(score_rows(score(name), heat[7 : 7 + n_rows]), whole[7 : 7 + n_rows])
