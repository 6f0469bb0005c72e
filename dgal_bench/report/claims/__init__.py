"""The paper's claims judged on every data set that was run, and what the verdicts depend on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgal_bench.report.claims.evidence import PAPER_SETS, Evidence, gather_evidence
from dgal_bench.report.claims.judge import NOT_MEASURED, JudgedClaim, growth_findings, judge_claim, judge_measurement
from dgal_bench.report.claims.paper import CLAIMS
from dgal_bench.report.claims.sensitivity import ChoiceEffect, choice_effects, setting_differences
from dgal_bench.report.groups import Group


@dataclass(frozen=True)
class ClaimsSurvey:
    """``setting_differences``: by data set; ``not_run``: the paper's data sets without a finished run."""

    evidence: Sequence[Evidence]
    claims: Sequence[JudgedClaim]
    choices: Sequence[ChoiceEffect]
    setting_differences: Mapping[str, Sequence[str]]
    not_run: Sequence[str]


def survey_claims(groups: Sequence[Group], growth_file: Path | None = None) -> ClaimsSurvey:
    """Judge every claim by ``groups``, and claim 11 by ``growth_file``, which benchmarks/scaling.py writes.

    Raises:
        ResultsError: the growth file is missing or of another format.
    """
    growth = [NOT_MEASURED] if growth_file is None else growth_findings(growth_file)
    all_evidence = gather_evidence(groups)
    claims = [judge_claim(claim, all_evidence) if claim.parts else judge_measurement(claim, growth) for claim in CLAIMS]
    run = {evidence.group.dataset for evidence in all_evidence}
    return ClaimsSurvey(
        all_evidence,
        claims,
        choice_effects(all_evidence),
        {evidence.name: setting_differences(evidence) for evidence in all_evidence},
        [name for name in PAPER_SETS if name not in run],
    )
