"""What rows of before say of a cell that is to run: seconds of what is left of it, and of its set-up."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from dgal_bench.config import SECTIONS, TRAINING_SETTINGS, to_dict, without_paths
from dgal_bench.disk import below
from dgal_bench.errors import ResultsError
from dgal_bench.record import CellLog, RoundRecord, read_cell, read_results
from dgal_bench.schema import Wanted, check
from dgal_bench.sweep import Job, Settings

_logger = logging.getLogger(__name__)

_ROUGHLY = ("profile", "dataset", "net", "training", "threads", "deterministic", "initial_size", "batch_size")
"""What cells have in common whose trainings take about as long, whatever their strategy and their rounds."""

_SET_UP = ("dataset", "representation", "trainer", "graph")

_WANTED: Wanted = {"fingerprint.device": (str,), "provenance.machine.cpu": (str,), "setup": (dict,)}
"""Of the header of a cell with rows, beside what every header has."""

Config = Mapping[str, Any]


def read_past(settings: Settings) -> list[CellLog]:
    """The cells of ``settings.past``, among which the results folder itself may hold none yet.

    A damaged file of the results folder is passed over with a warning: that of a cell which is to run is refused
    elsewhere, and any other is no reason not to run.

    Raises:
        ResultsError: another folder is not there or holds none, or a file of it is damaged.
    """
    own = _own(settings.results) if settings.results in settings.past else []
    others = [log for one in settings.past if one != settings.results for log in read_results(one)]
    for log in others:
        _check(log)
    return [*own, *others]


def _own(results: Path) -> list[CellLog]:
    found = []
    for path in below(results, "seed-*.jsonl"):
        try:
            if (log := read_cell(path)) is not None:
                _check(log)
                found.append(log)
        except ResultsError as error:
            _logger.warning("not reckoned by: %s", error)
    return found


def _check(log: CellLog) -> None:
    if log.records:
        check(log.header, _WANTED, str(log.path))


def row_seconds(row: RoundRecord) -> float:
    """All that a row has timed."""
    return row.train_seconds + row.test_seconds + row.extra_seconds + _query_seconds(row)


def _query_seconds(row: RoundRecord) -> float:
    return (row.query_seconds or 0.0) + (row.rehearsal_seconds or 0.0)


@dataclass(frozen=True)
class Guess:
    """Seconds of what is left of a cell, and how far they can be trusted.

    ``like``: by rows of its own configuration and kind of device. ``with_queries``: rows of its strategy were there.
    ``logs``: the cells that those rows are of.
    """

    seconds: float
    like: bool
    with_queries: bool
    logs: Sequence[CellLog]


@dataclass(frozen=True, eq=False)
class Past:
    """Cells with rows, to reckon others by."""

    logs: Sequence[CellLog]

    @cached_property
    def _by_configuration(self) -> dict[str, list[CellLog]]:
        found: dict[str, list[CellLog]] = {}
        for log in self.logs:
            if log.records:
                found.setdefault(_like(log.header["config"]), []).append(log)
        return found

    @cached_property
    def _by_training(self) -> dict[str, list[CellLog]]:
        found: dict[str, list[CellLog]] = {}
        for logs in self._by_configuration.values():
            found.setdefault(json.dumps(_parts(logs[0].header["config"], _ROUGHLY), sort_keys=True), []).extend(logs)
        return found

    def guess(self, job: Job, first: int, gpu: bool) -> Guess | None:
        """The cell's seconds from round ``first`` on; None: nothing comparable was ever run."""
        config = to_dict(job.config)
        wanted = _parts(config, _ROUGHLY)
        like = self._by_configuration.get(_like(config), [])
        roughly = [log for key, logs in self._by_training.items() if _agree(wanted, json.loads(key)) for log in logs]
        for kind in (gpu, not gpu):
            if logs := _of_kind(like, kind):
                whole = [log for log in logs if log.done] or logs
                return Guess(fmean(_left(log, first) for log in whole), kind == gpu, True, whole)
            if logs := _of_kind(roughly, kind):
                return _guess_roughly(config, first, logs)
        return None

    def set_up(self, job: Job, gpu: bool) -> tuple[float, Sequence[CellLog]] | None:
        """Seconds that representation and graph took, and the cells whose ledgers say so; None: not known."""
        wanted = _parts(to_dict(job.config), _SET_UP)
        del wanted["representation"]["seed"]  # another network takes no other time
        ledgers: dict[tuple[float, bool], CellLog] = {}  # once each: the cells of a data set share one
        for logs in self._by_configuration.values():
            if _agree(wanted, _parts(logs[0].header["config"], _SET_UP)):
                ledgers |= {(ledger_seconds(log), on_gpu(log)): log for log in logs if log.header.get("setup")}
        logs = _of_kind(ledgers.values(), gpu) or list(ledgers.values())
        return (fmean(ledger_seconds(log) for log in logs), logs) if logs else None


def ledger_seconds(log: CellLog) -> float:
    """What representation and graph of the cell cost once, the test split's share of both too."""
    parts = (log.header["setup"].get(name, {}) for name in ("representation", "graph"))
    return sum(float(part.get("seconds", 0.0)) + float(part.get("test_seconds", 0.0)) for part in parts)


def _left(log: CellLog, first: int) -> float:
    """Seconds of rounds ``first`` to R by the rows of a cell: their sum, scaled where it stopped before R."""
    rows = log.records[first:] or log.records
    return fmean(row_seconds(row) for row in rows) * (log.rounds + 1 - first)


def _guess_roughly(config: Config, first: int, logs: Sequence[CellLog]) -> Guess:
    """Means per evaluation of all the rows, and per query of those of the strategy."""
    evaluations = [row_seconds(row) - _query_seconds(row) for log in logs for row in log.records]
    own = [log for log in logs if _agree(config["strategy"], log.header["config"]["strategy"])]
    queries = [_query_seconds(row) for log in own for row in log.records if row.query_seconds is not None]
    left = config["rounds"] + 1 - first
    seconds = fmean(evaluations) * left + (fmean(queries) * (left - 1) if queries else 0.0)
    return Guess(seconds, False, bool(queries) or left == 1, logs)


def _like(config: Config) -> str:
    """Equal for cells that differ in nothing that counts but the seed: full supervision knows no strategy or graph."""
    names = TRAINING_SETTINGS if config["initial_size"] is None else config
    return json.dumps(_parts(config, [name for name in names if name != "seed"]), sort_keys=True)


def _parts(config: Config, names: Iterable[str]) -> dict[str, Any]:
    chosen = {name: config[name] for name in names if name in config}
    return {name: without_paths(value) if name in SECTIONS else value for name, value in chosen.items()}


def _agree(one: Config, other: Config) -> bool:
    """Whether the settings that both have are the same: rows may be older than a setting."""
    for name in one.keys() & other.keys():
        left, right = one[name], other[name]
        both = isinstance(left, Mapping) and isinstance(right, Mapping)
        if not (_agree(left, right) if both else left == right):
            return False
    return True


def on_gpu(log: CellLog) -> bool:
    return bool(log.header["fingerprint"]["device"] != "cpu")


def _of_kind(logs: Iterable[CellLog], gpu: bool) -> list[CellLog]:
    return [log for log in logs if on_gpu(log) == gpu]
