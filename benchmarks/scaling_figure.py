"""Query seconds against the number of points: a panel per kind of features, a line per strategy, named at its end."""

from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.optimize import isotonic_regression

# Okabe and Ito's palette, safe for colour-blind eyes; lines of one colour differ in their markers and are named.
_GRAPH, _POOL, _EMBED, _UNIFORM = "#D55E00", "#5F5F5F", "#0072B2", "#009E73"
LOOKS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("dgmg", "full"): {"color": _GRAPH, "marker": "s", "linestyle": "--"},
    ("dgmg", "incremental"): {"color": _GRAPH, "marker": "o", "linewidth": 2.6},
    ("dgmg", "first round"): {"color": _GRAPH, "marker": "D", "linestyle": ":"},
    ("dgbadge", "incremental"): {"color": "#E69F00", "marker": "v"},
    ("dgcoreset", "incremental"): {"color": "#E69F00", "marker": "^"},
    ("dglc", "incremental"): {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    ("dgent", "incremental"): {"color": "#E69F00", "marker": "P", "linestyle": ":"},
    ("rsmg", ""): {"color": _UNIFORM, "marker": "D"},
    ("rslc", ""): {"color": _UNIFORM, "marker": "s", "linestyle": "--"},
    ("rsbadge", ""): {"color": _UNIFORM, "marker": "v"},
    ("rscoreset", ""): {"color": _UNIFORM, "marker": "^", "linestyle": "-."},
    ("random", ""): {"color": _UNIFORM, "marker": "x", "linestyle": ":"},
    ("vae_seals", ""): {"color": _EMBED, "marker": "^"},
    ("vae_seals_matched", ""): {"color": _EMBED, "marker": "v", "linestyle": ":"},
    ("seals", ""): {"color": _EMBED, "marker": "P", "linestyle": "--"},
    ("margin", ""): {"color": _POOL, "marker": "o"},
    ("lc", ""): {"color": _POOL, "marker": "s"},
    ("entropy", ""): {"color": _POOL, "marker": "v"},
    ("badge", ""): {"color": "#000000", "marker": "D"},
    ("coreset", ""): {"color": "#CC79A7", "marker": "^"},
}
NAMES = {("dgmg", "full"): "dgmg, full", ("dgmg", "first round"): "dgmg, first round"}
_ROOM = 0.42  # beyond the last point, of the way from the first to it, for the lines' names
_GAP = 0.042  # of an axis' height: a line of text


def save_scaling(results: Mapping[str, Any], base: Path) -> list[Path]:
    """``base``.png and .svg."""
    figure = drawn(results)
    paths = [base.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        # no date in the SVG: the same measurements give the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def drawn(results: Mapping[str, Any]) -> Figure:
    known = [one for one in results["sizes"] if one["status"] == "measured"]
    kinds = list(dict.fromkeys(one["kind"] for one in known))
    figure = Figure(figsize=(5.8 * len(kinds) + 0.4, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    lines = [_lines([one for one in known if one["kind"] == kind]) for kind in kinds]
    for axes, kind, here in zip(panels, kinds, lines, strict=True):
        axes.set_title(kind, fontsize=12)
        _draw(axes, here)
    _scales(panels, lines)
    for axes, here in zip(panels, lines, strict=True):
        _names(axes, here)
    panels[0].set_ylabel("seconds of a query (log)")
    figure.suptitle("Seconds of one query against the number of points", fontsize=13)
    threads, machine = results["threads"], results["provenance"]["machine"]["cpu"]
    figure.supxlabel(
        "N, points in the pool (log).  Hollow: extrapolated from a pass over fewer images or a query of fewer points.\n"
        f"{results['features']} features, 110 labels, 10 picks, 100 candidates; CNN on 28x28 images; "
        f"{threads} thread{'' if threads == 1 else 's'} ({machine})",
        fontsize=8.5,
        color="#444444",
    )
    return figure


Line = list[tuple[int, float, bool]]
"""Points, seconds, and whether these are extrapolated."""


def _lines(sizes: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Line]:
    """By strategy and how it was asked, in the order of LOOKS."""
    found: dict[tuple[str, str], Line] = {}
    for key in LOOKS:
        line = [
            (one["points"], row["seconds"], row["extrapolated"])
            for one in sizes
            for row in one["queries"]
            if (row["name"], row["how"]) == key
        ]
        if line:
            found[key] = sorted(line)
    return found


def _draw(axes: Axes, lines: Mapping[tuple[str, str], Line]) -> None:
    for key, line in lines.items():
        look = {"linewidth": 1.5} | dict(LOOKS[key])
        color, marker = look["color"], look.pop("marker")
        axes.plot([n for n, _, _ in line], [y for _, y, _ in line], **look)
        for n, y, hollow in line:
            axes.plot(n, y, marker=marker, color=color, markersize=6, markerfacecolor="white" if hollow else color)


def _scales(panels: Sequence[Axes], lines: Sequence[Mapping[tuple[str, str], Line]]) -> None:
    """One for both panels; to the right of the last point there is room for the names."""
    points = sorted({n for here in lines for line in here.values() for n, _, _ in line})
    seconds = [y for here in lines for line in here.values() for _, y, _ in line]
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(points[0] * 0.8, points[-1] * max(2.0, points[-1] / points[0]) ** _ROOM)
        axes.set_ylim(min(seconds) / 2, max(seconds) * 8)  # names of lines that end together go above them
        axes.set_xticks(points)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(_unit))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=True)


def _unit(seconds: float, _: int) -> str:
    for one, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= one * 0.999:
            return f"{seconds / one:,.0f} {unit}"
    return ""


def _names(axes: Axes, lines: Mapping[tuple[str, str], Line]) -> None:
    """At the lines' ends, moved apart where those are close; a thin line then leads to its end."""
    ends = sorted(((line[-1][1], line[-1][0], key) for key, line in lines.items()), key=lambda end: end[0])
    low, high = (log10(y) for y in axes.get_ylim())
    wanted = [(log10(y) - low) / (high - low) for y, _, _ in ends]
    left, right = axes.get_xlim()
    for (y, x, key), height in zip(ends, apart(wanted, _GAP), strict=True):
        color = LOOKS[key]["color"]
        axes.annotate(
            NAMES.get(key, key[0]),
            xy=(x * (right / left) ** 0.012, y),
            xytext=(x * (right / left) ** 0.07, height),
            textcoords=axes.get_xaxis_transform(),
            va="center",
            fontsize=9,
            fontweight="bold" if key == ("dgmg", "incremental") else "normal",
            color=color,
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least ``gap`` from each other, with the least sum of squared distances to ``heights``."""
    steps = gap * np.arange(len(heights))
    found: list[float] = (isotonic_regression(np.asarray(heights) - steps).x + steps).tolist()
    return found
