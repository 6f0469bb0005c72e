"""A replay picks what the rows say, on the network that they come from; whatever cannot be compared is said."""

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch

from dgal_bench.cli.main import main
from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import ConfigError, ResultsError, UserError
from dgal_bench.core.system import LoadMonitor
from dgal_bench.engines import replay_task as replay
from dgal_bench.engines.replay import ReplayOptions, execute_replay, plan_replay, replay_table
from dgal_bench.engines.replay_task import ReplayRequest, pool_at, replay_run
from dgal_bench.experiment import Run
from dgal_bench.graph.incremental import UndoLog
from dgal_bench.loop import QueryResult, train
from dgal_bench.results.reader import read_run, read_timings
from dgal_bench.results.rows import COMMON, timings_path
from dgal_bench.strategies.base import Selection
from tests.sweeping import finish, here

STRATEGIES = ("margin", "dgmg", "vae_seals", "seals", "badge")
ROUNDS = 4


@pytest.fixture(scope="module")
def made(experiment, tmp_path_factory):
    """A finished run of each strategy: five evaluations on 200 digits."""
    root = tmp_path_factory.mktemp("results")
    for strategy in STRATEGIES:
        run_in_process(experiment, run_of(root, strategy), example_config(strategy, f"rounds={ROUNDS}"))
    return root


@pytest.fixture
def results(made, tmp_path):
    """Those of two strategies, to be changed."""
    for strategy in ("margin", "dgmg"):
        shutil.copytree(run_of(made, strategy).parent, run_of(tmp_path / "results", strategy).parent)
    return tmp_path / "results"


def run_of(root, strategy, seed=0):
    return root / "suite" / "digits" / strategy / f"seed-{seed}.jsonl"


def wanted(root, **facts):
    return ReplayOptions(root, Path("digits need none"), Path("unused"), repeats=2, **facts)


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.lines, self.rounds = [], []

    def setting_up(self, *facts): ...
    def begun(self, job): ...
    def close(self): ...

    def round(self, job, accuracy):
        self.rounds.append((job.name, accuracy))

    def done(self, job, seconds):
        self.lines.append(f"done {job.name}")

    def failed(self, job, error):
        self.lines.append(f"failed {job.name}: {error}")

    def skipped(self, job, why): ...

    def warn(self, text):
        self.lines.append(text)


def in_here(experiment):
    """The work in this process, in which the practice experiment is set up already."""

    def ask(job, config):
        told = []
        try:
            replay.run_replay_job(
                job, config, experiment, lambda event, **facts: told.append({"event": event, **facts})
            )
        except UserError as error:
            told.append({"event": "failed", "error": str(error), "exit_code": error.exit_code})
        yield from told

    return ask


def replayed(experiment, asked):
    heard = Heard()
    outcome = execute_replay(plan_replay(asked), asked, heard, in_here(experiment))
    for made in outcome.timings:
        beside(made.path, jobs=1, busy=0.0)
    return outcome, heard


def beside(path, jobs, busy):
    """What ran beside the first timing of a file, and nothing beside the others, whatever did while this test ran."""
    header, first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    alone = [line | {"jobs": 1, "busy_elsewhere": 0.0} for line in others]
    lines = [header, first | {"jobs": jobs, "busy_elsewhere": busy}, *alone]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("strategy", [*STRATEGIES, pytest.param("ganvae", marks=pytest.mark.slow)])
def test_the_picks_are_the_rows_and_the_network_is_theirs(experiment, made, strategy):
    if strategy not in STRATEGIES:
        run_in_process(experiment, run_of(made, strategy), example_config(strategy, f"rounds={ROUNDS}"))
    log = read_run(run_of(made, strategy))
    config, heard = example_config(strategy, f"rounds={ROUNDS}"), []
    asked = ReplayRequest(log, {strategy: config.strategy}, [0, 2, 3], repeats=3)
    header, timings = replay_run(asked, config, experiment, lambda round_, accuracy: heard.append((round_, accuracy)))
    assert heard == [(n, log.records[n].accuracy) for n in (0, 2, 3)]
    assert [timing.round for timing in timings] == [0, 2, 3]
    assert all(timing.picks_equal for timing in timings)
    assert (header["changed"], header["common"]) == ([], None)
    for timing in timings:
        row = log.records[timing.round]
        assert (timing.n_candidates, timing.n_scored) == (row.n_candidates, row.n_scored)
        assert timing.seconds.keys() == row.seconds.keys()
        assert len(timing.query_seconds) == 3
        middle = sorted(timing.query_seconds)[1]
        assert sum(timing.seconds.values()) == pytest.approx(middle, rel=0.05, abs=5e-4)
        assert timing.jobs >= 1


@pytest.mark.parametrize(
    ("totals", "lower_median"), [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 3.0, 2.0], 2.0), ([5.0], 5.0)]
)
def test_phases_are_those_of_the_median_repeat_and_all_repeats_must_pick_alike(
    experiment, made, monkeypatch, totals, lower_median
):
    """Queries of chosen lengths, the last of which picks something else than the row."""
    run = Run.of(example_config("margin", f"rounds={ROUNDS}"), experiment)
    log, lengths = read_run(run_of(made, "margin")), iter(totals)
    pool, row = pool_at(log, experiment, 1), log.records[1].indices

    def ask(run, pool, round_, model, memory):
        clock = Stopwatch()
        clock.total = clock.seconds["infer"] = total = next(lengths)
        picked = torch.tensor(row if total != totals[-1] else row[::-1])
        return QueryResult(run.query(pool, None, clock, round_, memory), Selection(picked, pool.unlabeled), 7)

    monkeypatch.setattr(replay, "run_query", ask)
    timing = replay.time_query(run, pool, 1, None, len(totals), "margin", row, LoadMonitor())
    assert timing.query_seconds == totals
    assert timing.seconds == {"infer": lower_median}
    assert timing.picks_equal is False


@pytest.mark.parametrize("round_", [0, 2])
def test_repeats_leave_one_state_of_a_diffusion_at_a_time(experiment, made, monkeypatch, round_):
    """In round 0 every repeat begins anew, later on each undoes the one before; none outlives the last."""
    log, alive, counts = read_run(run_of(made, "dgmg")), weakref.WeakSet(), []
    run, made_anew = Run.of(example_config("dgmg", f"rounds={ROUNDS}"), experiment), UndoLog.__init__
    pool, model = pool_at(log, experiment, round_), train(run, pool_at(log, experiment, round_), round_, Stopwatch())

    def counted(journal, tensors):
        alive.add(journal)
        counts.append(sum(bool(one.tensors) for one in alive if one is not journal))
        made_anew(journal, tensors)

    monkeypatch.setattr(UndoLog, "__init__", counted)
    gc.disable()
    timing = replay.time_query(run, pool, round_, model, 4, "dgmg", log.records[round_].indices, LoadMonitor())
    gc.enable()
    assert timing.picks_equal
    assert counts == [0] * (5 if round_ == 0 else 1)  # a rehearsal, and what is anew
    assert len(alive) == 0


def test_the_pool_of_a_round_is_what_was_known_in_it(experiment, made):
    log = read_run(run_of(made, "dgmg"))
    pool = pool_at(log, experiment, 2)
    known = log.header["initial"] + log.records[0].indices + log.records[1].indices
    assert pool.labeled.tolist() == known
    assert torch.equal(pool.labels, experiment.data.labels[known])


def test_a_replay_of_a_folder_writes_a_file_beside_each_run(experiment, results):
    before = {path: path.read_bytes() for path in results.rglob("seed-*.jsonl")}
    outcome, heard = replayed(experiment, wanted(results))
    assert outcome.problems == []
    for strategy in ("margin", "dgmg"):
        timings = read_timings(timings_path(run_of(results, strategy)))
        assert timings.rounds == [0, 2, 3]
        assert timings.picks_equal
        assert timings.of(read_run(run_of(results, strategy)))
    assert {path: path.read_bytes() for path in results.rglob("seed-*.jsonl")} == before
    assert len(heard.rounds) == 3 * 2
    lines = replay_table(outcome).splitlines()
    assert len(lines) == 2 + 2
    assert all("| equal |" in line for line in lines[2:])

    # the same command again has nothing to do, and one that asks for more does that
    assert plan_replay(wanted(results)).items == []
    assert len(plan_replay(wanted(results)).done) == 2
    assert len(plan_replay(wanted(results, again=True)).items) == 2
    assert len(plan_replay(wanted(results, rounds=[1])).items) == 2
    timings_path(run_of(results, "dgmg")).unlink()
    assert [item.log.path.parent.name for item in plan_replay(wanted(results)).items] == ["dgmg"]


def test_timings_of_another_machine_or_of_other_rows_or_beside_other_work_are_made_anew(experiment, results):
    without(results, "dgmg")
    replayed(experiment, wanted(results))
    path = timings_path(run_of(results, "margin"))
    whole = path.read_text()
    cpu = read_timings(path).header["provenance"]["machine"]["cpu"]
    path.write_text(whole.replace(json.dumps(cpu), json.dumps("Another")))
    assert len(plan_replay(wanted(results)).items) == 1
    path.write_text(whole)
    assert plan_replay(wanted(results)).items == []
    for jobs, busy, n_again in ((2, 0.0, 1), (1, 0.2, 1), (1, 0.1, 0), (1, None, 0)):  # taken beside other work
        beside(path, jobs, busy)
        assert len(plan_replay(wanted(results)).items) == n_again
    tampered(run_of(results, "margin"), 3)
    assert len(plan_replay(wanted(results)).items) == 1


def without(root, strategy):
    shutil.rmtree(run_of(root, strategy).parent)


def tampered(path, round_):
    """One pick of a round exchanged for a point that is in no row."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    used = set(lines[0]["initial"]).union(*(line.get("indices") or [] for line in lines))
    lines[1 + round_]["indices"][0] = min(set(range(200)) - used)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_changed_pick_is_found_and_said_in_one_line(experiment, results):
    without(results, "dgmg")
    tampered(run_of(results, "margin"), 2)
    outcome, heard = replayed(experiment, wanted(results))
    (line,) = outcome.problems
    assert line in heard.lines
    assert line.startswith("digits/margin/seed-0 picks others than its rows say in round 2")
    timings = read_timings(timings_path(run_of(results, "margin")))
    assert not timings.picks_equal
    assert timings.timings[0].picks_equal  # what was picked before it is known to be right
    assert "| others |" in replay_table(outcome)
    assert len(plan_replay(wanted(results)).items) == 1  # and is tried again


@pytest.mark.parametrize("name", ["data", "latents", "graph", "algorithm_version"])
def test_a_run_made_from_something_else_is_refused_and_the_others_go_on(experiment, results, name):
    path = run_of(results, "margin")
    first, _, rest = path.read_text().partition("\n")
    header = json.loads(first)
    header["fingerprint"][name] = 7 if name == "algorithm_version" else "somethingelse"
    path.write_text(json.dumps(header) + "\n" + rest)
    outcome, _ = replayed(experiment, wanted(results, rounds=(0,)))
    (line,) = outcome.problems
    assert line.startswith("digits/margin/seed-0 is not replayed: ")
    assert f"made from something else ({name} " in line
    assert [timings.header["cell"] for timings in outcome.timings] == ["digits/dgmg/seed-0"]


def test_a_configuration_of_another_version_is_refused_in_one_line(experiment, results):
    path = run_of(results, "margin")
    path.write_text(path.read_text().replace('"graph_k"', '"neighbours": 7, "graph_k"'))
    outcome, heard = replayed(experiment, wanted(results, rounds=(0,)))
    (line,) = outcome.problems
    assert line.startswith("digits/margin/seed-0 is not replayed: its configuration is another version's (")
    assert "\n" not in line
    assert line in heard.lines
    assert len(outcome.timings) == 1


def test_a_file_that_does_not_tell_what_its_rows_are_of_is_refused(results):
    path = run_of(results, "margin")
    path.write_text(path.read_text().replace('"data": "', '"datum": "'))
    with pytest.raises(ResultsError, match=f"{path}, line 1: fingerprint.data is missing"):
        plan_replay(wanted(results))


def test_where_nothing_can_be_timed_the_first_reason_is_the_commands(experiment, results):
    without(results, "dgmg")
    path = run_of(results, "margin")
    path.write_text(path.read_text().replace(experiment.data.sha256, "somethingelse"))
    with pytest.raises(UserError, match="made from something else") as caught:
        replayed(experiment, wanted(results))
    assert caught.value.exit_code == 2


def of_seed(path, seed, n_rows=None):
    """A copy of a run, or of its beginning, under another seed."""
    lines = path.read_text().splitlines(keepends=True)[: None if n_rows is None else 1 + n_rows]
    lines[0] = lines[0].replace('"config": {"seed": 0', f'"config": {{"seed": {seed}')
    path.with_name(f"seed-{seed}.jsonl").write_text("".join(lines))


def test_unfinished_runs_and_other_seeds_are_left_out_and_named(results, made):
    """Three strategies have finished seed 1, and two seed 0; of dgmg seed 1 is cut short, margin has none."""
    for strategy in ("badge", "seals", "vae_seals"):
        shutil.copytree(run_of(made, strategy).parent, run_of(results, strategy).parent)
        of_seed(run_of(results, strategy), 1)
        run_of(results, strategy).unlink()
    of_seed(run_of(results, "dgmg"), 1, n_rows=2)
    looked = plan_replay(wanted(results))
    assert looked.left_out == ["digits/dgmg/seed-1 is partial: left out", "digits/margin has no seed 1: left out"]
    asked_for = plan_replay(wanted(results, seed=0))
    assert [item.log.path.parent.name for item in asked_for.items] == ["dgmg", "margin"]
    with pytest.raises(ResultsError, match="no finished run of seed 5 to replay"):
        plan_replay(wanted(results, seed=5))


def test_rounds_are_those_asked_for(results):
    without(results, "dgmg")
    rounds = {asked: plan_replay(wanted(results, rounds=asked)).items[0].rounds for asked in (None, (), (3, 1, 3))}
    assert rounds == {None: [0, 2, 3], (): [0, 1, 2, 3], (3, 1, 3): [1, 3]}
    with pytest.raises(ConfigError, match="rounds=4, but digits/margin/seed-0 has queries in rounds 0 to 3"):
        plan_replay(wanted(results, rounds=(0, 4)))


def test_all_strategies_are_timed_on_the_state_of_one_run(experiment, results, made):
    """On dgmg's pool margin picks what margin would, and dgmg what its rows say; other settings are left out."""
    shutil.copytree(run_of(made, "vae_seals").parent, run_of(results, "vae_seals").parent)
    run_in_process(experiment, run_of(results, "rsmg"), example_config("rsmg", f"rounds={ROUNDS}", "batch_size=4"))
    asked = wanted(results, common="digits/dgmg/seed-0")
    outcome, heard = replayed(experiment, asked)
    assert outcome.problems == []
    assert "digits/rsmg has another configuration or content: left out" in heard.lines
    timings = read_timings(results / "suite" / "digits" / COMMON)
    assert timings.header["common"] == timings.header["cell"] == "digits/dgmg/seed-0"
    assert [(t.strategy, t.round, t.picks_equal) for t in timings.timings if t.round == 2] == [
        ("dgmg", 2, True), ("margin", 2, None), ("vae_seals", 2, None),
    ]  # fmt: skip
    scored = {t.strategy: t.n_scored for t in timings.timings if t.round == 3}
    assert scored["margin"] == 200 - 10 - 3 * 5  # all that dgmg has left unlabeled
    assert plan_replay(asked).items == []
    assert not timings_path(run_of(results, "dgmg")).exists()


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ("digits/dgmk/seed-0", "holds no such run; did you mean 'digits/dgmg/seed-0'"),
        ("dgmg/seed-0", "is 2 runs: name the suite too, as in other/digits/dgmg/seed-0"),
        ("other/digits/dgmg/seed-0", "is partial: only a finished run's states are known"),
    ],
)
def test_a_state_that_cannot_be_is_refused(results, common, message):
    other = results / "other" / "digits" / "dgmg" / "seed-0.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("".join(run_of(results, "dgmg").read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        plan_replay(wanted(results, common=common))


def test_what_was_timed_before_a_stop_is_kept(experiment, results):
    """Ctrl-C in the second run: the first is on disk, and the same command does the rest."""
    ask, begun = in_here(experiment), []

    def stopped(job, config):
        begun.append(job["path"])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return ask(job, config)

    asked = wanted(results)
    with pytest.raises(KeyboardInterrupt):
        execute_replay(plan_replay(asked), asked, Heard(), stopped)
    beside(timings_path(Path(begun[0])), jobs=1, busy=0.0)
    left = plan_replay(asked)
    assert (len(left.items), len(left.done)) == (1, 1)
    assert left.items[0].log.path == Path(begun[1])


def test_queries_of_a_replay_begin_with_the_same_memory_each_time(experiment, made, monkeypatch):
    """What a strategy keeps between rounds is as after a resume; no repeat profits from the one before."""
    from dgal_bench.strategies import seals

    searched = []

    def neighbor_mask(points, *rest, search=seals.neighbor_mask):
        searched.append(len(points))
        return search(points, *rest)

    monkeypatch.setattr(seals, "neighbor_mask", neighbor_mask)
    config = example_config("vae_seals", f"rounds={ROUNDS}")
    asked = ReplayRequest(read_run(run_of(made, "vae_seals")), {"vae_seals": config.strategy}, [3], repeats=3)
    replay_run(asked, config, experiment, lambda round_, accuracy: None)
    assert searched == [20, 5, 5, 5]  # rehearsed off the clock, then the newest batch, three times


@pytest.mark.slow
def test_the_verb_asks_a_process_of_its_own(experiment, cache_root, results):
    """All on one state; then each on its own, where a changed pick is exit code 1 and one line that says where."""

    def command(do, *words):
        words = [sys.executable, "-m", "dgal_bench.cli.main", "replay", str(results), f"cache={cache_root}", *words]
        done = do(words)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    code, said, _ = command(here, "--common", "digits/dgmg/seed-0")
    assert code == 0
    assert "margin on digits/dgmg/seed-0" in said
    tampered(run_of(results, "margin"), 2)
    code, said, warned = command(finish, "rounds=0,2", "repeats=2")
    assert code == 1
    assert "equal |" in said
    assert "digits/margin/seed-0 picks others than its rows say in round 2" in warned


def test_mistakes_of_a_command_are_one_line(results, capsys):
    for words, told in (
        ([], "replay takes one results folder"),
        ([str(results), "--common"], "--common needs a run: --common digits/margin/seed-0"),
        ([str(results), "--common", "digits/dgmg/seed-0", "seed=0"], "--common says which seed: leave seed= out"),
        ([str(results), "rounds="], "rounds= is an empty list"),
        ([str(results), "rounds=one"], "rounds=one: use a whole number"),
        ([str(results), "jobs=2"], "jobs= means nothing here"),
    ):
        assert main(["replay", *words]) == 2
        assert told in capsys.readouterr().err
