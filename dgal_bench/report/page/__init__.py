"""report.html: one self-contained file, which opens without a network."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from dgal_bench.report.claims.text import ClaimsView
from dgal_bench.report.figures import DrawnFigure, used_colours, variable
from dgal_bench.report.groups import Group
from dgal_bench.report.notes import (
    cautions,
    common_lines,
    ledger_lines,
    protocol,
    rerun_command,
    supervision_lines,
    unfinished_lines,
)
from dgal_bench.report.plots.style import DASHES, FAINT, GRID, INK, PAPER, Style, short_name, styles
from dgal_bench.report.summary import summarise
from dgal_bench.report.tables import (
    ResultTable,
    budget_table,
    comparison_table,
    ledger_table,
    machine_table,
    main_table,
    target_table,
)
from dgal_bench.report.times import hardware
from dgal_bench.results.rows import RunLog


@dataclass(frozen=True)
class Origin:
    """The runs behind a row of the table: their common configuration, and what distinguishes them."""

    strategy: str
    config: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class GroupView:
    """A section of the page, in plain values: another process may have made it."""

    name: str
    dataset: str
    slug: str
    profile: str
    algorithm_version: int
    styles: Mapping[str, Style]
    n_runs: int
    n_finished: int
    protocol: Sequence[str]
    supervision: Sequence[str]
    main: ResultTable | None
    more: Sequence[ResultTable]
    trouble: Sequence[str]
    ledger: Sequence[str]
    common: Sequence[str]
    cautions: Sequence[str]
    origins: Sequence[Origin]


def group_view(group: Group) -> GroupView:
    trouble = unfinished_lines(group)
    rows = summarise(group)
    other_cautions = [line for line in cautions(group) if line and line not in trouble]
    logs = [*group.logs, *group.references, *group.unstarted]
    return GroupView(
        group.name,
        group.dataset,
        group.slug,
        group.profile,
        group.algorithm_version,
        styles(group),
        len(logs),
        sum(log.done for log in logs),
        [line for line in protocol(group) if line],
        [line for line in supervision_lines(group) if line],
        main_table(group, rows) if rows else None,
        [table for make in _MORE if rows and (table := make(group)) is not None],
        trouble,
        ledger_lines(group),
        common_lines(group),
        other_cautions,
        origins(group),
    )


_MORE = (comparison_table, budget_table, target_table, ledger_table, machine_table)


def origins(group: Group) -> list[Origin]:
    """One per strategy with a run, finished or not, and for full supervision."""
    sets = {**group.runs}
    for log in [*group.references, *group.unstarted]:
        sets[log.path.parent.name] = [*sets.get(log.path.parent.name, []), log]
    return [Origin(name, logs[0].header["config"], [_run(log) for log in logs]) for name, logs in sets.items()]


def _run(log: RunLog) -> dict[str, Any]:
    header = log.header
    return {
        "seed": header["config"]["seed"],
        "status": log.status,
        "rows": f"{len(log.records)} of {log.rounds + 1}",
        "path": "/".join(log.path.parts[-4:]),
        "fingerprint": {key: str(value)[:12] for key, value in header["fingerprint"].items() if value is not None},
        "machine": hardware(header) if log.begun else "",
        "command": rerun_command(log),
    }


_HERE = Path(__file__).parent

LIGHT = {
    "ink": INK, "faint": FAINT, "grid": GRID, "paper": PAPER, "confirmed": "#00704F", "refuted": "#A84300",
}  # fmt: skip
DARK = {
    "ink": "#E8ECF0", "faint": "#A2ADB8", "grid": "#39424C", "paper": "#14181D", "confirmed": "#2FC79A",
    "refuted": "#F0803C",
}  # fmt: skip

_SHAPES: Mapping[str, str] = {
    "o": '<circle cx="16" cy="7" r="4"/>',
    "s": '<rect x="12.3" y="3.3" width="7.4" height="7.4"/>',
    "^": '<path d="M16 2.5 20.5 11h-9z"/>',
    "v": '<path d="M16 11.5 20.5 3h-9z"/>',
    "<": '<path d="M11.5 7 20 2.5v9z"/>',
    ">": '<path d="M20.5 7 12 2.5v9z"/>',
    "D": '<path d="M16 2.5 20.5 7 16 11.5 11.5 7z"/>',
    "P": '<path d="M14.3 2.5h3.4v2.8h2.8v3.4h-2.8v2.8h-3.4V8.7h-2.8V5.3h2.8z"/>',
    "X": '<path transform="rotate(45 16 7)" d="M14.3 2.5h3.4v2.8h2.8v3.4h-2.8v2.8h-3.4V8.7h-2.8V5.3h2.8z"/>',
    "*": '<path d="M16 1.8 17.3 5.3 21 5.4 18.1 7.7 19.1 11.3 16 9.2 12.9 11.3 13.9 7.7 11 5.4 14.7 5.3z"/>',
    "": "",
}
"""matplotlib's markers, in a box of 32 by 14."""
_STROKES: Sequence[str] = ("", "6 3", "2 2", "6 2 2 2", "5 1 1 1")


@dataclass(frozen=True)
class Section:
    """A group's text and figures."""

    view: GroupView
    figures: Sequence[DrawnFigure]

    @property
    def chips(self) -> list[tuple[str, str, Markup]]:
        """Name, short name and legend handle of every strategy."""
        return [(name, short_name(name), swatch(one)) for name, one in self.view.styles.items()]


def swatch(style: Style) -> Markup:
    """A legend's handle."""
    dash = _STROKES[DASHES.index(style.linestyle)] if style.linestyle in DASHES else ""
    colour = f"var(--{variable(style.color)})"
    line = (
        f'<path d="M1 7h30" stroke="{colour}" stroke-width="{style.linewidth}" stroke-dasharray="{dash}" fill="none"/>'
    )
    shape = f'<g fill="{colour}">{_SHAPES.get(style.marker, "")}</g>'
    return Markup(f'<svg class="swatch" viewBox="0 0 32 14" aria-hidden="true">{line}{shape}</svg>')  # noqa: S704


def render(
    title: str, claims: ClaimsView | None, sections: Sequence[Section], across: Sequence[DrawnFigure],
    facts: Mapping[str, Any],
) -> str:  # fmt: skip
    """The page; text from files is escaped, figures are not, because they were drawn here."""
    drawn = [one.svg for section in sections for one in section.figures] + [one.svg for one in across]
    swatches = [str(picture) for section in sections for *_, picture in section.chips]
    colours = used_colours([*drawn, *swatches])
    return _template().render(
        title=title, claims=claims, sections=sections, across=across, facts=facts, markup=Markup,
        light={**LIGHT, **{name: tones[0] for name, tones in colours.items()}},
        dark={**DARK, **{name: tones[1] for name, tones in colours.items()}},
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own files
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),  # noqa: S704
    )  # fmt: skip


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["pretty"] = lambda config: json.dumps(config, indent=1)
    environment.filters["code"] = _code
    return environment.get_template("page.html")


def _code(text: str) -> Markup:
    """Escaped text, with code where it has backticks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704
