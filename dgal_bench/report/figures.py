"""Every figure of a report: what it is called, how it is read, who draws it; and the files made of it."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from dgal_bench.report.bars import areas, labels_to_target, pareto_front, query_time
from dgal_bench.report.canvas import RC, Canvas
from dgal_bench.report.curves import accuracy_labels, accuracy_query_time, accuracy_total_time, seconds_spent
from dgal_bench.report.groups import Group
from dgal_bench.report.inline import inlined
from dgal_bench.report.maps import picks_on_latents
from dgal_bench.report.rounds import classes, exploration, points_per_round, propagated

DPI = 130


@dataclass(frozen=True)
class Plate:
    """A figure of a group: its heading on the page, how it is read, and what draws it (None: nothing to draw)."""

    heading: str
    reading: str
    draw: Callable[[Group], Canvas | None]


FIGURES: Mapping[str, Plate] = {
    "accuracy-query-time": Plate(
        "Accuracy against query time",
        "Up and to the left is better. Each point has cost the queries before it, and nothing else. "
        "Grey lines: the best and the worst final accuracy; dotted: every label of the pool.",
        accuracy_query_time,
    ),
    "accuracy-labels": Plate(
        "Accuracy against labels", "What a label buys, whatever it costs to choose it.", accuracy_labels
    ),
    "query-time": Plate(
        "Mean query time",
        "On a log scale the length of a bar cannot be split: the panel beside it says which phases the seconds are.",
        query_time,
    ),
    "pareto": Plate(
        "Pareto front", "No strategy is both cheaper and better than one on the line.", pareto_front
    ),
    "total-time": Plate(
        "Accuracy against total time",
        "As above, but with the representation and the graph paid for by those whose queries rest on them. "
        "Training is left out: it is the same for all.",
        accuracy_total_time,
    ),
    "seconds-spent": Plate(
        "When the set-up has paid", "Where a rising line crosses a flat one, the set-up has paid for itself.",
        seconds_spent,
    ),
    "area": Plate(
        "Area and final accuracy", "Area under the curve: mean accuracy over the range of labels.", areas
    ),
    "labels-to-target": Plate(
        "Labels needed", "Targets are shares of the best final accuracy here: 60, 80 and 95 %.", labels_to_target
    ),
    "points": Plate(
        "Candidates and points scored", "What a query costs on any machine: the images the network had to look at.",
        points_per_round,
    ),
    "exploration": Plate(
        "Exploration to refinement",
        "Exploring picks lie inside clusters and raise the reach; refining ones have neighbours of other classes.",
        exploration,
    ),
    "classes": Plate(
        "Classes seen", "How soon every class has a label, and how evenly a batch is spread over them.", classes
    ),
    "propagated": Plate(
        "What the graph knows", "The test images classified by labels propagated over the graph, without any network.",
        propagated,
    ),
    "picks": Plate(
        "Batches among the latents", "White: picks of the first third of the queries; dark: of the last third.",
        picks_on_latents,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A figure as the page takes it."""

    name: str
    plate: Plate
    svg: str
    note: str


def draw_all(group: Group, folder: Path) -> Iterator[tuple[Drawn, list[Path]]]:
    """Every figure there is of a group, each once: as PNG and SVG files, and for the page."""
    for name, plate in FIGURES.items():
        with mpl.rc_context(rc=RC):
            made = plate.draw(group)
            if made is not None:
                paths, svg = save(made, folder / f"{group.slug}-{name}")
                yield Drawn(name, plate, inlined(svg, made.top, made.bottom, f"{group.slug}-{name}"), made.note), paths


def save(made: Canvas, stem: Path) -> tuple[list[Path], str]:
    """Files of both kinds, and the text of the SVG; the same rows give the same bytes."""
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    made.figure.savefig(png, dpi=DPI)
    text = io.StringIO()
    made.figure.savefig(text, format="svg", metadata={"Date": None})
    svg.write_text(text.getvalue(), encoding="utf-8")
    return [png, svg], text.getvalue()
