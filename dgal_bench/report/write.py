"""Write a report: summary.csv, summary.md and the figures, from a results folder."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

from dgal_bench.errors import ResultsError
from dgal_bench.record import read_results
from dgal_bench.report.figures import save_figures
from dgal_bench.report.summary import group, summary_csv
from dgal_bench.report.tables import summary_md
from dgal_bench.timings import read_all_timings


@dataclass(frozen=True)
class Written:
    """The Markdown summary as text, and every file written."""

    summary: str
    files: list[Path]


def write_report(results: Path, out: Path) -> Written:
    """Read every cell under ``results`` and write the report to ``out``.

    Raises:
        ResultsError: nothing to report on, a damaged file, or ``out`` cannot be written.
    """
    groups = group(read_results(results), read_all_timings(results))
    summary = summary_md(groups)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.csv").write_text(summary_csv(groups), encoding="utf-8")
        (out / "summary.md").write_text(summary, encoding="utf-8")
        files = [out / "summary.csv", out / "summary.md"]
        with matplotlib.rc_context({"svg.hashsalt": "dgal_bench", "font.size": 10}):
            for one in groups:
                if one.strategies:
                    files += save_figures(one, out)
    except OSError as error:
        raise ResultsError(f"the report cannot be written to {out}: {error.strerror}: set --out DIR") from error
    return Written(summary, files)
