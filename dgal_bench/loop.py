"""The active-learning loop of one run: train, test, query on the clock, check, annotate, record."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dgal_bench.config.schema import RunConfig
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.seeding import isolated
from dgal_bench.core.system import LoadMonitor, on_threads, register_worker
from dgal_bench.core.types import Index
from dgal_bench.data.datamodule import PoolDataModule
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.experiment import Run
from dgal_bench.graph.diffusion import reach_share
from dgal_bench.graph.graph import Graph
from dgal_bench.graph.propagation import propagation_accuracy
from dgal_bench.models.predict import Predictor, Rehearsal
from dgal_bench.models.task import Fit, TaskModule, fit, measure_accuracy, new_trainer
from dgal_bench.results.resume import check_resumable
from dgal_bench.results.rows import RoundRecord, picks
from dgal_bench.results.writer import RowWriter
from dgal_bench.strategies.base import Query, Selection

log = logging.getLogger(__name__)


def run_loop(run: Run, writer: RowWriter, on_round: Callable[[RoundRecord], None], resume_anyway: bool = False) -> None:
    """Run a run from where its file ends: R + 1 evaluations, R queries.

    Raises:
        ResultsError: the file was made from something else (data, latents, graph, configuration, code).
    """
    with on_threads(run.config.threads), register_worker():
        pool, first = start_or_resume(run, writer, resume_anyway)
        memory, seconds = warm_up(run, pool, first) if first < run.config.rounds else ({}, None)
        for round_ in range(first, run.config.rounds + 1):
            record, pool, memory = run_round(run, pool, round_, memory)
            writer.write(replace(record, rehearsal_seconds=seconds) if round_ == first else record)
            on_round(record)


def run_round(
    run: Run, pool: Pool, round_: int, memory: Mapping[str, Any]
) -> tuple[RoundRecord, Pool, Mapping[str, Any]]:
    """Train from scratch, test, and unless it is the last round query and annotate. Only the query is on the clock.

    ``memory`` is what the last query left for the next, and so is the last part of what is returned.
    """
    beside, around = LoadMonitor(), Stopwatch(run.experiment.device)
    model = train(run, pool, round_, around)
    facts = evaluation_facts(run, pool, round_, model, around)
    if round_ < run.config.rounds:
        beside.look()
        asked = run_query(run, pool, round_, model, memory)
        beside.look()
        picked = asked.selection.indices
        pool = pool.annotate(picked, run.experiment.data.labels[picked])  # the oracle
        facts |= query_facts(run, asked)
        memory = asked.query.remembered
    if model.data.predict_batch_size < run.config.predict_batch_size:
        facts["halved_to"] = model.data.predict_batch_size
    return RoundRecord(**facts, **beside.facts()), pool, memory


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The network of a round, with the loaders that feed it, and how its training and its test ended."""

    module: TaskModule
    data: PoolDataModule
    fit: Fit
    accuracy: float


def train(run: Run, pool: Pool, round_: int, clock: Stopwatch) -> TrainedModel:
    """Train from scratch and test: a function of configuration, seed, round and the labels so far."""
    data, module = run.datamodule(pool, round_), run.new_module(round_)
    with isolated(run.config.seed, "training", round_):
        trainer = new_trainer(run.config, run.experiment.device)
        with clock.phase("train"):
            fitted = fit(trainer, module, data)
        with clock.phase("test"):
            accuracy = measure_accuracy(trainer, module, data)
    return TrainedModel(module, data, fitted, accuracy)


@dataclass(frozen=True, eq=False)
class QueryResult:
    """One query, answered: its clock and notes are in ``query``; ``n_scored`` points passed through the network."""

    query: Query
    selection: Selection
    n_scored: int


def run_query(run: Run, pool: Pool, round_: int, model: TrainedModel, memory: Mapping[str, Any]) -> QueryResult:
    """The query of a round, on its own clock; what it returns is checked when the clock has stopped.

    Raises:
        StrategyError: the strategy broke its contract.
    """
    clock = Stopwatch(run.experiment.device)
    predict = Predictor(model.module, model.data, run.experiment.device, clock)
    query = run.query(pool, predict, clock, round_, memory)
    with clock.running():
        selection = run.strategy.select(query, run.config.batch_size)
    pool.check(selection.indices, run.config.batch_size)
    pool.check(selection.candidates, len(selection.candidates), "left")
    return QueryResult(query, selection, predict.n_scored)


def evaluation_facts(run: Run, pool: Pool, round_: int, model: TrainedModel, clock: Stopwatch) -> dict[str, Any]:
    with clock.phase("extra"):
        extra = {
            "reach": reach_share(run.graph, pool.labeled, run.graph.default_steps),
            "propagated": propagated_accuracy(run, pool) if propagation_due(run.config, round_) else None,
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


def propagated_accuracy(run: Run, pool: Pool) -> dict[str, float] | None:
    """How well the graph alone knows the test split: the oracle's and the examiner's to ask, never a strategy's.

    None where the test images are not tied to the graph (a user's embeddings without any of theirs).
    """
    data, attachment = run.experiment.data, run.experiment.prepared.attachment
    if attachment is None:
        return None
    return propagation_accuracy(run.graph, attachment, pool.labeled, pool.labels, data.n_classes, data.test_labels)


def query_facts(run: Run, asked: QueryResult) -> dict[str, Any]:
    """What happened in a query, gathered after the clock has stopped; true labels are the oracle's to use here."""
    labels, query, batch = run.experiment.data.labels, asked.query, asked.selection.indices
    notes = {name: fact() for name, fact in query.notes.items()}
    return {
        "indices": batch.tolist(),
        "classes": labels[batch].tolist(),
        "n_candidates": len(asked.selection.candidates),
        "candidates": positions_hash(asked.selection.candidates),
        "n_scored": asked.n_scored,
        "boundary_share": boundary_share(run.experiment.prepared.graph, labels, batch),
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


def warm_up(run: Run, pool: Pool, first: int) -> tuple[Mapping[str, Any], float]:
    """Let a whole query run once untimed, on an untrained network that looks at two batches only.

    Returns:
        What the round before ``first`` would have left in memory: the rehearsal is of that round where there was one.
        And the seconds that it took.
    """
    clock = Stopwatch(run.experiment.device)
    n_before = len(pool.labeled) - (run.config.batch_size if first else 0)
    before = Pool(pool.size, pool.n_classes, pool.labeled[:n_before], pool.labels[:n_before])
    predict = Rehearsal(run.new_module(0), run.datamodule(before, 0), run.experiment.device, clock)
    query = run.query(before, predict, clock, max(0, first - 1), rehearsal=True)
    with clock.running():
        run.strategy.select(query, run.config.batch_size)
    return (query.remembered if first else {}), clock.total


def start_or_resume(run: Run, writer: RowWriter, resume_anyway: bool) -> tuple[Pool, int]:
    """The pool and the round to begin with: after the rows of the file, or at the initial set of a new one."""
    config, data, rows = run.config, run.experiment.data, writer.log
    header = run.header(f"{data.name}/{writer.path.parent.name}/{writer.path.stem}")
    if rows is None:
        first = initial_set(data.labels, data.n_classes, config.initial_size, config.seed, config.balanced)
        if len(classes := data.labels[first].unique()) == 1:
            log.warning(
                "%s, seed %d: the initial set of %d holds only class %d, so the first network cannot tell any apart: "
                "raise initial_size, or set balanced=true",
                data.name, config.seed, len(first), int(classes),
            )  # fmt: skip
        classes = {} if config.full_supervision else {"initial_classes": data.labels[first].tolist()}
        writer.write_header(header | {"initial": first.tolist()} | classes)
        return Pool(data.size, data.n_classes, first, data.labels[first]), 0
    changed = check_resumable(rows, header, resume_anyway)
    if not rows.done and (changed or rows.failure):
        writer.write_continuation({"changed": changed, "provenance": header["provenance"]})
    labeled = torch.tensor(rows.header["initial"] + picks(rows.records), dtype=torch.int64)
    return Pool(data.size, data.n_classes, labeled, data.labels[labeled]), len(rows.records)
