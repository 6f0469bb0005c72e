"""Curves over labels, seconds or queries: means over seeds with a 95 % band; the notes and legends of all figures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dgal_bench.report.costs import cumulative_query_means, cumulative_seconds, sums_note, times_note
from dgal_bench.report.groups import Group
from dgal_bench.report.plots.style import (
    FAINT,
    Canvas,
    Style,
    canvas,
    count_axis,
    element_id,
    log_axis,
    percent_axis,
    styles,
)
from dgal_bench.report.statistics import Estimate, mean_intervals
from dgal_bench.results.rows import RoundRecord, RunLog

MARKER = 4.0
SECONDS = "seconds of all queries so far (log)"
_DOTS = (0, (1, 2))

PerStrategy = Callable[[str], Sequence[float]]


def legend(group: Group) -> dict[str, Mapping[str, Any]]:
    """A handle for every strategy, and for full supervision."""
    handles: dict[str, Mapping[str, Any]] = {}
    for one in styles(group).values():
        handles[one.name] = {**one.line, "markersize": MARKER}
    done = [log for log in group.references if log.done]
    return handles | {supervised_label(log): {"color": FAINT, "linestyle": _DOTS, "linewidth": 1.2} for log in done}


def supervised_label(log: RunLog) -> str:
    varied = "".join(f" {part.rpartition('.')[2]}" for part in log.path.parent.name.split("+")[1:])
    return f"all {log.records[-1].n_labeled:,} labels{varied}"


def seeds_note(group: Group, *more: str) -> str:
    """The number of seeds behind means and bands, and the profile."""
    means = f"mean and 95 % band (cut at the frame) over {n_seeds(group)}"
    plain = "one seed, no band" if n_seeds(group) == "1 seed" else means
    return "; ".join([plain, f"profile {group.profile}", *filter(None, more)])


def means_note(group: Group, *more: str) -> str:
    """The same for a figure without bands."""
    return "; ".join([f"mean over {n_seeds(group)}", *filter(None, more)])


def n_seeds(group: Group) -> str:
    """``5 seeds``; ``3/5 seeds`` where strategies differ."""
    numbers = sorted({len(group.finished(strategy)) for strategy in group.strategies})
    return f"{'/'.join(map(str, numbers))} seed{'' if numbers == [1] else 's'}"


def over_seeds(group: Group, strategy: str, value: Callable[[RoundRecord], float]) -> list[Estimate]:
    """Of each row, over finished seeds, up to the shortest run."""
    logs = list(group.finished(strategy).values())
    n_rows = min(len(log.records) for log in logs)
    return mean_intervals([[value(record) for record in log.records[:n_rows]] for log in logs])


def accuracies(group: Group, strategy: str) -> list[Estimate]:
    return over_seeds(group, strategy, lambda record: record.accuracy)


def labels(group: Group, strategy: str) -> list[float]:
    """Of each row; strategies of one group may differ in their labels."""
    return [one.mean for one in over_seeds(group, strategy, lambda record: float(record.n_labeled))]


def line(axes: Axes, strategy: str, style: Style, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, markersize=MARKER, label=style.name, gid=element_id(strategy, "line"), **style.line)


def _band(axes: Axes, strategy: str, style: Style, x: Sequence[float], estimates: Sequence[Estimate]) -> None:
    if estimates and estimates[0].n > 1:
        low, high = [one.low for one in estimates], [one.high for one in estimates]
        axes.fill_between(
            x, low, high, color=style.color, alpha=0.08, linewidth=0, gid=element_id(strategy, "band")
        )  # fmt: skip


def _accuracy(
    group: Group, title: str, xlabel: str, x_of: PerStrategy, first_row: int, note: str, extremes: bool
) -> Canvas:
    """Accuracy over ``x_of`` a strategy, from its row ``first_row`` on."""
    drawing = canvas(f"{title}: {group.dataset_label}", legend(group), seeds_note(group, note))
    (axes,) = drawing.axes
    means: list[float] = []
    for strategy, style in styles(group).items():
        estimates, x = accuracies(group, strategy)[first_row:], list(x_of(strategy))[first_row:]
        _band(axes, strategy, style, x, estimates)
        line(axes, strategy, style, x, [one.mean for one in estimates])
        means += [one.mean for one in estimates]
    full = {supervised_label(log): log.records[-1].accuracy for log in group.references if log.done}
    for label, accuracy in full.items():
        axes.axhline(accuracy, color=FAINT, linewidth=1.2, linestyle=_DOTS, gid="line:full supervision", label=label)
    if extremes and means:
        finals = [accuracies(group, strategy)[-1].mean for strategy in group.strategies]
        for height, which in ((max(finals), "best"), (min(finals), "worst")):
            axes.axhline(height, color=FAINT, linewidth=0.8, gid=f"line:{which}", zorder=1)
    # The frame follows the means: with few seeds a band is wider than accuracies can be.
    every = [*means, *full.values()]
    axes.set_ylim(max(0.0, min(every, default=0.0) - 0.06), min(1.0, max(every, default=1.0) + 0.04))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("test accuracy")
    percent_axis(axes.yaxis)
    return drawing


def accuracy_labels(group: Group) -> Canvas:
    """Figs. 6, 9 and 11 of the paper."""
    drawing = _accuracy(group, "Accuracy against labels", "labels", partial(labels, group), 0, "", extremes=False)
    count_axis(drawing.axes[0].xaxis)
    return drawing


def accuracy_query_time(group: Group) -> Canvas:
    """Figs. 5 and 8 of the paper: each row against the query seconds of the rows before it, on a log axis."""
    extremes = "grey lines: best and worst final accuracy"
    note = "; ".join(filter(None, [extremes, times_note(group)]))
    drawing = _accuracy(
        group, "Accuracy against query time", SECONDS, partial(cumulative_query_means, group), 1, note, extremes=True
    )
    _log_x(drawing, [x for strategy in group.strategies for x in cumulative_query_means(group, strategy)])
    return drawing


def accuracy_total_time(group: Group) -> Canvas:
    """Table 2 of the paper as curves: with the set-up that the queries rest on."""

    label = "seconds of set-up and all queries so far (log)"
    x_of = partial(cumulative_seconds, group)
    drawing = _accuracy(group, "Accuracy against total time", label, x_of, 1, sums_note(group), extremes=True)
    _log_x(drawing, [x for strategy in group.strategies for x in x_of(strategy)])
    return drawing


def _log_x(drawing: Canvas, values: Sequence[float]) -> None:
    log_axis(drawing.axes[0].xaxis, values)


def seconds_spent(group: Group) -> Canvas:
    """The cost of each strategy after so many queries, set-up included: which is cheaper, and from when on."""
    drawing = canvas(
        f"Set-up and queries, seconds so far: {group.dataset_label}", legend(group), means_note(group, sums_note(group))
    )
    (axes,) = drawing.axes
    every: list[float] = []
    for strategy, style in styles(group).items():
        seconds = cumulative_seconds(group, strategy)[1:]
        line(axes, strategy, style, range(1, len(seconds) + 1), seconds)
        every += seconds
    axes.set_xlabel("queries made")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("seconds (log)")
    log_axis(axes.yaxis, every)
    return drawing
