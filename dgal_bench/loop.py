"""The active-learning loop of one cell: train, test, query on the clock, check, annotate, record."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from dgal_bench.arrays import Index
from dgal_bench.clock import Stopwatch
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.graph.diffusion import reached
from dgal_bench.graph.transition import Graph
from dgal_bench.identity import check_resumable
from dgal_bench.lab import Cell
from dgal_bench.models.predict import Predictor
from dgal_bench.models.task import Fit, fit, measure_accuracy, new_trainer
from dgal_bench.record import Recorder, RoundRecord, picks
from dgal_bench.seeding import isolated
from dgal_bench.strategies import Query
from dgal_bench.threads import on_threads

log = logging.getLogger(__name__)


def run_cell(
    cell: Cell, recorder: Recorder, on_round: Callable[[RoundRecord], None], jobs: int = 1, resume_anyway: bool = False
) -> None:
    """Run a cell from where its file ends: R + 1 evaluations, R queries.

    Raises:
        ResultsError: the file was made from something else (data, latents, graph, configuration, code).
    """
    with on_threads(cell.config.threads):
        pool, first = start(cell, recorder, resume_anyway)
        if first < cell.config.rounds:
            warm_up(cell, pool)
        for round_ in range(first, cell.config.rounds + 1):
            record, pool = run_round(cell, pool, round_, jobs)
            recorder.write(record)
            on_round(record)


def run_round(cell: Cell, pool: Pool, round_: int, jobs: int) -> tuple[RoundRecord, Pool]:
    """Train from scratch, test, and unless it is the last round query and annotate. Only the query is on the clock."""
    config, device = cell.config, cell.lab.device
    around = Stopwatch(device)
    data, module = cell.datamodule(pool, round_), cell.new_module(round_)
    with isolated(config.seed, "training", round_):
        trainer = new_trainer(config, device)
        with around.phase("train"):
            fitted = fit(trainer, module, data)
        with around.phase("test"):
            accuracy = measure_accuracy(trainer, module, data)
    facts = evaluation_facts(cell, pool, round_, fitted, accuracy, around, jobs)
    if round_ < config.rounds:
        clock = Stopwatch(device)
        predict = Predictor(module, data, device, clock)
        query = cell.query(pool, predict, clock, round_)
        with clock.running():
            selection = cell.strategy.select(query, config.batch_size)
        pool.check(selection.indices, config.batch_size)
        pool.check(selection.candidates, len(selection.candidates), "left")
        pool = pool.annotate(selection.indices, cell.lab.data.labels[selection.indices])  # the oracle
        facts |= query_facts(cell, query, selection.indices)
        facts |= {"n_candidates": len(selection.candidates), "n_scored": predict.n_scored}
    return RoundRecord(**facts), pool


def evaluation_facts(
    cell: Cell, pool: Pool, round_: int, fitted: Fit, accuracy: float, clock: Stopwatch, jobs: int
) -> dict[str, Any]:
    return {
        "round": round_,
        "n_labeled": len(pool.labeled),
        "accuracy": accuracy,
        **asdict(fitted),
        "reach": reached(cell.graph, pool.labeled, cell.graph.default_steps),
        "train_seconds": clock.seconds["train"],
        "test_seconds": clock.seconds["test"],
        "threads": torch.get_num_threads(),
        "jobs": jobs,
        "load": os.getloadavg()[0],
    }


def query_facts(cell: Cell, query: Query, batch: Index) -> dict[str, Any]:
    """What happened in a query, gathered after the clock has stopped; true labels are the oracle's to use here."""
    labels = cell.lab.data.labels
    notes = {name: fact() for name, fact in query.notes.items()}
    return {
        "indices": batch.tolist(),
        "classes": labels[batch].tolist(),
        "boundary_share": boundary_share(cell.lab.setup.graph, labels, batch),
        "ties": notes.pop("ties", 0.0),
        "query_seconds": query.clock.total,
        "seconds": dict(query.clock.seconds),
        "extra": notes,
    }


def boundary_share(graph: Graph, labels: torch.Tensor, batch: Index) -> float:
    """Mean over the batch of the share of a point's graph neighbours that have another label; none counts as 0."""
    shares = []
    for point in batch.tolist():
        near = labels[graph.neighbors(point)]
        shares.append(float((near != labels[point]).float().mean()) if len(near) else 0.0)
    return sum(shares) / len(shares)


def warm_up(cell: Cell, pool: Pool) -> None:
    """Let predict, the diffusion and the strategy run once untimed, on an untrained network."""
    clock = Stopwatch(cell.lab.device)
    config = cell.config
    predict = Predictor(cell.new_module(0), cell.datamodule(pool, 0), cell.lab.device, clock)
    predict(pool.unlabeled[: 2 * config.predict_batch_size])
    reached(cell.graph, pool.labeled, cell.graph.default_steps)
    query = cell.query(pool, predict, clock, 0)
    candidates = cell.strategy.restrict(query)[: config.restricted_size]
    cell.strategy.acquire(query, candidates, config.batch_size)


def start(cell: Cell, recorder: Recorder, resume_anyway: bool) -> tuple[Pool, int]:
    """The pool and the round to begin with: after the rows of the file, or at the initial set of a new one."""
    config, data, rows = cell.config, cell.lab.data, recorder.log
    header = cell.header(f"{data.name}/{recorder.path.parent.name}/{recorder.path.stem}")
    if rows is None:
        first = initial_set(data.labels, data.n_classes, config.initial_size, config.seed, config.balanced)
        if len(classes := data.labels[first].unique()) == 1:
            log.warning(
                "%s, seed %d: the initial set of %d holds only class %d, so the first network cannot tell any apart: "
                "raise initial_size, or set balanced=true",
                data.name, config.seed, len(first), int(classes),
            )  # fmt: skip
        recorder.write_header(header | {"initial": first.tolist()})
        return Pool(data.size, data.n_classes, first, data.labels[first]), 0
    changed = check_resumable(rows, header, resume_anyway)
    if not rows.done and (changed or rows.failure):
        recorder.write_continuation({"changed": changed, "provenance": header["provenance"]})
    labeled = torch.tensor(rows.header["initial"] + picks(rows.records), dtype=torch.int64)
    return Pool(data.size, data.n_classes, labeled, data.labels[labeled]), len(rows.records)
