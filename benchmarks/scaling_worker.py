"""One size of benchmarks/scaling.py in a process of its own: ``python -m benchmarks.scaling_worker REQUEST``.

The request and the answer are JSON objects; how far it is goes to stderr. Features and graph are left in the request's
folder, where a second run finds them.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.asking import (
    CPU,
    PHASES,
    Answer,
    ask,
    experiment_of,
    pool_of,
    remembered,
    sampled_pass,
    synthetic_outputs,
)
from benchmarks.machine import cores_of_others, reset_peak, status_megabytes
from benchmarks.points import blocks
from dgal_bench.core.system import on_threads
from dgal_bench.core.types import Outputs, Progress
from dgal_bench.engines.worker import hide_missing_gpus
from dgal_bench.experiment import Run
from dgal_bench.graph.graph import Graph
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import transition
from dgal_bench.models.trainer import silence_lightning

CLASSES = 10
ROUND, LABELED = 10, 110  # 100 labels before the last round's, 10 in each
_IMAGES = 1000  # that stand for those of any pool

BUILD_THREADS = 2
"""The graph is set-up: whatever a query's threads are."""

WHOLE = "strategy.restrict.memory_limit=0"  # T whole products
HOWS = ("full", "first round", "incremental")
"""Ways to ask dgmg: by whole products; with nothing remembered, by the rows that labels reach; after a round."""

ON_GRAPH = ("dgmg", "dgbadge", "dglc", "dgent", "dgcoreset")
BY_SIZE = ("random", "rsmg", "rsbadge", "rslc", "rscoreset")
"""Measured at every size; ``ON_POOL`` up to ``own_limit`` points only."""

NEAR_LABELS = ("vae_seals", "vae_seals_matched")
ON_POOL = ("margin", "lc", "entropy", "badge", "coreset", "seals", *NEAR_LABELS)
REMEMBERING = (*ON_GRAPH, *NEAR_LABELS)


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """The graph's seconds, and those of every strategy's query; megabytes at the peak of either."""
    folder = Path(request["folder"]) / f"{request['kind']}-{request['points']}-{request['features']}"
    folder.mkdir(parents=True, exist_ok=True)
    others = cores_of_others()
    latents = stored_points(folder, request["kind"], request["points"], request["features"])
    with on_threads(BUILD_THREADS):
        graph, built = stored_graph(folder, latents)
    reset_peak()
    rows = queries(request, latents, graph)
    return {
        "status": "measured",
        "edges": len(graph.indices),
        "steps": graph.default_steps,
        "graph": built,
        "queries": rows,
        "right": right(rows),
        "peak_mb": status_megabytes("VmHWM"),
        "cores_of_others": others(),
    }


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def stored_points(folder: Path, kind: str, n_points: int, n_features: int) -> Tensor:
    """(N, d) float32, read from the folder's file as it is asked for: never whole in memory by this."""
    path = folder / "features.npy"
    if not path.exists():
        tell(f"{kind}, {n_points:,}: features")
        partial = path.with_suffix(".partial")
        file = np.lib.format.open_memmap(partial, "w+", np.float32, (n_points, n_features))
        start = 0
        for block in blocks(kind, n_points, n_features):
            file[start : start + len(block)] = block
            start += len(block)
        file.flush()
        partial.rename(path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def stored_graph(folder: Path, latents: Tensor) -> tuple[Graph, dict[str, Any]]:
    """The graph, and its seconds and peak memory when it was built."""
    facts = folder / "graph.json"
    if not facts.exists():
        graph, built = made_graph(folder, latents)
        arrays = {name: value for name, value in vars(graph).items() if isinstance(value, Tensor)}
        for name in set(arrays) & {field.name for field in fields(graph)}:
            np.save(folder / f"graph-{name}.npy", arrays[name].numpy())
        settings = {field.name: getattr(graph, field.name) for field in fields(graph) if field.name not in arrays}
        facts.write_text(json.dumps({"built": built, "settings": settings}))
    known = json.loads(facts.read_text())
    arrays = {path.stem.removeprefix("graph-"): torch.from_numpy(np.load(path)) for path in folder.glob("graph-*.npy")}
    return Graph(**arrays, **known["settings"]), known["built"]


def made_graph(folder: Path, latents: Tensor) -> tuple[Graph, dict[str, Any]]:
    """As set-up makes it."""
    reset_peak()
    start = perf_counter()
    spec = inputs.settings().graph
    neighbors = knn(
        latents, spec.graph_k, spec.backend, spec.exact_limit, CPU, spec.recall_target, progress(folder.name)
    )
    search_seconds = perf_counter() - start
    graph = transition(neighbors, spec.kernel, spec.symmetrize)
    built = {
        "seconds": perf_counter() - start, "search_seconds": search_seconds, "peak_mb": status_megabytes("VmHWM"),
        "method": neighbors.method, "recall": neighbors.recall, "threads": BUILD_THREADS,
    }  # fmt: skip
    return graph, built


def progress(name: str) -> Progress:
    return lambda what, done, of: tell(f"{name}: {what}, {done} of {of}")


def queries(request: Mapping[str, Any], latents: Tensor, graph: Graph) -> list[dict[str, Any]]:
    """A row per strategy, and of dgmg one for each of HOWS."""
    n_points, sample, repeats = request["points"], request["sample"], request["repeats"]
    limited = min(n_points, request["own_limit"])
    answers = synthetic_outputs(limited, CLASSES)
    asker = Asker(latents, graph, answers, sample, repeats)
    rows = []
    for name in (*ON_GRAPH, *BY_SIZE, *ON_POOL):
        tell(f"{request['kind']}, {n_points:,}: {name}")
        size = limited if name in ON_POOL else n_points
        for how in HOWS if name == "dgmg" else ("incremental",) if name in ON_GRAPH else ("",):
            rows.append(row(name, how, asker(name, how, size), n_points, size))
    return rows


class Asker:
    """Asks a strategy for 10 points of the first ``size``, ``repeats`` times after once for warmth.

    The network is an untrained CNN: its seconds do not depend on its weights.
    """

    def __init__(self, latents: Tensor, graph: Graph, answers: Outputs, sample: int, repeats: int) -> None:
        self._data = inputs.generated(_IMAGES, CLASSES)
        self._module = inputs.new_module(inputs.settings(), self._data).eval()
        self._latents, self._graph, self._answers = latents, graph, answers
        self._sample, self._repeats = sample, repeats

    def __call__(self, name: str, how: str, size: int) -> list[Answer]:
        config = inputs.settings(*([WHOLE] if how == "full" else []), strategy=name)
        # Only ON_POOL are asked for fewer than all points, and none of them walks on the graph.
        run = Run.of(config, experiment_of(config, self._data, self._latents[:size], self._graph))
        pool, make = pool_of(size, CLASSES, LABELED), sampled_pass(self._sample, self._answers)
        asked = []
        for _ in range(1 + self._repeats):
            goes_on = name in REMEMBERING and how not in ("full", "first round")
            memory = remembered(run, pool, ROUND, self._module, self._answers) if goes_on else {}
            asked.append(ask(run, pool, ROUND, self._module, memory, make))
            del memory  # gigabytes, of ten million points
        return asked[1:]


def row(name: str, how: str, asked: Sequence[Answer], n_points: int, size: int) -> dict[str, Any]:
    """Medians; of a query of fewer points than there are, as many times more as there are more points.

    But the points that those of NEAR_LABELS pass through the network are as many however many others there are.
    """
    scale = n_points / size
    passes = 1.0 if name in NEAR_LABELS else scale
    phases = [{phase: one.phases[phase] * (passes if phase == "pass" else scale) for phase in PHASES} for one in asked]
    seconds = [sum(one.values()) for one in phases]
    return {
        "name": name,
        "how": how,
        "seconds": median(seconds),
        "all_seconds": seconds,
        "phases": {phase: median(one[phase] for one in phases) for phase in PHASES},
        "extrapolated": scale > 1 or asked[0].extrapolated,
        "n_scored": round(passes * asked[0].n_scored),
        "touched": asked[0].touched,
        "picks": asked[0].picks,
    }


def right(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether dgmg picks the same however it is asked, and full is full: all edges, T times."""
    of_dgmg = {row["how"]: row for row in rows if row["name"] == "dgmg"}
    return len({tuple(row["picks"]) for row in of_dgmg.values()}) == 1 and of_dgmg["full"]["touched"] == 1


def main() -> None:
    silence_lightning()
    hide_missing_gpus()
    request = json.loads(sys.argv[1])
    with on_threads(request["threads"]):
        answer = measure(request)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
