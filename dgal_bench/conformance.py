"""The laws that every strategy keeps: our tests hold all strategies to them, ``dgal-bench check`` a user's own.

A law takes an experiment and a strategy's name, asks the strategy for a batch (200 digits, an untrained network) and
raises LawError where it finds a breach.
"""

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dgal_bench.config.compose import add_choice, compose, group_names
from dgal_bench.config.schema import RunConfig
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import ConfigError, StrategyError, UserError, innermost_error
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.experiment import Experiment, Run, open_experiment
from dgal_bench.graph.graph import GRAPH_ARRAYS
from dgal_bench.loop import run_loop
from dgal_bench.models.predict import Predictor
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import PHASES, RoundRecord, choice
from dgal_bench.results.writer import FileWriter
from dgal_bench.strategies import plugins, resolve_parts
from dgal_bench.strategies.base import Selection

BATCH = 5
"""The phases of a query that a row may hold."""

EXAMPLE_SETTINGS = (
    "representation.threads=1",
    "dataset.pool_size=200",
    "dataset.test_size=60",
    "restricted_size=20",
    "adversary_steps=2",
)


class LawError(Exception):
    """What was found, in one line."""


@cache
def example_config(strategy: str, *overrides: str) -> RunConfig:
    """Two queries of five on 200 digits, PCA instead of a VAE: a run takes a third of a second."""
    choices = {"dataset": "digits", "representation": "pca", "profile": "smoke", "strategy": strategy}
    config = compose(choices, [*EXAMPLE_SETTINGS, *overrides])
    return replace(config, strategy=resolve_parts(config.strategy))


def example_experiment(cache_root: Path) -> Experiment:
    return open_experiment(example_config("random"), Path("digits need none"), cache_root, lambda what, done, of: None)


class ExampleQuery:
    """One query of a practice run, with the clock and the counter that belong to it."""

    def __init__(
        self, experiment: Experiment, strategy: str, seed: int = 0, n_labeled: int = 12, round_: int = 1
    ) -> None:
        self.run = Run.of(example_config(strategy, f"initial_size={n_labeled}", f"seed={seed}"), experiment)
        first = initial_set(experiment.data.labels, experiment.data.n_classes, n_labeled, seed)
        self.pool = Pool(experiment.data.size, experiment.data.n_classes, first, experiment.data.labels[first])
        self.clock = Stopwatch(experiment.device)
        data = self.run.datamodule(self.pool, round_)
        self.predict = Predictor(self.run.new_module(round_), data, experiment.device, self.clock)
        self.query = self.run.query(self.pool, self.predict, self.clock, round_)
        self.when = f"with {n_labeled} labels and seed {seed}"

    def select(self) -> Selection:
        with self.clock.running():
            return self.run.strategy.select(self.query, BATCH)


def full_batch(experiment: Experiment, strategy: str) -> None:
    """With one label, with some, and with no more points left than the batch needs."""
    for n_labeled in (1, 12, experiment.data.size - BATCH):
        for seed in (0, 1, 2):
            asked = ExampleQuery(experiment, strategy, seed, n_labeled)
            try:
                asked.pool.check(asked.select().indices, BATCH)
            except StrategyError as error:
                raise LawError(f"{asked.when}: {error}") from error


def candidates_are_unlabeled(experiment: Experiment, strategy: str) -> None:
    for n_labeled in (1, 12, experiment.data.size - BATCH):
        asked = ExampleQuery(experiment, strategy, n_labeled=n_labeled)
        candidates = asked.run.strategy.restrict(asked.query)
        try:
            asked.pool.check(candidates, len(candidates) if isinstance(candidates, torch.Tensor) else 0, "left")
        except StrategyError as error:
            raise LawError(f"{asked.when}: {error}") from error


def same_seed_same_batch(experiment: Experiment, strategy: str) -> None:
    batches = []
    for _ in range(2):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002, S311 - the global ones are elsewhere each time
        batches.append(ExampleQuery(experiment, strategy).select().indices)
    if different := int((batches[0] != batches[1]).sum()):
        raise LawError(
            f"asked twice, {different} of {BATCH} picks differ: draw from query.rng, break ties by query.ties"
        )


def global_generators_untouched(experiment: Experiment, strategy: str) -> None:
    asked = ExampleQuery(experiment, strategy)
    before = _global_states()
    asked.select()
    moved = [name for name, state in _global_states().items() if state != before[name]]
    if moved:
        raise LawError(f"the global generator of {' and '.join(moved)} has moved: draw from query.rng")


def _global_states() -> dict[str, object]:
    _, key, *rest = np.random.get_state()  # noqa: NPY002 - the one to watch
    return {
        "random": random.getstate(),
        "numpy": (np.asarray(key).tolist(), rest),  # the key alone moves at every 624th draw only
        "torch": torch.get_rng_state().tolist(),
    }


def inputs_are_unchanged(experiment: Experiment, strategy: str) -> None:
    asked = ExampleQuery(experiment, strategy)
    graph = asked.run.graph
    shown = {
        "query.pool.labeled": asked.pool.labeled,
        "query.pool.labels": asked.pool.labels,
        "query.images": asked.query.images,
        "the latents": experiment.prepared.features,
        **{f"the graph's {part}": getattr(graph, part) for part in GRAPH_ARRAYS},
    }
    before = {name: tensor.clone() for name, tensor in shown.items()}
    asked.select()
    changed = [name for name, tensor in shown.items() if not torch.equal(tensor, before[name])]
    if changed:
        raise LawError(f"it has written into {' and '.join(changed)}: work on a copy")


def hidden_labels_make_no_difference(experiment: Experiment, strategy: str) -> None:
    """The same pool with every unknown label replaced: a strategy cannot tell."""
    asked = ExampleQuery(experiment, strategy)
    masked = torch.full_like(experiment.data.labels, experiment.data.n_classes - 1)
    masked[asked.pool.labeled] = asked.pool.labels
    blind = ExampleQuery(replace(experiment, data=replace(experiment.data, labels=masked)), strategy)
    blind.query = replace(blind.query, pool=asked.pool)
    if not torch.equal(asked.select().indices, blind.select().indices):
        raise LawError("with the labels of unlabeled points replaced it picks others: it has seen them")


def phases_sum_to_the_total(experiment: Experiment, strategy: str) -> None:
    """Within 2 % or 0.2 ms; the median of several, since another process may cut in between two readings."""
    gaps = []
    for _ in range(5):
        asked = ExampleQuery(experiment, strategy)
        asked.select()
        total, parts = asked.clock.total, sum(asked.clock.seconds.values())
        gaps.append(abs(total - parts) - max(0.02 * total, 2e-4))
        if unknown := sorted(asked.clock.seconds.keys() - PHASES):
            raise LawError(f"phase '{unknown[0]}' is not one of a row's: {', '.join(sorted(PHASES))}")
    if statistics.median(gaps) > 0:
        raise LawError(f"{1e3 * statistics.median(gaps):.1f} ms more than 2 % of the query are in no phase, or in two")


def resume_gives_the_same_rows(experiment: Experiment, strategy: str) -> None:
    """A run that is stopped after any round and goes on in a new process has the rows of one that was left alone.

    A plugin's module is run afresh for each, as a new process would.
    """
    config = example_config(strategy, "rounds=3")
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole" / "seed-0.jsonl", Path(folder) / "cut" / "seed-0.jsonl"
        plugins.reload_all()
        rows = run_in_process(experiment, whole, config)
        cut.parent.mkdir()
        for kept in range(1, 3):
            cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[: 1 + kept]))
            plugins.reload_all()
            for round_, (one, other) in enumerate(zip(rows, run_in_process(experiment, cut, config), strict=True)):
                if choice(one) != choice(other):
                    raise LawError(
                        f"stopped after round {kept - 1}, it goes on to another round {round_} than undisturbed: it "
                        "keeps something between rounds that is in no row"
                    )


def run_in_process(experiment: Experiment, path: Path, config: RunConfig) -> tuple[RoundRecord, ...]:
    """Run a run in this process; its rows as read back from the file."""
    with FileWriter(path) as writer:
        run_loop(Run.of(config, experiment), writer, lambda record: None)
    log = read_run(path)
    assert log is not None
    return log.records


LAWS: dict[str, Callable[[Experiment, str], None]] = {
    "picks a full batch of distinct unlabeled points": full_batch,
    "restricts to distinct unlabeled points": candidates_are_unlabeled,
    "picks the same again for the same seed": same_seed_same_batch,
    "leaves the global random generators alone": global_generators_untouched,
    "changes nothing of what it is shown": inputs_are_unchanged,
    "does not depend on labels it cannot know": hidden_labels_make_no_difference,
    "accounts for its seconds in the phases of a row": phases_sum_to_the_total,
    "goes on after a stop as if there had been none": resume_gives_the_same_rows,
}

FIRST = (full_batch, candidates_are_unlabeled)
"""The laws without which the others say nothing."""


# ``dgal-bench check``: strategies before the laws, and what is found said in a table.


@dataclass(frozen=True)
class CheckResult:
    """How a strategy stands to a law; ``broken`` says how it broke it, None where it holds."""

    strategy: str
    law: str
    broken: str | None


def check_strategy(experiment: Experiment, strategy: str) -> Iterator[CheckResult]:
    """A strategy before every law; an error of its own counts as a breach.

    One that does not even pick and restrict as it must is not asked further: it would break everything.
    """
    for law, holds in LAWS.items():
        broken = None
        try:
            holds(copy_experiment(experiment), strategy)  # what a cheat writes into must not reach the next law
        except (LawError, UserError) as error:
            broken = " ".join(str(error).split())
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises is a finding
            broken = innermost_error(error)
        yield CheckResult(strategy, law, broken)
        if broken and holds in FIRST:
            return


def copy_experiment(experiment: Experiment) -> Experiment:
    """An experiment that shares no tensor of images, labels, latents or graph with this one."""
    data = {name: getattr(experiment.data, name).clone() for name in ("images", "labels", "test_images", "test_labels")}
    graph = experiment.prepared.graph
    parts = {name: getattr(graph, name).clone() for name in ("indptr", "indices", "weights", "degrees")}
    prepared = replace(
        experiment.prepared, graph=replace(graph, **parts), features=experiment.prepared.features.clone()
    )
    return replace(experiment, data=replace(experiment.data, **data), prepared=prepared)


def check_plugins(references: Sequence[str]) -> list[CheckResult]:
    """Every strategy of the plugins before every law; parts in no sentence of theirs are put into one.

    Raises:
        ConfigError: a plugin cannot be loaded, or a part needs settings and is in no sentence.
    """
    silence_lightning()
    names = [name for path in plugins.install(references) for name in plugin_strategies(plugins.INSTALLED[path])]
    for name in names:
        example_config(name)  # a sentence that makes no sense is a mistake, not a broken law
    with tempfile.TemporaryDirectory() as folder:
        experiment = example_experiment(Path(folder))
        return [verdict for name in names for verdict in check_strategy(experiment, name)]


def plugin_strategies(plugin: plugins.Plugin) -> list[str]:
    """The strategies of a plugin, and one for each part that is in none of them: with margin, or on everything."""
    names = list(plugin.strategies)
    spoken = {role: {s[role]["kind"] for s in plugin.strategies.values()} for role in ("restrict", "acquire")}
    for kind in sorted(plugin.restrictions.keys() - spoken["restrict"]):
        names.append(_single_part(kind, {"restrict": {"kind": kind}, "acquire": {"kind": "margin"}}))
    for kind in sorted(plugin.acquisitions.keys() - spoken["acquire"]):
        names.append(_single_part(kind, {"restrict": {"kind": "everything"}, "acquire": {"kind": kind}}))
    return names


def _single_part(kind: str, sentence: dict[str, dict[str, str]]) -> str:
    name = f"({kind})"
    if name not in group_names("strategy"):
        add_choice("strategy", name, {"strategy": {"name": name, **sentence}})
    try:
        example_config(name)
    except ConfigError as error:
        raise ConfigError(f"'{kind}' is in no strategy of its file and cannot stand alone: {error}") from error
    return name


def check_table(verdicts: Sequence[CheckResult]) -> str:
    """A line for each strategy and law, the breach below it, and a count."""
    lines = []
    for strategy in dict.fromkeys(verdict.strategy for verdict in verdicts):
        lines.append(strategy)
        for verdict in verdicts:
            if verdict.strategy == strategy:
                lines.append(f"  {'BROKEN' if verdict.broken else 'ok':7} {verdict.law}")
                lines += [f"          {verdict.broken}"] if verdict.broken else []
        untried = len(LAWS) - sum(verdict.strategy == strategy for verdict in verdicts)
        lines += [f"  -       {untried} more laws, not tried before this is mended"] if untried else []
    n_broken = sum(verdict.broken is not None for verdict in verdicts)
    return "\n".join([*lines, f"{len(verdicts) - n_broken} of {len(verdicts)} laws hold, {n_broken} broken"])
