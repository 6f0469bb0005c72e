"""All of it: the claims judged on every data set that was run, choices both ways, and settings against the paper's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgal_bench.report.claims.bench import PAPER_SETS, Bench
from dgal_bench.report.claims.choices import Weighed, weighed
from dgal_bench.report.claims.departures import departures
from dgal_bench.report.claims.gather import benches
from dgal_bench.report.claims.growth import ABSENT, growth
from dgal_bench.report.claims.judge import Judged, judged, measured
from dgal_bench.report.claims.paper import CLAIMS
from dgal_bench.report.groups import Group


@dataclass(frozen=True)
class Survey:
    """``departures`` by data set; ``not_run``: the paper's data sets without a finished cell."""

    benches: Sequence[Bench]
    claims: Sequence[Judged]
    weighed: Sequence[Weighed]
    departures: Mapping[str, Sequence[str]]
    not_run: Sequence[str]


def survey(groups: Sequence[Group], growth_file: Path | None = None) -> Survey:
    """Of the groups of a results folder; ``growth_file``: of benchmarks/scaling.py, for the claim that no row decides.

    Raises:
        ResultsError: the growth file is missing or something else.
    """
    grown = [ABSENT] if growth_file is None else growth(growth_file)
    found = benches(groups)
    claims = [judged(claim, found) if claim.parts else measured(claim, grown) for claim in CLAIMS]
    run = {bench.group.dataset for bench in found}
    return Survey(
        found,
        claims,
        weighed(found),
        {bench.name: departures(bench) for bench in found},
        [name for name in PAPER_SETS if name not in run],
    )
