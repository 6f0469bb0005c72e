"""Figures round by round, two panels each: candidates, classes, exploration, and what the graph knows."""

from collections.abc import Callable, Sequence
from math import nan

import numpy as np
from matplotlib.ticker import MaxNLocator

from dgal_bench.report.groups import Group
from dgal_bench.report.plots.curves import legend, line, means_note
from dgal_bench.report.plots.style import Canvas, canvas, count_axis, log_axis, percent_axis, styles
from dgal_bench.results.metrics import batch_balance, classes_seen
from dgal_bench.results.rows import RoundRecord, RunLog


def _pair(
    group: Group, title: str, headings: Sequence[str], values: Sequence[Callable[[RunLog], Sequence[float] | None]],
    xlabel: str = "round", note: str = "",
) -> Canvas:  # fmt: skip
    """Two panels of means over seeds, one value a row; runs without the value are left out."""
    drawing = canvas(
        f"{title}: {group.dataset_label}",
        legend(group),
        means_note(group, note),
        panels=(1.0, 1.0),
        height=3.4,
        headings=headings,
    )
    for axes, value in zip(drawing.axes, values, strict=True):
        for strategy, style in styles(group).items():
            columns = [value(log) for log in group.finished(strategy).values()]
            if present := [column for column in columns if column]:
                means = [sum(at) / len(at) for at in zip(*present, strict=False)]
                line(axes, strategy, style, range(len(means)), means)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not axes.lines:
            axes.text(0.5, 0.5, "not in these rows", ha="center", va="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
    return drawing


def points_per_round(group: Group) -> Canvas:
    """Candidates of a restriction and points scored by the network, round by round."""

    def candidates(log: RunLog) -> list[float]:
        return _positive([record.n_candidates for record in log.records[:-1]])

    def scored(log: RunLog) -> list[float]:
        return _positive([record.n_scored for record in log.records[:-1]])

    headings = ("candidates (log)", "points scored (log)")
    note = "strategies that score no point are not in the right panel"
    drawing = _pair(group, "Candidates and points scored per query", headings, (candidates, scored), note=note)
    for axes in drawing.axes:
        log_axis(axes.yaxis, [float(y) for drawn in axes.lines for y in np.asarray(drawn.get_ydata())])
    return drawing


def _positive(values: Sequence[int | None]) -> list[float]:
    """For a log axis: a gap for None and 0, and no line where all are."""
    return [float(value) if value else nan for value in values] if any(values) else []


def classes(group: Group) -> Canvas:
    """How many classes were seen, and how evenly a batch is spread over them."""

    def seen(log: RunLog) -> Sequence[float] | None:
        found = classes_seen(log.records, log.header.get("initial_classes"))
        return None if found is None else [float(n) for n in found]

    def balance(log: RunLog) -> list[float]:
        known = log.header.get("data", {}).get("n_classes") or log.header["config"]["dataset"].get("n_classes")
        n_classes = int(known or 0)
        return [batch_balance(record.classes, n_classes) for record in log.records if record.classes and n_classes]

    note = "balance: entropy of a batch's classes, 1 where they are as even as the batch's size allows"
    drawing = _pair(
        group, "Classes seen, and their balance", ("classes seen", "batch balance"), (seen, balance), note=note
    )
    if drawing.axes[1].lines:
        drawing.axes[1].set_ylim(-0.03, 1.03)
    return drawing


def exploration(group: Group) -> Canvas:
    """From exploring clusters to refining boundaries (paper, Figs. 3 and 4, section 4.2), as numbers."""

    def boundary(log: RunLog) -> list[float]:
        return [record.boundary_share for record in log.records if record.boundary_share is not None]

    headings = ("boundary share of the batch", "reach of the labels")
    note = "boundary share: of a pick's graph neighbours those with another label; reach: of the pool what a label "
    note += "diffuses to within T steps"
    drawing = _pair(
        group, "Exploration to refinement", headings, (boundary, lambda log: [r.reach for r in log.records]), note=note
    )  # fmt: skip
    for axes in drawing.axes:
        percent_axis(axes.yaxis)
    return drawing


def propagation(group: Group) -> Canvas | None:
    """Test accuracy of the network and of labels propagated over the graph; None where no row has both."""

    def network(record: RoundRecord) -> float:
        return record.accuracy

    def graph(record: RoundRecord) -> float:
        return float((record.propagated or {})["accuracy"])

    rows = {strategy: _has_rounds(group, strategy) for strategy in styles(group)}
    if not any(rows.values()):
        return None
    drawing = canvas(
        f"What the graph knows: {group.dataset_label}", legend(group),
        means_note(group, "at the rounds where rows have both; labels propagated by the diffusion's T steps"),
        panels=(1.0, 1.0), height=3.4, headings=("network, test accuracy", "graph alone, test accuracy"),
    )  # fmt: skip
    for axes, value in zip(drawing.axes, (network, graph), strict=True):
        for strategy, style in styles(group).items():
            at = rows[strategy]
            points = [[value(record) for record in seeds] for seeds in at]
            x = [seeds[0].n_labeled for seeds in at]
            line(axes, strategy, style, x, [sum(each) / len(each) for each in points])
        axes.set_xlabel("labels")
        count_axis(axes.xaxis)
        percent_axis(axes.yaxis)
    low = min(axes.get_ylim()[0] for axes in drawing.axes)
    high = max(axes.get_ylim()[1] for axes in drawing.axes)
    for axes in drawing.axes:
        axes.set_ylim(max(0.0, low), min(1.02, high))
    return drawing


def _has_rounds(group: Group, strategy: str) -> list[list[RoundRecord]]:
    """The records of all seeds at the rounds where each has propagated labels."""
    logs = list(group.finished(strategy).values())
    rounds = zip(*(log.records for log in logs), strict=False)
    return [list(records) for records in rounds if all(record.propagated for record in records)]
