"""``dgal-bench validate``: every results file against its schema, its own header, its place and the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgal_bench.disk import below
from dgal_bench.record import cell_files
from dgal_bench.validate.cells import examine
from dgal_bench.validate.folders import check_doubles, check_initial_sets, leftovers
from dgal_bench.validate.projections import examine_projection
from dgal_bench.validate.replays import examine_timings

AT_MOST = 5
"""Problems of one file that are said; of the rest only how many there are."""


@dataclass(frozen=True)
class Verdict:
    """``problems`` and ``notes``: a line each. A note is nothing wrong, but worth knowing."""

    problems: Sequence[str]
    notes: Sequence[str]
    n_problems: int
    n_files: int
    n_rounds: int

    @property
    def text(self) -> str:
        """A line each, and the count."""
        said = f"{self.n_problems} problem{'s' * (self.n_problems != 1)}" if self.n_problems else "nothing wrong"
        count = f"{self.n_files} files, {self.n_rounds} rounds: {said}"
        return "\n".join([*self.problems, *(f"note: {note}" for note in self.notes), count])


def validate(root: Path) -> Verdict:
    """Check every file of rows, of timings and of a projection under ``root``: of results, a suite or a data set.

    Raises:
        ResultsError: there is no such folder, or no results file in it.
    """
    cells = [examine(path) for path in cell_files(root)]
    check_doubles(cells)
    check_initial_sets(cells)
    reports = [*cells, *(examine_timings(path) for path in below(root, "timings-*.jsonl"))]
    reports += [examine_projection(path, cells) for path in below(root, "projection-*.npz")]
    return Verdict(
        [line for report in reports for line in _said(report.path, report.problems)],
        [line for report in reports for line in _said(report.path, report.notes)]
        + [f"{path}: {what}" for path, what in leftovers(root)],
        sum(len(report.problems) for report in reports),
        len(reports),
        sum(report.n_rounds for report in reports),
    )


def _said(path: Path, found: Sequence[tuple[int, str]]) -> list[str]:
    lines = [f"{path}, line {number}: {what}" if number else f"{path}: {what}" for number, what in found[:AT_MOST]]
    return lines + ([f"{path}: and {len(found) - AT_MOST} more"] if len(found) > AT_MOST else [])
