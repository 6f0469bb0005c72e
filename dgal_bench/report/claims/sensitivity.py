"""The choices that could change the paper's conclusion, shown both ways: claims judged again under the other one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dgal_bench.config.compose import compose
from dgal_bench.config.schema import differences, to_dict
from dgal_bench.core.errors import UserError
from dgal_bench.report.claims.evidence import Evidence
from dgal_bench.report.claims.judge import JudgedClaim, judge_claim
from dgal_bench.report.claims.paper import CLAIMS, Claim, ClaimPart
from dgal_bench.report.times import Counted, all_phases, without_phases
from dgal_bench.strategies import resolve_parts

# Where the settings of a data set's rows differ from the paper's, and why.


REASONS: Mapping[str, str] = {
    "representation.max_epochs": "on a CPU the paper's 300 epochs of 60,000 images take hours",
    "representation.seed": "one representation per seed tells more than one for all, as the paper has it",
    "adversary_steps": "on a CPU 100 epochs of the adversary a round take days",
    "strategy.acquire.max_steps": "on a CPU 100 epochs of the adversary a round take days",
    "training.max_epochs": "so that many runs take minutes",
    "rounds": "the run asked for it",
    "restricted_size": "the run asked for it",
}
"""By setting; one that is not here was set by the run's own command."""

NOT_IN_PAPER: Sequence[str] = (
    "K = 20 neighbours: the paper does not say how many, and 10 is the other common value.",
    "SEALS takes 100 neighbours of every label, its authors' value; the paper does not say how many.",
    "Ties, which are thousands early on, are broken by a seeded hash: the paper does not say, and a sort would take "
    "the first of the data set.",
    "Early stopping looks at the training loss: Table 1 leaves no validation set.",
    "The VAE's error is summed over pixels and its KL over latents: averaging one of them makes the latents collapse.",
    "The labeled rows of the diffusion are clamped in every step, and the weights are symmetrised.",
)
"""What the paper leaves open, everywhere alike."""

_CIRCUMSTANCES = ("seed", "profile", "threads", "device", "representation.threads", "predict_batch_size")
"""Settings that say who made the rows, not what."""


def setting_differences(bench: Evidence) -> list[str]:
    """``representation.max_epochs: 15 instead of 300 (...)`` for each; one line where the paper has no setting."""
    if not bench.of_the_paper:
        return [f"{bench.group.dataset} is not one of the paper's data sets: every setting is ours."]
    found: dict[str, str] = {}
    for label in bench.group.strategies:
        logs = list(bench.runs(label).values()) if "+" not in label else []  # a suffix is a departure by name
        for log in logs[:1]:  # the seeds of a strategy have one configuration
            found |= _against_paper(log.header["config"])
    return [f"{name}: {change}" for name, change in sorted(found.items())]


def _against_paper(config: Mapping[str, Any]) -> dict[str, str]:
    """By setting what differs; of a setting that the row's version did not have nothing is said."""
    dataset, strategy = config["dataset"]["name"], config["strategy"]["name"]
    try:
        made = compose({"dataset": dataset, "strategy": strategy, "profile": "paper", "representation": "default"})
        paper = to_dict(made) | {"strategy": to_dict(resolve_parts(made.strategy))}
    except UserError:
        return {strategy: f"no strategy of the package on {dataset}: it has no setting of the paper's"}
    changes = {}
    for line in differences(_shared(paper, config), _shared(config, paper)):
        name, _, change = line.partition(": ")
        theirs, _, ours = change.partition(" -> ")
        if not name.startswith(_CIRCUMSTANCES):
            changes[name] = f"{ours} instead of {theirs} ({REASONS.get(name, 'set by the command of the run')})"
    return changes


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of one the other has, too."""
    return {
        key: _shared(value, other[key]) if isinstance(value, Mapping) and isinstance(other[key], Mapping) else value
        for key, value in one.items()
        if key in other
    }


BY_POSITION = "strategy.restrict.tie_break=position"
REPRESENTATION = "representation.seed="


@dataclass(frozen=True)
class AnalysisChoice:
    """``here`` what the verdicts rest on, ``else_`` the other way.

    ``stands_for`` says of a bench which variant stands in whose place there; ``timed``: only seconds change.
    ``concerns``: whom the choice is about. A part about several of them is judged where all have a variant.
    """

    title: str
    here: str
    else_: str
    concerns: frozenset[str]
    stands_for: Callable[[Evidence], Mapping[str, str]] = lambda bench: {}
    counted: Counted = all_phases
    shared: bool = False
    timed: bool = False

    def touched(self, claim: Claim, bench: Evidence) -> tuple[ClaimPart, ...]:
        """The parts of the claim that rest on what changes, and on nothing that should change and does not."""
        if self.timed:
            return tuple(part for part in claim.parts if part.timed and part.strategies & self.concerns)
        changed = frozenset(self.stands_for(bench))
        return tuple(
            part for part in claim.parts if part.strategies & changed and part.strategies & self.concerns <= changed
        )


def _with(suffix: str) -> Callable[[Evidence], Mapping[str, str]]:
    """Every strategy that was run with this setting, too."""

    def found(bench: Evidence) -> Mapping[str, str]:
        names = [label.removesuffix(f"+{suffix}") for label in bench.group.strategies if label.endswith(f"+{suffix}")]
        return {name: f"{name}+{suffix}" for name in names if bench.runs(name)}

    return found


def _matched_strategies(bench: Evidence) -> Mapping[str, str]:
    pairs = {"seals": "seals_matched", "vae_seals": "vae_seals_matched"}
    return {one: other for one, other in pairs.items() if bench.runs(one) and bench.runs(other)}


_DIFFUSING = frozenset({"dgmg", "dglc", "dgbadge", "dgcoreset"})
_RESTING = _DIFFUSING | {"vae_seals"}


def analysis_choices(benches: Sequence[Evidence]) -> list[AnalysisChoice]:
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
        AnalysisChoice(
            "Ties of the diffusion", "broken by a seeded hash", "by position, as a sort would", _DIFFUSING,
            _with(BY_POSITION),
        ),
        AnalysisChoice(
            "How many candidates SEALS has", "seals_k = 100 neighbours of every label", "as many as DGMG",
            frozenset({"seals", "vae_seals"}), _matched_strategies,
        ),
        AnalysisChoice(
            "What of SEALS' query is timed", "all of it", "without embedding the pool and indexing it again",
            frozenset({"seals"}), counted=without_phases("embed", "index"), timed=True,
        ),
        AnalysisChoice(
            "What of GANVAE's query is timed", "all of it", "without training the adversary",
            frozenset({"ganvae"}), counted=without_phases("aux_train"), timed=True,
        ),
        AnalysisChoice(
            "The one-off cost", "in no query", "VAE and graph shared out over the run's queries", _RESTING,
            shared=True, timed=True,
        ),
        *(
            AnalysisChoice(
                "The representation", "the rows' own", suffix.replace(REPRESENTATION, "that of seed "), _RESTING,
                _with(suffix),
            )
            for suffix in suffixes
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class BothWays:
    """A claim on one data set, judged under both choices."""

    choice: AnalysisChoice
    bench: str
    here: JudgedClaim
    other: JudgedClaim

    @property
    def verdicts(self) -> tuple[str, str]:
        return self.here.by_bench[self.bench], self.other.by_bench[self.bench]

    @property
    def changed(self) -> bool:
        return len(set(self.verdicts)) > 1


@dataclass(frozen=True)
class ChoiceEffect:
    """A choice with every claim that it touches, on the data sets where both ways were run."""

    choice: AnalysisChoice
    pairs: Sequence[BothWays] = field(default_factory=list)


def choice_effects(benches: Sequence[Evidence]) -> list[ChoiceEffect]:
    """Every choice, those too that nothing was run for.

    Both ways a claim is judged on that data set alone, on the seeds that both have, in the parts that the choice
    touches; Holm's correction is for those.
    """
    known = analysis_choices(benches)
    return [ChoiceEffect(choice, [pair for bench in benches for pair in _pairs(choice, bench)]) for choice in known]


def _pairs(choice: AnalysisChoice, bench: Evidence) -> Iterator[BothWays]:
    """The claims that come to something else under the other choice, in a verdict or in a number."""
    here, other = bench.both_ways(choice.stands_for(bench), choice.counted, choice.shared)
    for claim in CLAIMS:
        if parts := choice.touched(claim, bench):
            alone = replace(claim, parts=parts)
            pair = BothWays(choice, bench.name, judge_claim(alone, [here]), judge_claim(alone, [other]))
            sides = zip(pair.here.findings, pair.other.findings, strict=True)
            if any(a.effect != b.effect for a, b in sides if a.effect and b.effect):
                yield pair
