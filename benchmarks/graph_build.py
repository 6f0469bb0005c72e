"""Seconds of a graph's neighbours: ours, exact and approximate, FAISS, hnswlib, pynndescent, graphlearning, the floor.

``python benchmarks/graph_build.py`` runs every contender in a process of its own, one after another, and writes the
table to standard output and everything to ``--out``. README.md in this folder says more.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

from benchmarks.common import answer, at_least_one, header, machine_text, parser, positive_seconds, quiet, say, write
from benchmarks.points import KINDS

WORKER = "benchmarks.graph_build_worker"
WHOLE = ("tiles", "lists", "flat", "ivf", "hnsw", "hnswlib", "pynndescent", "graphlearning")
COMPILED = ("pynndescent", "graphlearning")
"""Peers that take half a minute before their first answer: no part of --quick."""
SAMPLED = ("lists", "ivf")
"""The contenders at the large size, where the usual order is timed on a sample."""

# Contender, ours, by how much at least, at which recall of ours: what the issue asks for.
GOALS = (("points", "flat", "tiles", 1.0, 1.0), ("points", "flat", "lists", 6.0, 0.98))
LARGE_GOAL = ("large", "ivf", "lists", 2.5, 0.99)
_LARGE_MB = 4000


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    results = header("graph_build", options.threads, words) | {"measurements": []}
    say(f"neighbours of {options.points:,} and {options.large:,} points, K = {options.k}; {machine_text(results)}")
    for kind in options.kinds:
        for size, n_features, names, target in (
            ("points", 50, WHOLE, 0.98),
            ("large", 64, SAMPLED, 0.99),
        ):
            request = {
                "kind": kind, "points": getattr(options, size), "features": n_features, "k": options.k,
                "recall_target": target, "sample": options.sample if size == "large" else None,
                "repeats": options.repeats,
                "threads": options.threads,
            }  # fmt: skip
            results["measurements"] += _measured(size, request, names, options)
            write(results, options.out)  # the next size may take a quarter of an hour
    rows = results["measurements"]
    results["goals"] = [goal for kind in options.kinds for goal in goals(rows, kind)]
    say("\n".join(["", *map(goal_text, results["goals"]), "", quiet(row.get("cores_of_others") for row in rows)]))
    write(results, options.out)
    say(f"written: {options.out}")
    return int(any(row["status"] == "failed" or row.get("wrong") for row in rows))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("graph_build", __doc__)
    made.add_argument("--points", type=at_least_one, default=60_000, help="of 50 features (default: 60,000)")
    made.add_argument("--large", type=at_least_one, default=1_000_000, help="of 64 features (default: 1,000,000)")
    made.add_argument("--k", type=at_least_one, default=20, help="neighbours (default: 20)")
    made.add_argument("--sample", type=at_least_one, default=20_000, help="queries in the usual order at --large")
    made.add_argument(
        "--repeats", type=at_least_one, default=3, help="of which the median counts, but for slow ones (default: 3)"
    )
    made.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    made.add_argument("--peers", nargs="*", choices=WHOLE, default=list(WHOLE), help="contenders (default: all)")
    made.add_argument("--limit", type=positive_seconds, default=600.0, help="seconds a contender has (default: 600)")
    made.add_argument("--quick", action="store_true", help="3,000 and 6,000 points, without peers that compile")
    options = made.parse_args(words)
    if options.quick:
        options.points, options.large, options.sample = 3_000, 6_000, 1_000
        options.peers = [name for name in options.peers if name not in COMPILED]
    return options


def _measured(
    size: str, request: Mapping[str, Any], names: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender; an inverted file has the lists and probes that ours has just had."""
    rows: list[dict[str, Any]] = []
    say(f"\n{request['kind']}, {request['points']:,} x {request['features']}")
    say(f"{'':14}{'seconds':>10}{'recall':>9}{'peak MB':>9}{'/ tiles':>9}{'/ lists':>9}{'/ floor':>9}")
    for name in (name for name in names if name in options.peers):
        ours = next((row for row in rows if row.get("lists")), {})
        asked = {**request, "contender": name, "lists": ours.get("lists")}
        sys.stderr.write(f"{name} is at work, for {options.limit:g} seconds at most\n")
        if name == "ivf" and not ours:
            found = {"status": "left_out", "error": "ours compared all points or was not asked: no lists to take over"}
        else:
            found = answer(WORKER, asked, options.threads, options.limit)
        rows.append({"size": size, **request, "contender": name, **found})
        with_ratios(rows)
        say(row_text(rows[-1]))
    return rows


def with_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """By how much each took longer than each of ours, and than the floor of an exact search."""
    seconds = {row["contender"]: row["seconds"] for row in rows if row["status"] == "measured"}
    for row in rows:
        if row["status"] == "measured":
            row["x"] = {ours: row["seconds"] / seconds[ours] for ours in ("tiles", "lists") if ours in seconds}
            row["x_floor"] = row["seconds"] / row["floor_seconds"]


def row_text(row: Mapping[str, Any]) -> str:
    if row["status"] != "measured":
        return f"{row['contender']:14}{row['status']}{': ' + row['error'] if 'error' in row else ''}"
    ratios = "".join(f"{row['x'].get(ours, float('nan')):>9.2f}" for ours in ("tiles", "lists"))
    peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    text = f"{row['contender']:14}{row['seconds']:>10.2f}{row['recall']:>9.4f}{peak:>9}{ratios}"
    return f"{text}{row['x_floor']:>9.2f}  {row['remark']}"


def goals(rows: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What the issue asks for, and whether it was met: the ratios at this size, and the memory of the large one.

    Memory that could not be measured is not met.
    """
    made = []
    for size, theirs, ours, least, recall in (*GOALS, LARGE_GOAL):
        found = {row["contender"]: row for row in rows if (row["size"], row["kind"]) == (size, kind)}
        if {found.get(name, {}).get("status") for name in (theirs, ours)} != {"measured"}:
            continue
        x = found[theirs]["seconds"] / found[ours]["seconds"]
        most, peak = _LARGE_MB if size == "large" else None, found[ours]["peak_mb"]
        small = most is None or (peak is not None and peak < most)
        met = x >= least and found[ours]["recall"] >= recall and small
        made.append({"kind": kind, "size": size, "theirs": theirs, "ours": ours, "x": x, "least": least, "met": met,
                     "recall": found[ours]["recall"], "least_recall": recall, "their_recall": found[theirs]["recall"],
                     "peak_mb": peak, "most_mb": most})  # fmt: skip
    return made


def goal_text(goal: Mapping[str, Any]) -> str:
    verdict = "met" if goal["met"] else "MISSED"
    text = (
        f"{verdict:7}{goal['kind']}, {goal['size']}: {goal['ours']} {goal['x']:.2f} times as fast as {goal['theirs']} "
        f"(goal {goal['least']:g}) at recall {goal['recall']:.4f} (goal {goal['least_recall']:g})"
    )
    if goal["most_mb"] is not None:
        peak = "unmeasured memory" if goal["peak_mb"] is None else f"{goal['peak_mb']:.0f} MB"
        text += f", in {peak} (goal {goal['most_mb']})"
    if goal["theirs"] == "ivf":
        text += f"; {goal['theirs']}'s recall is {goal['their_recall']:.4f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
