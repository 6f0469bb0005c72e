"""Cells that may be compared, and one row per strategy with intervals over seeds; summary.csv."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgal_bench.config import SECTIONS, differences, without_paths
from dgal_bench.identity import ALGORITHM_VERSION
from dgal_bench.record import CellLog
from dgal_bench.report.needs import check_told
from dgal_bench.report.statistics import (
    Estimate,
    area_under_curve,
    mean_scored,
    ratio_interval,
    t_interval,
)
from dgal_bench.report.times import Times, by_cell, comparable, either, from_replay, from_rows, timings_of
from dgal_bench.timings import Timings

REFERENCE = "margin"
"""The strategy that speed-ups are against."""

_SOURCES = ("query_source", "query_beside", "speedup_source", "speedup_beside")
_Key = tuple[str, str, str, int]


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
    unbegun: Sequence[CellLog] = ()
    """Cells that failed or were skipped before they began: of whatever strategy, and nobody knows on what data."""
    timings: Sequence[Timings] = ()
    """Replays, of these cells or of others."""

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

    def replayed(self, strategy: str) -> dict[int, Timings]:
        """By seed the replays of finished cells that found the rows' own picks again."""
        known = by_cell(self.timings)
        found = {seed: timings_of(log, known) for seed, log in self.finished(strategy).items()}
        return {seed: timings for seed, timings in found.items() if timings is not None}


def group(logs: Iterable[CellLog], timings: Sequence[Timings] = ()) -> list[Group]:
    """Cells kept apart by suite, data set, its content, profile and algorithm version: never averaged over those.

    Raises:
        ResultsError: a file does not say what a report tells.
    """
    apart: dict[_Key, dict[str, dict[str, list[CellLog]]]] = {}
    unbegun: dict[_Key, list[CellLog]] = {}
    for log in logs:
        check_told(log)
        if log.begun:
            contents = apart.setdefault(_key(log), {})
            cells = contents.setdefault(log.header["fingerprint"]["data"][:8], {})
            cells.setdefault(log.path.resolve().parent.name, []).append(log)
        else:
            unbegun.setdefault(_key(log), []).append(log)
    groups = []
    for key in sorted(apart.keys() | unbegun.keys()):
        contents = apart.get(key) or {"": {}}
        never = unbegun.get(key, [])
        for content, cells in sorted(contents.items()):
            groups.append(_group(key, cells, content if len(contents) > 1 else "", never, timings))
            never = []  # told once
    return groups


def _key(log: CellLog) -> _Key:
    header = log.header
    name, version = header["config"]["dataset"]["name"], header["fingerprint"]["algorithm_version"]
    return log.path.resolve().parts[-4], name, header["profile"], version


def _group(
    key: _Key, cells: Mapping[str, Sequence[CellLog]], content: str, unbegun: Sequence[CellLog],
    timings: Sequence[Timings],
) -> Group:  # fmt: skip
    references = [log for logs in cells.values() for log in logs if is_reference(log)]
    strategies = {label: logs for label, logs in cells.items() if not is_reference(logs[0])}
    return Group(*key, _by_configuration(strategies), references, content, unbegun, timings)


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
    return common | {"content": {name: str(fingerprint[name])[:8] for name in ("weights", "files")}}


@dataclass(frozen=True)
class SummaryRow:
    """One strategy: shares in 0..1, seconds, points; ``speedup`` is None without a finished reference cell."""

    strategy: str
    final_accuracy: Estimate
    area: Estimate
    query_seconds: Estimate
    n_scored: float
    speedup: Estimate | None
    query: Times
    speedup_source: str
    speedup_beside: bool | None


def summarise(group: Group) -> list[SummaryRow]:
    """A row per strategy, the highest area under the curve first."""
    rows = [_row(group, strategy) for strategy in group.strategies]
    return sorted(rows, key=lambda row: -row.area.mean)


def _row(group: Group, strategy: str) -> SummaryRow:
    cells = group.finished(strategy)
    query = from_replay(group.replayed(strategy)) or from_rows(cells)
    pair = _comparison(strategy, group)
    seeds = sorted(pair[0].seconds) if pair else []
    return SummaryRow(
        strategy,
        final_accuracy=t_interval([log.records[-1].accuracy for log in cells.values()]),
        area=t_interval([area_under_curve(log.records) for log in cells.values()]),
        query_seconds=t_interval(list(query.seconds.values())),
        n_scored=sum(mean_scored(log.records) for log in cells.values()) / len(cells),
        speedup=ratio_interval([pair[1].seconds[seed] for seed in seeds], [pair[0].seconds[seed] for seed in seeds])
        if pair
        else None,
        query=query,
        speedup_source=pair[0].source if pair else "",
        speedup_beside=either(*(times.beside for times in pair or ())),
    )


def _comparison(strategy: str, group: Group) -> tuple[Times, Times] | None:
    """A strategy's times and the reference's, of the same seeds and from the same source; None without any."""
    reference = _reference(strategy, group)
    ours, theirs = group.replayed(strategy), group.replayed(reference)
    both = [seed for seed in ours.keys() & theirs.keys() if comparable(ours[seed], theirs[seed])]
    replays = [from_replay({seed: timings[seed] for seed in both}) for timings in (ours, theirs)]
    if replays[0] and replays[1]:
        return replays[0], replays[1]
    cells, others = group.finished(strategy), group.finished(reference)
    seeds = cells.keys() & others.keys()
    if not seeds:
        return None
    return from_rows({seed: cells[seed] for seed in seeds}), from_rows({seed: others[seed] for seed in seeds})


def _reference(strategy: str, group: Group) -> str:
    """The reference under the same varied settings (``margin+graph.graph_k=10``) where there is one."""
    same = "+".join([REFERENCE, *strategy.split("+")[1:]])
    return same if same in group.cells else REFERENCE


def summary_csv(groups: Iterable[Group]) -> str:
    """Full precision, one line per strategy; an interval's ends are empty with one seed.

    Times: their source, replay or rows, and whether they were taken beside other work: yes, no or unknown.
    """
    measures = ("final_accuracy", "area", "query_seconds", "speedup")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]
    writer.writerow(
        ["suite", "dataset", "profile", "algorithm_version", "strategy", "n_seeds", "n_scored", *ends, *_SOURCES]
    )
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
            said = {True: "yes", False: "no", None: "unknown"}
            speedup = [row.speedup_source, said[row.speedup_beside]] if row.speedup else ["", ""]
            sources = [row.query.source, said[row.query.beside], *speedup]
            writer.writerow([*identity, row.final_accuracy.n, row.n_scored, *values, *sources])
    return text.getvalue()


def _ends(estimate: Estimate | None) -> list[float | str]:
    if estimate is None:
        return ["", "", ""]
    return [estimate.mean, *((estimate.low, estimate.high) if estimate.n > 1 else ("", ""))]
