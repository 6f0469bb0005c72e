"""How a strategy looks: the same in every figure, the legend of the page and both of its schemes."""

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgal_bench.record import CellLog
from dgal_bench.report.groups import Group

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
"""What would not stand out on a dark page, and the lighter tone of the same hue that does."""


@dataclass(frozen=True)
class Look:
    """Of a strategy: its name in legends, a dash of matplotlib's, its marker and width, what it is drawn above."""

    name: str
    color: str
    marker: str
    linestyle: Any
    linewidth: float
    zorder: int

    @property
    def line(self) -> dict[str, Any]:
        """As matplotlib takes it."""
        return {key: value for key, value in vars(self).items() if key != "name"}


def look(log: CellLog) -> Look:
    strategy = log.header["config"]["strategy"]
    restrict, acquire = strategy["restrict"]["kind"], strategy["acquire"]["kind"]
    if (restrict, acquire) == ("everything", "random"):
        return Look(strategy["name"], RANDOM_COLOUR, "", "--", 1.6, 3)
    diffusion = restrict == "diffusion"
    colour = RESTRICTION_COLOURS.get(restrict) or _pick(OTHER_COLOURS, restrict)
    return Look(
        strategy["name"],
        WHOLE_POOL_COLOURS.get(acquire, colour) if restrict == "everything" else colour,
        CRITERION_MARKERS.get(acquire) or _pick(OTHER_MARKERS, acquire),
        "-",
        2.0 if diffusion else 1.3,
        4 if diffusion else 2,
    )


def looks(group: Group) -> dict[str, Look]:
    """Of every strategy with a finished cell, in the order of legends.

    Those that differ in a varied setting only are told apart by their dashes, and beyond five by markers, too.
    """
    found: dict[str, Look] = {}
    kin: Counter[tuple[str, str]] = Counter()
    shown = Counter(short_name(strategy) for strategy in group.strategies)
    for strategy in order(group):
        own = look(group.cells[strategy][0])
        turn, kin[own.color, own.marker] = kin[own.color, own.marker], kin[own.color, own.marker] + 1
        dashes = [own.linestyle, *(dash for dash in DASHES if dash != own.linestyle)]
        short = short_name(strategy)
        found[strategy] = replace(
            own,
            name=textwrap.shorten(strategy if shown[short] > 1 else short, _NAME, placeholder="…"),
            linestyle=dashes[turn % len(dashes)],
            marker=own.marker if turn < len(dashes) else OTHER_MARKERS[turn // len(dashes) % len(OTHER_MARKERS)],
        )
    return found


def order(group: Group) -> list[str]:
    """Random first, then by what the network is shown, then by name."""
    kinds = ["everything", *[kind for kind in RESTRICTION_COLOURS if kind != "everything"]]

    def key(strategy: str) -> tuple[bool, int, str]:
        parts = group.cells[strategy][0].header["config"]["strategy"]
        restrict = parts["restrict"]["kind"]
        place = kinds.index(restrict) if restrict in kinds else len(kinds)
        return (parts["acquire"]["kind"] != "random", place, strategy)

    return sorted(group.strategies, key=key)


def short_name(strategy: str) -> str:
    """``dgmg+strategy.restrict.score=margin`` as a legend has room for it: ``dgmg score=margin``."""
    return re.sub(r"\+(?:\w+\.)*(\w+=)", r" \1", strategy)


def _pick(choices: Sequence[str], name: str) -> str:
    return choices[sum(name.encode()) % len(choices)]
