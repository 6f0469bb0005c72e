"""Queries asked as the loop asks them, on features without a training; and passes that are timed on a sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import network_outputs
from benchmarks.inputs import SEED, standardise
from dgal_bench.config.schema import RunConfig
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.seeding import rng_for
from dgal_bench.core.types import Features, Index, Outputs
from dgal_bench.data.datamodule import PoolDataModule
from dgal_bench.data.image_data import ImageData
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Experiment, Prepared, Run
from dgal_bench.graph.graph import Graph
from dgal_bench.models.predict import Predictor
from dgal_bench.models.task import TaskModule

CPU = torch.device("cpu")
PASS = ("infer", "embed")
"""Phases in which points pass through the network."""

PHASES = ("diffuse", "select", "pass", "acquire", "other")
"""As an answer has them: ``other`` is what only some strategies do, to index and to search."""

_GLIMPSE = 2  # images: what is remembered does not depend on the network

MakePredictor = Callable[[TaskModule, PoolDataModule, Stopwatch], Predictor]


class SampledPass(Predictor):
    """Passes no more than ``sample`` of the points it is asked for; of more, ``answers`` stand for the outputs.

    ``unpaid_seconds``: what the others would have taken at the sample's rate, to be added to the clock's. The images
    of a pool larger than its data set are the data set's over and over, and so are the answers.
    """

    def __init__(
        self, module: TaskModule, data: PoolDataModule, clock: Stopwatch, sample: int, answers: Outputs
    ) -> None:
        super().__init__(module, data, CPU, clock)
        self._images = len(data.data.images)
        self._sample = sample
        self._answers = answers
        self.unpaid_seconds = 0.0

    def _forward(self, ids: Index) -> Outputs:
        some = ids[: self._sample]
        start = perf_counter()
        outputs = super()._forward(some % self._images)
        seconds = perf_counter() - start
        if len(some) == len(ids):
            return outputs
        self.unpaid_seconds += seconds * (len(ids) / len(some) - 1)
        rows = ids % len(self._answers.log_probs)
        return Outputs(self._answers.log_probs[rows], self._answers.features[rows])


def whole_pass(module: TaskModule, data: PoolDataModule, clock: Stopwatch) -> Predictor:
    return Predictor(module, data, CPU, clock)


def sampled_pass(sample: int, answers: Outputs) -> MakePredictor:
    return lambda module, data, clock: SampledPass(module, data, clock, sample, answers)


def synthetic_outputs(n_points: int, n_classes: int) -> Outputs:
    made = network_outputs(n_points, n_classes)
    return Outputs(torch.from_numpy(made.log_probs), torch.from_numpy(made.features))


def experiment_of(config: RunConfig, data: ImageData, latents: Features, graph: Graph) -> Experiment:
    """As ``open_experiment`` makes it, of untrained features; they may be of more points than there are images."""
    return Experiment(data, standardise(config, data), Prepared(latents, graph, None, "none", "none", {}), CPU)


def pool_of(n_points: int, n_classes: int, n_labeled: int) -> Pool:
    """Distinct points drawn uniformly, with labels drawn uniformly; fewer of them are the first of more."""
    rng = rng_for(SEED, "benchmark labels", n_points)
    labeled = torch.from_numpy(rng.choice(n_points, min(n_points, 1000), replace=False)[:n_labeled])
    labels: Tensor = torch.from_numpy(rng.integers(n_classes, size=1000)[:n_labeled])
    return Pool(n_points, n_classes, labeled, labels)


@dataclass(frozen=True, eq=False)
class Answer:
    """Seconds of a query, and by phase; ``extrapolated``: those of a pass that was timed on a sample are among them.

    ``touched``: of a diffusion the share of the edges of T whole products that it multiplied.
    """

    seconds: float
    phases: Mapping[str, float]
    extrapolated: bool
    n_scored: int
    n_candidates: int
    picks: list[int]
    touched: float | None = None


def ask(
    run: Run, pool: Pool, round_: int, module: TaskModule, memory: Mapping[str, Any],
    make: MakePredictor = whole_pass,
) -> Answer:  # fmt: skip
    """A query as loop.ask puts it, with the predictor that ``make`` makes.

    Raises:
        StrategyError: the strategy broke its contract.
    """
    clock = Stopwatch(CPU)
    predict = make(module, run.datamodule(pool, round_), clock)
    query = run.query(pool, predict, clock, round_, memory)
    with clock.running():
        selection = run.strategy.select(query, run.config.batch_size)
    pool.check(selection.indices, run.config.batch_size)
    unpaid = predict.unpaid_seconds if isinstance(predict, SampledPass) else 0.0
    return Answer(
        clock.total + unpaid, _grouped(clock.seconds, unpaid), unpaid > 0, predict.n_scored,
        len(selection.candidates), selection.indices.tolist(), query.notes.get("touched", lambda: None)(),
    )  # fmt: skip


def remembered(run: Run, pool: Pool, round_: int, module: TaskModule, answers: Outputs) -> Mapping[str, Any]:
    """What the query of the round before has left, when the last batch had no labels yet; its pass is cut short."""
    n_before = len(pool.labeled) - run.config.batch_size
    before = Pool(pool.size, pool.n_classes, pool.labeled[:n_before], pool.labels[:n_before])
    clock = Stopwatch(CPU)
    predict = SampledPass(module, run.datamodule(before, round_ - 1), clock, _GLIMPSE, answers)
    query = run.query(before, predict, clock, round_ - 1)
    run.strategy.select(query, run.config.batch_size)
    return query.remembered


def _grouped(seconds: Mapping[str, float], unpaid: float) -> dict[str, float]:
    known = {name: seconds.get(name, 0.0) for name in ("diffuse", "select", "acquire")}
    passed = sum(seconds.get(name, 0.0) for name in PASS)
    other = sum(seconds.values()) - sum(known.values()) - passed
    return known | {"pass": passed + unpaid, "other": other}
