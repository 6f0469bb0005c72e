"""Claims judged on every data set that was run, then over all of them; claim 11 by a file of benchmarks/scaling.py."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log
from pathlib import Path
from typing import Any

from scipy.stats import linregress
from scipy.stats import t as student

from dgal_bench.core.errors import ResultsError
from dgal_bench.report.claims.evidence import Evidence, one_per_dataset
from dgal_bench.report.claims.paper import BENCHMARKS, Claim, ClaimPart
from dgal_bench.report.claims.rules import (
    ALPHA,
    CONFIRMED,
    EXPONENT,
    LINEAR,
    MIN_SEEDS,
    NOT_RUN,
    REFUTED,
    UNDECIDED,
    combine,
    every,
    some,
)
from dgal_bench.report.comparisons import holm, smallest_p
from dgal_bench.report.statistics import MANY, Estimate


@dataclass(frozen=True)
class ClaimFinding:
    """The verdict on a part of a claim on one data set.

    ``words`` has the rival's name; ``effect`` is None where nothing was run; ``why``: the reason where the verdict
    differs from what the interval alone says; ``busy``: whether other work ran meanwhile (None: not known).
    """

    dataset: str
    words: str
    rule: str
    verdict: str
    effect: Estimate | None
    unit: str
    n: int
    representations: int
    p: float | None = None
    holm_p: float | None = None
    why: str = ""
    source: str = ""
    busy: bool | None = False
    decides: bool = True
    """Whether the data set's own verdict includes it: a part combined by ``some`` is about all data sets."""


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its findings; verdicts by data set, over all that were run, and over the paper's own.

    ``of_the_paper`` is empty for a claim about no data set.
    """

    claim: Claim
    findings: Sequence[ClaimFinding]
    by_dataset: dict[str, str]
    over_all: str
    of_the_paper: str

    def of(self, dataset: str) -> list[ClaimFinding]:
        return [finding for finding in self.findings if finding.dataset == dataset]


def judge_claim(claim: Claim, all_evidence: Sequence[Evidence]) -> JudgedClaim:
    """By rows, with Holm's correction over all tests of the claim that can decide something, on all data sets."""
    each = [
        (part, evidence, examine_part(part, evidence))
        for part in claim.parts
        for evidence in all_evidence
        if part.concerns(evidence)
    ]
    n_tests = sum(found.p is not None for *_, found in each)
    corrected = holm([found.p for *_, found in each])
    tested = zip(each, corrected, strict=True)
    found = [(part, evidence, _apply_holm(finding, p, n_tests)) for (part, evidence, finding), p in tested]
    by_dataset = {
        evidence.name: combine([one.verdict for _, on, one in found if on is evidence and one.decides])
        for evidence in all_evidence
    }

    def over(these: Sequence[Evidence]) -> str:
        parts = [part for part in claim.parts if any(part.concerns(evidence) for evidence in these)]
        verdicts = [part.over([one.verdict for of, on, one in found if of is part and on in these]) for part in parts]
        whole = combine(verdicts)
        if whole == CONFIRMED:  # each part on some data set is not yet all parts on one
            everywhere = [part for part in parts if part.over is every]
            for evidence in these:
                own = combine([one.verdict for of, on, one in found if of in everywhere and on is evidence])
                whole = whole if own in (CONFIRMED, NOT_RUN) else UNDECIDED
        return whole

    judged = one_per_dataset(all_evidence)
    own = [evidence for evidence in judged if evidence.of_the_paper]
    return JudgedClaim(claim, [finding for *_, finding in found], by_dataset, over(judged), over(own))


def examine_part(part: ClaimPart, evidence: Evidence) -> ClaimFinding:
    """One part on one data set, before Holm's correction."""
    measure = part.measure
    rival = measure.theirs if isinstance(measure.theirs, str) else measure.theirs(evidence)
    words = part.words.format(theirs=evidence.label(rival) if rival else "none run")
    base = ClaimFinding(evidence.name, words, part.rule.words, NOT_RUN, None, "", 0, 0, decides=part.over is not some)
    if rival is None:
        return replace(base, why=f"not run: {', '.join(sorted(part.strategies))}")
    names = [name for name in (measure.ours, rival) if name]
    if missing := [evidence.label(name) for name in names if not evidence.runs(name)]:
        return replace(base, why=f"not run: {', '.join(missing)}")
    sample = measure(evidence, rival)
    if not sample.n:
        return replace(base, why="nothing to compare: no seed in common under one protocol, or too few rounds")
    effect, bound = sample.effect, part.rule.bound
    # The best or slowest benchmark is not known while one is missing.
    absent = [] if isinstance(measure.theirs, str) else [name for name in BENCHMARKS if not evidence.runs(name)]
    why = f"fewer than {MIN_SEEDS} seeds" if sample.n < MIN_SEEDS else f"not run: {', '.join(absent)}" if absent else ""
    verdict = UNDECIDED if why else part.rule.verdict(effect)
    if part.rule.meets and verdict == REFUTED:
        why = "more than claimed" if effect.low > part.rule.high else "less than claimed"
    return replace(
        base,
        verdict=verdict,
        effect=effect,
        unit=sample.unit,
        n=sample.n,
        representations=evidence.representations(sample.values.keys(), *names),
        p=None if (verdict == UNDECIDED and why) or bound is None else sample.p(bound),
        why=why,
        source=sample.source,
        busy=sample.busy,
    )


def _apply_holm(finding: ClaimFinding, p: float | None, n_tests: int) -> ClaimFinding:
    if p is None:
        return finding
    overruled = p > ALPHA and finding.verdict in (CONFIRMED, REFUTED)
    why = finding.why
    if overruled:
        why = "not after Holm's correction"
        if smallest_p(finding.n) * n_tests > ALPHA and finding.n >= MANY:
            why += f", which {finding.n} seeds cannot pass over {n_tests} tests"
    return replace(finding, holm_p=p, verdict=UNDECIDED if overruled else finding.verdict, why=why)


def judge_measurement(claim: Claim, findings: Sequence[ClaimFinding]) -> JudgedClaim:
    """By measurements of its own, which belong to no data set."""
    return JudgedClaim(claim, findings, {}, every([one.verdict for one in findings]), "")


MIN_SIZES = 5
"""With fewer sizes the verdict is undecided: the interval of their slope is wide, or narrow by chance."""

NOT_MEASURED = ClaimFinding(
    "", "a step of the diffusion takes time in proportion to the pool's size", LINEAR.words, NOT_RUN, None, EXPONENT,
    0, 0, why="not given: growth=FILE, as benchmarks/scaling.py writes it",
)  # fmt: skip


def growth_findings(path: Path) -> list[ClaimFinding]:
    """A finding for each kind of points of the file.

    Raises:
        ResultsError: the file is missing, or benchmarks/scaling.py did not write it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes = [one for one in content["sizes"] if one["status"] == "measured"]
        kinds = list(dict.fromkeys(one["kind"] for one in sizes))
        machine = content["provenance"]["machine"]["cpu"]
        found = [_finding(kind, [one for one in sizes if one["kind"] == kind], machine) for kind in kinds]
    except OSError as error:
        raise ResultsError(f"growth={path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"growth={path} is no file of benchmarks/scaling.py ({error!r})") from error
    if not found:
        raise ResultsError(f"growth={path} has no size that was measured")
    return found


def _finding(kind: str, sizes: Sequence[Mapping[str, Any]], machine: str) -> ClaimFinding:
    steps = {int(one["points"]): seconds for one in sizes if (seconds := _step(one)) is not None}
    words = f"a step over {', '.join(f'{n:,}' for n in sorted(steps))} {kind} points ({machine})"
    effect = exponent(steps)
    few = len(steps) < MIN_SIZES
    return ClaimFinding(
        "", words, LINEAR.words, UNDECIDED if few or effect is None else LINEAR.verdict(effect), effect, EXPONENT,
        len(steps), 0, why=f"fewer than {MIN_SIZES} sizes" if few else "",
    )  # fmt: skip


def _step(size: Mapping[str, Any]) -> float | None:
    """Seconds of one step of DGMG's whole diffusion; None where it was not measured."""
    for query in size["queries"]:
        if query["name"] == "dgmg" and query["how"] == "full":
            return float(query["phases"]["diffuse"]) / int(size["steps"])
    return None


def exponent(seconds: Mapping[int, float]) -> Estimate | None:
    """The slope of log seconds over log size, with Student's interval of a least-squares line; None under 2 sizes."""
    if len(seconds) < 2:
        return None
    sizes = sorted(seconds)
    line = linregress([log(n) for n in sizes], [log(seconds[n]) for n in sizes])
    free = len(sizes) - 2
    half = float(student.ppf(0.975, free)) * float(line.stderr) if free else inf
    return Estimate(float(line.slope), float(line.slope) - half, float(line.slope) + half, len(sizes))
