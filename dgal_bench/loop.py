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
from dgal_bench.results.writer import FileWriter
from dgal_bench.strategies.base import Query, Selection

log = logging.getLogger(__name__)


def run_loop(
    run: Run, writer: FileWriter, on_round: Callable[[RoundRecord], None], resume_anyway: bool = False
) -> None:
    """Execute a run from where its file ends: R + 1 evaluations, R queries.

    Raises:
        ResultsError: the file was made from other data, features, graph, configuration or code.
    """
    with on_threads(run.config.threads), register_worker():
        pool, first = start_or_resume(run, writer, resume_anyway)
        memory, seconds = warm_up(run, pool, first) if first < run.config.rounds else ({}, None)
        for round_ in range(first, run.config.rounds + 1):
            record, pool, memory = run_round(run, pool, round_, memory)
            writer.write(replace(record, rehearsal_seconds=seconds) if round_ == first else record)
            on_round(record)


def start_or_resume(run: Run, writer: FileWriter, resume_anyway: bool) -> tuple[Pool, int]:
    """The pool and the first round to run: after the rows of the file, or at the initial set of a new file."""
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


def warm_up(run: Run, pool: Pool, first: int) -> tuple[Mapping[str, Any], float]:
    """Execute one whole query untimed, on an untrained network that answers for two batches only.

    Returns:
        The memory for the query of round ``first``, and the seconds of the rehearsal. On a resume the query of the
        round before is rehearsed, and the memory is what that left; in a new run it is empty.
    """
    clock = Stopwatch(run.experiment.device)
    n_before = len(pool.labeled) - (run.config.batch_size if first else 0)
    before = Pool(pool.size, pool.n_classes, pool.labeled[:n_before], pool.labels[:n_before])
    predict = Rehearsal(run.new_module(0), run.datamodule(before, 0), run.experiment.device, clock)
    query = run.query(before, predict, clock, max(0, first - 1), rehearsal=True)
    with clock.running():
        run.strategy.select(query, run.config.batch_size)
    return (query.remembered if first else {}), clock.total


def run_round(
    run: Run, pool: Pool, round_: int, memory: Mapping[str, Any]
) -> tuple[RoundRecord, Pool, Mapping[str, Any]]:
    """Train from scratch and test; before the last round also query and annotate. Only the query is on the clock.

    ``memory`` is what the previous query remembered; the last item returned is what this one remembered.
    """
    load, clock = LoadMonitor(), Stopwatch(run.experiment.device)
    model = train(run, pool, round_, clock)
    facts = evaluation_facts(run, pool, round_, model, clock)
    if round_ < run.config.rounds:
        load.sample()
        result = run_query(run, pool, round_, model, memory)
        load.sample()
        batch = result.selection.indices
        pool = pool.annotate(batch, run.experiment.data.labels[batch])  # the oracle
        facts |= query_facts(run, result)
        memory = result.query.remembered
    if model.data.predict_batch_size < run.config.predict_batch_size:
        facts["halved_to"] = model.data.predict_batch_size
    return RoundRecord(**facts, **load.facts()), pool, memory


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The network of a round, its data loaders, and the outcome of its training and its test."""

    module: TaskModule
    data: PoolDataModule
    fit: Fit
    accuracy: float


def train(run: Run, pool: Pool, round_: int, clock: Stopwatch) -> TrainedModel:
    """Train from scratch and test: the result depends on configuration, seed, round and the labels so far."""
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
    """A query after its end, with clock and notes; ``n_scored`` points passed through the network."""

    query: Query
    selection: Selection
    n_scored: int


def run_query(run: Run, pool: Pool, round_: int, model: TrainedModel, memory: Mapping[str, Any]) -> QueryResult:
    """The query of a round, on its own clock; the selection is checked after the clock has stopped.

    This is what query time means: from a trained network to the batch, ``Strategy.select`` and nothing else.

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
    """Accuracy of the graph alone on the test split. It uses test labels and is never given to a strategy.

    None where the test images are not attached to the graph (a user's embeddings, without those of the test images).
    """
    data, attachment = run.experiment.data, run.experiment.prepared.attachment
    if attachment is None:
        return None
    return propagation_accuracy(run.graph, attachment, pool.labeled, pool.labels, data.n_classes, data.test_labels)


def query_facts(run: Run, result: QueryResult) -> dict[str, Any]:
    """The facts of a query, gathered after the clock has stopped; only here do they use true labels."""
    labels, query, batch = run.experiment.data.labels, result.query, result.selection.indices
    notes = {name: fact() for name, fact in query.notes.items()}
    return {
        "indices": batch.tolist(),
        "classes": labels[batch].tolist(),
        "n_candidates": len(result.selection.candidates),
        "candidates": positions_hash(result.selection.candidates),
        "n_scored": result.n_scored,
        "boundary_share": boundary_share(run.experiment.prepared.graph, labels, batch),
        "ties": notes.pop("ties", 0.0),
        "query_seconds": query.clock.total,
        "seconds": dict(query.clock.seconds),
        "extra": notes,
    }


def positions_hash(positions: Index) -> str:
    """The start of the sha256 of the sorted positions as little-endian int64: the order makes no difference."""
    ascending = positions.sort().values.numpy().astype("<i8")
    return hashlib.sha256(ascending.tobytes()).hexdigest()[:20]


def boundary_share(graph: Graph, labels: torch.Tensor, batch: Index) -> float:
    """Mean over the batch of the share of a point's graph neighbours with another label (0 without neighbours)."""
    shares = []
    for point in batch.tolist():
        near = labels[graph.neighbors(point)]
        shares.append(float((near != labels[point]).float().mean()) if len(near) else 0.0)
    return sum(shares) / len(shares)
