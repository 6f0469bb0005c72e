"""Seconds and memory of badge, coreset and margin after the forward pass: ours, plain references, scikit-activeml.

``python benchmarks/acquisition.py`` runs every measurement in a process of its own, one after another, and writes the
table to standard output, everything to ``--out`` and a figure beside it. README.md in this folder says more.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, where tests/reference.py is

from benchmarks import plan, report
from benchmarks.common import answer, header, machine_text, parser, positive_seconds, quiet, say, write
from benchmarks.figure import save_figure
from benchmarks.plan import Case

WORKER = "benchmarks.worker"
PEERS = ("scikit-activeml", "scikit-learn")
_SETUP_SECONDS = 120  # imports and inputs, on a machine that is slow or busy; beyond the limit and this, it hangs


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    planned = plan.cases(options.criteria, options.quick)
    results = _header(options, words)
    say(_introduction(results, len(planned)))
    pace: dict[tuple[str, str], float] = {}
    rows = results["measurements"]
    start = perf_counter()
    for number, case in enumerate(planned, 1):
        row = measured(case, rows, options.threads, options.limit)
        rows.append(row)
        if seconds := row.get("seconds"):
            pace[case.criterion, case.implementation] = seconds / plan.expected_seconds(case)
        left = plan.seconds_left(planned[number:], pace, options.limit)
        say(_progress(number, len(planned), case, row, left, options.limit))
    results["took_seconds"] = perf_counter() - start
    compared = report.comparisons(rows, results["bandwidth"]["read_gb_per_second"], options.limit)
    results["comparisons"] = compared
    say(f"\n{report.table(compared, options.limit)}\n\n{quiet(row.get('cores_of_others') for row in rows)}")
    _write(results, options.out)
    return int(any(row["status"] == "failed" for row in rows))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("acquisition", __doc__)
    made.add_argument("--quick", action="store_true", help="2,000 points, 10 classes, 10 picks: under a minute")
    made.add_argument(
        "--limit", type=positive_seconds, default=30.0, help="seconds after which a call is stopped (default: 30)"
    )
    made.add_argument("--criteria", nargs="+", choices=plan.CRITERIA, default=plan.CRITERIA, help="default: all")
    return made.parse_args(words)


def _header(options: argparse.Namespace, words: Sequence[str] | None) -> dict[str, Any]:
    return header("acquisition", options.threads, words) | {
        "limit_seconds": options.limit,
        "memory_gb": plan.memory_bytes() / 1e9,
        "bandwidth": answer(WORKER, {"bandwidth": True}, options.threads, _SETUP_SECONDS),
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
    return case.facts() | answer(WORKER, case.facts() | {"limit": limit}, threads, limit + _SETUP_SECONDS)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _introduction(results: Mapping[str, Any], n_cases: int) -> str:
    return (
        f"{n_cases} measurements, each in a process of its own, at most {results['limit_seconds']:g} s a call; "
        f"{machine_text(results)}, {results['memory_gb']:.0f} GB, memory read at "
        f"{results['bandwidth']['read_gb_per_second']:.1f} GB/s"
    )


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
    write({**results, "measurements": kept}, out)
    written = [out, *save_figure(results, out.with_suffix(""))]
    say("written: " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    sys.exit(main())
