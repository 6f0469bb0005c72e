"""Claims judged on every data set that was run, and then over all of them."""

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
    FEW,
    LINEAR,
    NOT_RUN,
    REFUTED,
    UNDECIDED,
    every,
    some,
    together,
)
from dgal_bench.report.comparisons import holm, smallest_p
from dgal_bench.report.statistics import MANY, Estimate


@dataclass(frozen=True)
class ClaimFinding:
    """What a part of a claim comes to on one data set.

    ``words`` with its rival's name; ``effect`` None where nothing was run; ``why`` a verdict is not what its interval
    alone says; ``source`` of its seconds, and whether they were taken beside other work (None: not known).
    """

    bench: str
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
    beside: bool | None = False
    counts: bool = True
    """Whether the data set's own verdict rests on it: ``sometimes`` is about all of them."""


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its findings; verdicts by data set, over all that were run, and over the paper's own.

    Of a claim that is about no data set the last is empty.
    """

    claim: Claim
    findings: Sequence[ClaimFinding]
    by_bench: dict[str, str]
    over_all: str
    of_the_paper: str

    def of(self, bench: str) -> list[ClaimFinding]:
        return [finding for finding in self.findings if finding.bench == bench]


def judge_claim(claim: Claim, benches: Sequence[Evidence]) -> JudgedClaim:
    """By rows. Holm's correction is over all tests of the claim, on whatever data set, that can decide something."""
    each = [
        (part, bench, examine_part(part, bench)) for part in claim.parts for bench in benches if part.concerns(bench)
    ]
    n_tests = sum(found.p is not None for *_, found in each)
    corrected = holm([found.p for *_, found in each])
    tested = zip(each, corrected, strict=True)
    found = [(part, bench, _apply_holm(finding, p, n_tests)) for (part, bench, finding), p in tested]
    by_bench = {
        bench.name: together([one.verdict for _, on, one in found if on is bench and one.counts]) for bench in benches
    }

    def over(these: Sequence[Evidence]) -> str:
        asked = [part for part in claim.parts if any(part.concerns(bench) for bench in these)]
        verdicts = [part.over([one.verdict for of, on, one in found if of is part and on in these]) for part in asked]
        whole = together(verdicts)
        if whole == CONFIRMED:  # each part somewhere is not yet the claim anywhere
            everywhere = [part for part in asked if part.over is every]
            for bench in these:
                own = together([one.verdict for of, on, one in found if of in everywhere and on is bench])
                whole = whole if own in (CONFIRMED, NOT_RUN) else UNDECIDED
        return whole

    counted = one_per_dataset(benches)
    own = [bench for bench in counted if bench.of_the_paper]
    return JudgedClaim(claim, [finding for *_, finding in found], by_bench, over(counted), over(own))


def examine_part(part: ClaimPart, bench: Evidence) -> ClaimFinding:
    """One part on one data set, before Holm's correction."""
    measure = part.measure
    rival = measure.theirs if isinstance(measure.theirs, str) else measure.theirs(bench)
    words = part.words.format(theirs=bench.label(rival) if rival else "none run")
    base = ClaimFinding(bench.name, words, part.rule.words, NOT_RUN, None, "", 0, 0, counts=part.over is not some)
    if rival is None:
        return replace(base, why=f"not run: {', '.join(sorted(part.strategies))}")
    names = [name for name in (measure.ours, rival) if name]
    if missing := [bench.label(name) for name in names if not bench.runs(name)]:
        return replace(base, why=f"not run: {', '.join(missing)}")
    sample = measure(bench, rival)
    if not sample.n:
        return replace(base, why="nothing to compare: no seed in common under one protocol, or too few rounds")
    effect, bound = sample.effect, part.rule.bound
    # Who is best or slowest of all is not known while one is missing.
    absent = [] if isinstance(measure.theirs, str) else [name for name in BENCHMARKS if not bench.runs(name)]
    why = f"fewer than {FEW} seeds" if sample.n < FEW else f"not run: {', '.join(absent)}" if absent else ""
    verdict = UNDECIDED if why else part.rule.verdict(effect)
    if part.rule.meets and verdict == REFUTED:
        why = "more than claimed" if effect.low > part.rule.high else "less than claimed"
    return replace(
        base,
        verdict=verdict,
        effect=effect,
        unit=sample.unit,
        n=sample.n,
        representations=bench.representations(sample.values.keys(), *names),
        p=None if (verdict == UNDECIDED and why) or bound is None else sample.p(bound),
        why=why,
        source=sample.source,
        beside=sample.beside,
    )


def _apply_holm(finding: ClaimFinding, p: float | None, n_tests: int) -> ClaimFinding:
    if p is None:
        return finding
    undone = p > ALPHA and finding.verdict in (CONFIRMED, REFUTED)
    why = finding.why
    if undone:
        why = "not after Holm's correction"
        if smallest_p(finding.n) * n_tests > ALPHA and finding.n >= MANY:
            why += f", which {finding.n} seeds cannot pass over {n_tests} tests"
    return replace(finding, holm_p=p, verdict=UNDECIDED if undone else finding.verdict, why=why)


def judge_measurement(claim: Claim, findings: Sequence[ClaimFinding]) -> JudgedClaim:
    """By measurements of its own, which are of no data set."""
    return JudgedClaim(claim, findings, {}, every([one.verdict for one in findings]), "")


# Claim 11: how the seconds of the diffusion grow with the pool, from a file of benchmarks/scaling.py.


ENOUGH = 5
"""Sizes under which nothing is decided: an interval of a slope through fewer is wide, or chance."""

ABSENT = ClaimFinding(
    "", "a step of the diffusion takes time in proportion to the pool's size", LINEAR.words, NOT_RUN, None, EXPONENT,
    0, 0, why="not given: growth=FILE, as benchmarks/scaling.py writes it",
)  # fmt: skip


def growth_findings(path: Path) -> list[ClaimFinding]:
    """A finding for each kind of points of the file.

    Raises:
        ResultsError: there is no such file, or it is none of benchmarks/scaling.py's.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        sizes = [one for one in told["sizes"] if one["status"] == "measured"]
        kinds = list(dict.fromkeys(one["kind"] for one in sizes))
        where = told["provenance"]["machine"]["cpu"]
        found = [_finding(kind, [one for one in sizes if one["kind"] == kind], where) for kind in kinds]
    except OSError as error:
        raise ResultsError(f"growth={path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"growth={path} is no file of benchmarks/scaling.py ({error!r})") from error
    if not found:
        raise ResultsError(f"growth={path} has no size that was measured")
    return found


def _finding(kind: str, sizes: Sequence[Mapping[str, Any]], where: str) -> ClaimFinding:
    steps = {int(one["points"]): seconds for one in sizes if (seconds := _step(one)) is not None}
    words = f"a step over {', '.join(f'{n:,}' for n in sorted(steps))} {kind} points ({where})"
    effect = exponent(steps)
    few = len(steps) < ENOUGH
    return ClaimFinding(
        "", words, LINEAR.words, UNDECIDED if few or effect is None else LINEAR.verdict(effect), effect, EXPONENT,
        len(steps), 0, why=f"fewer than {ENOUGH} sizes" if few else "",
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
