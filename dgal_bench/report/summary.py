"""Cells that may be compared, and one row per strategy with intervals over seeds; summary.csv."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any

from dgal_bench.config import SECTIONS, differences, without_paths
from dgal_bench.identity import ALGORITHM_VERSION
from dgal_bench.record import CellLog
from dgal_bench.report.statistics import (
    Estimate,
    area_under_curve,
    mean_query_seconds,
    mean_scored,
    ratio_interval,
    t_interval,
)

REFERENCE = "margin"
"""The strategy that speed-ups are against."""


@dataclass(frozen=True, eq=False)
class Group:
    """Cells that may be compared: one suite, data set, profile and algorithm version; ``cells`` by strategy label."""

    suite: str
    dataset: str
    profile: str
    algorithm_version: int
    cells: Mapping[str, Sequence[CellLog]]
    references: Sequence[CellLog] = ()
    """Full supervision: trainings on the whole labeled pool, no strategies."""
    content: str = ""
    """The start of the data's hash, where other cells of this name rest on other data."""

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.dataset}" + (f" (data {self.content})" if self.content else "")

    @property
    def slug(self) -> str:
        """The start of its figures' file names."""
        version = "" if self.algorithm_version == ALGORITHM_VERSION else f"-v{self.algorithm_version}"
        return f"{self.suite}-{self.dataset}-{self.profile}{version}" + (f"-{self.content}" if self.content else "")

    @property
    def logs(self) -> list[CellLog]:
        return [log for logs in self.cells.values() for log in logs]

    def finished(self, strategy: str) -> dict[int, CellLog]:
        """Finished cells by seed; partial and failed ones are never averaged in."""
        return {log.header["config"]["seed"]: log for log in self.cells.get(strategy, ()) if log.done}

    @property
    def strategies(self) -> list[str]:
        """Those with a finished cell."""
        return [strategy for strategy in self.cells if self.finished(strategy)]


def group(logs: Iterable[CellLog]) -> list[Group]:
    """Cells kept apart by suite, data set, its content, profile and algorithm version: never averaged over those."""
    apart: dict[tuple[str, str, str, int, str], dict[str, list[CellLog]]] = {}
    for log in logs:
        suite = log.path.resolve().parts[-4]
        header = log.header
        key = (
            suite,
            header["config"]["dataset"]["name"],
            header["profile"],
            header["fingerprint"]["algorithm_version"],
            str(header["fingerprint"].get("data"))[:8],
        )
        apart.setdefault(key, {}).setdefault(log.path.resolve().parent.name, []).append(log)
    names = [key[:4] for key in apart]
    return [_group(key[:4], cells, key[4] if names.count(key[:4]) > 1 else "") for key, cells in sorted(apart.items())]


def _group(key: tuple[str, str, str, int], cells: Mapping[str, Sequence[CellLog]], content: str) -> Group:
    references = [log for logs in cells.values() for log in logs if is_reference(log)]
    strategies = {label: logs for label, logs in cells.items() if not is_reference(logs[0])}
    return Group(*key, cells=_by_configuration(strategies), references=references, content=content)


def is_reference(log: CellLog) -> bool:
    """Whether all of the pool was labeled at once: full supervision."""
    return log.header["config"]["initial_size"] is None


def _by_configuration(cells: Mapping[str, Sequence[CellLog]]) -> dict[str, list[CellLog]]:
    """Seeds of a folder are averaged only where nothing but the seed differs; a difference becomes part of the name."""
    kept: dict[str, list[CellLog]] = {}
    for label, logs in cells.items():
        first = _without_seed(logs[0])
        for log in logs:
            changes = differences(first, _without_seed(log))
            name = f"{label} ({'; '.join(changes)})" if changes else label
            kept.setdefault(name, []).append(log)
    return kept


def _without_seed(log: CellLog) -> dict[str, Any]:
    """What the seeds of a strategy must have in common; where a user's files lie is none of it, what they hold is.

    A representation that was made anew, on another machine say, is none of it either: its seeds differ as much.
    """
    config, fingerprint = log.header["config"], log.header["fingerprint"]
    common = {key: without_paths(value) if key in SECTIONS else value for key, value in config.items() if key != "seed"}
    return common | {"content": {name: str(fingerprint.get(name))[:8] for name in ("weights", "files")}}


@dataclass(frozen=True)
class SummaryRow:
    """One strategy: shares in 0..1, seconds, points; ``speedup`` is None without a finished reference cell."""

    strategy: str
    final_accuracy: Estimate
    area: Estimate
    query_seconds: Estimate
    n_scored: float
    speedup: Estimate | None


def summarise(group: Group) -> list[SummaryRow]:
    """A row per strategy, the highest area under the curve first."""
    rows = [_row(group, strategy) for strategy in group.strategies]
    return sorted(rows, key=lambda row: -row.area.mean)


def _row(group: Group, strategy: str) -> SummaryRow:
    cells = group.finished(strategy)
    reference = group.finished(_reference(strategy, group))
    seeds = sorted(cells.keys() & reference.keys())
    seconds = {seed: mean_query_seconds(log.records) for seed, log in cells.items()}
    return SummaryRow(
        strategy,
        final_accuracy=t_interval([log.records[-1].accuracy for log in cells.values()]),
        area=t_interval([area_under_curve(log.records) for log in cells.values()]),
        query_seconds=t_interval(list(seconds.values())),
        n_scored=sum(mean_scored(log.records) for log in cells.values()) / len(cells),
        speedup=ratio_interval(
            [mean_query_seconds(reference[seed].records) for seed in seeds], [seconds[seed] for seed in seeds]
        )
        if seeds
        else None,
    )


def _reference(strategy: str, group: Group) -> str:
    """The reference under the same varied settings (``margin+graph.graph_k=10``) where there is one."""
    same = "+".join([REFERENCE, *strategy.split("+")[1:]])
    return same if same in group.cells else REFERENCE


def summary_csv(groups: Iterable[Group]) -> str:
    """Full precision, one line per strategy; an interval's ends are empty with one seed."""
    measures = ("final_accuracy", "area", "query_seconds", "speedup")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]
    writer.writerow(["suite", "dataset", "profile", "algorithm_version", "strategy", "n_seeds", "n_scored", *ends])
    for one in groups:
        for row in summarise(one):
            values = [value for measure in measures for value in _ends(getattr(row, measure))]
            identity = [
                one.suite,
                one.name.removeprefix(f"{one.suite}/"),
                one.profile,
                one.algorithm_version,
                row.strategy,
            ]
            writer.writerow([*identity, row.final_accuracy.n, row.n_scored, *values])
    return text.getvalue()


def _ends(estimate: Estimate | None) -> list[float | str]:
    if estimate is None:
        return ["", "", ""]
    return [estimate.mean, *("" if isinf(end) else end for end in (estimate.low, estimate.high))]
