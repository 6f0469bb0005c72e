"""Estimates from earlier rows how long a sweep takes; without comparable rows nothing is assumed."""

import heapq
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from dgal_bench.config.schema import SECTIONS, TRAINING_SETTINGS, flatten, to_dict, without_paths
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import find_files
from dgal_bench.engines.progress import duration
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.reader import read_results, read_run
from dgal_bench.results.rows import RoundRecord, RunLog

_logger = logging.getLogger(__name__)

_TRAINING = ("profile", "dataset", "net", "training", "threads", "deterministic", "initial_size", "batch_size")
"""Runs that agree in these train for about as long, whatever their strategy and number of rounds."""

_SETUP = ("dataset", "representation", "trainer", "graph")

Config = Mapping[str, Any]


def read_past(settings: SweepSettings) -> list[RunLog]:
    """The runs of the folders ``settings.past``; only the results folder itself may be empty.

    A damaged file of the results folder is ignored with a warning: the sweep refuses it later if it needs it.

    Raises:
        ResultsError: another folder is missing or has no runs, or one of its files is damaged.
    """
    own = _own_runs(settings.results) if settings.results in settings.past else []
    return [*own, *(log for folder in settings.past if folder != settings.results for log in read_results(folder))]


def _own_runs(results: Path) -> list[RunLog]:
    logs = []
    for path in find_files(results, "seed-*.jsonl"):
        try:
            if (log := read_run(path)) is not None:
                logs.append(log)
        except ResultsError as error:
            _logger.warning("ignored for the estimate: %s", error)
    return logs


def row_seconds(row: RoundRecord) -> float:
    """The sum of a row's times."""
    return row.train_seconds + row.test_seconds + row.extra_seconds + _query_seconds(row)


def _query_seconds(row: RoundRecord) -> float:
    return (row.query_seconds or 0.0) + (row.rehearsal_seconds or 0.0)


@dataclass(frozen=True)
class TimeGuess:
    """Estimated seconds of a run's remaining rounds, and how reliable they are.

    ``same_configuration``: from rows of its configuration and kind of device. ``with_queries``: queries of its
    strategy are in. ``logs``: the runs whose rows were used.
    """

    seconds: float
    same_configuration: bool
    with_queries: bool
    logs: Sequence[RunLog]


@dataclass(frozen=True, eq=False)
class PastRuns:
    """Earlier runs, to estimate others from."""

    logs: Sequence[RunLog]

    @cached_property
    def _by_configuration(self) -> dict[str, list[RunLog]]:
        groups: dict[str, list[RunLog]] = {}
        for log in self.logs:
            if log.records:
                groups.setdefault(_configuration_key(log.header["config"]), []).append(log)
        return groups

    @cached_property
    def _by_training(self) -> dict[str, list[RunLog]]:
        groups: dict[str, list[RunLog]] = {}
        for logs in self._by_configuration.values():
            groups.setdefault(json.dumps(_parts(logs[0].header["config"], _TRAINING), sort_keys=True), []).extend(logs)
        return groups

    def guess(self, job: PlannedRun, first: int, gpu: bool) -> TimeGuess | None:
        """The run's seconds from round ``first`` on; None: there are no comparable rows."""
        config = to_dict(job.config)
        training = _parts(config, _TRAINING)
        same = self._by_configuration.get(_configuration_key(config), [])
        similar = [log for key, logs in self._by_training.items() if _agree(training, json.loads(key)) for log in logs]
        for kind in (gpu, not gpu):
            if logs := _of_kind(same, kind):
                best = [log for log in logs if log.done] or logs
                return TimeGuess(fmean(_seconds_left(log, first) for log in best), kind == gpu, True, best)
            if logs := _of_kind(similar, kind):
                return _guess_roughly(config, first, logs)
        return None

    def setup(self, job: PlannedRun, gpu: bool) -> tuple[float, Sequence[RunLog]] | None:
        """Seconds of representation and graph, and the runs whose headers state them; None: not known."""
        parts = _parts(to_dict(job.config), _SETUP)
        del parts["representation"]["seed"]  # does not change the time
        ledgers: dict[tuple[float, bool], RunLog] = {}  # each once: the runs of a data set share a setup
        for logs in self._by_configuration.values():
            if _agree(parts, _parts(logs[0].header["config"], _SETUP)):
                ledgers |= {(ledger_seconds(log), on_gpu(log)): log for log in logs if log.header.get("setup")}
        logs = _of_kind(ledgers.values(), gpu) or list(ledgers.values())
        return (fmean(ledger_seconds(log) for log in logs), logs) if logs else None


def ledger_seconds(log: RunLog) -> float:
    """Seconds of the run's representation and graph, including the test split's."""
    parts = (log.header["setup"].get(name, {}) for name in ("representation", "graph"))
    return sum(float(part.get("seconds", 0.0)) + float(part.get("test_seconds", 0.0)) for part in parts)


def _seconds_left(log: RunLog, first: int) -> float:
    """Seconds of rounds ``first`` to R from the rows of a run: their sum, scaled if it stopped before R."""
    rows = log.records[first:] or log.records
    return fmean(row_seconds(row) for row in rows) * (log.rounds + 1 - first)


def _guess_roughly(config: Config, first: int, logs: Sequence[RunLog]) -> TimeGuess:
    """The mean per evaluation over all rows, and per query over the strategy's rows."""
    evaluations = [row_seconds(row) - _query_seconds(row) for log in logs for row in log.records]
    own = [log for log in logs if _agree(config["strategy"], log.header["config"]["strategy"])]
    queries = [_query_seconds(row) for log in own for row in log.records if row.query_seconds is not None]
    left = config["rounds"] + 1 - first
    seconds = fmean(evaluations) * left + (fmean(queries) * (left - 1) if queries else 0.0)
    return TimeGuess(seconds, False, bool(queries) or left == 1, logs)


def _configuration_key(config: Config) -> str:
    """Equal for runs that differ only in the seed; full supervision uses neither strategy nor graph."""
    names = TRAINING_SETTINGS if config["initial_size"] is None else config
    return json.dumps(_parts(config, [name for name in names if name != "seed"]), sort_keys=True)


def _parts(config: Config, names: Iterable[str]) -> dict[str, Any]:
    chosen = {name: config[name] for name in names if name in config}
    return {name: without_paths(value) if name in SECTIONS else value for name, value in chosen.items()}


def _agree(settings: Config, others: Config) -> bool:
    """Whether the settings that both have are equal: rows may be older than a setting."""
    left, right = flatten(settings), flatten(others)
    return all(left[name] == right[name] for name in left.keys() & right.keys())


def on_gpu(log: RunLog) -> bool:
    return bool(log.header["fingerprint"]["device"] != "cpu")


def _of_kind(logs: Iterable[RunLog], gpu: bool) -> list[RunLog]:
    return [log for log in logs if on_gpu(log) == gpu]


def makespan(seconds: Iterable[float], n_lanes: int) -> float:
    """When the last job ends, if each in turn goes to the first free lane."""
    free = [0.0] * n_lanes
    for length in seconds:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


@dataclass(frozen=True, eq=False)
class TimeEstimate:
    """A guess or None for each run to do; seconds or None for each setup.

    ``machines``: those of the rows used. ``other_device``: some rows are of the other kind of device.
    """

    guesses: Mapping[PlannedRun, TimeGuess | None]
    setups: Mapping[str, float | None]
    n_lanes: int
    n_gpus: int
    machines: Sequence[str]
    other_device: bool

    @property
    def known_guesses(self) -> list[TimeGuess]:
        return [guess for guess in self.guesses.values() if guess is not None]

    @property
    def setup_seconds(self) -> float:
        return sum(seconds or 0.0 for seconds in self.setups.values())

    @property
    def seconds(self) -> float | None:
        """The setups one after the other, then the runs side by side; None: no run can be estimated."""
        if not self.known_guesses:
            return None
        return self.setup_seconds + makespan((guess.seconds for guess in self.known_guesses), self.n_lanes)


def estimate_time(
    todo: Sequence[PlannedRun],
    logs: Mapping[Path, RunLog | None],
    past: Sequence[RunLog],
    n_lanes: int,
    n_gpus: int = 0,
) -> TimeEstimate:
    """Estimate the runs ``todo``, whose rows so far are in ``logs``, from the runs ``past``."""
    past_runs = PastRuns(past)
    guesses: dict[PlannedRun, TimeGuess | None] = {}
    setups: dict[str, float | None] = {}
    machines, other_device = set(), False
    for job in todo:
        gpu = n_gpus > 0 and job.config.device != "cpu"
        log = logs[job.path]
        guess = guesses[job] = past_runs.guess(job, len(log.records) if log else 0, gpu)
        used = list(guess.logs) if guess else []
        if job.setup_key not in setups and not job.config.full_supervision:
            seconds, sources = past_runs.setup(job, gpu) or (None, [])
            setups[job.setup_key] = seconds
            used += sources
        machines |= {_machine(source) for source in used}
        other_device |= any(on_gpu(source) != gpu for source in used)
    return TimeEstimate(guesses, setups, n_lanes, n_gpus, sorted(machines), other_device)


def _machine(log: RunLog) -> str:
    device = str(log.header["fingerprint"]["device"])
    return f"{log.header['provenance']['machine']['cpu']}, cpu" if device == "cpu" else device


def estimate_lines(jobs: Sequence[PlannedRun], logs: Mapping[Path, RunLog | None], estimate: TimeEstimate) -> list[str]:
    """The number of runs, also by data set if there are several, and about how long the rest takes."""
    gpus = f" ({_count(estimate.n_gpus, 'GPU')})" if estimate.n_gpus else ""
    lines = [f"{_count_line(jobs, logs, estimate)}, {estimate.n_lanes} side by side{gpus}"]
    by_name: dict[str, list[PlannedRun]] = {}
    for job in jobs:
        by_name.setdefault(job.config.dataset.name, []).append(job)
    if len(by_name) > 1:
        width = max(map(len, by_name))
        lines += [
            f"  {name:{width}}  {_count_line(named, logs, estimate)}{_work(named, estimate)}"
            for name, named in by_name.items()
        ]
    return lines + (_basis_lines(estimate) if estimate.guesses else [])


def _count_line(jobs: Sequence[PlannedRun], logs: Mapping[Path, RunLog | None], estimate: TimeEstimate) -> str:
    statuses = [log.status for job in jobs if (log := logs[job.path]) is not None and job not in estimate.guesses]
    others = "".join(f", {n} {status}" for status in ("failed", "skipped") if (n := statuses.count(status)))
    n_todo = sum(job in estimate.guesses for job in jobs)
    return f"{_count(len(jobs), 'run')}: {statuses.count('done')} done{others}, {n_todo} to run"


def _work(jobs: Sequence[PlannedRun], estimate: TimeEstimate) -> str:
    """The time of a data set's runs, one after the other."""
    todo = [estimate.guesses[job] for job in jobs if job in estimate.guesses]
    seconds = [guess.seconds for guess in todo if guess is not None]
    if not seconds:
        return ", no past rows" if todo else ""
    of = "" if len(seconds) == len(todo) else f" for {len(seconds)} of them"
    return f", about {duration(sum(seconds))} of work{of}"


def _basis_lines(estimate: TimeEstimate) -> list[str]:
    if estimate.seconds is None:
        return ["how long is not known: past=DIR,... names no results of these data sets and networks"]
    guesses, n_todo = estimate.known_guesses, len(estimate.guesses)
    other = f", not of {'the GPUs' if estimate.n_gpus else 'a machine without GPU, as'} asked for"
    lines = [
        f"about {duration(estimate.seconds)} for {len(guesses)} of {_count(n_todo, 'run')}, by rows of "
        f"{'; '.join(estimate.machines)}{other if estimate.other_device else ''}"
    ]
    if n_same := sum(guess.same_configuration for guess in guesses):
        lines.append(f"  {n_same} by rows like theirs, all but the seed")
    if rough := [guess for guess in guesses if not guess.same_configuration]:
        n_without = sum(not guess.with_queries for guess in rough)
        lines.append(
            f"  {len(rough)} roughly, by rows of the same data set and network"
            + (f"; {n_without} of them without queries: none was ever timed" if n_without else "")
        )
    if len(guesses) < n_todo:
        lines.append(f"  {n_todo - len(guesses)} have no past rows and are not in it")
    if estimate.setups:
        lines.append(_setup_line(list(estimate.setups.values()), estimate.setup_seconds))
    return lines


def _setup_line(setups: Sequence[float | None], seconds: float) -> str:
    n_known = sum(setup is not None for setup in setups)
    whole = f"about {duration(seconds)} of it, less what the cache has already"
    timed = [whole if n_known == len(setups) else f"{n_known} {whole}"] if n_known else []
    untimed = [f"{len(setups) - n_known} not known"] if n_known < len(setups) else []
    return f"  {_count(len(setups), 'set-up')}: {'; '.join(timed + untimed)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
