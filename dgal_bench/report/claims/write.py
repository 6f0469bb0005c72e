"""Write the verdicts on the claims, from a results folder: claims.md and claims.csv."""

from dataclasses import dataclass
from pathlib import Path

from dgal_bench.errors import ResultsError
from dgal_bench.record import read_results
from dgal_bench.report.claims.survey import survey
from dgal_bench.report.claims.words import claims_csv, claims_md, overview
from dgal_bench.report.groups import group
from dgal_bench.timings import read_all_timings


@dataclass(frozen=True)
class Surveyed:
    """The claims in short, as Markdown, and the files written."""

    overview: str
    files: list[Path]


def write_survey(results: Path, out: Path, growth: Path | None = None) -> Surveyed:
    """Judge the paper's claims by every cell under ``results`` and write claims.md and claims.csv to ``out``.

    Raises:
        ResultsError: nothing to judge by, a damaged file, ``growth`` is no file of benchmarks/scaling.py, or ``out``
            cannot be written.
    """
    found = survey(group(read_results(results), read_all_timings(results)), growth)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "claims.md").write_text(claims_md(found), encoding="utf-8")
        (out / "claims.csv").write_text(claims_csv(found), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"the claims cannot be written to {out}: {error.strerror}: set --out DIR") from error
    return Surveyed(overview(found), [out / "claims.md", out / "claims.csv"])
