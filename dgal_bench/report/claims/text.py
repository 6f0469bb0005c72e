"""The verdicts on the claims in words and tables: claims.md, claims.csv and the first part of the page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path

from dgal_bench.core.errors import ResultsError
from dgal_bench.report.claims import ClaimsSurvey, survey_claims
from dgal_bench.report.claims.evidence import ALL, Evidence
from dgal_bench.report.claims.judge import ClaimFinding, JudgedClaim
from dgal_bench.report.claims.paper import BENCHMARKS, best
from dgal_bench.report.claims.rules import EXPONENT, MIN_SEEDS, NOT_RUN, POINTS, TIMES, SeedSample
from dgal_bench.report.claims.sensitivity import NOT_IN_PAPER, BothWays, ChoiceEffect
from dgal_bench.report.formatting import align_table, difference, escape_html, p_value, three_digits
from dgal_bench.report.groups import group
from dgal_bench.report.statistics import Estimate, mean_interval
from dgal_bench.results.reader import read_all_timings, read_results

TITLE = "The paper's claims, by these rows"

MARKS = {"confirmed": "✓ confirmed", "refuted": "✗ refuted", "undecided": "? undecided", NOT_RUN: "not run"}

RULES = (
    "Fixed before any row existed: Better or worse: the 95 % interval of the difference, paired over seeds, excludes "
    "0. Equal: the interval of the difference in area under the curve lies within ±1 point. Early: the first third of "
    "the rounds. About 100 (1,000) times: the interval of the ratio meets [30, 300] ([300, 3,000]). At least 10 times: "
    "its lower end is at least 10. Most: more than half of the data sets run. Contradicted is refuted, neither is "
    f"undecided, and so is anything on fewer than {MIN_SEEDS} seeds. Under 10 seeds intervals and tests are Student's, "
    "which takes differences to be normally distributed; from 10 they are BCa bootstraps and sign flips. Holm's "
    "correction is for all tests of a claim. Read into that, before any verdict was looked at: what does not survive "
    "Holm's correction is undecided; bands (equal, about) are judged by the interval alone; about as long: the ratio "
    "meets [0.3, 3]; competitive: within ±1 point, or better; a claim of several parts is confirmed where all are, and "
    "refuted where one is. Added when the first verdicts were there, each of which can only turn one into undecided: "
    "who is best or slowest is not known while a benchmark was not run; over all, a claim is confirmed only where "
    "every data set that ran it confirms it."
)


def effect_text(finding: ClaimFinding) -> str:
    """``+1.2 [0.3, 2.1] points``, ``61 [58, 65] times``; empty where nothing was run."""
    return "" if finding.effect is None else estimate_text(finding.effect, finding.unit)


def estimate_text(one: Estimate, unit: str) -> str:
    if unit == POINTS:
        return f"{difference(one, 100, 1)} points"
    ends = "" if isinf(one.high) or one.n < 2 else f" [{three_digits(one.low)}, {three_digits(one.high)}]"
    return f"{three_digits(one.mean)}{ends}{' times' if unit == TIMES else ''}"


def headline(evidence: Evidence) -> str:
    """DGMG's accuracy and query time on a data set, against random, margin and the most accurate benchmark."""
    runs = evidence.runs("dgmg")
    if not runs:
        return f"{evidence.name}: DGMG has no finished run."
    logs = list(runs.values())
    final = 100 * mean_interval([log.records[-1].accuracy for log in logs]).mean
    sentences = [f"On {evidence.name} DGMG ends at {final:.1f} % with {logs[0].records[-1].n_labeled} labels"]
    top, missing = best(evidence), any(not evidence.runs(name) for name in BENCHMARKS)
    differences = []
    for rival in dict.fromkeys(("random", "rsmg", *([top] if top else []))):
        sample = evidence.accuracy("dgmg", rival, ALL)
        if sample.n:
            kind = f"the most accurate benchmark{' of those run' if missing else ''}, " if rival == top else ""
            more = ", which restricts at random" if rival == "rsmg" else ""
            differences.append(f"{_difference_text(sample)} {kind}{rival}{more}")
    if differences:
        listed = (
            ", and ".join([", ".join(differences[:-1]), differences[-1]]) if len(differences) > 1 else differences[0]
        )
        sentences.append(f"its mean accuracy over all rounds is {listed}")
    faster = evidence.speed("dgmg", "margin")
    if faster.n:
        ratio = faster.effect
        times = ratio if ratio.mean >= 1 else Estimate(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low, ratio.n)
        less = "less" if ratio.mean >= 1 else "more"
        sentences.append(
            f"a query takes {three_digits(times.mean)} times{_interval_text(times)} {less} time than margin's"
        )
    return f"{'; '.join(sentences)} ({len(logs)} seed{'' if len(logs) == 1 else 's'})."


def _difference_text(sample: SeedSample) -> str:
    """``2.1 points [1.0, 3.2] above``; "not to be told from" where the interval holds 0 or seeds are few."""
    one = sample.effect
    ends = "" if isinf(one.high) else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    few = "" if sample.n >= MIN_SEEDS else f", {sample.n} seeds"
    if one.low <= 0 <= one.high or sample.n < MIN_SEEDS:
        return f"not to be told ({100 * one.mean:+.1f} points{ends}{few}) from that of"
    return f"{abs(100 * one.mean):.1f} points{ends} {'above' if one.mean > 0 else 'below'} that of"


def _interval_text(one: Estimate) -> str:
    return "" if isinf(one.high) else f" [{three_digits(one.low)}, {three_digits(one.high)}]"


def deciding_finding(one: JudgedClaim, dataset: str) -> ClaimFinding | None:
    """The first part with the verdict of the data set; None where nothing was run."""
    kind = one.by_dataset[dataset]
    return next((part for part in one.of(dataset) if part.decides and part.verdict == kind and part.effect), None)


def sample_sizes(one: JudgedClaim, dataset: str | None = None) -> str:
    """``5-10 seeds, 1 representation``: the sizes of the samples behind a verdict, over its parts."""
    found = [finding for finding in one.findings if finding.effect and (dataset is None or finding.dataset == dataset)]
    if not found or found[0].unit == EXPONENT:
        return ""
    seeds = {finding.n for finding in found}
    representations = {finding.representations for finding in found if finding.representations}
    parts = [("seed", seeds), *([("representation", representations)] if representations else [])]
    return ", ".join(f"{_span(sizes)} {noun}{'' if sizes == {1} else 's'}" for noun, sizes in parts)


def _span(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)}-{max(values)}"


def overview(survey: ClaimsSurvey) -> str:
    """The headlines and the table of verdicts."""
    lines = [
        *(f"- {headline(evidence)}" for evidence in survey.evidence),
        "",
        *_table(survey),
        "",
        not_run_line(survey),
    ]
    return escape_html("\n".join(lines) + "\n")


def claims_md(survey: ClaimsSurvey) -> str:
    """Headlines, verdicts, each claim's parts, the choices both ways, and settings unlike the paper's."""
    lines = [f"# {TITLE}", "", overview(survey), RULES, ""]
    for one in survey.claims:
        lines += _claim(one, survey.evidence)
    lines += ["## The choices that could change this, both ways", "", BOTH_WAYS, ""]
    for choice_effect in survey.choices:
        lines += [
            f"**{choice_effect.choice.title}**: {choice_summary(choice_effect)}",
            "",
            *_pairs(choice_effect.pairs),
        ]
    lines += ["## Where the settings differ from the paper's", ""]
    for name, found in survey.setting_differences.items():
        lines += [f"**{name}**", "", *(f"- {line}" for line in found or ["no setting differs"]), ""]
    lines += ["**left open by the paper**", "", *(f"- {line}" for line in NOT_IN_PAPER), ""]
    lines += [f"{evidence.name}: {evidence.rows_left_out}." for evidence in survey.evidence if evidence.rows_left_out]
    return escape_html("\n".join(lines).rstrip() + "\n")


def not_run_line(survey: ClaimsSurvey) -> str:
    return f"Not run yet: {', '.join(survey.not_run)}." if survey.not_run else "All data sets of the paper were run."


def n_of_paper(survey: ClaimsSurvey) -> str:
    """The heading of the column over the paper's own data sets."""
    return f"paper's own ({6 - len(survey.not_run)} of 6)"


def _table(survey: ClaimsSurvey) -> list[str]:
    names = [evidence.name for evidence in survey.evidence]
    rows = [
        [
            f"{one.claim.number}. {one.claim.title}",
            *(MARKS[one.by_dataset.get(name, NOT_RUN)] if one.by_dataset else "" for name in names),
            MARKS[one.over_all],
            MARKS.get(one.of_the_paper, ""),
        ]
        for one in survey.claims
    ]
    return align_table(["claim", *names, "over all run", n_of_paper(survey)], rows)


def _claim(one: JudgedClaim, all_evidence: Sequence[Evidence]) -> list[str]:
    claim = one.claim
    figures = [
        f"`figures/{slug}-{claim.figure}.png`" for evidence in all_evidence for slug in evidence.slugs if claim.figure
    ]
    lines = [
        f"## {claim.number}. {claim.title}: {one.over_all}",
        "",
        f"{claim.words} ({claim.where})",
        *([f"{claim.reading}"] if claim.reading else []),
        *([f"Figure: {', '.join(figures)}."] if figures else []),
        "",
    ]
    rows = [
        [
            finding.dataset, finding.words, effect_text(finding), verdict_text(finding),
            str(finding.n or ""), str(finding.representations or ""), p_value(finding.p), p_value(finding.holm_p),
        ]
        for finding in one.findings
    ]  # fmt: skip
    lines += align_table(["data set", "that", "effect", "verdict", "n", "representations", "p", "p (Holm)"], rows)
    if any(finding.busy for finding in one.findings):
        lines += ["", BUSY_NOTE]
    return [*lines, ""]


BUSY_NOTE = "Some of these seconds were taken beside other work: `dgal-bench replay RESULTS` takes them alone."


def verdict_text(finding: ClaimFinding) -> str:
    """The verdict, with the reason where it differs from what the interval alone says."""
    if finding.verdict == NOT_RUN:
        return finding.why or NOT_RUN
    return MARKS[finding.verdict] + (f" ({finding.why})" if finding.why else "")


BOTH_WAYS = (
    "Judged again on each data set alone, on the seeds that both ways have and in the parts that the choice touches: a "
    "verdict here may differ from the one above, which is of all parts and corrected for all data sets. Seconds are of "
    "replays only where both ways have them."
)


def choice_summary(choice_effect: ChoiceEffect) -> str:
    """Whether the other way was run, and which verdicts change under it."""
    ways = f"here {choice_effect.choice.here}; the other way {choice_effect.choice.alternative}."
    if not choice_effect.pairs:
        return f"{ways} Not run."
    changed = [pair for pair in choice_effect.pairs if pair.changed]
    if not changed:
        return f"{ways} No verdict changes, of {len(choice_effect.pairs)}."
    changes = (f"claim {pair.here.claim.number} on {pair.dataset} is {pair.verdicts[1]} instead of {pair.verdicts[0]}"
            for pair in changed)  # fmt: skip
    return f"{ways} {'; '.join(changes)}."


def _pairs(pairs: Sequence[BothWays]) -> list[str]:
    if not pairs:
        return []
    rows = [
        [f"{pair.here.claim.number}. {pair.here.claim.title}", pair.dataset, *pair.verdicts, *sides]
        for pair in pairs
        for sides in telling_findings(pair)
    ]
    head = ["claim", "data set", "here", "the other way", "that", "effect here", "the other way's"]
    return [*align_table(head, rows), ""]


def telling_findings(pair: BothWays) -> list[tuple[str, str, str]]:
    """The parts whose effect differs: in words, its effect here, and the other way."""
    return [
        (
            here.words if here.words == other.words else f"{here.words} / {other.words}",
            _count_words(here),
            _count_words(other),
        )
        for here, other in zip(pair.here.findings, pair.other.findings, strict=True)
        if here.effect != other.effect
    ]


def _count_words(finding: ClaimFinding) -> str:
    return f"{effect_text(finding)} (n = {finding.n})" if finding.effect else ""


_COLUMNS = (
    "claim", "title", "data_set", "that", "rule", "verdict", "why", "effect", "low", "high", "unit", "n_seeds",
    "n_representations", "p", "p_holm", "seconds_of", "beside_other_work",
)  # fmt: skip


def claims_csv(survey: ClaimsSurvey) -> str:
    """Per claim a line for each part on each data set, in full precision, then its own verdicts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in survey.claims:
        known = [one.claim.number, one.claim.title]
        for finding in one.findings:
            writer.writerow([*known, finding.dataset, finding.words, finding.rule, finding.verdict, finding.why,
                             *_numbers(finding)])  # fmt: skip
        whole = {**one.by_dataset, "over all run": one.over_all, "paper's own": one.of_the_paper}
        writer.writerows([*known, where, "the claim", "", found, *[""] * 11] for where, found in whole.items())
    return text.getvalue()


def _numbers(finding: ClaimFinding) -> list[str | float | int]:
    one = finding.effect
    if one is None:
        return [""] * 10
    ends = ("", "") if isinf(one.high) else (one.low, one.high)
    tests = ("" if p is None else p for p in (finding.p, finding.holm_p))
    busy = {True: "yes", False: "no", None: "unknown"}[finding.busy] if finding.source else ""
    return [one.mean, *ends, finding.unit, finding.n, finding.representations, *tests, finding.source, busy]


INTRODUCTION = (
    "Active learning asks for the labels that help a network most. Strategies that look at every unlabeled image "
    "before they choose make each question slow. DGAL, the method of the paper that is put to the test here, first "
    "lets the known labels spread over a graph of similar images and keeps the few hundred on which they disagree "
    "most; only those are shown to the network. With margin as the criterion that then picks, it is called DGMG. "
    "The paper claims the accuracy of the best strategies at a fraction of their query time. This is what the rows "
    "say."
)


@dataclass(frozen=True)
class VerdictView:
    """``kind``: confirmed, refuted, undecided, not run, or empty; ``part``, with its ``effect``, decides it."""

    kind: str
    text: str
    sample_sizes: str
    effect: str = ""
    part: str = ""


@dataclass(frozen=True)
class ClaimView:
    """``verdicts``: of each data set, over all that were run, and over the paper's own."""

    number: int
    title: str
    words: str
    where: str
    reading: str
    figure: str
    verdicts: Sequence[VerdictView]
    findings: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class ChoiceView:
    """A choice: the verdicts both ways in short, and the parts of claims that it changes."""

    title: str
    summary: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ClaimsView:
    """The first part of the page, in plain values."""

    introduction: str
    headlines: Sequence[str]
    columns: Sequence[str]
    claims: Sequence[ClaimView]
    not_run: str
    rules: str
    both_ways: str
    choices: Sequence[ChoiceView]
    settings: Sequence[tuple[str, Sequence[str]]]


def claims_view(survey: ClaimsSurvey) -> ClaimsView | None:
    """None where no claim has an effect on a data set."""
    if not any(finding.effect and finding.dataset for one in survey.claims for finding in one.findings):
        return None
    names = [evidence.name for evidence in survey.evidence]
    settings = [(name, lines or ["no setting differs"]) for name, lines in survey.setting_differences.items()]
    rows_left_out = [
        (evidence.name, [evidence.rows_left_out]) for evidence in survey.evidence if evidence.rows_left_out
    ]
    return ClaimsView(
        INTRODUCTION,
        [headline(evidence) for evidence in survey.evidence],
        [*names, "over all run", n_of_paper(survey)],
        [_claim_view(one, names) for one in survey.claims],
        not_run_line(survey),
        RULES,
        BOTH_WAYS,
        [_choice(choice_effect) for choice_effect in survey.choices],
        [*settings, ("left open by the paper", NOT_IN_PAPER), *rows_left_out],
    )


def _claim_view(one: JudgedClaim, names: Sequence[str]) -> ClaimView:
    each = [_verdict(one, name) for name in names]
    whole = [VerdictView(kind, MARKS.get(kind, ""), "") for kind in (one.over_all, one.of_the_paper)]
    claim = one.claim
    return ClaimView(
        claim.number, claim.title, claim.words, claim.where, claim.reading, claim.figure, [*each, *whole],
        [_finding(finding) for finding in one.findings],
        [BUSY_NOTE] if any(finding.busy for finding in one.findings) else [],
    )  # fmt: skip


def _verdict(one: JudgedClaim, name: str) -> VerdictView:
    if name not in one.by_dataset:
        return VerdictView("", "", "")
    kind, part = one.by_dataset[name], deciding_finding(one, name)
    effect_and_part = (effect_text(part), part.words) if part else ("", "")
    return VerdictView(kind, MARKS[kind], sample_sizes(one, name), *effect_and_part)


def _finding(one: ClaimFinding) -> list[str]:
    ran = one.verdict != NOT_RUN
    numbers = [str(one.n or ""), str(one.representations or "")] if ran else ["", ""]
    return [one.dataset, one.words, effect_text(one), verdict_text(one), *numbers, p_value(one.p), p_value(one.holm_p)]


def _choice(choice_effect: ChoiceEffect) -> ChoiceView:
    rows = [
        [f"{pair.here.claim.number}. {pair.here.claim.title}", pair.dataset, *pair.verdicts, *sides]
        for pair in choice_effect.pairs
        for sides in telling_findings(pair)
    ]
    return ChoiceView(choice_effect.choice.title, choice_summary(choice_effect), rows)


@dataclass(frozen=True)
class WrittenClaims:
    """``overview``: the headlines and verdicts as Markdown."""

    overview: str
    files: list[Path]


def write_claims(results: Path, out: Path, growth: Path | None = None) -> WrittenClaims:
    """Judge the paper's claims by all runs under ``results``; write claims.md and claims.csv to ``out``.

    Raises:
        ResultsError: no runs, a damaged file, a ``growth`` that benchmarks/scaling.py did not write, or an ``out``
            that cannot be written.
    """
    found = survey_claims(group(read_results(results), read_all_timings(results)), growth)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "claims.md").write_text(claims_md(found), encoding="utf-8")
        (out / "claims.csv").write_text(claims_csv(found), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"the claims cannot be written to {out}: {error.strerror}: set --out DIR") from error
    return WrittenClaims(overview(found), [out / "claims.md", out / "claims.csv"])
