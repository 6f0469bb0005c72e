"""Seconds and memory of badge, coreset and margin after the forward pass: ours, plain references, scikit-activeml.

``python benchmarks/acquisition.py`` runs every measurement in a process of its own, one after another, and writes the
table to standard output, everything to ``--out`` and a figure beside it. README.md in this folder says more.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, where tests/reference.py is

from benchmarks import plan, report
from benchmarks.figure import save_figure
from benchmarks.plan import Case
from dgal_bench.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
PEERS = ("scikit-activeml", "scikit-learn")
_SETUP_SECONDS = 120  # imports and inputs, on a machine that is slow or busy; beyond the limit and this, it hangs
_BUSY = 0.2  # cores that other processes use, above which timings are noise


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    planned = plan.cases(options.criteria, options.quick)
    results = _header(options)
    _say(_introduction(results, len(planned)))
    pace: dict[tuple[str, str], float] = {}
    rows = results["measurements"]
    start = perf_counter()
    for number, case in enumerate(planned, 1):
        row = measured(case, rows, options.threads, options.limit)
        rows.append(row)
        if seconds := row.get("seconds"):
            pace[case.criterion, case.implementation] = seconds / plan.expected_seconds(case)
        left = plan.seconds_left(planned[number:], pace, options.limit)
        _say(_progress(number, len(planned), case, row, left, options.limit))
    results["took_seconds"] = perf_counter() - start
    compared = report.comparisons(rows, results["bandwidth"]["read_gb_per_second"], options.limit)
    results["comparisons"] = compared
    _say(f"\n{report.table(compared, options.limit)}\n\n{_quiet(rows)}")
    _write(results, options.out)
    return int(any(row["status"] == "failed" for row in rows))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/acquisition.py", description=(__doc__ or "").partition("\n")[0])
    default_out = ROOT / "benchmarks" / "results" / "acquisition.json"
    parser.add_argument("--quick", action="store_true", help="2,000 points, 10 classes, 10 picks: under a minute")
    parser.add_argument("--out", type=Path, default=default_out, help="the JSON file; the figure goes beside it")
    parser.add_argument(
        "--threads", type=int, default=1, help="for torch, BLAS and OpenMP alike (default: 1, as a cell has)"
    )
    parser.add_argument("--limit", type=float, default=30.0, help="seconds after which a call is stopped (default: 30)")
    parser.add_argument("--criteria", nargs="+", choices=plan.CRITERIA, default=plan.CRITERIA, help="default: all")
    options = parser.parse_args(words)
    if options.threads < 1 or not options.limit > 0:
        parser.error(
            f"--threads {options.threads} --limit {options.limit:g}: use 1 or more threads, and a limit above 0"
        )
    return options


def _header(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": " ".join(["python", "benchmarks/acquisition.py", *sys.argv[1:]]),
        "threads": options.threads,
        "limit_seconds": options.limit,
        "memory_gb": plan.memory_bytes() / 1e9,
        "bandwidth": _worker({"bandwidth": True}, options.threads, _SETUP_SECONDS),
        "provenance": provenance(),
        "peers": {name: _version(name) for name in PEERS},
        "features": plan.N_FEATURES,
        "coreset_centres": plan.N_CENTRES,
        "measurements": [],
    }


def measured(case: Case, rows: Sequence[Mapping[str, Any]], threads: int, limit: float) -> dict[str, Any]:
    """The row of a case; it is not started if it needs too much memory or a smaller one of ``rows`` was stopped."""
    needed = plan.needed_bytes(case)
    if needed > plan.MEMORY_SHARE * plan.memory_bytes():
        return case.facts() | {"status": "over_memory", "peak_mb": None, "needs_gb": needed / 1e9}
    stopped = [Case.of(row) for row in rows if row["status"] == "over_limit"]
    smaller = [other for other in stopped if case.is_larger_than(other)]
    if smaller:
        return case.facts() | {"status": "not_started", "peak_mb": None, "because_of": smaller[0].facts()}
    return case.facts() | _worker(case.facts() | {"limit": limit}, threads, limit + _SETUP_SECONDS)


def _worker(request: Mapping[str, Any], threads: int, patience: float) -> dict[str, Any]:
    """What a fresh process answers; the numbers of threads must be in its environment before it loads a library."""
    words = [sys.executable, "-m", "benchmarks.worker", json.dumps(request)]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, timeout=patience, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "over_limit", "peak_mb": None}
    if done.returncode == -9:  # the system's own guard of memory
        return {"status": "over_memory", "peak_mb": None}
    if done.returncode != 0:
        return {"status": "failed", "peak_mb": None, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _introduction(results: Mapping[str, Any], n_cases: int) -> str:
    machine = results["provenance"]["machine"]
    return (
        f"{n_cases} measurements, each in a process of its own, {results['threads']} thread(s), at most "
        f"{results['limit_seconds']:g} s a call; {machine['cpu']}, {machine['cores']} cores, "
        f"{results['memory_gb']:.0f} GB, memory read at {results['bandwidth']['read_gb_per_second']:.1f} GB/s"
    )


def _quiet(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the seconds can be trusted: two threads that wait for each other suffer most from a third process."""
    others = [row["cores_of_others"] for row in rows if row.get("cores_of_others") is not None]
    busy = sum(cores > _BUSY for cores in others)
    if busy:
        return f"NOISE: other processes kept more than {_BUSY:g} cores busy in {busy} of {len(others)} measurements"
    return f"quiet machine: other processes kept at most {max(others, default=0.0):.2f} cores busy"


def _progress(number: int, n_cases: int, case: Case, row: Mapping[str, Any], left: float, limit: float) -> str:
    sizes = f"N={case.points:<8,}C={case.classes or 'any':<4} B={case.picks:<4}"
    seconds = report.seconds_text(row, limit) + (" s" if row["status"] == "measured" else "")
    remark = f"  {row['error']}" if "error" in row else ""
    minutes = f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"
    return (
        f"[{number:>3}/{n_cases}] {case.criterion:<8}{sizes}{case.implementation:<16}{seconds:>12}  {minutes}{remark}"
    )


def _write(results: Mapping[str, Any], out: Path) -> None:
    """Without the picks themselves: they were for comparing, and ``shared_picks`` says what came of it."""
    kept = [{key: value for key, value in row.items() if key != "chosen"} for row in results["measurements"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**results, "measurements": kept}, indent=1) + "\n")
    written = [out, *save_figure(results, out.with_suffix(""))]
    _say("written: " + ", ".join(str(path) for path in written))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
