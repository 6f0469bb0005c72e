"""Seconds of every strategy's query against the number of points, on features that nobody trained for.

``python benchmarks/scaling.py`` builds a graph of 10^4 to 10^7 points, clustered ones and those of one connected
manifold, and asks strategies for 10 points, 110 labeled. What would take hours is timed on fewer points or images and
extrapolated, and marked. Each size has a process of its own; ``--work`` keeps features, graphs and answers for the next
run. Left out: ganvae, whose query is the training of an adversary, and variants of seals and vae_seals that pass the
same points through the network and search among them as those do.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

import numpy as np

from benchmarks.common import answer, at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.points import KINDS
from benchmarks.scaling_figure import save_scaling
from benchmarks.scaling_worker import BUILD_THREADS

POINTS = [10**4, 10**5, 10**6, 10**7]
QUICK = [2_000, 4_000]
PHASES = ("diffuse", "select")
MOST_FULL = 1.05
"""The log-log slope of the full diffusion's and the full selection's seconds against N: a goal, for both kinds."""

BELOW_INCREMENTAL = 0.8
"""Of the incremental diffusion, clustered."""

HUGE, GIGABYTES = 10**7, 16
"""From so many points on, building and asking must each stay under so much memory."""

LEFT_OUT = ("ganvae", "seals_margin", "seals_matched", "vae_seals_margin")
_PATIENCE = 4 * 3600  # seconds for one size


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    results = header("scaling", options.threads, words) | {
        "features": options.features, "sample": options.sample, "own_limit": options.own_limit, "left_out": LEFT_OUT,
    }  # fmt: skip
    say(f"{options.features} features, medians of {options.repeats} queries, {machine_text(results)}")
    say(f"graphs are built on {BUILD_THREADS} threads; left out: {', '.join(LEFT_OUT)}")
    sizes = []
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(TemporaryDirectory(prefix="dgal-scaling-")))
        for n_points in options.points:
            for kind in options.kinds:
                sizes.append(
                    {"kind": kind, "points": n_points}
                    | measured(kind, n_points, folder, options, results["provenance"])
                )
                say(told(sizes[-1]))
                results |= {"sizes": sizes, "slopes": slopes(sizes), "memory": memory_goals(sizes)}
                write(results, options.out)  # the next size may take an hour
    say(f"\n{table(results)}\n\n{quiet(one.get('cores_of_others') for one in sizes)}")
    written = [options.out]
    if any(one["status"] == "measured" for one in sizes):
        written += save_scaling(results, options.out.with_suffix(""))
    say("written: " + ", ".join(map(str, written)))
    return int(not all(one["status"] == "measured" and one["right"] for one in sizes))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("scaling", __doc__)
    made.add_argument("--points", type=at_least_one, nargs="+", default=POINTS, help="sizes (default: 10^4 to 10^7)")
    made.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="of features (default: both)")
    made.add_argument("--features", type=at_least_one, default=64, help="dimensions (default: 64)")
    made.add_argument("--repeats", type=at_least_one, default=3, help="of every query (default: 3)")
    made.add_argument(
        "--sample", type=at_least_one, default=20_000,
        help="images of a pass over the pool, from which longer ones are extrapolated (default: 20000)",
    )  # fmt: skip
    made.add_argument(
        "--own-limit", type=at_least_one, default=10**6,
        help="points up to which criteria on the whole pool are measured (default: 1000000)",
    )  # fmt: skip
    made.add_argument("--work", type=Path, help="keep features, graphs and answers here (default: a temporary folder)")
    made.add_argument("--quick", action="store_true", help=f"{QUICK} points: seconds")
    options = made.parse_args(words)
    if options.quick:
        options.points, options.sample, options.own_limit = QUICK, 1000, 3_000
    options.points = sorted(options.points)
    if options.points[0] < 1000:
        made.error(f"--points {options.points[0]} is too small: use 1000 or more")
    return options


def measured(
    kind: str, n_points: int, folder: Path, options: argparse.Namespace, made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """One size, or what was answered to the same request before, on this machine by this very code (``made_by``)."""
    request = {
        "kind": kind, "points": n_points, "features": options.features, "folder": str(folder.resolve()),
        "sample": options.sample, "own_limit": options.own_limit, "repeats": options.repeats,
        "threads": options.threads,
    }  # fmt: skip
    kept = folder / f"{kind}-{n_points}-{options.features}" / f"answer-{_name(request)}.json"
    if kept.exists() and (known := json.loads(kept.read_text()))["made_by"] == made_by and not made_by["git"]["dirty"]:
        say(f"{kept}: asked before")
        return dict(known)
    found = answer("benchmarks.scaling_worker", request, options.threads, _PATIENCE, heard=True)
    if found["status"] == "measured":
        write(found := found | {"made_by": made_by}, kept)
    return found


def _name(request: Mapping[str, Any]) -> str:
    """Of a request, wherever its folder lies."""
    asked = {key: value for key, value in request.items() if key != "folder"}
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def told(size: Mapping[str, Any]) -> str:
    where = f"{size['kind']}, {size['points']:,} points"
    if size["status"] != "measured":
        return f"{where}: {size['status']} {size.get('error', '')}".rstrip()
    built = size["graph"]
    return (
        f"{where}: graph in {built['seconds']:.1f} s (search {built['search_seconds']:.1f}, {built['method']}, recall "
        f"{built['recall']:.4f}, {size['edges']:,} edges, peak {built['peak_mb'] / 1e3:.1f} GB), "
        f"queries' peak {size['peak_mb'] / 1e3:.1f} GB"
    )


def slope(points: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Of the line that fits log seconds against log N best; None of fewer than two sizes."""
    if len(points) < 2:
        return None
    return float(np.polyfit([log(n) for n in points], [log(one) for one in seconds], 1)[0])


def slopes(sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of dgmg's diffusion and selection, full and incremental, by kind; and whether a goal is reached.

    T = ceil(log_K N) grows, too: ``per_step`` is the slope of a diffusion's seconds over T, without a goal.
    """
    found = []
    for kind in dict.fromkeys(one["kind"] for one in sizes):
        for how in ("full", "incremental"):
            lines = [
                (one["points"], one["steps"], row["phases"])
                for one in sizes
                if one["kind"] == kind and one["status"] == "measured"
                for row in one["queries"]
                if (row["name"], row["how"]) == ("dgmg", how)
            ]
            points = [n for n, _, _ in lines]
            for phase in PHASES:
                fitted = slope(points, [phases[phase] for _, _, phases in lines])
                line = {"kind": kind, "how": how, "phase": phase, "slope": fitted}
                if phase == "diffuse":
                    line["per_step"] = slope(points, [phases[phase] / steps for _, steps, phases in lines])
                found.append(line | goal(kind, how, phase, fitted))
    return found


def memory_goals(sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gigabytes at the peak of building and of asking, where there are HUGE points."""
    return [
        {
            "kind": one["kind"],
            "points": one["points"],
            "of": of,
            "gigabytes": peak / 1e3,
            "reached": peak / 1e3 < GIGABYTES,
        }
        for one in sizes
        if one["points"] >= HUGE and one["status"] == "measured"
        for of, peak in (("graph", one["graph"]["peak_mb"]), ("queries", one["peak_mb"]))
    ]


def goal(kind: str, how: str, phase: str, fitted: float | None) -> dict[str, Any]:
    """What the slope should be, in words, and whether it is; none for an incremental selection or a manifold's."""
    if how == "full":
        return {"goal": f"at most {MOST_FULL:g}", "reached": None if fitted is None else fitted <= MOST_FULL}
    if (kind, phase) == ("clustered", "diffuse"):
        return {
            "goal": f"below {BELOW_INCREMENTAL:g}",
            "reached": None if fitted is None else fitted < BELOW_INCREMENTAL,
        }
    return {"goal": None, "reached": None}


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "Seconds of a query. *: extrapolated, from a pass over fewer images, or from a query of fewer points.",
        "diffuse, select: dgmg's two steps before its candidates pass through the network; edges: the share that was",
        "multiplied. full: whole products; first round: the rows that labels reach; incremental: those of 10 new ones.",
    ]
    for kind in dict.fromkeys(one["kind"] for one in results["sizes"]):
        known = [one for one in results["sizes"] if one["kind"] == kind and one["status"] == "measured"]
        if not known:
            continue
        lines += ["", f"{kind:<22}" + "".join(f"{one['points']:>14,}" for one in known)]
        for rows in zip(*(one["queries"] for one in known), strict=True):
            label = f"{rows[0]['name']} {rows[0]['how']}".strip()
            runs = (f"{seconds_text(row['seconds'])}{'*' if row['extrapolated'] else ' '}" for row in rows)
            lines.append(f"{label:<22}" + "".join(f"{run:>14}" for run in runs))
            if rows[0]["name"] == "dgmg":
                lines += [f"{'  ' + phase + ' ms':<22}" + milliseconds(rows, phase) for phase in PHASES]
                lines.append(f"{'  edges':<22}" + "".join(f"{row['touched']:>13.1%} " for row in rows))
    lines.append("")
    for one in results["slopes"]:
        if one["slope"] is not None:
            steps = f" ({one['per_step']:.2f} per step)" if "per_step" in one else ""
            name = f"slope of {one['phase']}, {one['how']}, {one['kind']}"
            lines.append(f"{name}: {one['slope']:.2f}{steps}{verdict(one)}")
    lines += [
        f"peak of {one['of']}, {one['kind']}, {one['points']:,} points: {one['gigabytes']:.1f} GB; goal: under "
        f"{GIGABYTES}, {'reached' if one['reached'] else 'NOT reached'}"
        for one in results["memory"]
    ]
    return "\n".join(lines)


def milliseconds(rows: Sequence[Mapping[str, Any]], phase: str) -> str:
    return "".join(f"{1e3 * row['phases'][phase]:>13.2f} " for row in rows)


def seconds_text(seconds: float) -> str:
    return f"{seconds:,.4f}" if seconds < 10 else f"{seconds:,.1f}"


def verdict(one: Mapping[str, Any]) -> str:
    if one["goal"] is None:
        return ""
    return f"; goal: {one['goal']}, {'reached' if one['reached'] else 'NOT reached'}"


if __name__ == "__main__":
    sys.exit(main())
