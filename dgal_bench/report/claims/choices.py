"""The choices that could change the paper's conclusion, shown both ways: claims judged again under the other one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dgal_bench.report.claims.bench import Bench
from dgal_bench.report.claims.judge import Judged, judged
from dgal_bench.report.claims.paper import CLAIMS, Claim, Part
from dgal_bench.report.times import Counted, less, whole

BY_POSITION = "strategy.restrict.tie_break=position"
REPRESENTATION = "representation.seed="


@dataclass(frozen=True)
class Choice:
    """``here`` what the verdicts rest on, ``else_`` the other way.

    ``stands_for`` says of a bench which variant stands in whose place there; ``timed``: only seconds change.
    ``concerns``: whom the choice is about. A part about several of them is judged where all have a variant.
    """

    title: str
    here: str
    else_: str
    concerns: frozenset[str]
    stands_for: Callable[[Bench], Mapping[str, str]] = lambda bench: {}
    counted: Counted = whole
    shared: bool = False
    timed: bool = False

    def touched(self, claim: Claim, bench: Bench) -> tuple[Part, ...]:
        """The parts of the claim that rest on what changes, and on nothing that should change and does not."""
        if self.timed:
            return tuple(part for part in claim.parts if part.timed and part.strategies & self.concerns)
        changed = frozenset(self.stands_for(bench))
        return tuple(
            part for part in claim.parts if part.strategies & changed and part.strategies & self.concerns <= changed
        )


def _with(suffix: str) -> Callable[[Bench], Mapping[str, str]]:
    """Every strategy that was run with this setting, too."""

    def found(bench: Bench) -> Mapping[str, str]:
        names = [label.removesuffix(f"+{suffix}") for label in bench.group.strategies if label.endswith(f"+{suffix}")]
        return {name: f"{name}+{suffix}" for name in names if bench.cells(name)}

    return found


def _matched(bench: Bench) -> Mapping[str, str]:
    pairs = {"seals": "seals_matched", "vae_seals": "vae_seals_matched"}
    return {one: other for one, other in pairs.items() if bench.cells(one) and bench.cells(other)}


_DIFFUSING = frozenset({"dgmg", "dglc", "dgbadge", "dgcoreset"})
_RESTING = _DIFFUSING | {"vae_seals"}


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
            "Ties of the diffusion", "broken by a seeded hash", "by position, as a sort would", _DIFFUSING,
            _with(BY_POSITION),
        ),
        Choice(
            "How many candidates SEALS has", "seals_k = 100 neighbours of every label", "as many as DGMG",
            frozenset({"seals", "vae_seals"}), _matched,
        ),
        Choice(
            "What of SEALS' query is timed", "all of it", "without embedding the pool and indexing it again",
            frozenset({"seals"}), counted=less("embed", "index"), timed=True,
        ),
        Choice(
            "What of GANVAE's query is timed", "all of it", "without training the adversary",
            frozenset({"ganvae"}), counted=less("aux_train"), timed=True,
        ),
        Choice(
            "The one-off cost", "in no query", "VAE and graph shared out over the run's queries", _RESTING,
            shared=True, timed=True,
        ),
        *(
            Choice(
                "The representation", "the rows' own", suffix.replace(REPRESENTATION, "that of seed "), _RESTING,
                _with(suffix),
            )
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

    Both ways a claim is judged on that data set alone, on the seeds that both have, in the parts that the choice
    touches; Holm's correction is for those.
    """
    known = choices(benches)
    return [Weighed(choice, [pair for bench in benches for pair in _pairs(choice, bench)]) for choice in known]


def _pairs(choice: Choice, bench: Bench) -> Iterator[BothWays]:
    """The claims that come to something else under the other choice, in a verdict or in a number."""
    here, other = bench.both_ways(choice.stands_for(bench), choice.counted, choice.shared)
    for claim in CLAIMS:
        if parts := choice.touched(claim, bench):
            alone = replace(claim, parts=parts)
            pair = BothWays(choice, bench.name, judged(alone, [here]), judged(alone, [other]))
            sides = zip(pair.here.findings, pair.other.findings, strict=True)
            if any(a.effect != b.effect for a, b in sides if a.effect and b.effect):
                yield pair
