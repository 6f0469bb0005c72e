"""The laws that every strategy keeps: our tests check all strategies against them, ``dgal-bench check`` a user's own.

A law takes an experiment and a strategy's name, asks the strategy for a batch (200 digits, an untrained network) and
raises LawError at a breach.
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

EXAMPLE_SETTINGS = (
    "representation.threads=1",
    "dataset.pool_size=200",
    "dataset.test_size=60",
    "restricted_size=20",
    "adversary_steps=2",
)


class LawError(Exception):
    """The breach of a law, in one line."""


@cache
def example_config(strategy: str, *overrides: str) -> RunConfig:
    """Two queries of five on 200 digits, PCA instead of a VAE: a run takes a third of a second."""
    choices = {"dataset": "digits", "representation": "pca", "profile": "smoke", "strategy": strategy}
    config = compose(choices, [*EXAMPLE_SETTINGS, *overrides])
    return replace(config, strategy=resolve_parts(config.strategy))


def example_experiment(cache_root: Path) -> Experiment:
    return open_experiment(example_config("random"), Path("digits need none"), cache_root, lambda what, done, of: None)


class ExampleQuery:
    """One query of an example run, with its clock and its counter of points scored."""

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
    """With one label, with some, and with exactly as many unlabeled points as the batch needs."""
    for n_labeled in (1, 12, experiment.data.size - BATCH):
        for seed in (0, 1, 2):
            example = ExampleQuery(experiment, strategy, seed, n_labeled)
            try:
                example.pool.check(example.select().indices, BATCH)
            except StrategyError as error:
                raise LawError(f"{example.when}: {error}") from error


def candidates_are_unlabeled(experiment: Experiment, strategy: str) -> None:
    for n_labeled in (1, 12, experiment.data.size - BATCH):
        example = ExampleQuery(experiment, strategy, n_labeled=n_labeled)
        candidates = example.run.strategy.restrict(example.query)
        try:
            example.pool.check(candidates, len(candidates) if isinstance(candidates, torch.Tensor) else 0, "left")
        except StrategyError as error:
            raise LawError(f"{example.when}: {error}") from error


def same_seed_same_batch(experiment: Experiment, strategy: str) -> None:
    batches = []
    for _ in range(2):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002, S311 - moves the global ones
        batches.append(ExampleQuery(experiment, strategy).select().indices)
    if different := int((batches[0] != batches[1]).sum()):
        raise LawError(
            f"asked twice, {different} of {BATCH} picks differ: draw from query.rng, break ties by query.ties"
        )


def global_generators_untouched(experiment: Experiment, strategy: str) -> None:
    example = ExampleQuery(experiment, strategy)
    before = _global_states()
    example.select()
    moved = [name for name, state in _global_states().items() if state != before[name]]
    if moved:
        raise LawError(f"the global generator of {' and '.join(moved)} has moved: draw from query.rng")


def _global_states() -> dict[str, object]:
    _, key, *rest = np.random.get_state()  # noqa: NPY002 - the one to check
    return {
        "random": random.getstate(),
        "numpy": (np.asarray(key).tolist(), rest),  # the key itself changes only at every 624th draw
        "torch": torch.get_rng_state().tolist(),
    }


def inputs_are_unchanged(experiment: Experiment, strategy: str) -> None:
    example = ExampleQuery(experiment, strategy)
    graph = example.run.graph
    inputs = {
        "query.pool.labeled": example.pool.labeled,
        "query.pool.labels": example.pool.labels,
        "query.images": example.query.images,
        "the features": experiment.prepared.features,
        **{f"the graph's {part}": getattr(graph, part) for part in GRAPH_ARRAYS},
    }
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    example.select()
    changed = [name for name, tensor in inputs.items() if not torch.equal(tensor, before[name])]
    if changed:
        raise LawError(f"it wrote into {' and '.join(changed)}: work on a copy")


def hidden_labels_make_no_difference(experiment: Experiment, strategy: str) -> None:
    """The same pool with every unknown label replaced: the picks must not change."""
    example = ExampleQuery(experiment, strategy)
    masked = torch.full_like(experiment.data.labels, experiment.data.n_classes - 1)
    masked[example.pool.labeled] = example.pool.labels
    blind = ExampleQuery(replace(experiment, data=replace(experiment.data, labels=masked)), strategy)
    blind.query = replace(blind.query, pool=example.pool)
    if not torch.equal(example.select().indices, blind.select().indices):
        raise LawError("with other labels on the unlabeled points it picks other points: it has seen these labels")


def phases_sum_to_the_total(experiment: Experiment, strategy: str) -> None:
    """Within 2 % or 0.2 ms; the median of several, since another process may interrupt between two readings."""
    gaps = []
    for _ in range(5):
        example = ExampleQuery(experiment, strategy)
        example.select()
        total, parts = example.clock.total, sum(example.clock.seconds.values())
        gaps.append(abs(total - parts) - max(0.02 * total, 2e-4))
        if unknown := sorted(example.clock.seconds.keys() - PHASES):
            raise LawError(f"phase '{unknown[0]}' is not one of a row's: {', '.join(sorted(PHASES))}")
    if statistics.median(gaps) > 0:
        raise LawError(f"{1e3 * statistics.median(gaps):.1f} ms more than 2 % of the query are in no phase, or in two")


def resume_gives_the_same_rows(experiment: Experiment, strategy: str) -> None:
    """A run that is stopped after any round and resumed in a new process has the rows of an undisturbed run.

    A plugin's module is executed again before each, as a new process would do.
    """
    config = example_config(strategy, "rounds=3")
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole" / "seed-0.jsonl", Path(folder) / "cut" / "seed-0.jsonl"
        plugins.reload_all()
        rows = run_in_process(experiment, whole, config)
        cut.parent.mkdir()
        for n_rows in range(1, 3):
            cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[: 1 + n_rows]))
            plugins.reload_all()
            resumed = run_in_process(experiment, cut, config)
            for round_, (row, resumed_row) in enumerate(zip(rows, resumed, strict=True)):
                if choice(row) != choice(resumed_row):
                    raise LawError(
                        f"stopped after round {n_rows - 1} and resumed, it gives another round {round_} than "
                        "undisturbed: it keeps something between rounds that is in no row"
                    )


def run_in_process(experiment: Experiment, path: Path, config: RunConfig) -> tuple[RoundRecord, ...]:
    """Execute a run in this process; returns its rows as read back from the file."""
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
"""The laws without which the others mean nothing."""


@dataclass(frozen=True)
class CheckResult:
    """Whether a strategy keeps a law; ``broken`` says how it breaks the law, None where it keeps it."""

    strategy: str
    law: str
    broken: str | None


def check_strategy(experiment: Experiment, strategy: str) -> Iterator[CheckResult]:
    """Check a strategy against every law; an error that it raises counts as a breach.

    A breach of one of the ``FIRST`` laws ends the check: the strategy would break all others too.
    """
    for law, check in LAWS.items():
        broken = None
        try:
            check(copy_experiment(experiment), strategy)  # writes must not reach the next law
        except (LawError, UserError) as error:
            broken = " ".join(str(error).split())
        except Exception as error:  # noqa: BLE001 - any error of a user's code is a breach
            broken = innermost_error(error)
        yield CheckResult(strategy, law, broken)
        if broken and check in FIRST:
            return


def copy_experiment(experiment: Experiment) -> Experiment:
    """An experiment that shares no tensor of images, labels, features or graph with this one."""
    data = {name: getattr(experiment.data, name).clone() for name in ("images", "labels", "test_images", "test_labels")}
    graph = experiment.prepared.graph
    parts = {name: getattr(graph, name).clone() for name in ("indptr", "indices", "weights", "degrees")}
    prepared = replace(
        experiment.prepared, graph=replace(graph, **parts), features=experiment.prepared.features.clone()
    )
    return replace(experiment, data=replace(experiment.data, **data), prepared=prepared)


def check_plugins(references: Sequence[str]) -> list[CheckResult]:
    """Check every strategy of the plugins; a part that is in none of their strategies is put into one.

    Raises:
        ConfigError: a plugin cannot be loaded, or a part needs settings and is in no strategy.
    """
    silence_lightning()
    names = [name for path in plugins.install(references) for name in plugin_strategies(plugins.INSTALLED[path])]
    for name in names:
        example_config(name)  # an invalid strategy is a mistake, not a broken law
    with tempfile.TemporaryDirectory() as folder:
        experiment = example_experiment(Path(folder))
        return [result for name in names for result in check_strategy(experiment, name)]


def plugin_strategies(plugin: plugins.Plugin) -> list[str]:
    """The strategies of a plugin, and one for each part that is in none of them: with margin, or on everything."""
    names = list(plugin.strategies)
    used = {role: {s[role]["kind"] for s in plugin.strategies.values()} for role in ("restrict", "acquire")}
    for kind in sorted(plugin.restrictions.keys() - used["restrict"]):
        names.append(_single_part(kind, {"restrict": {"kind": kind}, "acquire": {"kind": "margin"}}))
    for kind in sorted(plugin.acquisitions.keys() - used["acquire"]):
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


def check_table(results: Sequence[CheckResult]) -> str:
    """A line for each strategy and law, the breach below it, and a count."""
    lines = []
    for strategy in dict.fromkeys(result.strategy for result in results):
        lines.append(strategy)
        for result in results:
            if result.strategy == strategy:
                lines.append(f"  {'BROKEN' if result.broken else 'ok':7} {result.law}")
                lines += [f"          {result.broken}"] if result.broken else []
        untried = len(LAWS) - sum(result.strategy == strategy for result in results)
        lines += [f"  -       {untried} more laws, not checked before this one holds"] if untried else []
    n_broken = sum(result.broken is not None for result in results)
    return "\n".join([*lines, f"{len(results) - n_broken} of {len(results)} laws hold, {n_broken} broken"])
