"""A run's queries once more: its networks re-created from its rows, and the query alone timed."""

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
    """What is asked for: at which rounds of a run, how often, and by which strategies (by label, its own first)."""

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
    asked: ReplayRequest, config: RunConfig, experiment: Experiment, on_round: Callable[[int, float], None]
) -> tuple[dict[str, Any], list[Timing]]:
    """The header and the lines of a timings file; ``on_round`` is told the round and its network's accuracy.

    Raises:
        ResultsError: the run was made from something else (data, latents, graph, code).
        UserError: a strategy cannot be built, or broke its contract.
    """
    with on_threads(config.threads), register_worker():
        header = _header(asked, Run.of(config, experiment))
        runs = {label: Run.of(replace(config, strategy=one), experiment) for label, one in asked.strategies.items()}
        timings = []
        for round_ in asked.rounds:
            beside, pool = LoadMonitor(), pool_at(asked.log, experiment, round_)
            model = train(runs[asked.label], pool, round_, Stopwatch(experiment.device))
            for label, run in runs.items():
                expected = asked.log.records[round_].indices if label == asked.label else None
                timings.append(time_query(run, pool, round_, model, asked.repeats, label, expected, beside))
                beside = LoadMonitor()
            on_round(round_, model.accuracy)
    return header, timings


def run_replay_job(
    job: Mapping[str, Any], config: RunConfig, experiment: Experiment, emit: Callable[..., None]
) -> None:
    """A worker's job of kind ``replay``: tells that it begins, of each round, and at the end what belongs into a file.

    Raises:
        ResultsError: the run's file is not as it was; else see ``play``.
    """
    began, log = perf_counter(), read_run(Path(job["path"]))
    if log is None or not log.done:
        raise ResultsError(f"{job['path']} is not finished (any more): there is nothing to compare with")
    emit("begun")
    strategies = {label: StrategyConfig(**one) for label, one in job["strategies"].items()}
    asked = ReplayRequest(log, strategies, job["rounds"], job["repeats"])
    header, timings = replay_run(
        asked, config, experiment, lambda round_, accuracy: emit("round", round=round_, accuracy=accuracy)
    )
    emit("done", seconds=perf_counter() - began, header=header, timings=[asdict(timing) for timing in timings])


def _header(asked: ReplayRequest, run: Run) -> dict[str, Any]:
    name = f"{run.experiment.data.name}/{asked.label}/{asked.log.path.stem}"
    now = run.header(name)
    return {
        "cell": name,
        "common": name if asked.common else None,
        "picks": state_digest(asked.log),
        "rounds": list(asked.rounds),
        "repeats": asked.repeats,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "changed": check_resumable(asked.log, now, anyway=True),
        "fingerprint": now["fingerprint"],
        "provenance": now["provenance"],
    }


def pool_at(log: RunLog, experiment: Experiment, round_: int) -> Pool:
    """What a run knew in a round: its first labels and the picks of the rounds before."""
    labeled = torch.tensor(log.header["initial"] + picks(log.records[:round_]), dtype=torch.int64)
    return Pool(experiment.data.size, experiment.data.n_classes, labeled, experiment.data.labels[labeled])


def time_query(
    run: Run, pool: Pool, round_: int, model: TrainedModel, repeats: int, label: str, expected: Sequence[int] | None,
    beside: LoadMonitor,
) -> Timing:  # fmt: skip
    """The same query ``repeats`` times, each as the first of its round: nothing is kept."""
    memory, _ = warm_up(run, pool, round_)
    beside.look()
    answers = [_run_query(run_query(run, pool, round_, model, memory)) for _ in range(repeats)]
    middle = sorted(answers, key=lambda one: one.total)[(repeats - 1) // 2]
    return Timing(
        strategy=label,
        round=round_,
        query_seconds=[one.total for one in answers],
        seconds=middle.seconds,
        n_candidates=middle.n_candidates,
        n_scored=middle.n_scored,
        picks_equal=None if expected is None else all(one.picks == list(expected) for one in answers),
        **beside.facts(),
    )


@dataclass(frozen=True)
class _Query:
    """What a Timing needs of one repeat, without the query, which holds what it would leave for the next round."""

    total: float
    seconds: dict[str, float]
    n_candidates: int
    n_scored: int
    picks: list[int]


def _run_query(asked: QueryResult) -> _Query:
    clock, chosen = asked.query.clock, asked.selection
    n_candidates = len(chosen.candidates)
    return _Query(clock.total, dict(clock.seconds), n_candidates, asked.n_scored, chosen.indices.tolist())
