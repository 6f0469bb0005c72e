"""Claims judged on every data set that was run, and then over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dgal_bench.report.claims.bench import Bench
from dgal_bench.report.claims.gather import one_each
from dgal_bench.report.claims.paper import BENCHMARKS, Claim, Part
from dgal_bench.report.claims.rules import (
    ALPHA,
    CONFIRMED,
    FEW,
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
class Finding:
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
class Judged:
    """A claim with its findings; verdicts by data set, over all that were run, and over the paper's own.

    Of a claim that is about no data set the last is empty.
    """

    claim: Claim
    findings: Sequence[Finding]
    by_bench: dict[str, str]
    over_all: str
    of_the_paper: str

    def of(self, bench: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.bench == bench]


def judged(claim: Claim, benches: Sequence[Bench]) -> Judged:
    """By rows. Holm's correction is over all tests of the claim, on whatever data set, that can decide something."""
    each = [(part, bench, examined(part, bench)) for part in claim.parts for bench in benches if part.concerns(bench)]
    n_tests = sum(found.p is not None for *_, found in each)
    corrected = holm([found.p for *_, found in each])
    tested = zip(each, corrected, strict=True)
    found = [(part, bench, _after_holm(finding, p, n_tests)) for (part, bench, finding), p in tested]
    by_bench = {
        bench.name: together([one.verdict for _, on, one in found if on is bench and one.counts]) for bench in benches
    }

    def over(these: Sequence[Bench]) -> str:
        asked = [part for part in claim.parts if any(part.concerns(bench) for bench in these)]
        verdicts = [part.over([one.verdict for of, on, one in found if of is part and on in these]) for part in asked]
        whole = together(verdicts)
        if whole == CONFIRMED:  # each part somewhere is not yet the claim anywhere
            everywhere = [part for part in asked if part.over is every]
            for bench in these:
                own = together([one.verdict for of, on, one in found if of in everywhere and on is bench])
                whole = whole if own in (CONFIRMED, NOT_RUN) else UNDECIDED
        return whole

    counted = one_each(benches)
    own = [bench for bench in counted if bench.of_the_paper]
    return Judged(claim, [finding for *_, finding in found], by_bench, over(counted), over(own))


def examined(part: Part, bench: Bench) -> Finding:
    """One part on one data set, before Holm's correction."""
    measure = part.measure
    rival = measure.theirs if isinstance(measure.theirs, str) else measure.theirs(bench)
    words = part.words.format(theirs=bench.label(rival) if rival else "none run")
    base = Finding(bench.name, words, part.rule.words, NOT_RUN, None, "", 0, 0, counts=part.over is not some)
    if rival is None:
        return replace(base, why=f"not run: {', '.join(sorted(part.strategies))}")
    names = [name for name in (measure.ours, rival) if name]
    if missing := [bench.label(name) for name in names if not bench.cells(name)]:
        return replace(base, why=f"not run: {', '.join(missing)}")
    sample = measure(bench, rival)
    if not sample.n:
        return replace(base, why="nothing to compare: no seed in common under one protocol, or too few rounds")
    effect, bound = sample.effect, part.rule.bound
    # Who is best or slowest of all is not known while one is missing.
    absent = [] if isinstance(measure.theirs, str) else [name for name in BENCHMARKS if not bench.cells(name)]
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


def _after_holm(finding: Finding, p: float | None, n_tests: int) -> Finding:
    if p is None:
        return finding
    undone = p > ALPHA and finding.verdict in (CONFIRMED, REFUTED)
    why = finding.why
    if undone:
        why = "not after Holm's correction"
        if smallest_p(finding.n) * n_tests > ALPHA and finding.n >= MANY:
            why += f", which {finding.n} seeds cannot pass over {n_tests} tests"
    return replace(finding, holm_p=p, verdict=UNDECIDED if undone else finding.verdict, why=why)


def measured(claim: Claim, findings: Sequence[Finding]) -> Judged:
    """By measurements of its own, which are of no data set."""
    return Judged(claim, findings, {}, every([one.verdict for one in findings]), "")
