"""Figures with a horizontal line per strategy (query times, areas, labels needed), and the Pareto front."""

from collections.abc import Mapping, Sequence
from math import inf

from matplotlib.axes import Axes

from dgal_bench.report.costs import phase_seconds, reach_target, sources_note, targets
from dgal_bench.report.groups import Group
from dgal_bench.report.plots.curves import legend, n_seeds, seeds_note
from dgal_bench.report.plots.style import (
    FAINT,
    PAPER,
    Canvas,
    canvas,
    count_axis,
    element_id,
    log_axis,
    percent_axis,
    short_name,
    styles,
)
from dgal_bench.report.statistics import Estimate
from dgal_bench.report.summary import summarise
from dgal_bench.results.metrics import pareto

PHASE_COLOURS = {
    "embed": "#56B4E9", "index": "#5B6BD6", "search": "#009E73", "diffuse": "#D55E00", "select": "#E69F00",
    "infer": "#0072B2", "acquire": "#CC79A7", "aux_train": "#7A7A7A",
}  # fmt: skip
TARGET_MARKERS = ("o", "D", "s")
_ROW = 0.235  # inches


def _rows(
    group: Group, title: str, names: Sequence[str], handles: Mapping[str, Mapping[str, object]], note: str,
    panels: Sequence[float] = (1.0,),
) -> Canvas:  # fmt: skip
    """A horizontal line for each strategy, the first on top, named at the left."""
    own = styles(group)
    shown = [own[name].name for name in names]
    longest = max(map(len, shown), default=1)
    size = 10 if longest < 20 else 8.5
    drawing = canvas(
        f"{title}: {group.dataset_label}", handles, note, height=0.8 + _ROW * max(4, len(names)), panels=panels,
        left=0.35 + 0.0082 * size * longest, gap=0.3, own_key=True,
    )  # fmt: skip
    for axes in drawing.axes:
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(names)), [""] * len(names))
    drawing.axes[0].set_yticks(range(len(names)), shown, fontsize=size)
    return drawing


def _dot(axes: Axes, strategy: str, y: float, one: Estimate, style: Mapping[str, object], scale: float = 1.0) -> None:
    """A mean with its interval, where there is one."""
    ends = [] if one.high == inf else [one.low * scale, one.high * scale]
    if ends:
        axes.plot(ends, [y, y], color=style["color"], linewidth=2, alpha=0.45, gid=element_id(strategy, "interval"))
    axes.plot(
        [one.mean * scale], [y], linestyle="", color=style["color"], marker=style["marker"] or "o", markersize=6,
        gid=element_id(strategy, "mean"),
    )  # fmt: skip


def query_time(group: Group) -> Canvas:
    """Figs. 7, 10, 12 and 13 of the paper; the right panel splits each bar's seconds, which a log scale cannot."""
    rows = sorted(summarise(group), key=lambda row: row.query_seconds.mean)
    names = [row.strategy for row in rows]
    split = {name: phase_seconds(group, name) for name in names}
    used = [phase for phase in PHASE_COLOURS if any(phase in seconds for seconds in split.values())]
    key = {phase: {"color": PHASE_COLOURS[phase], "linewidth": 6} for phase in used}
    note = seeds_note(group, sources_note(group))
    drawing = _rows(group, "Mean query time, and its phases", names, key, note, panels=(1.25, 1.0))
    bars, phases = drawing.axes
    own = styles(group)
    low = min(row.query_seconds.mean for row in rows) / 2
    for y, row in enumerate(rows):
        mean = row.query_seconds.mean
        bars.barh([y], [mean - low], left=low, height=0.62, color=own[row.strategy].color, alpha=0.85).patches[
            0
        ].set_gid(element_id(row.strategy, "bar"))
        if row.query_seconds.high < inf:
            bars.plot([max(row.query_seconds.low, low), row.query_seconds.high], [y, y], color=FAINT, linewidth=1.2)
        _stack(phases, y, split[row.strategy])
    ends = [min(row.query_seconds.high, 50 * row.query_seconds.mean) for row in rows]
    log_axis(bars.xaxis, [low, *ends], dense=1.0)  # half of a figure has no room for more
    bars.set_xlim(left=low)
    bars.set_xlabel("seconds of one query (log)")
    phases.set_xlim(0, 1)
    phases.set_xlabel("share by phase")
    phases.set_xticks([0, 0.5, 1])
    percent_axis(phases.xaxis)
    return drawing


def _stack(axes: Axes, y: int, seconds: Mapping[str, float]) -> None:
    total, left = sum(seconds.values()), 0.0
    for phase in [phase for phase in PHASE_COLOURS if phase in seconds]:
        share = seconds[phase] / total
        axes.barh([y], [share], left=left, height=0.62, color=PHASE_COLOURS[phase], edgecolor=PAPER, linewidth=0.4)
        left += share


def pareto_front(group: Group) -> Canvas:
    """The strategies that no other beats in both area under the curve and mean query time."""
    rows = {row.strategy: row for row in summarise(group)}
    points = {name: (row.query_seconds.mean, row.area.mean) for name, row in rows.items()}
    front = pareto(points)
    names = f"on the front: {', '.join(map(short_name, front))}"
    drawing = canvas(
        f"Pareto front: {group.dataset_label}", legend(group), seeds_note(group, names, sources_note(group))
    )
    (axes,) = drawing.axes
    stairs = [points[name] for name in front]
    axes.step([x for x, _ in stairs], [y for _, y in stairs], where="post", color=FAINT, linewidth=1, gid="line:front")
    for name, style in styles(group).items():
        row, (x, y) = rows[name], points[name]
        if row.area.high < inf:
            axes.plot([x, x], [row.area.low, row.area.high], color=style.color, alpha=0.4, gid=element_id(name, "area"))
            ends = [row.query_seconds.low if row.query_seconds.low > 0 else x / 5, row.query_seconds.high]
            axes.plot(ends, [y, y], color=style.color, alpha=0.4, gid=element_id(name, "seconds"))
        axes.plot(
            [x], [y], linestyle="", color=style.color, marker=style.marker or "D",
            markersize=9 if name in front else 6.5, gid=element_id(name, "mean"),
        )  # fmt: skip
    axes.set_xlabel("mean seconds of one query (log)")
    axes.set_ylabel("area under the curve")
    percent_axis(axes.yaxis)
    means = [y for _, y in points.values()]
    axes.set_ylim(max(0.0, min(means) - 0.05), min(1.0, max(means) + 0.04))
    log_axis(axes.xaxis, [x for x, _ in points.values()], dense=1.2)
    return drawing


def areas_and_accuracies(group: Group) -> Canvas:
    """The area under the curve and the final accuracy, with their intervals."""
    rows = summarise(group)
    drawing = _rows(
        group, "Area under the curve, final accuracy", [row.strategy for row in rows], {}, seeds_note(group),
        panels=(1.0, 1.0),
    )  # fmt: skip
    own = styles(group)
    for axes, what in zip(drawing.axes, ("area", "final_accuracy"), strict=True):
        for y, row in enumerate(rows):
            _dot(axes, row.strategy, y, getattr(row, what), own[row.strategy].line)
        means = [getattr(row, what).mean for row in rows]
        axes.set_xlim(max(0.0, min(means) - 0.06), min(1.0, max(means) + 0.05))
        percent_axis(axes.xaxis)
    drawing.axes[0].set_xlabel("area: mean accuracy")
    drawing.axes[1].set_xlabel("final accuracy")
    return drawing


def labels_to_target(group: Group) -> Canvas:
    """Labels that each strategy needs; a target that not every seed reaches is drawn hollow."""
    goals = targets(group)
    key = {
        f"{goal:.0%}": {"marker": marker, "linestyle": "", "color": FAINT, "markersize": 6}
        for goal, marker in zip(goals, TARGET_MARKERS, strict=False)
    }
    found = {name: [reach_target(group, name, goal) for goal in goals] for name in group.strategies}
    names = sorted(
        found, key=lambda name: [one.labels if one.labels is not None else inf for one in reversed(found[name])]
    )
    note = f"mean over those of {n_seeds(group)} that reach it; hollow: not all of them do; missing: none does"
    drawing = _rows(group, "Labels needed to reach an accuracy", names, key, note)
    (axes,) = drawing.axes
    own = styles(group)
    for y, name in enumerate(names):
        for one, marker in zip(found[name], TARGET_MARKERS, strict=False):
            if one.labels is not None:
                axes.plot(
                    [one.labels], [y], linestyle="", marker=marker, markersize=6.5, color=own[name].color,
                    markerfacecolor=own[name].color if one.n_reached == one.n else "none",
                    gid=element_id(name, "target"),
                )  # fmt: skip
    axes.set_xlabel("labels")
    axes.set_xlim(left=0)
    count_axis(axes.xaxis)
    return drawing
