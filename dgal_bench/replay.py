"""A cell's queries once more: its networks re-created from its rows, and the query alone timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dgal_bench.beside import Beside, counted
from dgal_bench.clock import Stopwatch
from dgal_bench.config import RunConfig, StrategyConfig
from dgal_bench.data.pool import Pool
from dgal_bench.errors import ResultsError
from dgal_bench.identity import check_resumable
from dgal_bench.lab import Cell, Lab
from dgal_bench.loop import Asked, Trained, ask, train, warm_up
from dgal_bench.record import CellLog, picks, read_cell
from dgal_bench.threads import on_threads
from dgal_bench.timings import Timing, digest


@dataclass(frozen=True, eq=False)
class Replay:
    """What is asked for: at which rounds of a cell, how often, and by which strategies (by label, its own first)."""

    log: CellLog
    strategies: Mapping[str, StrategyConfig]
    rounds: Sequence[int]
    repeats: int

    @property
    def label(self) -> str:
        return self.log.path.parent.name

    @property
    def common(self) -> bool:
        return len(self.strategies) > 1


def play(
    asked: Replay, config: RunConfig, lab: Lab, on_round: Callable[[int, float], None]
) -> tuple[dict[str, Any], list[Timing]]:
    """The header and the lines of a timings file; ``on_round`` is told the round and its network's accuracy.

    Raises:
        ResultsError: the cell was made from something else (data, latents, graph, code).
        UserError: a strategy cannot be built, or broke its contract.
    """
    with on_threads(config.threads), counted():
        header = _header(asked, Cell.of(config, lab))
        cells = {label: Cell.of(replace(config, strategy=one), lab) for label, one in asked.strategies.items()}
        timings = []
        for round_ in asked.rounds:
            beside, pool = Beside(), pool_at(asked.log, lab, round_)
            model = train(cells[asked.label], pool, round_, Stopwatch(lab.device))
            for label, cell in cells.items():
                expected = asked.log.records[round_].indices if label == asked.label else None
                timings.append(time_query(cell, pool, round_, model, asked.repeats, label, expected, beside))
                beside = Beside()
            on_round(round_, model.accuracy)
    return header, timings


def answer(job: Mapping[str, Any], config: RunConfig, lab: Lab, emit: Callable[..., None]) -> None:
    """A worker's job of kind ``replay``: tells that it begins, of each round, and at the end what belongs into a file.

    Raises:
        ResultsError: the cell's file is not as it was; else see ``play``.
    """
    began, log = perf_counter(), read_cell(Path(job["path"]))
    if log is None or not log.done:
        raise ResultsError(f"{job['path']} is not finished (any more): there is nothing to compare with")
    emit("begun")
    strategies = {label: StrategyConfig(**one) for label, one in job["strategies"].items()}
    asked = Replay(log, strategies, job["rounds"], job["repeats"])
    header, timings = play(asked, config, lab, lambda round_, accuracy: emit("round", round=round_, accuracy=accuracy))
    emit("done", seconds=perf_counter() - began, header=header, timings=[asdict(timing) for timing in timings])


def _header(asked: Replay, cell: Cell) -> dict[str, Any]:
    name = f"{cell.lab.data.name}/{asked.label}/{asked.log.path.stem}"
    now = cell.header(name)
    return {
        "cell": name,
        "common": name if asked.common else None,
        "picks": digest(asked.log),
        "rounds": list(asked.rounds),
        "repeats": asked.repeats,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "changed": check_resumable(asked.log, now, anyway=True),
        "fingerprint": now["fingerprint"],
        "provenance": now["provenance"],
    }


def pool_at(log: CellLog, lab: Lab, round_: int) -> Pool:
    """What a cell knew in a round: its first labels and the picks of the rounds before."""
    labeled = torch.tensor(log.header["initial"] + picks(log.records[:round_]), dtype=torch.int64)
    return Pool(lab.data.size, lab.data.n_classes, labeled, lab.data.labels[labeled])


def time_query(
    cell: Cell, pool: Pool, round_: int, model: Trained, repeats: int, label: str, expected: Sequence[int] | None,
    beside: Beside,
) -> Timing:  # fmt: skip
    """The same query ``repeats`` times, each as the first of its round: nothing is kept."""
    memory, _ = warm_up(cell, pool, round_)
    beside.look()
    answers = [_answer(ask(cell, pool, round_, model, memory)) for _ in range(repeats)]
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
class _Answer:
    """What a Timing needs of one repeat, without the query, which holds what it would leave for the next round."""

    total: float
    seconds: dict[str, float]
    n_candidates: int
    n_scored: int
    picks: list[int]


def _answer(asked: Asked) -> _Answer:
    clock, chosen = asked.query.clock, asked.selection
    n_candidates = len(chosen.candidates)
    return _Answer(clock.total, dict(clock.seconds), n_candidates, asked.n_scored, chosen.indices.tolist())
