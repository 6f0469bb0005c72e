"""The choices that could change the paper's conclusion, shown both ways: claims judged again under the other one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dgal_bench.report.claims.bench import Bench
from dgal_bench.report.claims.judge import Judged, judged
from dgal_bench.report.claims.paper import CLAIMS, Claim
from dgal_bench.report.times import Counted, less, whole

BY_POSITION = "strategy.restrict.tie_break=position"
REPRESENTATION = "representation.seed="


@dataclass(frozen=True)
class Choice:
    """``here`` what the verdicts rest on, ``else_`` the other way.

    ``stands_for`` says of a bench which variant stands in whose place there; ``timed``: only seconds change.
    """

    title: str
    here: str
    else_: str
    stands_for: Callable[[Bench], Mapping[str, str]] = lambda bench: {}
    counted: Counted = whole
    shared: bool = False
    timed: bool = False
    concerns: frozenset[str] = frozenset()
    """Of a timed choice the strategies whose seconds change."""

    def other(self, bench: Bench) -> Bench | None:
        """The bench under the other choice; None where nothing of it was run."""
        stands_for = dict(self.stands_for(bench))
        if not self.timed and not stands_for:
            return None
        return bench.both_ways(stands_for, self.counted, self.shared)

    def touches(self, claim: Claim, bench: Bench) -> bool:
        """Whether a part of the claim rests on what changes."""
        changed = self.concerns if self.timed else frozenset(self.stands_for(bench))
        return any(part.strategies & changed and (part.timed or not self.timed) for part in claim.parts)


def _with(suffix: str) -> Callable[[Bench], Mapping[str, str]]:
    """Every strategy that was run with this setting, too."""

    def found(bench: Bench) -> Mapping[str, str]:
        names = [label.removesuffix(f"+{suffix}") for label in bench.group.strategies if label.endswith(f"+{suffix}")]
        return {name: f"{name}+{suffix}" for name in names if bench.cells(name)}

    return found


def _matched(bench: Bench) -> Mapping[str, str]:
    pairs = {"seals": "seals_matched", "vae_seals": "vae_seals_matched"}
    return {one: other for one, other in pairs.items() if bench.cells(one) and bench.cells(other)}


_ON_NEIGHBOURS = frozenset({"seals"})
_RESTING = frozenset({"dgmg", "dglc", "dgbadge", "dgcoreset", "vae_seals"})


def choices(benches: Sequence[Bench]) -> list[Choice]:
    """Those that are known beforehand, and one for each other representation that was run."""
    suffixes = sorted(
        {
            label.partition("+")[2]
            for bench in benches
            for label in bench.group.strategies
            if label.partition("+")[2].startswith(REPRESENTATION)
        }
    )
    return [
        Choice(
            "Ties of the diffusion", "broken by a seeded hash", "by position, as a sort would", _with(BY_POSITION)
        ),
        Choice(
            "How many candidates SEALS has", "seals_k = 100 neighbours of every label", "as many as DGMG", _matched
        ),
        Choice(
            "What of SEALS' query is timed", "all of it", "without embedding the pool and indexing it again",
            counted=less("embed", "index"), timed=True, concerns=_ON_NEIGHBOURS,
        ),
        Choice(
            "What of GANVAE's query is timed", "all of it", "without training the adversary",
            counted=less("aux_train"), timed=True, concerns=frozenset({"ganvae"}),
        ),
        Choice(
            "The one-off cost", "in no query", "VAE and graph shared out over the run's queries",
            shared=True, timed=True, concerns=_RESTING,
        ),
        *(
            Choice("The representation", "the one of seed 0", suffix.replace(REPRESENTATION, "of seed "), _with(suffix))
            for suffix in suffixes
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class BothWays:
    """A claim on one data set, judged under both choices."""

    choice: Choice
    bench: str
    here: Judged
    other: Judged

    @property
    def verdicts(self) -> tuple[str, str]:
        return self.here.by_bench[self.bench], self.other.by_bench[self.bench]

    @property
    def changed(self) -> bool:
        return len(set(self.verdicts)) > 1


@dataclass(frozen=True)
class Weighed:
    """A choice with every claim that it touches, on the data sets where both ways were run."""

    choice: Choice
    pairs: Sequence[BothWays] = field(default_factory=list)


def weighed(benches: Sequence[Bench]) -> list[Weighed]:
    """Every choice, those too that nothing was run for.

    Both ways a claim is judged on that data set alone, with what only was run on both sides.
    """
    return [
        Weighed(choice, [pair for bench in benches for pair in _pairs(choice, bench)]) for choice in choices(benches)
    ]


def _pairs(choice: Choice, bench: Bench) -> Iterator[BothWays]:
    """The claims that come to something else under the other choice, in a verdict or in a number."""
    other = choice.other(bench)
    if other is None:
        return
    for claim in CLAIMS:
        if choice.touches(claim, bench):
            here, there = judged(claim, [bench]), judged(claim, [other])
            if any(a.effect != b.effect for a, b in zip(here.findings, there.findings, strict=True) if b.effect):
                yield BothWays(choice, bench.name, here, there)
