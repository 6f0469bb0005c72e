"""Seconds against the number of points: a panel per criterion, a line per implementation, labeled at its end."""

from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.plan import IMPLEMENTATIONS, N_CENTRES, N_FEATURES

Row = Mapping[str, Any]
# Okabe and Ito's palette, safe for colour-blind eyes; the marker says the same once more.
LOOKS = {
    "ours": {"color": "#D55E00", "marker": "o", "linewidth": 2.4},
    "reference": {"color": "#5F5F5F", "marker": "s", "linewidth": 1.4},
    "scikit-activeml": {"color": "#0072B2", "marker": "^", "linewidth": 1.6},
}
NAMES = {"ours": "dgal-bench", "reference": "plain reference", "scikit-activeml": "scikit-activeml"}
# criterion: its name, and what its reference does
TITLES = {
    "badge": ("BADGE", "reference: every gradient written out"),
    "coreset": ("CoreSet", "reference: all distances, anew for each pick"),
    "margin": ("Margin", "reference: sort every row, sort all points"),
}
_STOPPED = ("over_limit", "not_started")
_LABEL_GAP = 0.115  # of an axis' height: two lines of text
_HIGHEST_LABEL = 0.95


def save_figure(results: Mapping[str, Any], base: Path) -> list[Path]:
    """``base``.png and .svg, for the fewest classes and picks of the run: there the curve over N is longest."""
    figure = _figure(results)
    paths = [base.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        # no date in the SVG: the same measurements give the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _figure(results: Mapping[str, Any]) -> Figure:
    rows = results["measurements"]
    classes = min((row["classes"] for row in rows if row["classes"]), default=None)
    picks = min(row["picks"] for row in rows)
    shown = [row for row in rows if row["picks"] == picks and row["classes"] in (None, classes)]
    criteria = list(dict.fromkeys(row["criterion"] for row in shown))
    figure = Figure(figsize=(4.3 * len(criteria) + 0.4, 4.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(criteria), squeeze=False)[0]
    for axes, criterion in zip(panels, criteria, strict=True):
        _panel(axes, criterion, [row for row in shown if row["criterion"] == criterion], results["limit_seconds"])
    panels[0].set_ylabel("seconds (log)")
    figure.suptitle(f"Seconds to pick {picks} of N points, after the network's forward pass", fontsize=13)
    threads, machine = results["threads"], results["provenance"]["machine"]["cpu"]
    figure.supxlabel(
        f"N, points to pick from (log).  {N_FEATURES} features, {classes or 'any number of'} classes, CoreSet from "
        f"{N_CENTRES} labeled points; {threads} thread{'' if threads == 1 else 's'} ({machine})",
        fontsize=8.5,
        color="#444444",
    )
    return figure


def _panel(axes: Axes, criterion: str, rows: Sequence[Row], limit: float) -> None:
    """Log-log; a call that was stopped is an arrow that starts at the limit."""
    ends = []
    for name in IMPLEMENTATIONS:
        line = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["points"])
        places = [(row["points"], limit if row["status"] in _STOPPED else row.get("seconds")) for row in line]
        drawn = [(x, y) for x, y in places if y]
        if not drawn:
            continue
        axes.plot(*zip(*drawn, strict=True), markersize=5.5, **LOOKS[name])  # type: ignore[arg-type]
        for row in line:
            if row["status"] in _STOPPED:
                axes.plot(row["points"], limit * 1.35, marker=r"$\uparrow$", markersize=11, color=LOOKS[name]["color"])
        ends.append((name, *drawn[-1], line[-1]["status"] in _STOPPED))
    title, reference = TITLES[criterion]
    axes.set_title(title, fontsize=12, pad=17)
    axes.text(0.5, 1.005, reference, transform=axes.transAxes, ha="center", va="bottom", fontsize=8, color="#5F5F5F")
    _scales(axes, sorted({row["points"] for row in rows}))
    _labels(axes, ends)


def _scales(axes: Axes, points: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    # to the right of the last point there is room for its label
    axes.set_xlim(points[0] * 0.85, points[-1] * (points[-1] / points[0]) ** 0.75 * 1.6)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.set_xticks(points)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:g}k"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _labels(axes: Axes, ends: Sequence[tuple[str, float, float, bool]]) -> None:
    """Each line's name and, where ours is measured at the same N, how many times ours it takes."""
    at, ours = next(((x, y) for name, x, y, stopped in ends if name == "ours" and not stopped), (None, None))
    ends = sorted(ends, key=lambda end: end[2])
    for (name, x, y, stopped), height in zip(ends, _heights(axes, [end[2] for end in ends]), strict=True):
        ratio = (
            f"{'more than ' if stopped else ''}{_times(y / ours)} as long"
            if ours and x == at and name != "ours"
            else ""
        )
        axes.annotate(
            f"{NAMES[name]}\n{ratio}".strip(),
            xy=(x * 1.12, height),
            xycoords=("data", "axes fraction"),
            va="center",
            fontsize=8.5,
            fontweight="bold" if name == "ours" else "normal",
            color=LOOKS[name]["color"],
        )


def _heights(axes: Axes, seconds: Sequence[float]) -> list[float]:
    """Where labels go, in shares of the axis: at their lines' ends, in ascending order, but never on each other."""
    low, high = (log10(y) for y in axes.get_ylim())
    heights = [(log10(y) - low) / (high - low) for y in seconds]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _LABEL_GAP)
    for i in reversed(range(len(heights))):
        ceiling = _HIGHEST_LABEL if i == len(heights) - 1 else heights[i + 1] - _LABEL_GAP
        heights[i] = min(heights[i], ceiling)
    return heights


def _times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 10 else f"{ratio:,.0f}×"  # noqa: RUF001 - the sign, not the letter
