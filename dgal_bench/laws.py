"""The laws that every strategy keeps: our tests hold all strategies to them, ``dgal-bench check`` a user's own.

A law takes a lab and a strategy's name, asks the strategy on a practice cell (200 digits, an untrained network) and
raises LawError where it finds a breach.
"""

import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dgal_bench import plugins
from dgal_bench.clock import Stopwatch
from dgal_bench.compose import compose
from dgal_bench.config import RunConfig
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.errors import StrategyError
from dgal_bench.graph.transition import GRAPH_ARRAYS
from dgal_bench.lab import Cell, Lab, open_lab
from dgal_bench.loop import run_cell
from dgal_bench.models.predict import Predictor
from dgal_bench.record import PHASES, RoundRecord, choice, read_cell
from dgal_bench.recorder import Recorder
from dgal_bench.strategies import Selection, resolved

BATCH = 5
"""The phases of a query that a row may hold."""

PRACTICE = (
    "representation.threads=1",
    "dataset.pool_size=200",
    "dataset.test_size=60",
    "restricted_size=20",
    "adversary_steps=2",
)


class LawError(Exception):
    """What was found, in one line."""


@cache
def practice(strategy: str, *overrides: str) -> RunConfig:
    """Two queries of five on 200 digits, PCA instead of a VAE: a cell takes a third of a second."""
    choices = {"dataset": "digits", "representation": "pca", "profile": "smoke", "strategy": strategy}
    config = compose(choices, [*PRACTICE, *overrides])
    return replace(config, strategy=resolved(config.strategy))


def practice_lab(cache_root: Path) -> Lab:
    return open_lab(practice("random"), Path("digits need none"), cache_root, lambda what, done, of: None)


class Asked:
    """One query of a practice cell, with the clock and the counter that belong to it."""

    def __init__(self, lab: Lab, strategy: str, seed: int = 0, n_labeled: int = 12, round_: int = 1) -> None:
        self.cell = Cell.of(practice(strategy, f"initial_size={n_labeled}", f"seed={seed}"), lab)
        first = initial_set(lab.data.labels, lab.data.n_classes, n_labeled, seed)
        self.pool = Pool(lab.data.size, lab.data.n_classes, first, lab.data.labels[first])
        self.clock = Stopwatch(lab.device)
        data = self.cell.datamodule(self.pool, round_)
        self.predict = Predictor(self.cell.new_module(round_), data, lab.device, self.clock)
        self.query = self.cell.query(self.pool, self.predict, self.clock, round_)
        self.when = f"with {n_labeled} labels and seed {seed}"

    def select(self) -> Selection:
        with self.clock.running():
            return self.cell.strategy.select(self.query, BATCH)


def full_batch(lab: Lab, strategy: str) -> None:
    """With one label, with some, and with no more points left than the batch needs."""
    for n_labeled in (1, 12, lab.data.size - BATCH):
        for seed in (0, 1, 2):
            asked = Asked(lab, strategy, seed, n_labeled)
            try:
                asked.pool.check(asked.select().indices, BATCH)
            except StrategyError as error:
                raise LawError(f"{asked.when}: {error}") from error


def candidates_are_unlabeled(lab: Lab, strategy: str) -> None:
    for n_labeled in (1, 12, lab.data.size - BATCH):
        asked = Asked(lab, strategy, n_labeled=n_labeled)
        candidates = asked.cell.strategy.restrict(asked.query)
        try:
            asked.pool.check(candidates, len(candidates) if isinstance(candidates, torch.Tensor) else 0, "left")
        except StrategyError as error:
            raise LawError(f"{asked.when}: {error}") from error


def same_seed_same_batch(lab: Lab, strategy: str) -> None:
    batches = []
    for _ in range(2):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002, S311 - the global ones are elsewhere each time
        batches.append(Asked(lab, strategy).select().indices)
    if different := int((batches[0] != batches[1]).sum()):
        raise LawError(
            f"asked twice, {different} of {BATCH} picks differ: draw from query.rng, break ties by query.ties"
        )


def global_generators_untouched(lab: Lab, strategy: str) -> None:
    asked = Asked(lab, strategy)
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


def what_it_sees_is_unchanged(lab: Lab, strategy: str) -> None:
    asked = Asked(lab, strategy)
    graph = asked.cell.graph
    shown = {
        "query.pool.labeled": asked.pool.labeled,
        "query.pool.labels": asked.pool.labels,
        "query.images": asked.query.images,
        "the latents": lab.setup.latents,
        **{f"the graph's {part}": getattr(graph, part) for part in GRAPH_ARRAYS},
    }
    before = {name: tensor.clone() for name, tensor in shown.items()}
    asked.select()
    changed = [name for name, tensor in shown.items() if not torch.equal(tensor, before[name])]
    if changed:
        raise LawError(f"it has written into {' and '.join(changed)}: work on a copy")


def hidden_labels_make_no_difference(lab: Lab, strategy: str) -> None:
    """The same pool with every unknown label replaced: a strategy cannot tell."""
    asked = Asked(lab, strategy)
    masked = torch.full_like(lab.data.labels, lab.data.n_classes - 1)
    masked[asked.pool.labeled] = asked.pool.labels
    blind = Asked(replace(lab, data=replace(lab.data, labels=masked)), strategy)
    blind.query = replace(blind.query, pool=asked.pool)
    if not torch.equal(asked.select().indices, blind.select().indices):
        raise LawError("with the labels of unlabeled points replaced it picks others: it has seen them")


def phases_sum_to_the_total(lab: Lab, strategy: str) -> None:
    """Within 2 % or 0.2 ms; the median of several, since another process may cut in between two readings."""
    gaps = []
    for _ in range(5):
        asked = Asked(lab, strategy)
        asked.select()
        total, parts = asked.clock.total, sum(asked.clock.seconds.values())
        gaps.append(abs(total - parts) - max(0.02 * total, 2e-4))
        if unknown := sorted(asked.clock.seconds.keys() - PHASES):
            raise LawError(f"phase '{unknown[0]}' is not one of a row's: {', '.join(sorted(PHASES))}")
    if statistics.median(gaps) > 0:
        raise LawError(f"{1e3 * statistics.median(gaps):.1f} ms more than 2 % of the query are in no phase, or in two")


def goes_on_after_a_stop(lab: Lab, strategy: str) -> None:
    """A cell that is stopped after any round and goes on in a new process has the rows of one that was left alone.

    A plugin's module is run afresh for each, as a new process would.
    """
    config = practice(strategy, "rounds=3")
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole" / "seed-0.jsonl", Path(folder) / "cut" / "seed-0.jsonl"
        plugins.run_again()
        rows = run_here(lab, whole, config)
        cut.parent.mkdir()
        for kept in range(1, 3):
            cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[: 1 + kept]))
            plugins.run_again()
            for round_, (one, other) in enumerate(zip(rows, run_here(lab, cut, config), strict=True)):
                if choice(one) != choice(other):
                    raise LawError(
                        f"stopped after round {kept - 1}, it goes on to another round {round_} than undisturbed: it "
                        "keeps something between rounds that is in no row"
                    )


def run_here(lab: Lab, path: Path, config: RunConfig) -> tuple[RoundRecord, ...]:
    """Run a cell in this process; its rows as read back from the file."""
    with Recorder(path) as recorder:
        run_cell(Cell.of(config, lab), recorder, lambda record: None)
    log = read_cell(path)
    assert log is not None
    return log.records


LAWS: dict[str, Callable[[Lab, str], None]] = {
    "picks a full batch of distinct unlabeled points": full_batch,
    "restricts to distinct unlabeled points": candidates_are_unlabeled,
    "picks the same again for the same seed": same_seed_same_batch,
    "leaves the global random generators alone": global_generators_untouched,
    "changes nothing of what it is shown": what_it_sees_is_unchanged,
    "does not depend on labels it cannot know": hidden_labels_make_no_difference,
    "accounts for its seconds in the phases of a row": phases_sum_to_the_total,
    "goes on after a stop as if there had been none": goes_on_after_a_stop,
}

FIRST = (full_batch, candidates_are_unlabeled)
"""The laws without which the others say nothing."""
