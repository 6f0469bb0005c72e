"""Seconds and megabytes of a report: the page, its figures and tables, over a folder of generated results.

``python benchmarks/reporting.py`` writes 360 runs of 31 rows (six data sets, twelve strategies, five seeds; nobody ran
them), reports on them as the command does, in a process of its own with its imports, and sets that beside two floors of
the same run: the lines parsed by json.loads alone, and bare figures as many as the report has, drawn and saved.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.generated import PAPER, SIX, generate
from benchmarks.machine import cores_of_others
from dgal_bench.report.figures import DPI
from dgal_bench.report.plots.style import RC, WIDTH

GOAL = {"seconds": 20.0, "mb": 10.0}


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    results = header("reporting", 1, words) | {"goal": GOAL}
    say(f"a report, {machine_text(results)}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = generate(root / "results", SIX[: options.datasets], PAPER, range(options.seeds), options.rounds,
                         projections=True)  # fmt: skip
        say(f"{len(files)} runs written")
        results |= measured(root, files)
    say(f"\n{table(results)}\n\n{quiet([results['cores_of_others']])}")
    write(results, options.out)
    say(f"written: {options.out}")
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("reporting", __doc__)
    made.add_argument("--datasets", type=at_least_one, default=len(SIX), help="of the paper's six (default: all)")
    made.add_argument("--seeds", type=at_least_one, default=5)
    made.add_argument("--rounds", type=at_least_one, default=30)
    return made.parse_args(words)


def measured(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The command's own seconds, what it wrote, and the floors."""
    out, others, start = root / "report", cores_of_others(), perf_counter()
    words = [sys.executable, "-m", "dgal_bench.cli.main", "report", str(root / "results"), "--out", str(out)]
    subprocess.run(words, check=True, capture_output=True)
    seconds, busy = perf_counter() - start, others()
    n_figures = len(list(out.rglob("*.png")))
    return {
        "cells": len(files),
        "rows": sum(path.read_bytes().count(b'"kind": "round"') for path in files),
        "seconds": seconds,
        "page_mb": (out / "report.html").stat().st_size / 1e6,
        "all_mb": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6,
        "figures": n_figures,
        "parse_seconds": _parsed(files),
        "draw_seconds": _drawn(n_figures),
        "cores_of_others": busy,
    }


def _parsed(files: Sequence[Path]) -> float:
    """Floor of reading: every line as JSON and nothing checked."""
    start = perf_counter()
    for path in files:
        for line in path.read_bytes().splitlines():
            json.loads(line)
    return perf_counter() - start


def _drawn(n_figures: int) -> float:
    """Floor of drawing, on one core: as many figures of twelve lines of 31 points and bands, as PNG and as SVG."""
    import matplotlib as mpl

    rng, start = np.random.default_rng(0), perf_counter()
    with mpl.rc_context(rc=RC):
        for _ in range(n_figures):
            figure = Figure(figsize=(WIDTH, 4.5))
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            for _ in PAPER:
                y = rng.random(31).cumsum()
                axes.plot(np.arange(31), y, marker="o")
                axes.fill_between(np.arange(31), y - 1, y + 1, alpha=0.1)
            figure.savefig(io.BytesIO(), format="png", dpi=DPI)
            figure.savefig(io.StringIO(), format="svg")
    return perf_counter() - start


def table(results: Mapping[str, Any]) -> str:
    floor = results["parse_seconds"] + results["draw_seconds"]
    verdicts = [
        f"{name}: goal under {limit:g}: {results[key]:.1f}, {'reached' if results[key] < limit else 'NOT reached'}"
        for name, key, limit in (("seconds", "seconds", GOAL["seconds"]), ("page, MB", "page_mb", GOAL["mb"]))
    ]
    return "\n".join(
        [
            f"{results['cells']} runs, {results['rows']:,} rows: {results['seconds']:.1f} s with all imports, "
            f"{results['figures']} figures, page {results['page_mb']:.1f} MB, all files {results['all_mb']:.1f} MB",
            f"floor: {results['parse_seconds']:.2f} s to parse the lines, {results['draw_seconds']:.1f} s to draw and "
            f"save as many bare figures on one core: the report takes {results['seconds'] / floor:.2f} times that",
            *verdicts,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
