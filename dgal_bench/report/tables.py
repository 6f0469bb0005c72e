"""summary.csv and summary.md: one row per strategy, with intervals over seeds; and what to know about them."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isinf
from typing import Any

from dgal_bench.config import differences
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

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.dataset}"

    @property
    def slug(self) -> str:
        """The start of its figures' file names."""
        version = "" if self.algorithm_version == ALGORITHM_VERSION else f"-v{self.algorithm_version}"
        return f"{self.suite}-{self.dataset}-{self.profile}{version}"

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
    """Cells kept apart by suite, data set, profile and algorithm version: never averaged over those."""
    apart: dict[tuple[str, str, str, int], dict[str, list[CellLog]]] = {}
    for log in logs:
        suite = log.path.resolve().parts[-4]
        header = log.header
        key = (
            suite,
            header["config"]["dataset"]["name"],
            header["profile"],
            header["fingerprint"]["algorithm_version"],
        )
        apart.setdefault(key, {}).setdefault(log.path.resolve().parent.name, []).append(log)
    return [Group(*key, cells=_by_configuration(cells)) for key, cells in sorted(apart.items())]


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
    return {key: value for key, value in log.header["config"].items() if key != "seed"}


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
            identity = [one.suite, one.dataset, one.profile, one.algorithm_version, row.strategy]
            writer.writerow([*identity, row.final_accuracy.n, row.n_scored, *values])
    return text.getvalue()


def _ends(estimate: Estimate | None) -> list[float | str]:
    if estimate is None:
        return ["", "", ""]
    return [estimate.mean, *("" if isinf(end) else end for end in (estimate.low, estimate.high))]


def summary_md(groups: Sequence[Group]) -> str:
    """A section per group: what was run, the table, the one-off ledger, and what to be wary of."""
    return "\n".join(_section(one) for one in groups)


def _section(group: Group) -> str:
    lines = [
        f"## {group.name}, profile {group.profile}, algorithm {group.algorithm_version}",
        "",
        *_protocol(group),
        "",
    ]
    if group.strategies:
        lines += _aligned(
            ["strategy", "seeds", "final accuracy %", "area under curve %", "query ms", "points scored", "speed-up"],
            [_cells(row) for row in summarise(group)],
        )
        lines += ["", "Mean and 95 % t interval over seeds. Area: mean accuracy over the range of labels. Query: mean"]
        lines += [
            f"seconds of one query, nothing else; speed-up: {REFERENCE}'s query time over the strategy's, by seed.",
            "",
        ]
    return "\n".join([*lines, *_ledger(group), *_warnings(group)]) + "\n"


def _protocol(group: Group) -> list[str]:
    configs = [log.header["config"] for log in group.logs]

    def values(*path: str) -> str:
        return "/".join(dict.fromkeys(str(reduce(lambda node, key: node[key], path, config)) for config in configs))

    records = [record for log in group.logs for record in log.records]
    threads, jobs = (sorted({getattr(record, name) for record in records}) for name in ("threads", "jobs"))
    return [
        f"{values('initial_size')} first labels, {values('rounds')} queries of {values('batch_size')}, "
        f"{values('restricted_size')} candidates after a restriction; representation "
        f"{values('representation', 'kind')}, K = {values('graph', 'graph_k')}.",
        f"{' / '.join(machines(group))}; {_numbers(threads)} thread(s) a cell, {_numbers(jobs)} cell(s) side by side.",
    ]


def machines(group: Group) -> list[str]:
    """Every machine and revision that made these rows."""
    return sorted({_machine(log.header) for log in group.logs})


def _machine(header: Mapping[str, Any]) -> str:
    where, print_ = header["provenance"], header["fingerprint"]
    revision = (where["git"]["revision"] or "?" * 8)[:8] + (" (modified)" if where["git"]["dirty"] else "")
    device = where["machine"]["cpu"] if print_["device"] == "cpu" else print_["device"]
    return f"{device}, {where['machine']['cores']} cores, torch {print_['torch']}, dgal-bench {revision}"


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "?"


def _cells(row: SummaryRow) -> list[str]:
    return [
        row.strategy,
        str(row.final_accuracy.n),
        spread(row.final_accuracy, 100, 1),
        spread(row.area, 100, 1),
        spread(row.query_seconds, 1000, 2),
        f"{row.n_scored:,.0f}",
        speedup(row.speedup),
    ]


def spread(estimate: Estimate, factor: float, digits: int) -> str:
    """``91.2 +- 0.8``; the mean alone with one seed."""
    mean = f"{estimate.mean * factor:.{digits}f}"
    return mean if isinf(estimate.high) else f"{mean} ± {(estimate.high - estimate.mean) * factor:.{digits}f}"


def speedup(estimate: Estimate | None) -> str:
    """``61 [58, 65]`` times; the ratio alone with one seed."""
    if estimate is None:
        return ""
    if isinf(estimate.high):
        return f"{estimate.mean:.3g}"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    pads = ["<", *[">"] * (len(head) - 1)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(f"{c:{pad}{w}}" for c, pad, w in zip(cells, pads, widths, strict=True)) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + (":" if pad == ">" else "-") for w, pad in zip(widths, pads, strict=True)) + "|"
    )
    return [line(head), rule, *map(line, rows)]


def _ledger(group: Group) -> list[str]:
    """The one-off cost and quality of each representation and graph under these rows."""
    made = {log.header["fingerprint"]["graph"]: log.header["setup"] for log in group.logs}
    lines = []
    for setup in made.values():
        representation, graph = setup["representation"], setup["graph"]
        shares = ", ".join(f"{name} {share:.3f}" for name, share in representation["label_share"].items())
        lines.append(
            f"Once, in no query time: {representation['kind']} {representation['seconds']:.1f} s, "
            f"graph {graph['seconds']:.2f} s ({graph['components']} component(s), "
            f"{'exact' if graph['exact'] else f'''recall {graph['recall']:.3f}'''}). "
            f"Share of the 20 nearest neighbours with a point's label: {shares}."
        )
    return lines


def _warnings(group: Group) -> list[str]:
    lines = []
    for log in group.logs:
        if not log.done:
            why = f": {log.failure['error']}" if log.failure else ""
            cell = f"{log.path.parent.name}/{log.path.stem}"
            lines.append(f"{log.status.upper()}, not counted: {cell}, {len(log.records)} of {log.rounds + 1} rows{why}")
        changed = [change for one in log.continuations for change in one["changed"]]
        if changed:
            lines.append(f"Continued elsewhere: {log.path.parent.name}/{log.path.stem} ({'; '.join(changed)})")
    underfit = sum(record.underfit for log in group.logs for record in log.records)
    if underfit:
        total = sum(len(log.records) for log in group.logs)
        lines.append(f"Underfit: {underfit} of {total} trainings ended above half the loss of a guess.")
    if any(record.jobs > 1 for log in group.logs for record in log.records):
        lines.append("Query times were taken with other cells running beside.")
    return ["", *lines] if lines else []
