"""One part of benchmarks/memory.py in a process of its own: ``python -m benchmarks.memory_worker REQUEST``.

The request and the answer are JSON objects. The part ``setup`` opens the experiment with an empty cache, every other
one is the name of a strategy whose first round is run on what the cache then holds.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.machine import reset_peak, status_megabytes
from dgal_bench import experiment, loop, representation
from dgal_bench.config.compose import compose
from dgal_bench.config.schema import RunConfig
from dgal_bench.core.system import on_threads
from dgal_bench.data.datamodule import Standardise
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.engines.worker import hide_missing_gpus
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.strategies.base import Strategy

# What is watched: whose function of that name is which phase. What is in none of them is the rest.
PHASES: tuple[tuple[Any, str, str], ...] = (
    (experiment, "load", "read images"),
    (Standardise, "of_pool", "mean and deviation"),
    (representation, "label_shares", "label_shares"),
    (experiment, "knn", "graph: neighbours"),
    (experiment, "transition", "graph: transition"),
    (experiment, "attach", "attach"),
    (experiment, "diagnostics", "diagnostics"),
    (loop, "fit", "training"),
    (loop, "measure_accuracy", "test"),
    (loop, "evaluation_facts", "reach, propagation"),
    (Strategy, "select", "query"),
)
REST = "the rest"


@dataclass
class Phase:
    """Megabytes in use when it first began and at its peak, and its seconds, those of phases inside it not counted."""

    before_mb: float
    peak_mb: float = 0.0
    seconds: float = 0.0


class Peaks:
    """The process's peak of memory by exclusive phase, as Stopwatch has seconds: read and reset at every edge."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self._stack: list[str] = []
        self._mark = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append(name)
        self.phases.setdefault(name, Phase(status_megabytes("VmRSS")))
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now = perf_counter()
        if self._stack:
            phase = self.phases[self._stack[-1]]
            phase.peak_mb = max(phase.peak_mb, status_megabytes("VmHWM"))
            phase.seconds += now - self._mark
        reset_peak()
        self._mark = perf_counter()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Let every call of ``owner.name`` be the phase."""
        inner: Callable[..., Any] = getattr(owner, name)

        @wraps(inner)
        def watched(*args: Any, **settings: Any) -> Any:
            with self.phase(phase):
                return inner(*args, **settings)

        setattr(owner, name, watched)


def configured(request: Mapping[str, Any]) -> RunConfig:
    """EMNIST's protocol (paper, Table 1) on the images and latents of the folder, with MNIST's network."""
    folder, part = Path(request["folder"]), request["part"]
    choices = {
        "dataset": "npz", "representation": "npy", "profile": "paper",
        "strategy": "random" if part == "setup" else part,
    }  # fmt: skip
    overrides = [
        f"dataset.path={folder / 'set.npz'}",
        f"representation.path={folder / 'latents.npy'}",
        f"representation.test_path={folder / 'test_latents.npy'}",
        f"representation.latent_dim={request['latent_dim']}",
        f"representation.threads={request['threads']}",
        f"threads={request['threads']}",
        "device=cpu", "rounds=1", "batch_size=20", "initial_size=20", "restricted_size=200",
        f"training.max_epochs={request['epochs']}", "training.min_epochs=1",
    ]  # fmt: skip
    return compose(choices, overrides)


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """The peak of each phase and of the whole in megabytes, and what was in memory after the imports."""
    config, peaks = configured(request), Peaks()
    imports_mb = status_megabytes("VmRSS")
    for owner, name, phase in PHASES:
        peaks.watch(owner, name, phase)
    folder = Path(request["folder"])
    with peaks.phase(REST), on_threads(config.threads):
        opened = experiment.open_experiment(config, folder, folder / "cache", lambda what, done, of: None)
        facts = {} if request["part"] == "setup" else first_round(config, opened)
    return {
        "status": "measured",
        "imports_mb": imports_mb,
        "peak_mb": max(phase.peak_mb for phase in peaks.phases.values()),
        "phases": {name: asdict(phase) for name, phase in peaks.phases.items()},
        "points": opened.data.size,
        "edges": len(opened.prepared.graph.indices),
        **facts,
    }


def first_round(config: RunConfig, opened: experiment.Experiment) -> dict[str, Any]:
    """Train, test, query: as in a run, and what shows that it did."""
    data = opened.data
    first = initial_set(data.labels, data.n_classes, config.initial_size, config.seed)
    pool = Pool(data.size, data.n_classes, first, data.labels[first])
    record, _, _ = loop.run_round(experiment.Run.of(config, opened), pool, 0, memory={})
    return {"epochs": record.epochs, "n_scored": record.n_scored, "n_candidates": record.n_candidates}


def main() -> None:
    silence_lightning()
    hide_missing_gpus()
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
