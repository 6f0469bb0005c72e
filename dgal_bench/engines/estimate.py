"""What earlier rows say of a run that is to run: seconds of what is left of it, and of its set-up."""

import heapq
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from dgal_bench.config.schema import SECTIONS, TRAINING_SETTINGS, to_dict, without_paths
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import find_files
from dgal_bench.engines.progress import duration
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.reader import read_results, read_run
from dgal_bench.results.rows import RequiredFields, RoundRecord, RunLog, check_header

_logger = logging.getLogger(__name__)

_ROUGHLY = ("profile", "dataset", "net", "training", "threads", "deterministic", "initial_size", "batch_size")
"""What runs have in common whose trainings take about as long, whatever their strategy and their rounds."""

_SET_UP = ("dataset", "representation", "trainer", "graph")

_WANTED: RequiredFields = {"fingerprint.device": (str,), "provenance.machine.cpu": (str,), "setup": (dict,)}
"""Of the header of a run with rows, beside what every header has."""

Config = Mapping[str, Any]


def read_past(settings: SweepSettings) -> list[RunLog]:
    """The runs of ``settings.past``, among which the results folder itself may hold none yet.

    A damaged file of the results folder is passed over with a warning: that of a run which is to run is refused
    elsewhere, and any other is no reason not to run.

    Raises:
        ResultsError: another folder is not there or holds none, or a file of it is damaged.
    """
    own = _rows_here(settings.results) if settings.results in settings.past else []
    others = [log for one in settings.past if one != settings.results for log in read_results(one)]
    for log in others:
        _check(log)
    return [*own, *others]


def _rows_here(results: Path) -> list[RunLog]:
    found = []
    for path in find_files(results, "seed-*.jsonl"):
        try:
            if (log := read_run(path)) is not None:
                _check(log)
                found.append(log)
        except ResultsError as error:
            _logger.warning("not reckoned by: %s", error)
    return found


def _check(log: RunLog) -> None:
    if log.records:
        check_header(log.header, _WANTED, str(log.path))


def row_seconds(row: RoundRecord) -> float:
    """All that a row has timed."""
    return row.train_seconds + row.test_seconds + row.extra_seconds + _query_seconds(row)


def _query_seconds(row: RoundRecord) -> float:
    return (row.query_seconds or 0.0) + (row.rehearsal_seconds or 0.0)


@dataclass(frozen=True)
class TimeGuess:
    """Seconds of what is left of a run, and how far they can be trusted.

    ``like``: by rows of its own configuration and kind of device. ``with_queries``: rows of its strategy were there.
    ``logs``: the runs that those rows are of.
    """

    seconds: float
    like: bool
    with_queries: bool
    logs: Sequence[RunLog]


@dataclass(frozen=True, eq=False)
class PastRuns:
    """Runs with rows, to reckon others by."""

    logs: Sequence[RunLog]

    @cached_property
    def _by_configuration(self) -> dict[str, list[RunLog]]:
        found: dict[str, list[RunLog]] = {}
        for log in self.logs:
            if log.records:
                found.setdefault(_same_kind(log.header["config"]), []).append(log)
        return found

    @cached_property
    def _by_training(self) -> dict[str, list[RunLog]]:
        found: dict[str, list[RunLog]] = {}
        for logs in self._by_configuration.values():
            found.setdefault(json.dumps(_parts(logs[0].header["config"], _ROUGHLY), sort_keys=True), []).extend(logs)
        return found

    def guess(self, job: PlannedRun, first: int, gpu: bool) -> TimeGuess | None:
        """The run's seconds from round ``first`` on; None: nothing comparable was ever run."""
        config = to_dict(job.config)
        wanted = _parts(config, _ROUGHLY)
        like = self._by_configuration.get(_same_kind(config), [])
        roughly = [
            log for key, logs in self._by_training.items() if _same_training(wanted, json.loads(key)) for log in logs
        ]
        for kind in (gpu, not gpu):
            if logs := _of_kind(like, kind):
                whole = [log for log in logs if log.done] or logs
                return TimeGuess(fmean(_left(log, first) for log in whole), kind == gpu, True, whole)
            if logs := _of_kind(roughly, kind):
                return _guess_roughly(config, first, logs)
        return None

    def set_up(self, job: PlannedRun, gpu: bool) -> tuple[float, Sequence[RunLog]] | None:
        """Seconds that representation and graph took, and the runs whose ledgers say so; None: not known."""
        wanted = _parts(to_dict(job.config), _SET_UP)
        del wanted["representation"]["seed"]  # another network takes no other time
        ledgers: dict[tuple[float, bool], RunLog] = {}  # once each: the runs of a data set share one
        for logs in self._by_configuration.values():
            if _same_training(wanted, _parts(logs[0].header["config"], _SET_UP)):
                ledgers |= {(ledger_seconds(log), on_gpu(log)): log for log in logs if log.header.get("setup")}
        logs = _of_kind(ledgers.values(), gpu) or list(ledgers.values())
        return (fmean(ledger_seconds(log) for log in logs), logs) if logs else None


def ledger_seconds(log: RunLog) -> float:
    """What representation and graph of the run cost once, the test split's share of both too."""
    parts = (log.header["setup"].get(name, {}) for name in ("representation", "graph"))
    return sum(float(part.get("seconds", 0.0)) + float(part.get("test_seconds", 0.0)) for part in parts)


def _left(log: RunLog, first: int) -> float:
    """Seconds of rounds ``first`` to R by the rows of a run: their sum, scaled where it stopped before R."""
    rows = log.records[first:] or log.records
    return fmean(row_seconds(row) for row in rows) * (log.rounds + 1 - first)


def _guess_roughly(config: Config, first: int, logs: Sequence[RunLog]) -> TimeGuess:
    """Means per evaluation of all the rows, and per query of those of the strategy."""
    evaluations = [row_seconds(row) - _query_seconds(row) for log in logs for row in log.records]
    own = [log for log in logs if _same_training(config["strategy"], log.header["config"]["strategy"])]
    queries = [_query_seconds(row) for log in own for row in log.records if row.query_seconds is not None]
    left = config["rounds"] + 1 - first
    seconds = fmean(evaluations) * left + (fmean(queries) * (left - 1) if queries else 0.0)
    return TimeGuess(seconds, False, bool(queries) or left == 1, logs)


def _same_kind(config: Config) -> str:
    """Equal for runs that differ in nothing that counts but the seed: full supervision knows no strategy or graph."""
    names = TRAINING_SETTINGS if config["initial_size"] is None else config
    return json.dumps(_parts(config, [name for name in names if name != "seed"]), sort_keys=True)


def _parts(config: Config, names: Iterable[str]) -> dict[str, Any]:
    chosen = {name: config[name] for name in names if name in config}
    return {name: without_paths(value) if name in SECTIONS else value for name, value in chosen.items()}


def _same_training(one: Config, other: Config) -> bool:
    """Whether the settings that both have are the same: rows may be older than a setting."""
    for name in one.keys() & other.keys():
        left, right = one[name], other[name]
        both = isinstance(left, Mapping) and isinstance(right, Mapping)
        if not (_same_training(left, right) if both else left == right):
            return False
    return True


def on_gpu(log: RunLog) -> bool:
    return bool(log.header["fingerprint"]["device"] != "cpu")


def _of_kind(logs: Iterable[RunLog], gpu: bool) -> list[RunLog]:
    return [log for log in logs if on_gpu(log) == gpu]


# How long a sweep would take, reckoned from earlier rows; where there are none, nothing is assumed.


def makespan(seconds: Iterable[float], n_lanes: int) -> float:
    """When the last of them ends, if each in turn goes to the lane that is free first."""
    free = [0.0] * n_lanes
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


@dataclass(frozen=True, eq=False)
class TimeEstimate:
    """Of the runs to run, a guess each or None; of the set-ups they need, seconds or None.

    ``rows_of``: the machines whose rows it rests on. ``foreign``: some are of the other kind of device.
    """

    guesses: Mapping[PlannedRun, TimeGuess | None]
    set_ups: Mapping[str, float | None]
    n_lanes: int
    n_gpus: int
    rows_of: Sequence[str]
    foreign: bool

    @property
    def known(self) -> list[TimeGuess]:
        return [guess for guess in self.guesses.values() if guess is not None]

    @property
    def set_up_seconds(self) -> float:
        return sum(seconds or 0.0 for seconds in self.set_ups.values())

    @property
    def seconds(self) -> float | None:
        """Set-ups one after the other, then the runs side by side; None: nothing is known of any run."""
        if not self.known:
            return None
        return self.set_up_seconds + makespan((guess.seconds for guess in self.known), self.n_lanes)


def estimate_time(
    todo: Sequence[PlannedRun],
    logs: Mapping[Path, RunLog | None],
    past: Sequence[RunLog],
    n_lanes: int,
    n_gpus: int = 0,
) -> TimeEstimate:
    """Reckon the runs ``todo``, of which ``logs`` has the rows that are there already, by the runs ``past``."""
    rows = PastRuns(past)
    guesses: dict[PlannedRun, TimeGuess | None] = {}
    set_ups: dict[str, float | None] = {}
    rows_of, foreign = set(), False
    for job in todo:
        gpu = n_gpus > 0 and job.config.device != "cpu"
        log = logs[job.path]
        guess = guesses[job] = rows.guess(job, len(log.records) if log else 0, gpu)
        used = list(guess.logs) if guess else []
        if job.setup_key not in set_ups and not job.config.full_supervision:
            seconds, of = rows.set_up(job, gpu) or (None, [])
            set_ups[job.setup_key] = seconds
            used += of
        rows_of |= {_machine(one) for one in used}
        foreign |= any(on_gpu(one) != gpu for one in used)
    return TimeEstimate(guesses, set_ups, n_lanes, n_gpus, sorted(rows_of), foreign)


def _machine(log: RunLog) -> str:
    device = str(log.header["fingerprint"]["device"])
    return f"{log.header['provenance']['machine']['cpu']}, cpu" if device == "cpu" else device


def estimate_lines(jobs: Sequence[PlannedRun], logs: Mapping[Path, RunLog | None], estimate: TimeEstimate) -> list[str]:
    """The runs counted, by data set too where there are several, and about how long those to run would take."""
    gpus = f" ({_count(estimate.n_gpus, 'GPU')})" if estimate.n_gpus else ""
    told = [f"{_count_line(jobs, logs, estimate)}, {estimate.n_lanes} side by side{gpus}"]
    by_name: dict[str, list[PlannedRun]] = {}
    for job in jobs:
        by_name.setdefault(job.config.dataset.name, []).append(job)
    if len(by_name) > 1:
        width = max(map(len, by_name))
        told += [
            f"  {name:{width}}  {_count_line(one, logs, estimate)}{_work(one, estimate)}"
            for name, one in by_name.items()
        ]
    return told + (_basis_line(estimate) if estimate.guesses else [])


def _count_line(jobs: Sequence[PlannedRun], logs: Mapping[Path, RunLog | None], estimate: TimeEstimate) -> str:
    statuses = [log.status for job in jobs if (log := logs[job.path]) is not None and job not in estimate.guesses]
    aside = "".join(f", {n} {status}" for status in ("failed", "skipped") if (n := statuses.count(status)))
    n_todo = sum(job in estimate.guesses for job in jobs)
    return f"{_count(len(jobs), 'run')}: {statuses.count('done')} done{aside}, {n_todo} to run"


def _work(jobs: Sequence[PlannedRun], estimate: TimeEstimate) -> str:
    """The seconds of a data set's runs, one after the other."""
    todo = [estimate.guesses[job] for job in jobs if job in estimate.guesses]
    known = [guess.seconds for guess in todo if guess is not None]
    if not known:
        return ", no past rows" if todo else ""
    of = "" if len(known) == len(todo) else f" for {len(known)} of them"
    return f", about {duration(sum(known))} of work{of}"


def _basis_line(estimate: TimeEstimate) -> list[str]:
    if estimate.seconds is None:
        return ["how long is not known: past=DIR,... names no results of these data sets and networks"]
    known, n_todo = estimate.known, len(estimate.guesses)
    other = f", not of {'the GPUs' if estimate.n_gpus else 'a machine without GPU, as'} asked for"
    told = [
        f"about {duration(estimate.seconds)} for {len(known)} of {_count(n_todo, 'run')}, by rows of "
        f"{'; '.join(estimate.rows_of)}{other if estimate.foreign else ''}"
    ]
    if n_like := sum(guess.like for guess in known):
        told.append(f"  {n_like} by rows like theirs, all but the seed")
    if rough := [guess for guess in known if not guess.like]:
        blind = sum(not guess.with_queries for guess in rough)
        told.append(
            f"  {len(rough)} roughly, by rows of the same data set and network"
            + (f"; {blind} of them without queries: none was ever timed" if blind else "")
        )
    if len(known) < n_todo:
        told.append(f"  {n_todo - len(known)} have no past rows and are not in it")
    if estimate.set_ups:
        told.append(_set_up_line(list(estimate.set_ups.values()), estimate.set_up_seconds))
    return told


def _set_up_line(set_ups: Sequence[float | None], seconds: float) -> str:
    n_known = sum(one is not None for one in set_ups)
    whole = f"about {duration(seconds)} of it, less what the cache has already"
    known = [whole if n_known == len(set_ups) else f"{n_known} {whole}"] if n_known else []
    missing = [f"{len(set_ups) - n_known} not known"] if n_known < len(set_ups) else []
    return f"  {_count(len(set_ups), 'set-up')}: {'; '.join(known + missing)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
