"""How long a sweep would take: by hand on forged rows, and by playing the lanes through."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgal_bench.config.schema import to_dict
from dgal_bench.core.errors import ResultsError
from dgal_bench.engines.estimate import estimate_lines, estimate_time, makespan, read_past
from dgal_bench.engines.sweep import PlannedRun, SweepSettings, plan_runs, read_logs
from dgal_bench.results.reader import read_results
from dgal_bench.results.resume import ALGORITHM_VERSION
from dgal_bench.results.rows import RoundRecord
from dgal_bench.results.writer import FileWriter
from tests.headers import header

GPU = "NVIDIA H100"


def settings(root, **changes):
    base = {
        "results": root / "results", "suite": "s", "data": root, "cache": root, "jobs": 1, "resume_anyway": False,
        "offline": True, "plugins": (), "full_supervision": False,
    }  # fmt: skip
    return SweepSettings(**{**base, **changes})


def runs(root, *strategies, seeds=("0",), full_supervision=False, **changes):
    axes = {
        "dataset": ["digits"], "representation": ["pca"], "profile": ["smoke"], "seed": list(seeds),
        "strategy": list(strategies), **changes,
    }  # fmt: skip
    return plan_runs(axes, settings(root, full_supervision=full_supervision))


def row(round_, train, query=None, rehearsal=None):
    """Training as said, 1 s of testing, half a second of extra."""
    return RoundRecord(
        round=round_, n_labeled=10, accuracy=0.5, underfit=False, epochs=1, train_loss=0.1, reach=1.0,
        train_seconds=train, test_seconds=1.0, extra_seconds=0.5, threads=1, jobs=1, load=0.0,
        query_seconds=query, rehearsal_seconds=rehearsal,
    )  # fmt: skip


def three_rows(query, train=(10.0, 20.0, 30.0)):
    """Of two queries and three evaluations, as the profile smoke has: train + 4.5 s + two queries in all."""
    return [row(0, train[0], query), row(1, train[1], query), row(2, train[2])]


def forge(job, rows, path=None, device="cpu", set_up=(7.0, 0.5), forget=()):
    config = {key: value for key, value in to_dict(job.config).items() if key not in forget}
    made = header(
        cell=job.name,
        profile=job.config.profile,
        fingerprint={"algorithm_version": ALGORITHM_VERSION, "config": job.config.hash, "device": device},
        provenance={"machine": {"cpu": "Abacus"}},
    ) | {"config": config}
    for name, seconds in zip(("representation", "graph"), set_up or (), strict=False):
        made["setup"][name] |= {"seconds": seconds, "test_seconds": 0.0}
    made["setup"] = made["setup"] if set_up else {}
    with FileWriter(path or job.path) as writer:
        writer.write_header(made)
        for one in rows:
            writer.write(one)


def past_of(root, *forged):
    """Forged runs of another folder, read back: (job, rows[, facts])."""
    for number, (job, rows, *facts) in enumerate(forged):
        forge(job, rows, root / "past" / "s" / "x" / str(number) / "seed-0.jsonl", **(facts[0] if facts else {}))
    return read_results(root / "past")


def reckon(root, jobs, past, n_lanes=1, n_gpus=0):
    return estimate_time(jobs, read_logs(jobs, settings(root)), past, n_lanes, n_gpus)


def test_another_seed_takes_the_mean_of_its_own_configuration_and_set_up_once(tmp_path):
    one, other = runs(tmp_path, "margin", seeds=("0", "1"))
    todo = runs(tmp_path, "margin", seeds=("2", "3"))
    past = past_of(tmp_path, (one, three_rows(1.0)), (other, three_rows(4.0)))
    found = reckon(tmp_path, todo, past)
    # 60 s of training, 4.5 of tests and extra, two queries of 1 or 4 s: 66.5 or 72.5
    assert [guess.seconds for guess in found.known_guesses] == pytest.approx([69.5, 69.5])
    assert all(guess.same_configuration for guess in found.known_guesses)
    assert found.seconds == pytest.approx(7.5 + 2 * 69.5)
    assert reckon(tmp_path, todo, past, n_lanes=2).seconds == pytest.approx(7.5 + 69.5)


def test_a_rehearsal_counts_and_where_files_lie_does_not(tmp_path):
    (job,) = runs(tmp_path, "margin")
    rows = three_rows(1.0)
    rows[0] = replace(rows[0], rehearsal_seconds=100.0)
    elsewhere = replace(job.config, dataset=replace(job.config.dataset, path="/here"))
    moved = replace(job.config, dataset=replace(job.config.dataset, path="/there"))
    found = reckon(tmp_path, [PlannedRun(moved, job.path)], past_of(tmp_path, (PlannedRun(elsewhere, job.path), rows)))
    assert found.known_guesses[0].same_configuration
    assert found.known_guesses[0].seconds == pytest.approx(166.5)


def test_a_partial_run_needs_its_remaining_rounds_only(tmp_path):
    one, todo = runs(tmp_path, "margin", seeds=("0", "1"))
    past = past_of(tmp_path, (one, three_rows(1.0)))
    forge(todo, three_rows(50.0)[:2])
    assert reckon(tmp_path, [todo], past).known_guesses[0].seconds == pytest.approx(31.5)  # the last row of the other


def test_unfinished_rows_are_scaled_and_only_where_there_are_no_finished_ones(tmp_path):
    one, other, todo = runs(tmp_path, "margin", seeds=("0", "1", "2"))
    partial = (one, three_rows(1.0)[:2])
    (guess,) = reckon(tmp_path, [todo], past_of(tmp_path / "a", partial)).known_guesses
    assert guess.seconds == pytest.approx((30 + 3 + 2) / 2 * 3)
    (guess,) = reckon(tmp_path, [todo], past_of(tmp_path / "b", partial, (other, three_rows(4.0)))).known_guesses
    assert guess.seconds == pytest.approx(72.5)


def test_other_rounds_take_means_per_evaluation_and_the_strategys_own_queries(tmp_path):
    margin, random = runs(tmp_path, "margin", "random")
    todo = runs(tmp_path, "margin", "random", "lc", rounds=["5"])
    past = past_of(tmp_path, (margin, three_rows(4.0)), (random, three_rows(1.0)))
    guesses = reckon(tmp_path, todo, past).known_guesses
    per_evaluation = 20 + 1.5
    assert [guess.seconds for guess in guesses] == pytest.approx(
        [6 * per_evaluation + 5 * 4, 6 * per_evaluation + 5 * 1, 6 * per_evaluation]
    )
    assert [guess.same_configuration for guess in guesses] == [False] * 3
    assert [guess.with_queries for guess in guesses] == [True, True, False]


def test_rows_older_than_a_setting_are_of_the_value_that_behaves_as_the_code_did(tmp_path):
    one, todo = runs(tmp_path, "margin", seeds=("0", "1"))
    past = past_of(tmp_path, (one, three_rows(1.0), {"forget": ("trainer",)}))
    (guess,) = reckon(tmp_path, [todo], past).known_guesses
    assert guess.seconds == pytest.approx(66.5)
    assert guess.same_configuration


@pytest.mark.parametrize("other", ["net.feature_dim", "initial_size", "training.max_epochs", "batch_size"])
def test_another_training_says_nothing(tmp_path, other):
    (one,) = runs(tmp_path, "margin", **{other: ["7"]})
    todo = runs(tmp_path, "margin")
    found = reckon(tmp_path, todo, past_of(tmp_path, (one, three_rows(1.0))))
    assert (found.known_guesses, found.seconds) == ([], None)
    assert found.guesses == {todo[0]: None}
    assert "how long is not known" in estimate_lines(todo, {todo[0].path: None}, found)[-1]


def test_full_supervision_is_no_measure_of_a_strategy_nor_the_other_way_round(tmp_path):
    margin, full = runs(tmp_path, "margin", full_supervision=True)
    past = past_of(tmp_path, (margin, three_rows(1.0)))
    assert reckon(tmp_path, [full], past).known_guesses == []
    past = past_of(tmp_path / "full", (full, [row(0, 500.0)], {"set_up": None}))
    assert reckon(tmp_path, [margin], past).known_guesses == []
    (guess,) = reckon(tmp_path, [full], past).known_guesses
    assert (guess.same_configuration, guess.seconds) == (True, 501.5)
    assert not reckon(tmp_path, [full], past).setups  # it needs no graph


def test_rows_of_the_same_kind_of_device_come_first_and_others_are_named(tmp_path):
    on_cpu, on_gpu, todo = runs(tmp_path, "margin", seeds=("0", "1", "2"))
    slow, fast = (on_cpu, three_rows(1.0)), (on_gpu, three_rows(1.0, (1.0, 2.0, 3.0)), {"device": GPU})
    both = past_of(tmp_path / "both", slow, fast)
    with_gpus, without = (reckon(tmp_path, [todo], both, n_gpus=n) for n in (1, 0))
    for found, seconds, machine in ((with_gpus, 12.5, GPU), (without, 66.5, "Abacus, cpu")):
        assert found.known_guesses[0].seconds == pytest.approx(seconds)
        assert (found.machines, found.other_device) == ([machine], False)
    foreign = reckon(tmp_path, [todo], past_of(tmp_path / "cpu", slow), n_gpus=8)
    assert foreign.other_device
    assert not foreign.known_guesses[0].same_configuration
    told = estimate_lines([todo], {todo.path: None}, foreign)
    assert told[0] == "1 run: 0 done, 1 to run, 1 side by side (8 GPUs)"
    assert told[1] == "about 1:14 for 1 of 1 run, by rows of Abacus, cpu, not of the GPUs asked for"


def test_a_set_up_that_was_never_timed_is_counted(tmp_path):
    (one,) = runs(tmp_path, "margin")
    todo = runs(tmp_path, "margin", seeds=("1", "2"))
    todo += runs(tmp_path, "margin+graph.graph_k=5")  # a graph of its own
    found = reckon(tmp_path, todo, past_of(tmp_path, (one, three_rows(1.0))))
    assert sorted(found.setups.values(), key=str) == [7.5, None]
    assert estimate_lines(todo, read_logs(todo, settings(tmp_path)), found)[-1] == (
        "  2 set-ups: 1 about 8 s of it, less what the cache has already; 1 not known"
    )


def test_a_shared_ledger_counts_once_in_the_mean_of_set_ups(tmp_path):
    jobs = runs(tmp_path, "margin", "lc", "random", seeds=("0",))
    todo = runs(tmp_path, "margin", seeds=("9",))
    other = {"set_up": (1.0, 0.5)}
    past = past_of(tmp_path, (jobs[0], three_rows(1.0)), (jobs[1], three_rows(1.0)), (jobs[2], three_rows(1.0), other))
    assert reckon(tmp_path, todo, past).setup_seconds == pytest.approx((7.5 + 1.5) / 2)


def test_the_lines_count_runs_by_data_set_and_what_is_known_of_them(tmp_path):
    jobs = runs(tmp_path, "margin", "lc", seeds=("0", "1"), dataset=["digits", "mnist"])
    forge(jobs[0], three_rows(1.0))
    done = read_results(tmp_path / "results")
    logs = read_logs(jobs, settings(tmp_path))
    found = estimate_time(jobs[1:], logs, done, 2)
    # 64.5 (lc, no queries known), 66.5, 64.5 on two lanes, after 7.5 of set-up: 136.5
    assert estimate_lines(jobs, logs, found) == [
        "8 runs: 1 done, 7 to run, 2 side by side",
        "  digits  4 runs: 1 done, 3 to run, about 3:16 of work",
        "  mnist   4 runs: 0 done, 4 to run, no past rows",
        "about 2:16 for 3 of 7 runs, by rows of Abacus, cpu",
        "  1 by rows like theirs, all but the seed",
        "  2 roughly, by rows of the same data set and network; 2 of them without queries: none was ever timed",
        "  4 have no past rows and are not in it",
        "  2 set-ups: 1 about 8 s of it, less what the cache has already; 1 not known",
    ]


def test_failed_runs_are_left_out_until_they_are_tried_again(tmp_path):
    jobs = runs(tmp_path, "margin", "lc")
    forge(jobs[0], three_rows(1.0)[:1])
    with FileWriter(jobs[0].path) as writer:
        writer.write_failure("ValueError: diverged", "")
    logs = read_logs(jobs, settings(tmp_path))
    left_out, again = (estimate_time(todo, logs, [], 1) for todo in (jobs[1:], jobs))
    assert estimate_lines(jobs, logs, left_out)[0] == "2 runs: 0 done, 1 failed, 1 to run, 1 side by side"
    assert estimate_lines(jobs, logs, again)[0] == "2 runs: 0 done, 2 to run, 1 side by side"
    assert estimate_lines(jobs, logs, estimate_time([], logs, [], 1)) == [
        "2 runs: 0 done, 1 failed, 0 to run, 1 side by side"
    ]


def test_the_results_folder_may_be_empty_another_place_to_look_may_not(tmp_path):
    here = settings(tmp_path)
    assert read_past(replace(here, past=[here.results])) == []
    with pytest.raises(ResultsError, match="nowhere is not a folder of results"):
        read_past(replace(here, past=[here.results, tmp_path / "nowhere"]))


def test_a_damaged_file_is_passed_over_in_the_results_folder_and_refused_elsewhere(tmp_path, caplog):
    """Of another suite, say: bench itself would run."""
    (job,) = runs(tmp_path, "margin")
    forge(job, three_rows(1.0))
    header, *rows = job.path.read_text().splitlines(keepends=True)
    said = json.loads(header)
    for name, first in (("torn", "{torn}\n"), ("no-device", json.dumps(said | {"fingerprint": {}}) + "\n")):
        path = tmp_path / "results" / "other" / name / "random" / "seed-0.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(first + "".join(rows))
    here = settings(tmp_path)
    assert [log.path for log in read_past(replace(here, past=[here.results]))] == [job.path]
    assert len(caplog.messages) == 2
    assert "no-device/random/seed-0.jsonl, line 1: fingerprint.algorithm_version is missing" in caplog.text
    assert "torn/random/seed-0.jsonl, line 1: not JSON" in caplog.text
    for name in ("torn", "no-device"):
        with pytest.raises(ResultsError, match=f"{name}/random/seed-0.jsonl, line 1"):
            read_past(replace(here, past=[tmp_path / "results" / "other" / name]))


SECONDS = st.lists(st.integers(0, 50), max_size=12)


@given(SECONDS, st.integers(1, 5))
def test_the_makespan_is_that_of_lanes_played_through_second_by_second(seconds, n_lanes):
    waiting, lanes, now = list(seconds), [0] * n_lanes, 0
    while waiting or any(lanes):
        for lane in range(n_lanes):
            while lanes[lane] == 0 and waiting:
                lanes[lane] = waiting.pop(0)
        if any(lanes):
            now += 1
        lanes = [max(0, left - 1) for left in lanes]
    assert makespan(seconds, n_lanes) == now


@given(SECONDS)
def test_more_lanes_never_take_longer_nor_less_than_the_longest_or_an_equal_share(seconds):
    spans = [makespan(seconds, n) for n in range(1, 14)]
    assert all(more <= fewer for fewer, more in pairwise(spans))
    assert spans[0] == sum(seconds)
    assert spans[-1] == max(seconds, default=0)
    assert all(span >= sum(seconds) / n for n, span in enumerate(spans, start=1))


def test_the_reference_rows_reckon_a_suite_of_which_no_data_are_here(tmp_path):
    """As a user would ask before there is a machine: mnist by its rows, the others counted."""
    jobs = runs(
        tmp_path, "margin", "badge", seeds=("0", "1"), dataset=["mnist", "svhn"], representation=["default"],
        profile=["cpu"], **{"representation.threads": ["2"]},
    )  # fmt: skip
    logs = dict.fromkeys((job.path for job in jobs), None)
    found = estimate_time(jobs, logs, read_results(Path(__file__).parent.parent / "results/reference/all/mnist"), 8, 8)
    assert [guess is not None for guess in found.guesses.values()] == [True] * 4 + [False] * 4
    assert found.other_device
    assert found.seconds > found.setup_seconds > 0
    assert found.machines == ["Intel(R) Xeon(R) Processor, cpu"]
