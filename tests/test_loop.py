"""The loop of one run: what a row says, and that a run continued is a run left alone."""

import itertools
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from dgal_bench import loop
from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core import system as beside
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import ResultsError, StrategyError
from dgal_bench.core.types import smallest
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Run, open_experiment
from dgal_bench.graph.diffusion import diffuse
from dgal_bench.graph.propagation import propagation_accuracy
from dgal_bench.loop import boundary_share, positions_hash, run_loop
from dgal_bench.models import vaal as adversary
from dgal_bench.models.nets import Classifier
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import choice
from dgal_bench.results.writer import FileWriter
from dgal_bench.strategies import seals
from dgal_bench.strategies.base import Strategy


def test_rounds_queries_and_rounds_plus_one_evaluations(experiment, tmp_path):
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", example_config("dgmg", "rounds=3"))
    assert [r.round for r in rows] == [0, 1, 2, 3]
    assert [r.n_labeled for r in rows] == [10, 15, 20, 25]
    assert [r.indices is not None for r in rows] == [True, True, True, False]
    header = read_run(tmp_path / "seed-0.jsonl").header
    labeled = header["initial"] + [i for r in rows for i in r.indices or []]
    assert len(set(labeled)) == 25
    for row in rows[:-1]:
        assert row.classes == experiment.data.labels[row.indices].tolist()
        assert row.query_seconds == pytest.approx(sum(row.seconds.values()), rel=0.2)
        assert (row.n_candidates, row.n_scored) == (20, 20)
        assert 0 <= row.boundary_share <= 1


def test_the_header_says_what_it_was_made_from(experiment, tmp_path):
    config, path = example_config("dgmg"), tmp_path / "dgmg" / "seed-0.jsonl"
    run_in_process(experiment, path, config)
    header = read_run(path).header
    fingerprint = header["fingerprint"]
    assert header["cell"] == "digits/dgmg/seed-0"
    assert (header["profile"], fingerprint["config"]) == ("smoke", config.hash)
    assert fingerprint["data"] == experiment.data.sha256
    assert (fingerprint["latents"], fingerprint["graph"]) == (
        experiment.prepared.features_sha256,
        experiment.prepared.graph_sha256,
    )
    assert fingerprint["threads"] == 1
    assert header["network"]["parameters"] == 11_760
    assert {"torch", "lightning", "faiss-cpu", "python"} <= set(header["provenance"]["versions"])
    assert header["provenance"]["machine"]["cpu"]
    assert fingerprint["vectors"] == torch.backends.cpu.get_cpu_capability()
    assert header["setup"]["graph"]["n_points"] == 200


def test_a_row_says_what_ran_beside_and_the_query_clock_does_not_see_the_counting(experiment, tmp_path, monkeypatch):
    """Two other runs while a slow census is taken: none of its time is in a query."""
    counted_in, count = [], beside.count_workers

    def slow(folder=None):
        time.sleep(0.05)
        counted_in.append(count())
        return counted_in[-1]

    monkeypatch.setattr(beside, "worker_folder", lambda: tmp_path / "census")
    monkeypatch.setattr(beside, "count_workers", slow)
    with beside.register_worker(), beside.register_worker():
        rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", example_config("random", "rounds=2"))
    assert [row.jobs for row in rows] == [3, 3, 3]
    assert len(counted_in) == 4 + 4 + 2  # when a round begins and ends, before a query and after it
    assert all(row.query_seconds < 0.04 for row in rows[:-1])
    assert all(row.load >= 0 for row in rows)
    assert all(row.busy_elsewhere >= 0 for row in rows)
    assert beside.count_workers() == 1


def test_reach_is_the_share_with_h_above_0(experiment, tmp_path):
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", example_config("random"))
    first = torch.tensor(read_run(tmp_path / "seed-0.jsonl").header["initial"])
    graph = experiment.prepared.graph
    heat = diffuse(graph, first, experiment.data.labels[first], 10, graph.default_steps)
    assert rows[0].reach == pytest.approx(float((heat.sum(1) > 0).float().mean()))


def test_boundary_share_by_hand(experiment):
    graph, labels = experiment.prepared.graph, experiment.data.labels
    batch = torch.tensor([3, 17])
    shares = [sum(int(labels[j] != labels[i]) for j in graph.neighbors(i)) / len(graph.neighbors(i)) for i in (3, 17)]
    assert boundary_share(graph, labels, batch) == pytest.approx(sum(shares) / 2)
    assert boundary_share(graph, torch.zeros_like(labels), batch) == 0


def test_strategies_of_a_seed_share_the_initial_set_and_the_first_network(experiment, tmp_path):
    first = {}
    for strategy in ("random", "margin", "rsmg", "dgmg"):
        path = tmp_path / strategy / "seed-0.jsonl"
        first[strategy] = (
            run_in_process(experiment, path, example_config(strategy))[0].accuracy,
            tuple(read_run(path).header["initial"]),
        )
    assert len(set(first.values())) == 1


@pytest.fixture(scope="module")
def undisturbed(experiment, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "seed-0.jsonl"
    return run_in_process(experiment, path, example_config("dgmg", "rounds=4")), path.read_bytes()


@pytest.mark.parametrize("stopped_after", [0, 1, 3])
def test_a_run_stopped_and_continued_is_the_same_bits(experiment, tmp_path, undisturbed, stopped_after):
    path, config = tmp_path / "seed-0.jsonl", example_config("dgmg", "rounds=4")

    def stop(record):
        if record.round == stopped_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), FileWriter(path) as writer:
        run_loop(Run.of(config, experiment), writer, stop)
    assert len(read_run(path).records) == stopped_after + 1
    rows = run_in_process(experiment, path, config)
    assert [choice(r) for r in rows] == [choice(r) for r in undisturbed[0]]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.62, 0.9, 0.999])
def test_a_file_cut_anywhere_goes_on_to_the_same_bits(experiment, tmp_path, undisturbed, share):
    """A kill in the middle of a write leaves a torn line: at any byte of the file."""
    rows, whole = undisturbed
    path = tmp_path / "seed-0.jsonl"
    path.write_bytes(whole[: int(share * len(whole))])
    again = run_in_process(experiment, path, example_config("dgmg", "rounds=4"))
    assert [choice(r) for r in again] == [choice(r) for r in rows]


def test_a_finished_run_is_left_alone(experiment, tmp_path, undisturbed):
    path = tmp_path / "seed-0.jsonl"
    path.write_bytes(undisturbed[1])
    run_in_process(experiment, path, example_config("dgmg", "rounds=4"))
    assert path.read_bytes() == undisturbed[1]


def forged(path, experiment, name, value):
    """A partial run whose header says that it was made from something else."""
    import json

    rows = path.read_bytes().splitlines(keepends=True)
    header = json.loads(rows[0])
    header["fingerprint"][name] = value
    path.write_bytes(json.dumps(header).encode() + b"\n" + rows[1])


@pytest.mark.parametrize(
    ("name", "value"), [("data", "else"), ("latents", "else"), ("graph", "else"), ("algorithm_version", 99)]
)
def test_rows_made_from_something_else_are_not_continued(experiment, tmp_path, name, value):
    path = tmp_path / "seed-0.jsonl"
    run_in_process(experiment, path, example_config("dgmg"))
    forged(path, experiment, name, value)
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=f"made from something else .{name} {value} "):
        run_in_process(experiment, path, example_config("dgmg"))
    assert path.read_bytes() == before


def test_another_configuration_is_refused_and_the_difference_named(experiment, tmp_path):
    path = tmp_path / "seed-0.jsonl"
    run_in_process(experiment, path, example_config("dgmg"))
    with pytest.raises(ResultsError, match=r"another configuration \(graph.graph_k: 10 -> 7\)"):
        run_in_process(experiment, path, example_config("dgmg", "graph.graph_k=7"))


@pytest.mark.parametrize(
    ("name", "value"), [("git", "0123abc"), ("torch", "9.9"), ("cpu", "Another"), ("device", "H100")]
)
def test_another_machine_or_revision_needs_anyway_and_leaves_a_line(experiment, tmp_path, name, value):
    path = tmp_path / "seed-0.jsonl"
    run_in_process(experiment, path, example_config("dgmg"))
    forged(path, experiment, name, value)
    with pytest.raises(ResultsError, match=f"{name}: '{value}' -> .*add resume=anyway"):
        run_in_process(experiment, path, example_config("dgmg"))
    with FileWriter(path) as writer:
        run_loop(Run.of(example_config("dgmg"), experiment), writer, lambda record: None, resume_anyway=True)
    log = read_run(path)
    assert log.done
    assert log.continuations[0]["changed"][0].startswith(f"{name}: '{value}' -> ")


def test_a_strategy_that_cheats_is_caught_before_its_row_is_written(experiment, tmp_path):
    """Picks a labeled point: the round is not recorded."""
    run = Run.of(example_config("random"), experiment)

    def picks_labeled(query, candidates, batch_size):
        return torch.cat([query.pool.labeled[:1], candidates[: batch_size - 1]])

    cheat = replace(run, strategy=Strategy("cheat", run.strategy.restrict, picks_labeled))
    path = tmp_path / "seed-0.jsonl"
    with pytest.raises(StrategyError, match="1 of 5 points that are labeled already"), FileWriter(path) as writer:
        run_loop(cheat, writer, lambda record: None)
    assert read_run(path).records == ()


def test_the_graph_names_its_neighbours_on_any_pool(experiment, cache_root):
    """DGMG by hand, from the ledger of a row: diffusion, smallest, margin."""
    config = example_config("dgmg", "rounds=1")
    run = Run.of(config, experiment)
    path = cache_root / "by-hand" / "seed-0.jsonl"
    row = run_in_process(experiment, path, config)[0]
    first = torch.tensor(read_run(path).header["initial"])
    pool = Pool(200, 10, first, experiment.data.labels[first])
    query = run.query(pool, None, None, 0)
    heat = diffuse(experiment.prepared.graph, first, pool.labels, 10, 3)
    scores = (2 * heat - heat.sum(1, keepdim=True)).abs().amin(1)[pool.unlabeled]
    candidates = pool.unlabeled[smallest(scores, 20, pool.unlabeled, query.ties)]
    assert set(row.indices) <= set(candidates.tolist())


def test_a_row_has_the_hash_of_its_candidates_in_whatever_order_they_came(experiment, tmp_path):
    config = example_config("dgmg", "rounds=1")
    run, path = Run.of(config, experiment), tmp_path / "seed-0.jsonl"
    row = run_in_process(experiment, path, config)[0]
    first = torch.tensor(read_run(path).header["initial"])
    candidates = run.strategy.restrict(
        run.query(Pool(200, 10, first, experiment.data.labels[first]), None, Stopwatch(), 0)
    )
    shuffled = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))]
    assert row.candidates == positions_hash(candidates) == positions_hash(shuffled)
    assert row.candidates != positions_hash(candidates[1:])
    assert positions_hash(torch.tensor([258, 1])) == sha256(b"\1" + bytes(7) + b"\2\1" + bytes(6)).hexdigest()[:20]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "margin", "dgmg"])
def test_any_number_of_interruptions(experiment, tmp_path, strategy):
    """Cut at 12 random bytes one after the other, going on each time for one round."""
    config = example_config(strategy, "rounds=6")
    alone = run_in_process(experiment, tmp_path / "alone" / "seed-0.jsonl", config)
    path = tmp_path / "seed-0.jsonl"
    rng = torch.Generator().manual_seed(0)
    for _ in range(12):
        limit = itertools.count()

        def stop(record, limit=limit):
            if next(limit) == 1:
                raise KeyboardInterrupt

        try:
            with FileWriter(path) as writer:
                run_loop(Run.of(config, experiment), writer, stop)
        except KeyboardInterrupt:
            pass
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) - int(torch.randint(0, len(raw) // 3, (1,), generator=rng))])
    assert [choice(r) for r in run_in_process(experiment, path, config)] == [choice(r) for r in alone]


@pytest.mark.slow
def test_real_mnist_runs(tmp_path):
    """Table 1's network and optimiser on a small part of the real images."""
    import os

    root = os.environ.get("DGAL_DATA")
    if not root:
        pytest.skip("needs $DGAL_DATA")
    from dgal_bench.config.compose import compose

    config = compose(
        {"dataset": "mnist", "representation": "vae", "profile": "smoke", "strategy": "dgmg"},
        [
            "representation.threads=1", "dataset.pool_size=100", "dataset.test_size=30",
            "representation.max_epochs=20", "representation.train_batch_size=8",
        ],
    )  # fmt: skip
    mnist = open_experiment(config, Path(root), tmp_path / "cache", lambda what, done, of: None)
    rows = run_in_process(mnist, tmp_path / "seed-0.jsonl", config)
    assert len(rows) == 3
    assert mnist.prepared.ledger["representation"]["active_latents"] > 0


def test_a_pool_used_up_by_the_last_query_can_be_continued(experiment, tmp_path):
    """190 + 2 x 5 = 200: killed before the last evaluation, no query is left to warm up for."""
    path, config = tmp_path / "seed-0.jsonl", example_config("dgmg", "initial_size=190")
    alone = run_in_process(experiment, path, config)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert [choice(r) for r in run_in_process(experiment, path, config)] == [choice(r) for r in alone]
    assert alone[-1].n_labeled == 200


def test_an_initial_set_of_one_class_works_with_a_warning(experiment, tmp_path, caplog):
    for strategy in ("random", "margin", "dgmg"):
        rows = run_in_process(
            experiment, tmp_path / strategy / "seed-0.jsonl", example_config(strategy, "initial_size=1")
        )
        assert [row.n_labeled for row in rows] == [1, 6, 11]
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 3
    assert len(set(texts)) == 1  # the same for every strategy of the seed: a sweep tells it once
    assert texts[0].startswith("digits, seed 0: the initial set of 1 holds only class ")
    assert texts[0].endswith("raise initial_size, or set balanced=true")
    run_in_process(experiment, tmp_path / "all" / "seed-0.jsonl", example_config("random", "balanced=true"))
    assert len(caplog.records) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", ["margin", "dgmg", "badge", "coreset", "seals", "vae_seals", "ganvae"])
def test_a_run_on_the_gpu_is_the_same_bits_twice(tmp_path, cache_root, strategy):
    config = example_config(strategy, "device=cuda")
    experiment = open_experiment(config, Path("digits need none"), cache_root, lambda what, done, of: None)
    rows = [run_in_process(experiment, tmp_path / str(i) / "seed-0.jsonl", config) for i in range(2)]
    assert [choice(row) for row in rows[0]] == [choice(row) for row in rows[1]]
    assert all(row.query_seconds > 0 for row in rows[0][:-1])


@pytest.mark.parametrize(("setting", "rounds"), [("few", [0, 2, 4]), ("all", [0, 1, 2, 3, 4]), ("none", [])])
def test_the_graph_alone_is_tested_at_the_rounds_asked_for(experiment, tmp_path, setting, rounds):
    rows = run_in_process(
        experiment, tmp_path / "seed-0.jsonl", example_config("rsmg", "rounds=4", f"propagation={setting}")
    )
    assert [row.round for row in rows if row.propagated] == rounds
    assert all(row.extra_seconds > 0 for row in rows)
    header = read_run(tmp_path / "seed-0.jsonl").header
    known = header["initial"]
    for row in rows:
        labeled = torch.tensor(known)
        if row.propagated:
            labels, test_labels = experiment.data.labels[labeled], experiment.data.test_labels
            expected = propagation_accuracy(
                experiment.prepared.graph, experiment.prepared.attachment, labeled, labels, 10, test_labels
            )
            assert row.propagated == expected
            assert 0.1 < row.propagated["converged_accuracy"] <= 1
        known = known + (row.indices or [])


def test_what_a_query_remembers_is_the_next_ones_memory_and_no_others(experiment, tmp_path, monkeypatch):
    """Round by round within one process; after a resume a rehearsal of the round before has left the same."""
    seen = []

    def select(strategy, query, batch_size, select=Strategy.select):
        if not query.rehearsal:
            seen.append(dict(query.memory))
        query.remember("n", len(query.pool.labeled))
        return select(strategy, query, batch_size)

    monkeypatch.setattr(Strategy, "select", select)
    path, config = tmp_path / "seed-0.jsonl", example_config("margin", "rounds=3")
    run_in_process(experiment, path, config)
    assert seen == [{}, {"n": 10}, {"n": 15}]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    run_in_process(experiment, path, config)
    assert seen[3:] == [{"n": 15}]


@pytest.mark.parametrize("strategy", ["margin", "seals", "badge", "ganvae"])
def test_a_rehearsal_is_a_whole_query_on_two_batches_off_the_clock(experiment, tmp_path, monkeypatch, strategy):
    """Before the first round of a process: two passes of 16 images, one step of an adversary, and no trace in rows."""
    passes, steps, forward = [], [], Classifier.forward

    def counted(net, images):
        if not net.training:
            passes.append(len(images))
        return forward(net, images)

    def warmed(run, pool, first, warm_up=loop.warm_up):
        before = len(passes)
        memory, seconds = warm_up(run, pool, first)
        told.append((passes[before:], seconds))
        return memory, seconds

    def trained(*args, train=adversary.train_vaal):
        steps.append(args[-1])
        return train(*args)

    told = []
    monkeypatch.setattr(Classifier, "forward", counted)
    monkeypatch.setattr(loop, "warm_up", warmed)
    monkeypatch.setattr(adversary, "train_vaal", trained)
    config = example_config(strategy, "predict_batch_size=16")
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    ((batches, seconds),) = told
    assert batches == ([] if strategy == "ganvae" else [16, 16])
    assert steps == ([1, 2, 2] if strategy == "ganvae" else [])
    assert [row.rehearsal_seconds for row in rows] == [seconds, None, None]
    assert rows[0].n_scored == {"margin": 190, "seals": 200, "badge": 190, "ganvae": 0}[strategy]


def test_vae_seals_searches_no_more_on_the_clock_after_a_resume(experiment, tmp_path, monkeypatch):
    """A stop must not make the next query slower: what was searched before is searched again off the clock."""
    searched = []

    def neighbor_mask(points, *rest, search=seals.neighbor_mask):
        searched.append(len(points))
        return search(points, *rest)

    monkeypatch.setattr(seals, "neighbor_mask", neighbor_mask)
    path, config = tmp_path / "seed-0.jsonl", example_config("vae_seals", "rounds=4")
    run_in_process(experiment, path, config)
    assert searched == [10, 10, 5, 5, 5]  # rehearsed, and then round by round
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    run_in_process(experiment, path, config)
    assert searched[5:] == [20, 5]
