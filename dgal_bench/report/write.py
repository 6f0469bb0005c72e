"""Writes a report from a results folder: the page, its figures, summary.csv and summary.md."""

import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from dgal_bench import __version__
from dgal_bench.config.schema import available_cores
from dgal_bench.core.errors import ResultsError
from dgal_bench.report.claims import survey_claims
from dgal_bench.report.claims.text import claims_view
from dgal_bench.report.costs import penalties
from dgal_bench.report.figures import DrawnFigure, FigureSpec, draw_all, inline_svg, save
from dgal_bench.report.formatting import align_table, escape_html, mark_values, speedup, spread
from dgal_bench.report.groups import BASELINE, Group, group, in_addresses
from dgal_bench.report.notes import cautions, common_lines, ledger_lines, protocol, sources, supervision_lines
from dgal_bench.report.page import Section, group_view, render
from dgal_bench.report.plots.maps import penalty_matrix
from dgal_bench.report.plots.style import RC
from dgal_bench.report.summary import SummaryRow, summarise, summary_csv
from dgal_bench.report.tables import comparison_table, interval_note, propagation_lines
from dgal_bench.results.reader import read_all_timings, read_results


def summary_md(groups: Sequence[Group]) -> str:
    """A section per group: what was run, the table, differences, the one-off ledger, and cautions."""
    return escape_html("\n".join(_markdown_section(one) for one in groups))


def _markdown_section(group: Group) -> str:
    lines = [
        f"## {group.name}, profile {group.profile}, algorithm {group.algorithm_version}",
        "",
        *protocol(group),
        "",
    ]
    if group.strategies:
        rows = summarise(group)
        lines += _table(rows)
        lines += [
            "",
            f"Mean and 95 % interval over seeds ({interval_note(group)}). Area: mean accuracy over the range of",
        ]
        lines += [
            "labels. Query: mean seconds of one query, nothing else; speed-up: "
            f"{BASELINE}'s query time over the strategy's, by seed.",
            *sources(group, rows),
            *common_lines(group),
            *propagation_lines(group),
            *_versus(group),
            "",
        ]
    lines += supervision_lines(group)
    return "\n".join([*lines, *ledger_lines(group), *cautions(group)]) + "\n"


def _table(rows: Sequence[SummaryRow]) -> list[str]:
    query = mark_values([spread(row.query_seconds, 1000, 2) for row in rows], [row.query.busy for row in rows])
    faster = mark_values([speedup(row.speedup) for row in rows], [row.speedup_busy for row in rows])
    return align_table(
        ["strategy", "seeds", "final accuracy %", "area under curve %", "query ms", "points scored", "speed-up"],
        [
            [
                row.strategy,
                str(row.final_accuracy.n),
                spread(row.final_accuracy, 100, 1),
                spread(row.area, 100, 1),
                query_ms,
                f"{row.n_scored:,.0f}",
                times_faster,
            ]
            for row, query_ms, times_faster in zip(rows, query, faster, strict=True)
        ],
    )


def _versus(group: Group) -> list[str]:
    """Every strategy against margin and random; empty where none shares a seed with them."""
    found = comparison_table(group)
    if found is None:
        return []
    rows = [[name, *(cell.text for cell in cells)] for name, cells in found.rows]
    return ["", *align_table(list(found.head), rows), "", *found.notes]


FIGURES = "figures"
"""The folder of the figures' files, in the report's."""

PENALTY = FigureSpec(
    "Who beats whom",
    "In a row who beats, in a column who is beaten, by how many data sets' worth of evaluations (BADGE's penalty "
    "matrix); the lowest line is the share of its evaluations that a strategy lost: low is good.",
    lambda group: None,
)


DrawProgress = Callable[[int, int], None]
"""Called with the number of groups drawn, and of all."""


@dataclass(frozen=True)
class WrittenReport:
    """The Markdown summary as text, and every file written, the page first."""

    summary: str
    files: list[Path]


def write_report(
    results: Path, out: Path, progress: DrawProgress = lambda done, of: None, growth: Path | None = None
) -> WrittenReport:
    """Read every run under ``results`` and write the report to ``out``; ``growth``: a file of benchmarks/scaling.py.

    Raises:
        ResultsError: no runs, a damaged file, or an ``out`` that cannot be written.
    """
    groups = group(read_results(results), read_all_timings(results))
    claims = claims_view(survey_claims(groups, growth))
    summary = summary_md(groups)
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        sections, files = [], []
        progress(0, len(groups))
        for n, (section, paths) in enumerate(_sections(groups, out / FIGURES), start=1):
            progress(n, len(groups))
            sections.append(section)
            files += paths
        across, paths = _across(groups, out / FIGURES)
        page = render("Accuracy, and what the query costs", claims, sections, across, _facts(sections))
        (out / "report.html").write_text(page, encoding="utf-8")
        (out / "summary.csv").write_text(summary_csv(groups), encoding="utf-8")
        (out / "summary.md").write_text(summary, encoding="utf-8")
    except BrokenProcessPool as error:
        raise ResultsError("a process that drew figures was killed, for want of memory perhaps: try again") from error
    except OSError as error:
        raise ResultsError(f"the report cannot be written to {out}: {error.strerror}: set --out DIR") from error
    return WrittenReport(summary, [out / "report.html", out / "summary.csv", out / "summary.md", *files, *paths])


def _sections(groups: Sequence[Group], folder: Path) -> Iterator[tuple[Section, list[Path]]]:
    """Each group in turn; several at once where processes can be forked, which repeats no imports."""
    n_workers = min(available_cores(), len(groups))
    if sys.platform != "linux" or n_workers < 2 or threading.active_count() > 1:
        yield from (_section(one, folder) for one in groups)
        return
    _TO_DRAW[:] = [(one, folder) for one in groups]
    pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("fork"), _start_worker)
    try:
        yield from pool.map(_draw, range(len(groups)))
    finally:
        pool.shutdown(cancel_futures=True)
        _TO_DRAW.clear()


def _start_worker() -> None:
    """Leaves signals to the parent process, which then ends the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # otherwise each collection visits all rows again, which doubles the time


_TO_DRAW: list[tuple[Group, Path]] = []
"""A forked process finds its groups here, not in a pipe."""


def _draw(place: int) -> tuple[Section, list[Path]]:
    return _section(*_TO_DRAW[place])


def _section(one: Group, folder: Path) -> tuple[Section, list[Path]]:
    figures = list(draw_all(one, folder)) if one.strategies else []
    return Section(group_view(one), [drawn for drawn, _ in figures]), [path for _, paths in figures for path in paths]


def _across(groups: Sequence[Group], folder: Path) -> tuple[list[DrawnFigure], list[Path]]:
    """The penalty matrix of each suite, profile and version in which two strategies were compared."""
    figures, files = [], []
    for one in penalties(groups):
        if one.n_compared.any():
            with mpl.rc_context(rc=RC):
                canvas = penalty_matrix(one)
                name = in_addresses(f"{one.suite}-{one.profile}-v{one.algorithm_version}-penalties", one.suite)
                paths, svg = save(canvas, folder / name)
            figures.append(DrawnFigure(name, PENALTY, inline_svg(svg, canvas.top, canvas.bottom, name), canvas.note))
            files += paths
    return figures, files


def _facts(sections: Sequence[Section]) -> dict[str, object]:
    """Facts for the head and foot of the page."""
    views = [section.view for section in sections]
    n_sets = len({one.dataset for one in views})
    sets = f"{n_sets} data set{'' if n_sets == 1 else 's'}"
    n_finished, n_runs = sum(one.n_finished for one in views), sum(one.n_runs for one in views)
    return {
        "summary": f"{n_finished:,} finished runs of {n_runs:,}, {sets}. Only the query is timed; every number is "
        "computed from the rows of finished runs, and leads back to them.",
        "n_not_counted": f"{sum(len(one.trouble) for one in views):,}",
        "several": len({(one.profile, one.algorithm_version) for one in views}) > 1,
        "footer": f"Made by dgal-bench {__version__} from the rows alone: the same rows give the same page.",
    }
