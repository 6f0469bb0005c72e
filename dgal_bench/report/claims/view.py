"""What the page says of the claims, in plain values."""

from collections.abc import Sequence
from dataclasses import dataclass

from dgal_bench.report.claims.choices import Weighed
from dgal_bench.report.claims.departures import LEFT_OPEN
from dgal_bench.report.claims.judge import Finding, Judged
from dgal_bench.report.claims.rules import NOT_RUN
from dgal_bench.report.claims.survey import Survey
from dgal_bench.report.claims.words import (
    BESIDE,
    BOTH_WAYS,
    MARKS,
    RULES,
    counts,
    deciding,
    effect,
    headline,
    n_of_paper,
    not_run_line,
    telling,
    verdict,
    weighing,
)
from dgal_bench.report.text import p_value

INTRODUCTION = (
    "Active learning asks for the labels that help a network most. Strategies that look at every unlabeled image "
    "before they choose make each question slow. DGAL, the method of the paper that is put to the test here, first "
    "lets the known labels spread over a graph of similar images and keeps the few hundred on which they disagree "
    "most; only those are shown to the network. With margin as the criterion that then picks, it is called DGMG. "
    "The paper claims the accuracy of the best strategies at a fraction of their query time. This is what the rows "
    "say."
)


@dataclass(frozen=True)
class Verdict:
    """``kind`` one of confirmed, refuted, undecided, not run, or nothing; ``counts`` what it rests on.

    ``effect`` of the part that decides, and that part in words.
    """

    kind: str
    text: str
    counts: str
    effect: str = ""
    part: str = ""


@dataclass(frozen=True)
class ClaimView:
    """``verdicts`` of each data set, over all that were run, and over the paper's own."""

    number: int
    title: str
    words: str
    where: str
    reading: str
    figure: str
    verdicts: Sequence[Verdict]
    findings: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class ChoiceView:
    """What is decided either way, in short, and the parts of claims that it changes."""

    title: str
    summary: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ClaimsView:
    """The first part of the page."""

    introduction: str
    headlines: Sequence[str]
    columns: Sequence[str]
    claims: Sequence[ClaimView]
    not_run: str
    rules: str
    both_ways: str
    choices: Sequence[ChoiceView]
    settings: Sequence[tuple[str, Sequence[str]]]


def claims_view(survey: Survey) -> ClaimsView | None:
    """None where no row says anything about a claim."""
    if not any(finding.effect and finding.bench for one in survey.claims for finding in one.findings):
        return None
    names = [bench.name for bench in survey.benches]
    settings = [(name, lines or ["no setting differs"]) for name, lines in survey.departures.items()]
    left_out = [(bench.name, [bench.left_out]) for bench in survey.benches if bench.left_out]
    return ClaimsView(
        INTRODUCTION,
        [headline(bench) for bench in survey.benches],
        [*names, "over all run", n_of_paper(survey)],
        [_claim(one, names) for one in survey.claims],
        not_run_line(survey),
        RULES,
        BOTH_WAYS,
        [_choice(weighed) for weighed in survey.weighed],
        [*settings, ("left open by the paper", LEFT_OPEN), *left_out],
    )


def _claim(one: Judged, names: Sequence[str]) -> ClaimView:
    each = [_verdict(one, name) for name in names]
    whole = [Verdict(kind, MARKS.get(kind, ""), "") for kind in (one.over_all, one.of_the_paper)]
    claim = one.claim
    return ClaimView(
        claim.number, claim.title, claim.words, claim.where, claim.reading, claim.figure, [*each, *whole],
        [_finding(finding) for finding in one.findings],
        [BESIDE] if any(finding.beside for finding in one.findings) else [],
    )  # fmt: skip


def _verdict(one: Judged, name: str) -> Verdict:
    if name not in one.by_bench:
        return Verdict("", "", "")
    kind, part = one.by_bench[name], deciding(one, name)
    said = (effect(part), part.words) if part else ("", "")
    return Verdict(kind, MARKS[kind], counts(one, name), *said)


def _finding(one: Finding) -> list[str]:
    ran = one.verdict != NOT_RUN
    numbers = [str(one.n or ""), str(one.representations or "")] if ran else ["", ""]
    return [one.bench, one.words, effect(one), verdict(one), *numbers, p_value(one.p), p_value(one.holm_p)]


def _choice(weighed: Weighed) -> ChoiceView:
    rows = [
        [f"{pair.here.claim.number}. {pair.here.claim.title}", pair.bench, *pair.verdicts, *sides]
        for pair in weighed.pairs
        for sides in telling(pair)
    ]
    return ChoiceView(weighed.choice.title, weighing(weighed), rows)
