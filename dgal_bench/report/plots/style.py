"""The layout of a figure (a title, axes, a legend and small print below, in inches), and the style of each strategy.

PNG and SVG files have the whole figure, the page the part between title and legend (report/figures.py).
matplotlib's own layouts would take longer than the drawing itself.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log10
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from dgal_bench.report.groups import Group
from dgal_bench.results.rows import RunLog

# The colour is for the restriction (Okabe and Ito's palette, safe for colour-blind eyes), the marker for the criterion:
# a strategy has one style in all figures and in the page's legend.
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
# Criteria on the whole pool have shades of its blue, and grey for the one that does not use the task network.
WHOLE_POOL_COLOURS = {
    "least_confidence": "#56B4E9",
    "entropy": "#8CC4EE",
    "badge": "#00436B",
    "k_center": "#5B6BD6",
    "adversary": "#7A7A7A",
}
RANDOM_COLOUR = "#010101"  # matplotlib leaves pure black out of an SVG, and a page could not change it
OTHER_COLOURS = ("#8C6D31", "#A0522D", "#6B8E23")
OTHER_MARKERS = ("v", "D", "<", ">")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))

_NAME = 40  # characters of a name in a figure

ON_DARK: Mapping[str, str] = {
    RANDOM_COLOUR: "#FFFFFF", "#00436B": "#2F86C4", "#0072B2": "#4AA8E0", "#5B6BD6": "#929EF2", "#D55E00": "#F0803C",
    "#009E73": "#2FC79A", "#7A7A7A": "#A8A8A8", "#8C6D31": "#C7A45A", "#A0522D": "#CF8158", "#6B8E23": "#9CC24E",
}  # fmt: skip
"""Colours too dark for a dark page, and their lighter tones."""


@dataclass(frozen=True)
class Style:
    """Of a strategy: ``name`` in legends, ``linestyle`` a dash pattern of matplotlib's, ``zorder`` its layer."""

    name: str
    color: str
    marker: str
    linestyle: Any
    linewidth: float
    zorder: int

    @property
    def line(self) -> dict[str, Any]:
        """Keywords for matplotlib."""
        return {key: value for key, value in vars(self).items() if key != "name"}


def style_of(log: RunLog) -> Style:
    strategy = log.header["config"]["strategy"]
    restrict, acquire = strategy["restrict"]["kind"], strategy["acquire"]["kind"]
    if (restrict, acquire) == ("everything", "random"):
        return Style(strategy["name"], RANDOM_COLOUR, "", "--", 1.6, 3)
    diffusion = restrict == "diffusion"
    colour = RESTRICTION_COLOURS.get(restrict) or _pick(OTHER_COLOURS, restrict)
    return Style(
        strategy["name"],
        WHOLE_POOL_COLOURS.get(acquire, colour) if restrict == "everything" else colour,
        CRITERION_MARKERS.get(acquire) or _pick(OTHER_MARKERS, acquire),
        "-",
        2.0 if diffusion else 1.3,
        4 if diffusion else 2,
    )


def styles(group: Group) -> dict[str, Style]:
    """Of every strategy with a finished run, in the order of legends.

    Strategies that differ only in a varied setting have different dashes, and beyond five different markers, too.
    """
    by_name: dict[str, Style] = {}
    n_alike: Counter[tuple[str, str]] = Counter()
    shown = Counter(short_name(strategy) for strategy in group.strategies)
    for strategy in legend_order(group):
        style = style_of(group.runs[strategy][0])
        turn, n_alike[style.color, style.marker] = (
            n_alike[style.color, style.marker],
            n_alike[style.color, style.marker] + 1,
        )
        dashes = [style.linestyle, *(dash for dash in DASHES if dash != style.linestyle)]
        short = short_name(strategy)
        by_name[strategy] = replace(
            style,
            name=textwrap.shorten(strategy if shown[short] > 1 else short, _NAME, placeholder="…"),
            linestyle=dashes[turn % len(dashes)],
            marker=style.marker if turn < len(dashes) else OTHER_MARKERS[turn // len(dashes) % len(OTHER_MARKERS)],
        )
    return by_name


def legend_order(group: Group) -> list[str]:
    """Random first, then by restriction, then by name."""
    kinds = ["everything", *[kind for kind in RESTRICTION_COLOURS if kind != "everything"]]

    def key(strategy: str) -> tuple[bool, int, str]:
        parts = group.runs[strategy][0].header["config"]["strategy"]
        restrict = parts["restrict"]["kind"]
        place = kinds.index(restrict) if restrict in kinds else len(kinds)
        return (parts["acquire"]["kind"] != "random", place, strategy)

    return sorted(group.strategies, key=key)


def short_name(strategy: str) -> str:
    """``dgmg+strategy.restrict.score=margin`` short enough for a legend: ``dgmg score=margin``."""
    return re.sub(r"\+(?:\w+\.)*(\w+=)", r" \1", strategy)


def _pick(choices: Sequence[str], name: str) -> str:
    return choices[sum(name.encode()) % len(choices)]


INK, FAINT, GRID, PAPER = "#1B1F24", "#5B6571", "#D9DEE4", "#FFFFFF"
"""Text, small print, rules and ground: the page replaces them by its scheme's."""

WIDTH = 6.0  # inches
TITLE, LEGEND, NOTE = "title", "legend", "note"
"""Ids of the parts that the page has itself."""

KEY = "line:key"

_LEGEND_ROW, _NOTE_ROW, _TITLE_ROW = 0.2, 0.16, 0.36  # inches
_LEGEND_CHARACTERS = 86  # in a row, without handles and gaps
_NOTE_WIDTH = 98  # characters

RC: Any = {
    "svg.hashsalt": "dgal_bench", "svg.fonttype": "none", "text.parse_math": False,
    "font.size": 11, "axes.titlesize": 11,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "grid.color": GRID, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "image.composite_image": False,
    "figure.facecolor": PAPER, "axes.facecolor": "none", "axes.grid": True,
}  # fmt: skip
"""matplotlib's settings for drawing and saving."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """A figure with its axes, left to right; ``top`` and ``bottom``: inches that the page cuts off there.

    ``note`` is the small print.
    """

    figure: Figure
    axes: list[Axes]
    top: float
    bottom: float
    note: str


def canvas(
    title: str,
    legend: Mapping[str, Mapping[str, Any]],
    note: str = "",
    height: float = 3.6,
    panels: Sequence[float] = (1.0,),
    left: float = 0.82,
    gap: float = 0.75,
    below: float = 0.58,
    headings: Sequence[str] = (),
    own_key: bool = False,
) -> Canvas:
    """Axes of ``panels``' relative widths, ``height`` inches high with their labels, each under its heading if any.

    Args:
        legend: by name the handle, as keywords of a line. It has strategies, which the page shows once for all figures,
            unless it is the figure's ``own_key``.
        left: inches to the left of the first axes; ``gap``: between two; ``below``: under them, for tick labels.
    """
    columns = _columns(list(legend))
    notes = textwrap.wrap(note, _NOTE_WIDTH)
    foot = _NOTE_ROW * len(notes)
    bottom = _LEGEND_ROW * ceil(len(legend) / columns) + foot + 0.22
    total = _TITLE_ROW + height + bottom
    figure = Figure(figsize=(WIDTH, total))
    FigureCanvasAgg(figure)
    figure.text(0.12 / WIDTH, 1 - 0.25 / total, title, fontsize=11.5, weight="bold", gid=TITLE)
    room_above = 0.3 if headings else 0.08
    axes = _side_by_side(figure, panels, left, gap, bottom + below, height - below - room_above)
    for one, heading in zip(axes, headings, strict=False):
        one.set_title(heading, loc="left", fontsize=10)
    if legend:
        _legend_below(figure, legend, columns, (foot + 0.12) / total).set_gid(KEY if own_key else LEGEND)
    if notes:
        figure.text(0.12 / WIDTH, 0.06 / total, "\n".join(notes), fontsize=8, color=FAINT, gid=NOTE, va="bottom")
    return Canvas(figure, axes, _TITLE_ROW, foot + 0.05 if own_key else bottom, note)


def _side_by_side(
    figure: Figure, panels: Sequence[float], left: float, gap: float, bottom: float, height: float
) -> list[Axes]:
    """Axes of these relative widths; other lengths are in inches."""
    total = figure.get_size_inches()[1]
    room, x, axes = WIDTH - left - gap * (len(panels) - 1) - 0.26, left, []
    for share in panels:
        width = room * share / sum(panels)
        axes.append(figure.add_axes((x / WIDTH, bottom / total, width / WIDTH, height / total)))
        x += width + gap
    return axes


def _legend_below(figure: Figure, legend: Mapping[str, Mapping[str, Any]], columns: int, y: float) -> Legend:
    """A legend whose lower edge is at ``y`` of the figure."""
    handles = [Line2D([], [], label=name, **keywords) for name, keywords in legend.items()]
    return figure.legend(
        handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9, bbox_to_anchor=(0.5, y),
        borderaxespad=0, borderpad=0, handlelength=2.2, columnspacing=1.2,
        labelspacing=(_LEGEND_ROW * 72 - 9 * 1.2) / 9,
    )  # fmt: skip


def _columns(names: Sequence[str]) -> int:
    """As many as fit with the longest name."""
    longest = max(map(len, names), default=1)
    return max(1, min(len(names), 5, _LEGEND_CHARACTERS // (longest + 7)))


def log_axis(axis: Axis, values: Iterable[float], dense: float = 2.2) -> None:
    """A log scale with plain numbers (0.01, 1, 100), more of them where the values span under ``dense`` decades."""
    positive = [value for value in values if value > 0] or [1.0]
    decades = log10(max(positive) / min(positive))
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    box = axis.axes.get_position()
    inches = box.width * WIDTH if axis is axis.axes.xaxis else 8.0  # a label is wide, and not high
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < dense else (1.0,), numticks=int(2 * inches)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: float) -> str:
    """``0.001``, ``20``, ``5,000``, ``2M``."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:g}"


def count_axis(axis: Axis) -> None:
    """Tick labels like ``2,000``."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def percent_axis(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))


def element_id(strategy: str, part: str) -> str:
    """The id of a drawn part of a strategy."""
    return f"strategy:{strategy}:{part}"
