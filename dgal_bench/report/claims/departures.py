"""Where the settings of a data set's rows differ from the paper's, and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from dgal_bench.compose import compose
from dgal_bench.config import differences, to_dict
from dgal_bench.errors import UserError
from dgal_bench.report.claims.bench import Bench
from dgal_bench.strategies import resolved

REASONS: Mapping[str, str] = {
    "representation.max_epochs": "on a CPU the paper's 300 epochs of 60,000 images take hours",
    "representation.seed": "one representation per seed tells more than one for all, as the paper has it",
    "adversary_steps": "on a CPU 100 epochs of the adversary a round take days",
    "strategy.acquire.max_steps": "on a CPU 100 epochs of the adversary a round take days",
    "training.max_epochs": "so that many cells take minutes",
    "rounds": "the run asked for it",
    "restricted_size": "the run asked for it",
}
"""By setting; one that is not here was set by the run's own command."""

LEFT_OPEN: Sequence[str] = (
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


def departures(bench: Bench) -> list[str]:
    """``representation.max_epochs: 15 instead of 300 (...)`` for each; one line where the paper has no setting."""
    if not bench.of_the_paper:
        return [f"{bench.group.dataset} is not one of the paper's data sets: every setting is ours."]
    found: dict[str, str] = {}
    for label in bench.group.strategies:
        logs = list(bench.cells(label).values()) if "+" not in label else []  # a suffix is a departure by name
        for log in logs[:1]:  # the seeds of a strategy have one configuration
            found |= _against_paper(log.header["config"])
    return [f"{name}: {change}" for name, change in sorted(found.items())]


def _against_paper(config: Mapping[str, Any]) -> dict[str, str]:
    """By setting what differs; of a setting that the row's version did not have nothing is said."""
    dataset, strategy = config["dataset"]["name"], config["strategy"]["name"]
    try:
        made = compose({"dataset": dataset, "strategy": strategy, "profile": "paper", "representation": "default"})
        paper = to_dict(made) | {"strategy": to_dict(resolved(made.strategy))}
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
