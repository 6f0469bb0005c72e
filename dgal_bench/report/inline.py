"""A figure's SVG as a part of the page: without its title and legend, in the page's colours, its strategies marked."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from dgal_bench.report.canvas import FAINT, GRID, INK, LEGEND, NOTE, PAPER, TITLE
from dgal_bench.report.looks import ON_DARK

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

ROLES: Mapping[str, str] = {INK: "ink", FAINT: "faint", GRID: "grid", PAPER: "paper"}
"""Colours that are the page's own."""

_HREF = f"{{{XLINK}}}href"
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_GEOMETRY = ("d", "transform", "points", "x", "y", "width", "height")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def inlined(svg: str, top: float, bottom: float, name: str) -> str:
    """The part of a figure between ``top`` and ``bottom`` inches; ``name`` makes its ids its own."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)  # noqa: S314 - as above
    _remove(root)
    width, height = (float(root.attrib.pop(side).removesuffix("pt")) for side in ("width", "height"))
    root.set("viewBox", f"0 {72 * top:.1f} {width:g} {height - 72 * (top + bottom):.1f}")
    root.set("aria-hidden", "true")  # its caption and the tables say it in words
    for element in root.iter():
        _rewrite(element, name)
    _share_pictures(root, name)
    return ET.tostring(root, encoding="unicode")


def _shorter(found: re.Match[str]) -> str:
    """A tenth of a point is finer than any screen; small numbers keep their digits, they may be factors."""
    number = float(found[0])
    return f"{number:.4g}" if abs(number) < 10 else f"{number:.1f}"


def _remove(root: ET.Element) -> None:
    """What the page has of its own, and what matplotlib says of itself."""
    for parent in list(root.iter()):
        for child in list(parent):
            unwanted = child.get("id") in (TITLE, LEGEND, NOTE) or child.tag == f"{{{SVG}}}metadata"
            if unwanted or (parent is not root and child.get("id") == "patch_1" and parent.get("id") == "figure_1"):
                parent.remove(child)


def _rewrite(element: ET.Element, name: str) -> None:
    """Ids become unique on the page, colours follow its scheme, and what is drawn of a strategy says of which."""
    own = element.attrib.pop("id", None)
    if own is not None and own.startswith("strategy:"):
        strategy = own.removeprefix("strategy:").rpartition(":")[0]
        element.set("data-strategy", strategy)
    elif own is not None and own.startswith("line:"):
        element.set("data-line", own.removeprefix("line:"))
    elif own is not None and not re.fullmatch(r"[a-z0-9]+_\d+", own):
        element.set("id", f"{name}-{own}")
    for key in ("clip-path", _HREF):
        if (value := element.get(key)) and not value.startswith("data:"):
            element.set(key, value.replace("#", f"#{name}-"))
    for key in _GEOMETRY:
        if value := element.get(key):
            element.set(key, _NUMBER.sub(_shorter, value))
    for key in ("style", "fill", "stroke"):
        if value := element.get(key):
            element.set(key, _themed(value))


def _share_pictures(root: ET.Element, name: str) -> None:
    """A picture is kept once, however often it is in the figure, and smoothed by whoever shows it."""
    kept: dict[str, str] = {}
    store = ET.Element(f"{{{SVG}}}defs")
    for element in list(root.iter(f"{{{SVG}}}image")):
        content = element.get(_HREF, "")
        if content not in kept:
            kept[content] = f"{name}-picture-{len(kept)}"
            sizes = {side: element.get(side, "") for side in ("width", "height")}
            ET.SubElement(store, f"{{{SVG}}}image", {_HREF: content, "id": kept[content], **sizes})
        element.tag = f"{{{SVG}}}use"
        element.set(_HREF, f"#{kept[content]}")
        element.attrib.pop("style", None)
        element.attrib.pop("id", None)
    if kept:
        root.insert(0, store)


def _themed(style: str) -> str:
    """``stroke: #0072b2`` as ``stroke: var(--c0072b2)``, which the page defines for both of its schemes."""
    return _COLOUR.sub(lambda found: f"var(--{variable(found[0])})", style)


def variable(colour: str) -> str:
    """The name of a colour in the page's style sheet."""
    return ROLES.get(colour.upper(), f"c{colour[1:].lower()}")


def used_colours(svgs: list[str]) -> dict[str, tuple[str, str]]:
    """Every colour that figures name, by its variable: on a light and on a dark page."""
    dark = {light.lower(): tone for light, tone in ON_DARK.items()}
    found = sorted({one for svg in svgs for one in re.findall(r"var\(--c([0-9a-f]{6})\)", svg)})
    return {f"c{one}": (f"#{one}", dark.get(f"#{one}", f"#{one}")) for one in found}
