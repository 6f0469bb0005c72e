"""The benchmarks' own laws: nothing dropped, ratios that are quotients, differences found. No time is asserted."""

import gc
import json
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from weakref import ref

import numpy as np
import pytest
import torch

from benchmarks import (
    acquisition,
    graph_build,
    inference,
    inputs,
    loops,
    machine,
    memory,
    memory_worker,
    plan,
    repetitions,
    report,
    reporting,
    scheduling,
    training,
    worker,
)
from benchmarks.loops import Task
from benchmarks.memory_worker import Peaks
from benchmarks.plan import CRITERIA, IMPLEMENTATIONS, Case
from dgal_bench.cli.main import main as command
from dgal_bench.data.pool import Pool
from dgal_bench.engines import local
from tests.measuring import answer_here
from tests.sweeping import WorkerHere

CASE = Case("badge", 60_000, 10, 50, "ours")


@pytest.fixture(autouse=True, scope="module")
def only_new_garbage() -> Iterator[None]:
    """Benchmarks collect it before each call, and in a process of all tests that takes half a second a time."""
    gc.freeze()
    yield
    gc.unfreeze()


def row(implementation, **facts):
    measured = {"status": "measured", "seconds": 1.0, "peak_mb": 3.0, "chosen": [7, 5, 9]}
    return replace(CASE, picks=3, implementation=implementation).facts() | measured | facts


def compare(*rows):
    (only,) = report.comparisons(rows, read_gb_per_second=10.0, limit=120.0)
    return only


def test_a_ratio_is_theirs_by_ours():
    found = compare(row("ours", seconds=0.5), row("reference", seconds=4.0), row("scikit-activeml", seconds=3.0))
    assert [found[name]["x_ours"] for name in IMPLEMENTATIONS[1:]] == [8.0, 6.0]
    assert found["ours"]["floor_seconds"] == 3 * 60_000 * 60 * 4 / 1e10
    assert found["ours"]["x_floor"] == 0.5 / found["ours"]["floor_seconds"]


def test_what_was_stopped_bounds_the_ratio_and_stays_in_the_table():
    missing = {"seconds": None, "peak_mb": None}
    found = compare(
        row("ours", seconds=0.5),
        row("reference", status="over_limit", **missing),
        row("scikit-activeml", status="over_memory", needs_gb=31.0, **missing),
    )
    assert (found["reference"]["x_ours"], found["reference"]["lower_bound"]) == (240.0, True)
    assert found["scikit-activeml"]["x_ours"] is None
    text = report.table([found], limit=120.0)
    assert "> 120 " in text
    assert "> 240 " in text
    assert "needs 31 GB" in text


@pytest.mark.parametrize(("theirs", "shared"), [([7, 5, 9], 3), ([7, 9, 5], 1), ([1, 5, 9], 0)])
def test_lists_are_compared_up_to_the_first_difference(theirs, shared):
    found = compare(row("ours"), row("reference", chosen=theirs), row("scikit-activeml", chosen=theirs))
    assert found["reference"]["shared_picks"] == shared
    assert found["scikit-activeml"]["shared_picks"] is None  # draws of its own


def test_margins_are_compared_as_sets():
    rows = [row(name, criterion="margin") for name in IMPLEMENTATIONS]
    rows[1]["chosen"] = [9, 7, 1]
    assert compare(*rows)["reference"]["shared_picks"] == 2


def test_a_case_larger_than_a_stopped_one_is_not_started_and_says_so():
    stopped = replace(CASE, implementation="reference").facts() | {"status": "over_limit", "peak_mb": None}
    larger = replace(CASE, implementation="reference", picks=200)
    found = acquisition.measured(larger, [stopped], threads=1, limit=1.0)
    assert (found["status"], found["because_of"]["picks"]) == ("not_started", 50)
    assert not replace(larger, implementation="scikit-activeml").is_larger_than(Case.of(stopped))
    assert not replace(larger, points=15_000).is_larger_than(Case.of(stopped))


def test_what_needs_more_memory_than_there_is_is_not_started(monkeypatch):
    monkeypatch.setattr(plan, "memory_bytes", lambda: 10**9)
    found = acquisition.measured(Case("badge", 125_000, 100, 50, "scikit-activeml"), [], threads=1, limit=1.0)
    assert found["status"] == "over_memory"
    assert found["needs_gb"] > 10


def test_every_size_is_planned_for_every_implementation():
    cases = plan.cases(CRITERIA, quick=False)
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert {replace(case, implementation=name) for name in IMPLEMENTATIONS} <= set(cases)


@pytest.mark.slow
def test_a_quick_run_compares_all_on_the_same_picks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acquisition, "answer", answer_here)
    monkeypatch.setattr(worker, "n_calls", lambda first_seconds: 2)
    out = tmp_path / "acquisition.json"
    assert acquisition.main(["--quick", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    results = json.loads(out.read_text())
    measured = {(one["criterion"], one["implementation"]): one for one in results["measurements"]}
    assert set(measured) == {(criterion, name) for criterion in CRITERIA for name in IMPLEMENTATIONS}
    assert all(one["status"] == "measured" for one in measured.values())
    assert all(one["seconds"] == min(one["all_seconds"]) for one in measured.values())
    assert [one["criterion"] for one in results["comparisons"]] == list(CRITERIA)
    for one in results["comparisons"]:
        ours = measured[one["criterion"], "ours"]["seconds"]
        for name in IMPLEMENTATIONS[1:]:
            assert one[name]["x_ours"] == measured[one["criterion"], name]["seconds"] / ours
            expected = None if (one["criterion"], name) == ("badge", "scikit-activeml") else one["picks"]
            assert one[name]["shared_picks"] == expected
        assert f"\n{one['criterion']} " in said
    assert results["bandwidth"]["torch_threads"] == results["threads"]
    assert results["provenance"]["machine"]["cpu"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "<svg" in out.with_suffix(".svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "classes"), [("badge", 10), ("coreset", None)])
def test_memory_beyond_the_inputs_is_small(criterion, classes, monkeypatch):
    """50 picks of 60,000 points with 50 features: the gradients alone would be 120 MB, all distances 14 GB.

    Here as in a process of its own: what is free goes back to the system before the call that is watched.
    """
    monkeypatch.setattr(acquisition, "answer", answer_here)
    monkeypatch.setattr(worker, "n_calls", lambda first_seconds: 1)
    found = acquisition.measured(Case(criterion, 60_000, classes, 50, "ours"), [], threads=1, limit=120.0)
    assert found["status"] == "measured", found
    if found["peak_mb"] is None:
        pytest.skip("peak memory is read under Linux's /proc")
    assert 0 < found["peak_mb"] < 100


def read(out):
    return json.loads(out.read_text())


def quotients(above, below):
    return sorted(a / b for a, b in zip(above, below, strict=True))


@pytest.mark.slow
def test_contenders_take_turns_and_ratios_pair_their_repetitions(monkeypatch):
    calls = []
    makers = {name: lambda name=name: lambda: calls.append(name) for name in "abc"}
    repeated = repetitions.interleaved(makers, 3)
    assert calls == list("abcbcacab")
    assert {name: len(seconds) for name, seconds in repeated.seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert repeated.answers == {name: [None] * 3 for name in "abc"}
    assert repetitions.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}


@pytest.mark.slow
def test_an_answer_of_which_only_a_part_is_kept_is_gone_before_the_next(monkeypatch):
    alive = []

    class Large:
        def __init__(self):
            assert not alive
            alive.append(self)

    def keep(name, answer):
        assert alive.pop() is answer
        held.append(ref(answer))
        return name.upper()

    held = []
    makers = {name: lambda: Large for name in "ab"}
    repeated = repetitions.interleaved(makers, 2, keep)
    assert repeated.answers == {"a": ["A", "A"], "b": ["B", "B"]}
    assert [one() for one in held] == [None] * 4


LOG_PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.4, 0.4 - 1e-6, 0.2]]).log()


@pytest.mark.parametrize(
    ("change", "different", "beyond"),
    [
        (lambda rows: rows, 0, 0),
        (lambda rows: rows[[1, 0, 2]], 2, 2),
        (lambda rows: torch.stack([rows[0], rows[1], rows[2, [1, 0, 2]]]), 1, 0),  # a tie at float rounding
        (lambda rows: torch.stack([rows[0], rows[1], rows[2, [2, 1, 0]]]), 1, 1),
        (lambda rows: torch.stack([rows[0] * torch.nan, rows[1], rows[2]]), 1, 1),
    ],
)
def test_a_class_that_differs_is_counted_and_only_a_tie_forgiven(change, different, beyond):
    found = inference.difference(LOG_PROBS, change(LOG_PROBS))
    assert (found["different"], found["beyond_ties"]) == (different, beyond)


def run_inference(out, repeats):
    return inference.main(["--images", "100", "--repeats", repeats, "--workers", "0", "--out", str(out)])


@pytest.mark.slow
def test_passes_are_compared_on_all_images(tmp_path, capsys):
    out = tmp_path / "inference.json"
    assert run_inference(out, "2") == 0
    results = read(out)
    rows = {row["name"]: row for row in results["measurements"]}
    assert set(rows) == {row.name for row in inference.contenders(0)}
    assert {(row["slices"], row["channels_last"]) for row in rows.values()} == {*product([True, False], repeat=2)}
    ours, usual = (rows[one.name]["all_seconds"] for one in (inference.OURS, inference.USUAL))
    low, high = quotients(usual, ours)
    assert results["goal"]["found"] == {"median": (low + high) / 2, "min": low, "max": high}
    assert rows[inference.USUAL.name]["x_ours"] == results["goal"]["found"]
    assert results["goal"]["reached"] == ((low + high) / 2 >= 1.7)
    assert (results["equal"], results["images"], results["threads"]) == (True, 100, 1)
    assert results["classes_answered"] > 5
    assert results["provenance"]["machine"]["cpu"]
    assert "equal classes on all 100 images: yes" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [one.name for one in inference.contenders(2)])
def test_any_pass_that_answers_in_another_order_is_found(broken):
    rows = inference.contenders(2)
    answers = {row.name: [LOG_PROBS, LOG_PROBS] for row in rows}
    seconds = {row.name: [1.0, 2.0] for row in rows}
    assert inference.summary(rows, seconds, answers)["equal"]
    answers[broken] = [LOG_PROBS, LOG_PROBS.roll(1, 0)]
    found = inference.summary(rows, seconds, answers)
    assert not found["equal"]
    assert [one["name"] for one in found["measurements"] if one["beyond_ties"]] == [broken]


@pytest.mark.slow
def test_another_answer_fails_the_run(tmp_path, capsys, monkeypatch):
    maker = inference.maker

    def flipped(row, data, weights):
        make = maker(row, data, weights)
        return (lambda: lambda: make()().flip(0)) if row.slices and not row.channels_last else make

    monkeypatch.setattr(inference, "maker", flipped)
    assert run_inference(tmp_path / "inference.json", "1") == 1
    assert not read(tmp_path / "inference.json")["equal"]
    assert "equal classes on all 100 images: NO, " in capsys.readouterr().out


def test_a_layout_is_what_its_name_says():
    """As the second convolution meets it: of one channel both layouts are alike."""
    data = inputs.generated(200, 10)
    rows = inference.contenders(0)
    met = {}
    for row in rows:
        makers = inference.passes([row], data, inputs.new_module(inputs.settings(), data).net.state_dict())

        def note(module, args, row=row):
            if isinstance(module, torch.nn.Conv2d) and module.in_channels > 1:
                met.setdefault(row.name, set()).add(args[0].is_contiguous(memory_format=torch.channels_last))

        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        makers[row.name]()()
        hook.remove()
    assert met == {row.name: {row.channels_last} for row in rows}


def test_single_images_are_what_slices_hold():
    data = inputs.generated(40, 10)
    images, labels = next(iter(torch.utils.data.DataLoader(inputs.PerItem(data), batch_size=40)))
    torch.testing.assert_close(images, inputs.standardise(inputs.settings(), data)(data.images))
    assert labels.equal(data.labels)


def run_training(out, epochs, repeats, *sizes):
    return training.main(["--sizes", *sizes, "--epochs", epochs, "--repeats", repeats, "--out", str(out)])


@pytest.mark.slow
def test_lightning_ends_with_the_weights_of_the_bare_loop(tmp_path, capsys):
    out = tmp_path / "training.json"
    assert run_training(out, "3", "2", "10", "70") == 0
    results = read(out)
    assert [(row["labels"], row["epochs"]) for row in results["sizes"]] == [(10, 3), (70, 3)]
    for row in results["sizes"]:
        assert (row["equal"], row["bit_equal"]) == (True, True)
        rows = {one["name"]: one for one in row["measurements"]}
        assert set(rows) == {loops.OURS, loops.BARE, loops.USUAL}
        assert all((one["epochs"], one["largest_difference"]) == (3, 0) for one in rows.values())
        low, high = quotients(rows[loops.OURS]["all_seconds"], rows[loops.BARE]["all_seconds"])
        assert rows[loops.OURS]["x_bare"] == {"median": (low + high) / 2, "min": low, "max": high}
        assert row["reached"] == ((low + high) / 2 <= 1.1)
        assert 0 < rows[loops.OURS]["construction_seconds"] < rows[loops.OURS]["seconds"]["median"]
    assert results["provenance"]["machine"]["cpu"]
    assert capsys.readouterr().out.count("; weights: the same bits") == 2


@pytest.mark.parametrize("broken", [loops.OURS, loops.USUAL])
@pytest.mark.slow
def test_a_training_in_another_order_fails(broken, tmp_path, capsys, monkeypatch):
    trainings = training.trainings

    class Backwards(Task):
        """On the same points, given in the opposite order."""

        def parts(self):
            module, slices = super().parts()
            pool = slices.pool
            slices.pool = Pool(pool.size, pool.n_classes, pool.labeled.flip(0), pool.labels.flip(0))
            return module, slices

    def other_order(task):
        backwards = Backwards(task.config, task.data, task.transform, task.n_labeled)
        return trainings(task) | {broken: trainings(backwards)[broken]}

    monkeypatch.setattr(training, "trainings", other_order)
    assert run_training(tmp_path / "training.json", "9", "1", "70") == 1
    (row,) = read(tmp_path / "training.json")["sizes"]
    assert (row["equal"], row["bit_equal"]) == (False, broken != loops.OURS)
    assert "; weights: NOT EQUAL" in capsys.readouterr().out


def test_no_rule_can_stop_a_training_early():
    training_config = Task.of(inputs.generated(50, 10), 10, epochs=40).config.training
    assert training_config.max_epochs == training_config.min_epochs == 40
    assert training_config.patience > 40


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (inference.main, ["--images", "0"]),
        (inference.main, ["--threads", "0"]),
        (training.main, ["--sizes", "12"]),
        (training.main, ["--epochs", "1"]),
        (acquisition.main, ["--limit", "0"]),
        *((graph_build.main, ["--limit", word]) for word in ("0", "-5", "nan", "soon")),
        (scheduling.main, ["--runs", "5"]),
    ],
)
def test_a_setting_that_measures_nothing_is_refused(main, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


needs_proc = pytest.mark.skipif(machine.reset_peak() is None, reason="peak memory is read under Linux's /proc")


@needs_proc
def test_a_peak_belongs_to_the_innermost_phase():
    peaks = Peaks()
    with peaks.phase("outer"):
        with peaks.phase("inner"):
            touched(200)
        with peaks.phase("kept"):
            kept = touched(100)
    beyond = {name: phase.peak_mb - phase.before_mb for name, phase in peaks.phases.items()}
    assert beyond["inner"] == pytest.approx(200, abs=20)
    assert beyond["kept"] == pytest.approx(100, abs=20)
    assert beyond["outer"] == pytest.approx(kept.nbytes / 1e6, abs=20)


def touched(megabytes):
    """Memory of its own, that goes back when it is let go: the allocator may keep what it has had before."""
    block = np.frombuffer(mmap.mmap(-1, megabytes * 10**6), dtype=np.uint8)
    block[:] = 1
    return block


def part(name, **phases):
    peak = max(phases.values())
    found = {key: {"before_mb": 900.0, "peak_mb": value, "seconds": 1.0} for key, value in phases.items()}
    return {
        "part": name, "status": "measured", "imports_mb": 850.0, "peak_mb": peak, "phases": found,
        "reached": peak <= 3000,
    }  # fmt: skip


def test_a_verdict_names_the_phase_of_the_peak():
    rest = {"the rest": 2500.2}
    assert memory.verdict(part("dgmg", **rest, query=2500.1)).endswith("reached: 2.50 GB, in query")
    assert memory.verdict(part("dgmg", **rest, query=1000.0)).endswith("reached: 2.50 GB, in the rest")
    over = part("setup", **rest, label_shares=3245.0)
    assert memory.verdict(over).endswith("under 3 GB, NOT reached: 3.25 GB, in label_shares")
    killed = {"part": "margin", "status": "over_memory", "peak_mb": None, "reached": None}
    assert memory.verdict(killed) == "goal for margin: not known, over_memory"
    lines = [line.split() for line in memory.table({"parts": [over, killed]}).splitlines()]
    assert ["label_shares", "3,245", "2,345", "1.00", "1.0"] in lines
    assert ["margin", "over_memory"] in lines


def test_generated_files_hold_what_is_generated_in_memory(tmp_path):
    inputs.write_files(tmp_path, 60, 20, 5, 8)
    data, found = inputs.generated(60, 20, 5), np.load(tmp_path / "set.npz")
    assert np.array_equal(found["images"], data.images[:, 0].numpy())
    assert np.array_equal(found["test_labels"], data.test_labels.numpy())
    latents = np.load(tmp_path / "latents.npy")
    assert (latents.shape, latents.dtype) == ((60, 8), np.float32)
    assert len({image.tobytes() for image in found["images"]}) == 60


@pytest.mark.slow
@needs_proc
def test_a_small_run_says_where_each_peak_is(tmp_path, monkeypatch):
    """In the process of the test: that each part has one of its own is seen where one fails."""

    def answer(*request):
        machine.return_free_memory()  # as a new process has none: what a phase takes is more than there was
        with monkeypatch.context() as patched:
            for owner, name, _ in memory_worker.PHASES:
                patched.setattr(owner, name, getattr(owner, name))  # watched until the part has ended
            return answer_here(*request)

    monkeypatch.setattr(memory, "answer", answer)
    out = tmp_path / "memory.json"
    assert memory.main(["--small", "--out", str(out)]) == 0
    parts = {row["part"]: row for row in read(out)["parts"]}
    assert set(parts) == set(memory.PARTS)
    for row in parts.values():
        assert row["status"] == "measured"
        assert row["peak_mb"] == max(phase["peak_mb"] for phase in row["phases"].values()) > row["imports_mb"] > 100
        assert row["reached"] == (row["peak_mb"] <= 3000)
    made, asked = {"label_shares", "graph: neighbours", "graph: transition", "attach"}, {"training", "test", "query"}
    assert made <= set(parts["setup"]["phases"])
    for name in ("margin", "dgmg"):
        assert asked <= set(parts[name]["phases"])
        assert not made & set(parts[name]["phases"])  # found in the cache that the set-up left
        assert parts[name]["edges"] == parts["setup"]["edges"] > 2_000
    assert (parts["margin"]["n_scored"], parts["dgmg"]["n_scored"]) == (1_980, 200)


@pytest.mark.slow
@needs_proc
def test_a_part_that_fails_says_why_and_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory.inputs, "write_files", lambda *_: None)
    monkeypatch.setattr(memory, "PARTS", ("margin",))
    assert memory.main(["--small", "--out", str(tmp_path / "memory.json")]) == 1
    (row,) = read(tmp_path / "memory.json")["parts"]
    assert (row["status"], row["reached"]) == ("failed", None)
    assert "set.npz" in row["error"]
    assert "goal for margin: not known, failed" in capsys.readouterr().out


def played(n_workers, n_runs, rng):
    """Runs on workers, in whole milliseconds: what was seen of each, and every worker's time, ``w`` for own work."""
    times, runs = [""] * n_workers, []
    for _ in range(n_runs):
        worker = min(range(n_workers), key=lambda one: len(times[one]))
        begun = len(times[worker])
        start = rng.integers(100, 200) if begun == 0 else rng.integers(1, 8)
        own = rng.integers(20, 60)
        times[worker] += "-" * start + "w" * own
        runs.append(scheduling.Ended(begun / 1000, len(times[worker]) / 1000, own / 1000))
    return runs, times


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_overhead_is_every_millisecond_without_own_work_between_start_and_end(n_workers):
    runs, times = played(n_workers, 60, np.random.default_rng(n_workers))
    first = max(len(time) - len(time.lstrip("-").lstrip("w")) for time in times)
    last = min(len(time) for time in times)
    idle = sum(time[first:last].count("-") for time in times)
    ended = sum(first < round(1000 * run.done) <= last for run in runs)
    found = scheduling.overhead(runs, n_workers)
    assert (found["ms"], found["of_cells"]) == (pytest.approx(idle / ended), ended)
    wall = max(len(time) for time in times)
    assert found["all_in_ms"] == pytest.approx(sum(wall - time.count("w") for time in times) / 60)


def test_only_a_local_sweep_has_a_goal_and_troubles_are_told():
    row = {
        "workers": 2, "start_seconds": 1.0, "own_ms": 50.0, "ms": 12.0, "of_cells": 9, "all_in_ms": 20.0,
        "plan_ms": 0.1, "scan_ms": 0.1, "troubles": [],
    }  # fmt: skip
    sweeps = [row | {"engine": "local"}, row | {"engine": "ray", "troubles": ["digits/random/seed-3: diverged"]}]
    text = scheduling.table({"sweeps": sweeps, "goal": {"ms": scheduling.GOAL_MS}})
    assert "local on 2: goal: under 10 ms a run: 12.00 ms, NOT reached" in text
    assert "ray on 2: 12.00 ms, noted\n  digits/random/seed-3: diverged" in text


@pytest.mark.slow
def test_a_small_sweep_is_run_to_its_end_and_its_own_work_is_most_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "WorkerProcess", WorkerHere)
    out = tmp_path / "scheduling.json"
    assert scheduling.main(["--runs", "8", "--sweeps", "local:1", "--out", str(out)]) == 0
    (found,) = read(out)["sweeps"]
    assert found["complete"]
    assert found["of_cells"] == 7
    assert 0 < found["ms"] < found["own_ms"] < 1000 * found["seconds"]
    assert found["own_ms"] + found["all_in_ms"] == pytest.approx(1000 * found["seconds"] / 8)


@pytest.mark.slow
def test_a_small_report_is_measured_as_the_large_one_is(tmp_path, monkeypatch, capsys, few_figures):
    def here(words, **how):
        assert words[:3] == [sys.executable, "-m", "dgal_bench.cli.main"]
        assert how == {"check": True, "capture_output": True}
        assert command(words[3:]) == 0

    monkeypatch.setattr(reporting.subprocess, "run", here)
    out = tmp_path / "reporting.json"
    assert reporting.main(["--datasets", "1", "--seeds", "2", "--rounds", "3", "--out", str(out)]) == 0
    results = read(out)
    assert (results["cells"], results["rows"]) == (25, 24 * 4 + 1)
    assert results["figures"] == 3  # two, and the penalties
    said = capsys.readouterr().out
    assert "25 runs, 97 rows" in said
    assert "page, MB: goal under 10: " in said
