"""The active-learning loop of one cell: train, test, query on the clock, check, annotate, record."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dgal_bench.arrays import Index
from dgal_bench.beside import Beside, counted
from dgal_bench.clock import Stopwatch
from dgal_bench.config import RunConfig
from dgal_bench.data.datamodule import PoolDataModule
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.graph.diffusion import reached
from dgal_bench.graph.propagation import propagated
from dgal_bench.graph.transition import Graph
from dgal_bench.identity import check_resumable
from dgal_bench.lab import Cell
from dgal_bench.models.predict import Predictor, Rehearsal
from dgal_bench.models.task import Fit, TaskModule, fit, measure_accuracy, new_trainer
from dgal_bench.record import RoundRecord, picks
from dgal_bench.recorder import Scribe
from dgal_bench.seeding import isolated
from dgal_bench.strategies import Query, Selection
from dgal_bench.threads import on_threads

log = logging.getLogger(__name__)


def run_cell(
    cell: Cell, recorder: Scribe, on_round: Callable[[RoundRecord], None], resume_anyway: bool = False
) -> None:
    """Run a cell from where its file ends: R + 1 evaluations, R queries.

    Raises:
        ResultsError: the file was made from something else (data, latents, graph, configuration, code).
    """
    with on_threads(cell.config.threads), counted():
        pool, first = start(cell, recorder, resume_anyway)
        memory, seconds = warm_up(cell, pool, first) if first < cell.config.rounds else ({}, None)
        for round_ in range(first, cell.config.rounds + 1):
            record, pool, memory = run_round(cell, pool, round_, memory)
            recorder.write(replace(record, rehearsal_seconds=seconds) if round_ == first else record)
            on_round(record)


def run_round(
    cell: Cell, pool: Pool, round_: int, memory: Mapping[str, Any]
) -> tuple[RoundRecord, Pool, Mapping[str, Any]]:
    """Train from scratch, test, and unless it is the last round query and annotate. Only the query is on the clock.

    ``memory`` is what the last query left for the next, and so is the last part of what is returned.
    """
    beside, around = Beside(), Stopwatch(cell.lab.device)
    model = train(cell, pool, round_, around)
    facts = evaluation_facts(cell, pool, round_, model, around)
    if round_ < cell.config.rounds:
        beside.look()
        asked = ask(cell, pool, round_, model, memory)
        beside.look()
        picked = asked.selection.indices
        pool = pool.annotate(picked, cell.lab.data.labels[picked])  # the oracle
        facts |= query_facts(cell, asked)
        memory = asked.query.remembered
    if model.data.predict_batch_size < cell.config.predict_batch_size:
        facts["halved_to"] = model.data.predict_batch_size
    return RoundRecord(**facts, **beside.facts()), pool, memory


@dataclass(frozen=True, eq=False)
class Trained:
    """The network of a round, with the loaders that feed it, and how its training and its test ended."""

    module: TaskModule
    data: PoolDataModule
    fit: Fit
    accuracy: float


def train(cell: Cell, pool: Pool, round_: int, clock: Stopwatch) -> Trained:
    """Train from scratch and test: a function of configuration, seed, round and the labels so far."""
    data, module = cell.datamodule(pool, round_), cell.new_module(round_)
    with isolated(cell.config.seed, "training", round_):
        trainer = new_trainer(cell.config, cell.lab.device)
        with clock.phase("train"):
            fitted = fit(trainer, module, data)
        with clock.phase("test"):
            accuracy = measure_accuracy(trainer, module, data)
    return Trained(module, data, fitted, accuracy)


@dataclass(frozen=True, eq=False)
class Asked:
    """One query, answered: its clock and notes are in ``query``; ``n_scored`` points passed through the network."""

    query: Query
    selection: Selection
    n_scored: int


def ask(cell: Cell, pool: Pool, round_: int, model: Trained, memory: Mapping[str, Any]) -> Asked:
    """The query of a round, on its own clock; what it returns is checked when the clock has stopped.

    Raises:
        StrategyError: the strategy broke its contract.
    """
    clock = Stopwatch(cell.lab.device)
    predict = Predictor(model.module, model.data, cell.lab.device, clock)
    query = cell.query(pool, predict, clock, round_, memory)
    with clock.running():
        selection = cell.strategy.select(query, cell.config.batch_size)
    pool.check(selection.indices, cell.config.batch_size)
    pool.check(selection.candidates, len(selection.candidates), "left")
    return Asked(query, selection, predict.n_scored)


def evaluation_facts(cell: Cell, pool: Pool, round_: int, model: Trained, clock: Stopwatch) -> dict[str, Any]:
    with clock.phase("extra"):
        extra = {
            "reach": reached(cell.graph, pool.labeled, cell.graph.default_steps),
            "propagated": propagated_accuracy(cell, pool) if propagation_due(cell.config, round_) else None,
        }
    return {
        "round": round_,
        "n_labeled": len(pool.labeled),
        "accuracy": model.accuracy,
        **asdict(model.fit),
        **extra,
        **{f"{name}_seconds": clock.seconds[name] for name in ("train", "test", "extra")},
        "threads": torch.get_num_threads(),
    }


def propagation_due(config: RunConfig, round_: int) -> bool:
    """Rounds 0, R/2 and R, unless the configuration says all or none."""
    few = (0, config.rounds // 2, config.rounds)
    return config.propagation == "all" or (config.propagation == "few" and round_ in few)


def propagated_accuracy(cell: Cell, pool: Pool) -> dict[str, float] | None:
    """How well the graph alone knows the test split: the oracle's and the examiner's to ask, never a strategy's.

    None where the test images are not tied to the graph (a user's embeddings without any of theirs).
    """
    data, attachment = cell.lab.data, cell.lab.setup.attachment
    if attachment is None:
        return None
    return propagated(cell.graph, attachment, pool.labeled, pool.labels, data.n_classes, data.test_labels)


def query_facts(cell: Cell, asked: Asked) -> dict[str, Any]:
    """What happened in a query, gathered after the clock has stopped; true labels are the oracle's to use here."""
    labels, query, batch = cell.lab.data.labels, asked.query, asked.selection.indices
    notes = {name: fact() for name, fact in query.notes.items()}
    return {
        "indices": batch.tolist(),
        "classes": labels[batch].tolist(),
        "n_candidates": len(asked.selection.candidates),
        "candidates": positions_hash(asked.selection.candidates),
        "n_scored": asked.n_scored,
        "boundary_share": boundary_share(cell.lab.setup.graph, labels, batch),
        "ties": notes.pop("ties", 0.0),
        "query_seconds": query.clock.total,
        "seconds": dict(query.clock.seconds),
        "extra": notes,
    }


def positions_hash(positions: Index) -> str:
    """The same for the same positions in any order: the start of the sha256 of them sorted, little-endian int64."""
    in_order = positions.sort().values.numpy().astype("<i8")
    return hashlib.sha256(in_order.tobytes()).hexdigest()[:20]


def boundary_share(graph: Graph, labels: torch.Tensor, batch: Index) -> float:
    """Mean over the batch of the share of a point's graph neighbours that have another label; none counts as 0."""
    shares = []
    for point in batch.tolist():
        near = labels[graph.neighbors(point)]
        shares.append(float((near != labels[point]).float().mean()) if len(near) else 0.0)
    return sum(shares) / len(shares)


def warm_up(cell: Cell, pool: Pool, first: int) -> tuple[Mapping[str, Any], float]:
    """Let a whole query run once untimed, on an untrained network that looks at two batches only.

    Returns:
        What the round before ``first`` would have left in memory: the rehearsal is of that round where there was one.
        And the seconds that it took.
    """
    clock = Stopwatch(cell.lab.device)
    n_before = len(pool.labeled) - (cell.config.batch_size if first else 0)
    before = Pool(pool.size, pool.n_classes, pool.labeled[:n_before], pool.labels[:n_before])
    predict = Rehearsal(cell.new_module(0), cell.datamodule(before, 0), cell.lab.device, clock)
    query = cell.query(before, predict, clock, max(0, first - 1), rehearsal=True)
    with clock.running():
        cell.strategy.select(query, cell.config.batch_size)
    return (query.remembered if first else {}), clock.total


def start(cell: Cell, recorder: Scribe, resume_anyway: bool) -> tuple[Pool, int]:
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
        classes = {} if config.full_supervision else {"initial_classes": data.labels[first].tolist()}
        recorder.write_header(header | {"initial": first.tolist()} | classes)
        return Pool(data.size, data.n_classes, first, data.labels[first]), 0
    changed = check_resumable(rows, header, resume_anyway)
    if not rows.done and (changed or rows.failure):
        recorder.write_continuation({"changed": changed, "provenance": header["provenance"]})
    labeled = torch.tensor(rows.header["initial"] + picks(rows.records), dtype=torch.int64)
    return Pool(data.size, data.n_classes, labeled, data.labels[labeled]), len(rows.records)
