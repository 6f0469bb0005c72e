"""Accuracy against labels, and against cumulative query time: mean over seeds with a 95 % band."""

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dgal_bench.record import CellLog
from dgal_bench.report.statistics import cumulative, cumulative_query_seconds, interpolated, t_interval
from dgal_bench.report.summary import Group
from dgal_bench.timings import Timings

# Colour says what the network is shown (Okabe and Ito's palette, safe for colour-blind eyes), the marker by which
# criterion it picks: a strategy looks the same everywhere.
RESTRICTION_COLOURS = {
    "everything": "#0072B2",
    "uniform": "#E69F00",
    "diffusion": "#D55E00",
    "model_neighbors": "#009E73",
    "graph_neighbors": "#CC79A7",
}
CRITERION_MARKERS = {
    "margin": "o",
    "least_confidence": "s",
    "entropy": "^",
    "badge": "P",
    "k_center": "X",
    "adversary": "*",
}
# Criteria on the whole pool stand close together: shades of its blue, and grey for the one that asks no network.
WHOLE_POOL_COLOURS = {
    "least_confidence": "#56B4E9",
    "entropy": "#9DD3F5",
    "badge": "#00436B",
    "k_center": "#5B6BD6",
    "adversary": "#7A7A7A",
}
RANDOM_COLOUR = "#000000"
OTHER_COLOURS = ("#8C6D31", "#A0522D", "#6B8E23")
OTHER_MARKERS = ("v", "D", "<", ">")
_CAPTION_WIDTH = 120  # characters of the small print under 8 inches
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def style(log: CellLog) -> dict[str, object]:
    """Colour, marker and width of a strategy's line."""
    strategy = log.header["config"]["strategy"]
    restrict, acquire = strategy["restrict"]["kind"], strategy["acquire"]["kind"]
    if (restrict, acquire) == ("everything", "random"):
        return {"color": RANDOM_COLOUR, "marker": "", "linestyle": "--", "linewidth": 1.6, "zorder": 3}
    diffusion = restrict == "diffusion"
    colour = RESTRICTION_COLOURS.get(restrict) or _pick(OTHER_COLOURS, restrict)
    return {
        "color": WHOLE_POOL_COLOURS.get(acquire, colour) if restrict == "everything" else colour,
        "marker": CRITERION_MARKERS.get(acquire) or _pick(OTHER_MARKERS, acquire),
        "linestyle": "-",
        "linewidth": 2.0 if diffusion else 1.3,
        "zorder": 4 if diffusion else 2,
    }


def styles(group: Group, strategies: Sequence[str]) -> dict[str, dict[str, object]]:
    """The look of each strategy; those that differ in a varied setting only are told apart by their dashes."""
    looks: dict[str, dict[str, object]] = {}
    for strategy in strategies:
        look = style(group.cells[strategy][0])
        alike = sum(other["color"] == look["color"] and other["marker"] == look["marker"] for other in looks.values())
        looks[strategy] = look | ({"linestyle": DASHES[alike % len(DASHES)]} if alike else {})
    return looks


def supervised_label(log: CellLog) -> str:
    varied = "".join(f" {part.rpartition('.')[2]}" for part in log.path.parent.name.split("+")[1:])
    return f"all {log.records[-1].n_labeled:,} labels{varied}"


def short_name(strategy: str) -> str:
    """``dgmg+strategy.restrict.score=margin`` as a legend has room for it: ``dgmg score=margin``."""
    return re.sub(r"\+(?:\w+\.)*(\w+=)", r" \1", strategy)


def _pick(choices: Sequence[str], name: str) -> str:
    return choices[sum(name.encode()) % len(choices)]


def accuracy_against_labels(group: Group) -> Figure:
    """Fig. 6 of the paper."""

    def labels(strategy: str) -> list[float]:
        return _mean([[float(r.n_labeled) for r in log.records] for log in group.finished(strategy).values()])

    figure, axes = _canvas(group, "labels", labels, first_row=0)
    axes.set_title(f"Accuracy against labels: {group.dataset}")
    return figure


def accuracy_against_query_time(group: Group) -> Figure:
    """Fig. 5 of the paper: each row against the query seconds of the rows before it, on a log axis."""
    label = "cumulative query time, seconds (log)"
    figure, axes = _canvas(group, label, partial(paid, group), first_row=1, note=times_note(group))
    axes.set_xscale("log")
    axes.set_title(f"Accuracy against query time: {group.dataset}")
    return figure


def paid(group: Group, strategy: str) -> list[float]:
    """The query seconds that each row has cost so far, mean over seeds: replayed ones where there are any.

    A replay knows some rounds only, between which it is taken for linear.
    """
    logs, replayed = group.finished(strategy), _drawn(group, strategy)
    if not replayed:
        return _mean([cumulative_query_seconds(log.records) for log in logs.values()])
    return _mean(
        [
            cumulative(interpolated({one.round: one.median_seconds for one in timings.timings}, logs[seed].rounds))
            for seed, timings in replayed.items()
        ]
    )


def _drawn(group: Group, strategy: str) -> dict[int, Timings]:
    """The replays that reach from the first query to the last: of what lies outside one nothing is known."""
    logs, replayed = group.finished(strategy), group.replayed(strategy)
    return {seed: made for seed, made in replayed.items() if {0, logs[seed].rounds - 1} <= set(made.rounds)}


def times_note(group: Group) -> str:
    """Which query times the figure shows."""
    replayed = [strategy for strategy in group.strategies if _drawn(group, strategy)]
    if not replayed:
        return ""
    others = [strategy for strategy in group.strategies if strategy not in replayed]
    few = (replayed, "of") if len(replayed) < len(others) else (others, "of all but")
    whose = f" {few[1]} {', '.join(map(short_name, few[0]))}" if others else ""
    found = [timings.rounds for strategy in replayed for timings in _drawn(group, strategy).values()]
    rounds = " or ".join(dict.fromkeys(", ".join(map(str, one)) for one in found))
    return f"query times{whose} replayed at rounds {rounds}, linear between them"


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    """Over seeds, as far as all of them go."""
    return [sum(values) / len(values) for values in zip(*columns, strict=False)]


def _canvas(
    group: Group, xlabel: str, x_of: Callable[[str], list[float]], first_row: int, note: str = ""
) -> tuple[Figure, Axes]:
    n_lines = len(group.strategies) + len(group.references)
    height = max(4.6, 0.8 + 0.23 * n_lines)  # inches: the legend has one for each
    figure = Figure(figsize=(8.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    n_seeds = {len(group.finished(strategy)) for strategy in group.strategies}
    looks = styles(group, _order(group))
    drawn: list[float] = []
    for strategy, look in looks.items():
        logs = list(group.finished(strategy).values())
        rows = range(first_row, min(len(log.records) for log in logs))
        estimates = [t_interval([log.records[row].accuracy for log in logs]) for row in rows]
        x = x_of(strategy)[first_row:]
        axes.plot(x, [e.mean for e in estimates], label=short_name(strategy), markersize=4.5, **look)  # type: ignore[arg-type]
        if len(logs) > 1:
            low, high = [e.low for e in estimates], [e.high for e in estimates]
            axes.fill_between(x, low, high, color=look["color"], alpha=0.07, linewidth=0)
        drawn += [e.mean for e in estimates]
    for log in group.references:
        if log.done:
            drawn.append(accuracy := log.records[-1].accuracy)
            axes.axhline(accuracy, color="#777777", linewidth=1.0, linestyle=(0, (1, 2)), label=supervised_label(log))
    # The frame follows the means: with few seeds a t band is wider than accuracies can be.
    axes.set_ylim(max(0.0, min(drawn, default=0.0) - 0.1), min(1.0, max(drawn, default=1.0) + 0.05))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    seeds = f"mean and 95 % t band (cut at the frame) over {'/'.join(map(str, sorted(n_seeds)))} seeds"
    caption = f"{'one seed, no band' if n_seeds == {1} else seeds}; profile {group.profile}"
    lines = [caption, *textwrap.wrap(note, _CAPTION_WIDTH)]
    figure.supxlabel("\n".join(lines), fontsize=8, color="#555555")
    return figure, axes


def _order(group: Group) -> list[str]:
    """Random first, then by what the network is shown, then by name."""
    kinds = ["everything", *[k for k in RESTRICTION_COLOURS if k != "everything"]]

    def key(strategy: str) -> tuple[int, int, str]:
        parts = group.cells[strategy][0].header["config"]["strategy"]
        restrict = parts["restrict"]["kind"]
        place = kinds.index(restrict) if restrict in kinds else len(kinds)
        return (parts["acquire"]["kind"] != "random", place, strategy)

    return sorted(group.strategies, key=key)


FIGURES: Mapping[str, Callable[[Group], Figure]] = {
    "accuracy-labels": accuracy_against_labels,
    "accuracy-query-time": accuracy_against_query_time,
}


def save_figures(group: Group, folder: Path) -> Iterator[Path]:
    """PNG and SVG of every figure of a group; yields the files written."""
    for name, draw in FIGURES.items():
        figure = draw(group)
        for kind in ("png", "svg"):
            path = folder / f"{group.slug}-{name}.{kind}"
            # no date in the SVG: the same rows give the same file
            figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            yield path
