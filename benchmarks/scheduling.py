"""Milliseconds a run of everything but its own work: what the engines, their processes and files take.

``python benchmarks/scheduling.py`` runs sweeps of 100 tiny runs (random on 200 digits, one query of 5) with the local
engine on one and on two workers, and with Ray where it is installed. A run's own work is what its worker timed, from
its open record to its last row. The first run of every worker comes apart: imports, and the data set to open.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

from benchmarks.common import at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.machine import cores_of_others
from dgal_bench import engines
from dgal_bench.conformance import EXAMPLE_SETTINGS
from dgal_bench.engines import sweep
from dgal_bench.engines.base import Listener
from dgal_bench.engines.sweep import PlannedRun, SweepSettings

GOAL_MS = {"local": 10.0}
"""By engine; Ray's is measured and noted."""

SWEEPS = ("local:1", "local:2", "ray:2")
_ALONE = {"rounds": "1", "propagation": "none"}


@dataclass
class Ended:
    """A run as the parent saw it, on one clock, and the seconds of its own work by its worker."""

    begun: float
    done: float = 0.0
    own: float = 0.0


class Watch(Listener):
    """Notes when each run began and ended, and what went wrong."""

    def __init__(self) -> None:
        self.runs: dict[str, Ended] = {}
        self.troubles: list[str] = []

    def setting_up(self, name: str, what: str, done: int, of: int) -> None: ...

    def begun(self, job: PlannedRun) -> None:
        self.runs[job.name] = Ended(perf_counter())

    def round(self, job: PlannedRun, accuracy: float) -> None: ...

    def done(self, job: PlannedRun, seconds: float) -> None:
        run = self.runs[job.name]
        run.done, run.own = perf_counter(), seconds

    def failed(self, job: PlannedRun, error: str) -> None:
        self.troubles.append(f"{job.name}: {error}")

    def skipped(self, job: PlannedRun, why: str) -> None:
        self.troubles.append(f"{job.name}: {why}")

    def warn(self, text: str) -> None:
        self.troubles.append(text)


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    results = header("scheduling", options.threads, words) | {"cells": options.runs, "goal": {"ms": GOAL_MS}}
    say(f"{options.runs} runs, {machine_text(results)}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        execute(root, "local:1", 1, options.threads)  # whose set-up the others find in the cache
        rows = []
        for which in options.sweeps:
            if which.startswith("ray") and find_spec("ray") is None:
                say(f"{which}: Ray is not installed, left out")
                continue
            rows.append(execute(root, which, options.runs, options.threads))
            say(f"{which}: done")
    results |= {"sweeps": rows}
    say(f"\n{table(results)}\n\n{quiet(row['cores_of_others'] for row in rows)}")
    write(results, options.out)
    say(f"written: {options.out}")
    return int(not all(row["complete"] for row in rows))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("scheduling", __doc__)
    made.add_argument("--runs", type=at_least_one, default=100, help="of every sweep (default: 100)")
    made.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="engine:workers")
    options = made.parse_args(words)
    if options.runs < (fewest := 3 * max(int(which.partition(":")[2]) for which in options.sweeps)):
        made.error(f"--cells {options.runs} is too small: use {fewest} or more, a worker's first tells nothing")
    return options


def execute(root: Path, which: str, n_runs: int, threads: int) -> dict[str, Any]:
    """A sweep into a folder of its own: planned, run and looked at again."""
    engine, _, workers = which.partition(":")
    settings = SweepSettings(
        results=root / f"{engine}-{workers}-{n_runs}", suite="scheduling", data=root, cache=root / "cache",
        jobs=int(workers), resume_anyway=False, offline=True, plugins=(), full_supervision=False, engine=engine,
    )  # fmt: skip
    start = perf_counter()
    jobs = sweep.plan_runs(_axes(n_runs, threads), settings)
    planned = perf_counter()
    watch, others = Watch(), cores_of_others()
    engines.execute(jobs, settings, watch, {})
    ended, busy = perf_counter(), others()
    logs = sweep.read_logs(jobs, settings)
    scanned = perf_counter()
    facts = {
        "engine": engine,
        "workers": int(workers),
        "plan_ms": 1000 * (planned - start) / n_runs,
        "scan_ms": 1000 * (scanned - ended) / n_runs,
        "start_seconds": min(run.begun for run in watch.runs.values()) - planned,
        "cores_of_others": busy,
        "complete": all(log is not None and log.done for log in logs.values()) and not watch.troubles,
        "troubles": watch.troubles,
    }
    return facts | (overhead(list(watch.runs.values()), int(workers)) if n_runs > int(workers) else {})


def _axes(n_runs: int, threads: int) -> dict[str, list[str]]:
    fixed = {"dataset": "digits", "representation": "pca", "profile": "smoke", "strategy": "random"}
    practice = dict(word.split("=", 1) for word in EXAMPLE_SETTINGS) | _ALONE | {"threads": str(threads)}
    return {key: [value] for key, value in (fixed | practice).items()} | {"seed": [str(n) for n in range(n_runs)]}


def overhead(runs: Sequence[Ended], n_workers: int) -> dict[str, Any]:
    """What the workers did beside runs' own work while all of them were at it.

    That is from when every worker has ended its first run until one finds no other to begin; own work ends with the
    run. ``all_in_ms``: of the whole time instead, the workers' start and their last wait for one another included.
    """
    by_begin = sorted(runs, key=lambda run: run.begun)
    ends = sorted(run.done for run in runs)
    first, last = max(run.done for run in by_begin[:n_workers]), ends[-n_workers]
    inside = sum(max(0.0, min(run.done, last) - max(run.done - run.own, first)) for run in runs)
    n_ended = sum(first < end <= last for end in ends)
    wall, own = ends[-1] - by_begin[0].begun, sum(run.own for run in runs)
    return {
        "ms": 1000 * (n_workers * (last - first) - inside) / n_ended,
        "of_cells": n_ended,
        "all_in_ms": 1000 * (n_workers * wall - own) / len(runs),
        "own_ms": 1000 * own / len(runs),
        "seconds": wall,
    }


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "ms: of a run, all but its own work, once every worker has had its first. all in: with the workers' start.",
        "start: seconds before the first run: imports, a set-up from the cache. plan, scan: ms a run, besides.",
        "",
        f"{'engine':<8}{'workers':>8}{'start s':>9}{'own ms':>9}{'ms':>8}{'of runs':>10}{'all in ms':>11}{'plan':>8}"
        f"{'scan':>8}",
    ]
    lines += [
        f"{row['engine']:<8}{row['workers']:>8}{row['start_seconds']:>9.1f}{row['own_ms']:>9.1f}{row['ms']:>8.2f}"
        f"{row['of_cells']:>10}{row['all_in_ms']:>11.2f}{row['plan_ms']:>8.2f}{row['scan_ms']:>8.2f}"
        for row in results["sweeps"]
    ]
    lines.append("")
    for row in results["sweeps"]:
        limit = results["goal"]["ms"].get(row["engine"])
        verdict = "noted" if limit is None else "reached" if row["ms"] < limit else "NOT reached"
        goal = "" if limit is None else f"goal: under {limit:g} ms a run: "
        lines.append(f"{row['engine']} on {row['workers']}: {goal}{row['ms']:.2f} ms, {verdict}")
        lines += [f"  {trouble}" for trouble in row["troubles"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
