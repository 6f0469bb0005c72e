"""What verdicts depend on: settings that differ from the paper's, and claims judged under both ways of each choice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dgal_bench.config.compose import compose
from dgal_bench.config.schema import flatten, to_dict
from dgal_bench.core.errors import UserError
from dgal_bench.report.claims.evidence import Evidence
from dgal_bench.report.claims.judge import JudgedClaim, judge_claim
from dgal_bench.report.claims.paper import CLAIMS, Claim, ClaimPart
from dgal_bench.report.times import CountSeconds, all_phases, without_phases
from dgal_bench.strategies import resolve_parts

REASONS: Mapping[str, str] = {
    "representation.max_epochs": "on a CPU the paper's 300 epochs of 60,000 images take hours",
    "representation.seed": "one representation per seed tells more than one for all, as the paper has it",
    "adversary_steps": "on a CPU 100 epochs of the adversary a round take days",
    "strategy.acquire.max_steps": "on a CPU 100 epochs of the adversary a round take days",
    "training.max_epochs": "so that many runs take minutes",
    "rounds": "the run asked for it",
    "restricted_size": "the run asked for it",
}
"""Why a setting differs from the paper's; one that is not listed was set by the run's command."""

NOT_IN_PAPER: Sequence[str] = (
    "K = 20 neighbours: the paper does not say how many, and 10 is the other common value.",
    "SEALS takes 100 neighbours of every label, its authors' value; the paper does not say how many.",
    "Ties, which are thousands early on, are broken by a seeded hash: the paper does not say, and a sort would take "
    "the first of the data set.",
    "Early stopping looks at the training loss: Table 1 leaves no validation set.",
    "The VAE's error is summed over pixels and its KL over latents: averaging one of them makes the latents collapse.",
    "The labeled rows of the diffusion are clamped in every step, and the weights are symmetrised.",
)
"""What the paper leaves open, on all data sets."""

_CIRCUMSTANCES = ("seed", "profile", "threads", "device", "representation.threads", "predict_batch_size")
"""Settings of how rows are made, not of what is measured."""


def setting_differences(evidence: Evidence) -> list[str]:
    """``representation.max_epochs: 15 instead of 300 (...)`` for each; one line where the paper has no setting."""
    if not evidence.of_the_paper:
        return [f"{evidence.group.dataset} is not one of the paper's data sets: every setting is ours."]
    found: dict[str, str] = {}
    for label in evidence.group.strategies:
        logs = list(evidence.runs(label).values()) if "+" not in label else []  # a suffix names its difference
        for log in logs[:1]:  # the seeds of a strategy have one configuration
            found |= _against_paper(log.header["config"])
    return [f"{name}: {change}" for name, change in sorted(found.items())]


def _against_paper(config: Mapping[str, Any]) -> dict[str, str]:
    """Differences by setting; a setting that the row's version did not have is left out."""
    dataset, strategy = config["dataset"]["name"], config["strategy"]["name"]
    try:
        paper_config = compose(
            {"dataset": dataset, "strategy": strategy, "profile": "paper", "representation": "default"}
        )
        paper = flatten(to_dict(paper_config) | {"strategy": to_dict(resolve_parts(paper_config.strategy))})
    except UserError:
        return {strategy: f"no strategy of the package on {dataset}: it has no setting of the paper's"}
    return {
        name: f"{ours!r} instead of {paper[name]!r} ({REASONS.get(name, 'set by the command of the run')})"
        for name, ours in flatten(config).items()
        if name in paper and ours != paper[name] and not name.startswith(_CIRCUMSTANCES)
    }


BY_POSITION = "strategy.restrict.tie_break=position"
REPRESENTATION = "representation.seed="


@dataclass(frozen=True)
class AnalysisChoice:
    """A choice of the analysis: ``here`` as the verdicts have it, and its ``alternative``.

    ``variants`` names for some evidence the variant of each strategy under the alternative; ``timed``: only seconds
    change. The choice is about ``strategies``; a part with several of them is judged where all have a variant.
    """

    title: str
    here: str
    alternative: str
    strategies: frozenset[str]
    variants: Callable[[Evidence], Mapping[str, str]] = lambda evidence: {}
    count_seconds: CountSeconds = all_phases
    share_setup: bool = False
    timed: bool = False

    def affected_parts(self, claim: Claim, evidence: Evidence) -> tuple[ClaimPart, ...]:
        """The parts that use a changed strategy, and none of ``strategies`` without a variant."""
        if self.timed:
            return tuple(part for part in claim.parts if part.timed and part.strategies & self.strategies)
        changed = frozenset(self.variants(evidence))
        return tuple(
            part for part in claim.parts if part.strategies & changed and part.strategies & self.strategies <= changed
        )


def _with(suffix: str) -> Callable[[Evidence], Mapping[str, str]]:
    """The variants with this setting, of every strategy that was run both with and without it."""

    def found(evidence: Evidence) -> Mapping[str, str]:
        names = [
            label.removesuffix(f"+{suffix}") for label in evidence.group.strategies if label.endswith(f"+{suffix}")
        ]
        return {name: f"{name}+{suffix}" for name in names if evidence.runs(name)}

    return found


def _matched_strategies(evidence: Evidence) -> Mapping[str, str]:
    pairs = {"seals": "seals_matched", "vae_seals": "vae_seals_matched"}
    return {one: other for one, other in pairs.items() if evidence.runs(one) and evidence.runs(other)}


_DIFFUSION = frozenset({"dgmg", "dglc", "dgbadge", "dgcoreset"})
_VAE_BASED = _DIFFUSION | {"vae_seals"}


def analysis_choices(all_evidence: Sequence[Evidence]) -> list[AnalysisChoice]:
    """The fixed choices, and one for each other representation that was run."""
    suffixes = sorted(
        {
            label.partition("+")[2]
            for evidence in all_evidence
            for label in evidence.group.strategies
            if label.partition("+")[2].startswith(REPRESENTATION)
        }
    )
    return [
        AnalysisChoice(
            "Ties of the diffusion", "broken by a seeded hash", "by position, as a sort would", _DIFFUSION,
            _with(BY_POSITION),
        ),
        AnalysisChoice(
            "How many candidates SEALS has", "seals_k = 100 neighbours of every label", "as many as DGMG",
            frozenset({"seals", "vae_seals"}), _matched_strategies,
        ),
        AnalysisChoice(
            "What of SEALS' query is timed", "all of it", "without embedding the pool and indexing it again",
            frozenset({"seals"}), count_seconds=without_phases("embed", "index"), timed=True,
        ),
        AnalysisChoice(
            "What of GANVAE's query is timed", "all of it", "without training the adversary",
            frozenset({"ganvae"}), count_seconds=without_phases("aux_train"), timed=True,
        ),
        AnalysisChoice(
            "The one-off cost", "in no query", "VAE and graph shared out over the run's queries", _VAE_BASED,
            share_setup=True, timed=True,
        ),
        *(
            AnalysisChoice(
                "The representation", "the rows' own", suffix.replace(REPRESENTATION, "that of seed "), _VAE_BASED,
                _with(suffix),
            )
            for suffix in suffixes
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class BothWays:
    """A claim on one data set, judged under both choices."""

    choice: AnalysisChoice
    dataset: str
    here: JudgedClaim
    other: JudgedClaim

    @property
    def verdicts(self) -> tuple[str, str]:
        return self.here.by_dataset[self.dataset], self.other.by_dataset[self.dataset]

    @property
    def changed(self) -> bool:
        return len(set(self.verdicts)) > 1


@dataclass(frozen=True)
class ChoiceEffect:
    """A choice with every claim that it affects, on the data sets where both ways were run."""

    choice: AnalysisChoice
    pairs: Sequence[BothWays] = field(default_factory=list)


def choice_effects(all_evidence: Sequence[Evidence]) -> list[ChoiceEffect]:
    """Every choice, also where its alternative was not run.

    Both ways a claim is judged on one data set, on the seeds that both have, in the parts that the choice affects;
    Holm's correction is for those.
    """
    known = analysis_choices(all_evidence)
    return [
        ChoiceEffect(choice, [pair for evidence in all_evidence for pair in _pairs(choice, evidence)])
        for choice in known
    ]


def _pairs(choice: AnalysisChoice, evidence: Evidence) -> Iterator[BothWays]:
    """The claims with another effect under the other choice."""
    here, other = evidence.both_ways(choice.variants(evidence), choice.count_seconds, choice.share_setup)
    for claim in CLAIMS:
        if parts := choice.affected_parts(claim, evidence):
            alone = replace(claim, parts=parts)
            pair = BothWays(choice, evidence.name, judge_claim(alone, [here]), judge_claim(alone, [other]))
            sides = zip(pair.here.findings, pair.other.findings, strict=True)
            if any(a.effect != b.effect for a, b in sides if a.effect and b.effect):
                yield pair
