"""Executes a replay: trains the networks of a run again from its rows, and times the queries alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dgal_bench.config.schema import RunConfig, StrategyConfig
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.system import LoadMonitor, on_threads, register_worker
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Experiment, Run
from dgal_bench.loop import QueryResult, TrainedModel, run_query, train, warm_up
from dgal_bench.results.reader import read_run
from dgal_bench.results.resume import check_resumable
from dgal_bench.results.rows import RunLog, Timing, picks, state_digest


@dataclass(frozen=True, eq=False)
class ReplayRequest:
    """A finished run, the strategies to time on its states (by label, its own first), rounds and repeats."""

    log: RunLog
    strategies: Mapping[str, StrategyConfig]
    rounds: Sequence[int]
    repeats: int

    @property
    def label(self) -> str:
        return self.log.path.parent.name

    @property
    def common(self) -> bool:
        return len(self.strategies) > 1


def replay_run(
    request: ReplayRequest, config: RunConfig, experiment: Experiment, on_round: Callable[[int, float], None]
) -> tuple[dict[str, Any], list[Timing]]:
    """The header and the lines of a timings file; ``on_round`` gets each round and its network's accuracy.

    Raises:
        ResultsError: the run has other data, features, graph or code.
        UserError: a strategy cannot be built, or broke its contract.
    """
    with on_threads(config.threads), register_worker():
        header = _header(request, Run.of(config, experiment))
        runs = {label: Run.of(replace(config, strategy=part), experiment) for label, part in request.strategies.items()}
        timings = []
        for round_ in request.rounds:
            monitor, pool = LoadMonitor(), pool_at(request.log, experiment, round_)
            model = train(runs[request.label], pool, round_, Stopwatch(experiment.device))
            for label, run in runs.items():
                expected = request.log.records[round_].indices if label == request.label else None
                timings.append(time_query(run, pool, round_, model, request.repeats, label, expected, monitor))
                monitor = LoadMonitor()
            on_round(round_, model.accuracy)
    return header, timings


def run_replay_job(
    job: Mapping[str, Any], config: RunConfig, experiment: Experiment, emit: Callable[..., None]
) -> None:
    """Execute a job ``replay``: emits begun, each round, and at the end the content of the timings file.

    Raises:
        ResultsError: the run is not finished; else see ``replay_run``.
    """
    start, log = perf_counter(), read_run(Path(job["path"]))
    if log is None or not log.done:
        raise ResultsError(f"{job['path']} is not finished (any more): there is nothing to compare with")
    emit("begun")
    strategies = {label: StrategyConfig(**settings) for label, settings in job["strategies"].items()}
    request = ReplayRequest(log, strategies, job["rounds"], job["repeats"])
    header, timings = replay_run(
        request, config, experiment, lambda round_, accuracy: emit("round", round=round_, accuracy=accuracy)
    )
    emit("done", seconds=perf_counter() - start, header=header, timings=[asdict(timing) for timing in timings])


def _header(request: ReplayRequest, run: Run) -> dict[str, Any]:
    name = f"{run.experiment.data.name}/{request.label}/{request.log.path.stem}"
    now = run.header(name)
    return {
        "cell": name,
        "common": name if request.common else None,
        "picks": state_digest(request.log),
        "rounds": list(request.rounds),
        "repeats": request.repeats,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "changed": check_resumable(request.log, now, anyway=True),
        "fingerprint": now["fingerprint"],
        "provenance": now["provenance"],
    }


def pool_at(log: RunLog, experiment: Experiment, round_: int) -> Pool:
    """The pool of a run in a round: its initial labels and the picks of earlier rounds."""
    labeled = torch.tensor(log.header["initial"] + picks(log.records[:round_]), dtype=torch.int64)
    return Pool(experiment.data.size, experiment.data.n_classes, labeled, experiment.data.labels[labeled])


def time_query(
    run: Run, pool: Pool, round_: int, model: TrainedModel, repeats: int, label: str, expected: Sequence[int] | None,
    monitor: LoadMonitor,
) -> Timing:  # fmt: skip
    """The same query ``repeats`` times, each as the first of its round: none keeps state for the next."""
    memory, _ = warm_up(run, pool, round_)
    monitor.sample()
    queries = [_facts(run_query(run, pool, round_, model, memory)) for _ in range(repeats)]
    middle = sorted(queries, key=lambda query: query.total)[(repeats - 1) // 2]
    return Timing(
        strategy=label,
        round=round_,
        query_seconds=[query.total for query in queries],
        seconds=middle.seconds,
        n_candidates=middle.n_candidates,
        n_scored=middle.n_scored,
        picks_equal=None if expected is None else all(query.picks == list(expected) for query in queries),
        **monitor.facts(),
    )


@dataclass(frozen=True)
class _QueryFacts:
    """What a Timing needs of one repeat; the query itself would hold the state that it keeps for the next round."""

    total: float
    seconds: dict[str, float]
    n_candidates: int
    n_scored: int
    picks: list[int]


def _facts(result: QueryResult) -> _QueryFacts:
    clock, selection = result.query.clock, result.selection
    n_candidates, picks_ = len(selection.candidates), selection.indices.tolist()
    return _QueryFacts(clock.total, dict(clock.seconds), n_candidates, result.n_scored, picks_)
