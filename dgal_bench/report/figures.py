"""Every figure of a report: its heading, its files, and its SVG as a part of the page.

On the page it has no title and legend of its own, the page's colours, and marked strategies.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from dgal_bench.report.groups import Group
from dgal_bench.report.plots.bars import areas_and_accuracies, labels_to_target, pareto_front, query_time
from dgal_bench.report.plots.curves import accuracy_labels, accuracy_query_time, accuracy_total_time, seconds_spent
from dgal_bench.report.plots.maps import picks_on_map
from dgal_bench.report.plots.rounds import classes, exploration, points_per_round, propagation
from dgal_bench.report.plots.style import FAINT, GRID, INK, LEGEND, NOTE, ON_DARK, PAPER, RC, TITLE, Canvas

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

ROLES: Mapping[str, str] = {INK: "ink", FAINT: "faint", GRID: "grid", PAPER: "paper"}
"""Colours that the page's scheme replaces."""

_HREF = f"{{{XLINK}}}href"
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_GEOMETRY = ("d", "transform", "points", "x", "y", "width", "height")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def inline_svg(svg: str, top: float, bottom: float, name: str) -> str:
    """The part of a figure between ``top`` and ``bottom`` inches; ``name`` makes its ids unique on the page."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib wrote it, here
    _remove(root)
    width, height = (float(root.attrib.pop(side).removesuffix("pt")) for side in ("width", "height"))
    root.set("viewBox", f"0 {72 * top:.1f} {width:g} {height - 72 * (top + bottom):.1f}")
    root.set("aria-hidden", "true")  # its caption and the tables have the content as text
    for element in root.iter():
        _rewrite(element, name)
    _share_pictures(root, name)
    return ET.tostring(root, encoding="unicode")


def _shorten(found: re.Match[str]) -> str:
    """A tenth of a point is finer than any screen; small numbers keep their digits: they may be factors."""
    number = float(found[0])
    return f"{number:.4g}" if abs(number) < 10 else f"{number:.1f}"


def _remove(root: ET.Element) -> None:
    """Title, legend and note, which the page has itself, the background, and matplotlib's metadata."""
    for parent in list(root.iter()):
        for child in list(parent):
            unwanted = child.get("id") in (TITLE, LEGEND, NOTE) or child.tag == f"{{{SVG}}}metadata"
            if unwanted or (parent is not root and child.get("id") == "patch_1" and parent.get("id") == "figure_1"):
                parent.remove(child)


def _rewrite(element: ET.Element, name: str) -> None:
    """Ids become unique on the page, colours follow its scheme, and elements of a strategy name it."""
    id_ = element.attrib.pop("id", None)
    if id_ is not None and id_.startswith("strategy:"):
        strategy = id_.removeprefix("strategy:").rpartition(":")[0]
        element.set("data-strategy", strategy)
    elif id_ is not None and id_.startswith("line:"):
        element.set("data-line", id_.removeprefix("line:"))
    elif id_ is not None and not re.fullmatch(r"[a-z0-9]+_\d+", id_):
        element.set("id", f"{name}-{id_}")
    for key in ("clip-path", _HREF):
        if (value := element.get(key)) and not value.startswith("data:"):
            element.set(key, value.replace("#", f"#{name}-"))
    for key in _GEOMETRY:
        if value := element.get(key):
            element.set(key, _NUMBER.sub(_shorten, value))
    for key in ("style", "fill", "stroke"):
        if value := element.get(key):
            element.set(key, _theme(value))


def _share_pictures(root: ET.Element, name: str) -> None:
    """Stores each picture once, however often the figure uses it; the browser smooths it."""
    ids: dict[str, str] = {}
    store = ET.Element(f"{{{SVG}}}defs")
    for element in list(root.iter(f"{{{SVG}}}image")):
        content = element.get(_HREF, "")
        if content not in ids:
            ids[content] = f"{name}-picture-{len(ids)}"
            sizes = {side: element.get(side, "") for side in ("width", "height")}
            ET.SubElement(store, f"{{{SVG}}}image", {_HREF: content, "id": ids[content], **sizes})
        element.tag = f"{{{SVG}}}use"
        element.set(_HREF, f"#{ids[content]}")
        element.attrib.pop("style", None)
        element.attrib.pop("id", None)
    if ids:
        root.insert(0, store)


def _theme(style: str) -> str:
    """``stroke: #0072b2`` as ``stroke: var(--c0072b2)``, which the page defines for its light and dark schemes."""
    return _COLOUR.sub(lambda found: f"var(--{variable(found[0])})", style)


def variable(colour: str) -> str:
    """The name of a colour in the page's style sheet."""
    return ROLES.get(colour.upper(), f"c{colour[1:].lower()}")


def used_colours(svgs: list[str]) -> dict[str, tuple[str, str]]:
    """Every colour in the figures, by its variable: on a light and on a dark page."""
    dark = {light.lower(): tone for light, tone in ON_DARK.items()}
    found = sorted({one for svg in svgs for one in re.findall(r"var\(--c([0-9a-f]{6})\)", svg)})
    return {f"c{one}": (f"#{one}", dark.get(f"#{one}", f"#{one}")) for one in found}


DPI = 130


@dataclass(frozen=True)
class FigureSpec:
    """A figure of a group: its heading on the page, how to read it, and its function (None: nothing to draw)."""

    heading: str
    reading: str
    draw: Callable[[Group], Canvas | None]


FIGURES: Mapping[str, FigureSpec] = {
    "accuracy-query-time": FigureSpec(
        "Accuracy against query time",
        "Up and to the left is better. Each point has cost the queries before it, and nothing else. "
        "Grey lines: the best and the worst final accuracy; dotted: every label of the pool.",
        accuracy_query_time,
    ),
    "accuracy-labels": FigureSpec(
        "Accuracy against labels", "What a label buys, whatever it costs to choose it.", accuracy_labels
    ),
    "query-time": FigureSpec(
        "Mean query time",
        "On a log scale the length of a bar cannot be split: the panel beside it says which phases the seconds are.",
        query_time,
    ),
    "pareto": FigureSpec(
        "Pareto front", "No strategy is both cheaper and better than one on the line.", pareto_front
    ),
    "total-time": FigureSpec(
        "Accuracy against total time",
        "As above, but with the representation and the graph paid for by those whose queries rest on them. "
        "Training is left out: it is the same for all.",
        accuracy_total_time,
    ),
    "seconds-spent": FigureSpec(
        "When the set-up has paid", "Where a rising line crosses a flat one, the set-up has paid for itself.",
        seconds_spent,
    ),
    "area": FigureSpec(
        "Area and final accuracy", "Area under the curve: mean accuracy over the range of labels.", areas_and_accuracies
    ),
    "labels-to-target": FigureSpec(
        "Labels needed", "Targets are shares of the best final accuracy here: 60, 80 and 95 %.", labels_to_target
    ),
    "points": FigureSpec(
        "Candidates and points scored", "What a query costs on any machine: the images the network had to look at.",
        points_per_round,
    ),
    "exploration": FigureSpec(
        "Exploration to refinement",
        "Exploring picks lie inside clusters and raise the reach; refining ones have neighbours of other classes.",
        exploration,
    ),
    "classes": FigureSpec(
        "Classes seen", "How soon every class has a label, and how evenly a batch is spread over them.", classes
    ),
    "propagated": FigureSpec(
        "What the graph knows", "The test images classified by labels propagated over the graph, without any network.",
        propagation,
    ),
    "picks": FigureSpec(
        "Batches among the latents", "White: picks of the first third of the queries; dark: of the last third.",
        picks_on_map,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DrawnFigure:
    """A figure for the page."""

    name: str
    spec: FigureSpec
    svg: str
    note: str


def draw_all(group: Group, folder: Path) -> Iterator[tuple[DrawnFigure, list[Path]]]:
    """Draws every figure of a group once: as PNG and SVG files, and for the page."""
    for name, spec in FIGURES.items():
        with mpl.rc_context(rc=RC):
            canvas = spec.draw(group)
            if canvas is not None:
                paths, svg = save(canvas, folder / f"{group.slug}-{name}")
                yield (
                    DrawnFigure(
                        name, spec, inline_svg(svg, canvas.top, canvas.bottom, f"{group.slug}-{name}"), canvas.note
                    ),
                    paths,
                )


def save(canvas: Canvas, stem: Path) -> tuple[list[Path], str]:
    """Writes PNG and SVG, and returns the SVG's text too; the same rows give the same bytes."""
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    canvas.figure.savefig(png, dpi=DPI)
    text = io.StringIO()
    canvas.figure.savefig(text, format="svg", metadata={"Date": None})
    svg.write_text(text.getvalue(), encoding="utf-8")
    return [png, svg], text.getvalue()
