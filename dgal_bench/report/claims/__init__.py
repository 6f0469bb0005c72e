"""All of it: the claims judged on every data set that was run, choices both ways, and settings against the paper's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgal_bench.report.claims.evidence import PAPER_SETS, Evidence, gather_evidence
from dgal_bench.report.claims.judge import ABSENT, JudgedClaim, growth_findings, judge_claim, judge_measurement
from dgal_bench.report.claims.paper import CLAIMS
from dgal_bench.report.claims.sensitivity import ChoiceEffect, choice_effects, setting_differences
from dgal_bench.report.groups import Group


@dataclass(frozen=True)
class ClaimsSurvey:
    """``departures`` by data set; ``not_run``: the paper's data sets without a finished run."""

    benches: Sequence[Evidence]
    claims: Sequence[JudgedClaim]
    weighed: Sequence[ChoiceEffect]
    departures: Mapping[str, Sequence[str]]
    not_run: Sequence[str]


def survey_claims(groups: Sequence[Group], growth_file: Path | None = None) -> ClaimsSurvey:
    """Of the groups of a results folder; ``growth_file``: of benchmarks/scaling.py, for the claim that no row decides.

    Raises:
        ResultsError: the growth file is missing or something else.
    """
    grown = [ABSENT] if growth_file is None else growth_findings(growth_file)
    found = gather_evidence(groups)
    claims = [judge_claim(claim, found) if claim.parts else judge_measurement(claim, grown) for claim in CLAIMS]
    run = {bench.group.dataset for bench in found}
    return ClaimsSurvey(
        found,
        claims,
        choice_effects(found),
        {bench.name: setting_differences(bench) for bench in found},
        [name for name in PAPER_SETS if name not in run],
    )
