"""Milliseconds of a diffusion step and of DGAL's whole restriction: ours, torch's and scipy's CSR products, the floor.

``python benchmarks/diffusion.py`` builds the graph of generated points (K = 20) and times one product M X, then the
restriction after 60 labels and 10 or 50 new ones: in full, gone on with from the round before, and with scipy's product
and argpartition. Last it selects among points of which 99 % have the lowest score, as where no label has reached, and
does so by ranking all that are tied. The floor is what memory allows, measured in the same run. Every answer of all is
checked. How seconds grow with N is benchmarks/scaling.py's to say: these sizes have features of different dimensions.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

import torch

from benchmarks import points
from benchmarks.common import at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.floors import bandwidth, step_bytes
from benchmarks.products import (
    FULL,
    INCREMENTAL,
    OURS,
    PEER,
    TORCH,
    Natural,
    Restricted,
    pool_of,
    products,
    restrictions,
    right_candidates,
    right_products,
    some_values,
)
from benchmarks.repetitions import Repeated, interleaved
from dgal_bench.core.seeding import TieBreak
from dgal_bench.core.system import on_threads
from dgal_bench.core.types import smallest
from dgal_bench.graph.graph import Graph
from dgal_bench.graph.incremental import lowest_scores, rank_scores
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import transition

GRAPH_K = 20
NEW = (10, 50)
RESTRICTED = 100
KNOWN = 60  # labels before, as after five rounds of ten
RANK_ALL = "ranking all tied points"
_CLASSES = 10  # of the restrictions
_LARGEST = 200_000_000  # elements of X beyond which a number of classes is left out
_MANY = 50_000_000  # beyond which two repetitions must do: scipy takes seconds for a product


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    results = header("diffusion", options.threads, words) | {"graph_k": GRAPH_K, "repeats": options.repeats}
    rows: list[dict[str, Any]] = []
    with on_threads(options.threads):
        results |= {"bytes_per_second": bandwidth(), "graphs": rows}
        say(f"memory moves {results['bytes_per_second'] / 1e9:.1f} GB/s; {machine_text(results)}\n")
        for kind in options.kinds:
            for size in options.points:
                rows.append(measured(kind, size, options, results["bytes_per_second"]))
                say(table(rows[-1]))
        results["tied"] = [tied_selection(options.most_points, options.repeats)]
        say("\n".join(map(_tied_text, results["tied"])))
    results["goals"] = goals(rows) + tied_goals(results["tied"])
    say("\n".join(_goal_text(one) for one in results["goals"]))
    say(quiet(cores for row in rows for cores in row["cores_of_others"]))
    write(results, options.out)
    say(f"written: {options.out}")
    return int(any(row["wrong"] for row in [*rows, *results["tied"]]))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("diffusion", __doc__)
    made.add_argument("--points", type=at_least_one, nargs="+", default=[60_000, 1_000_000])
    made.add_argument("--kinds", nargs="+", choices=sorted(points.KINDS), default=sorted(points.KINDS))
    made.add_argument("--classes", type=at_least_one, nargs="+", default=[10, 100], help="of the steps")
    made.add_argument("--repeats", type=at_least_one, default=5, help="of every contender (default: 5)")
    made.add_argument("--most-points", type=at_least_one, default=10_000_000, help="of a selection among tied points")
    made.add_argument("--quick", action="store_true", help="2,000 and 4,000 points, twice: seconds")
    options = made.parse_args(words)
    if options.quick:
        options.points, options.repeats, options.most_points = [2_000, 4_000], 2, 4_000
    if min(options.points) < 1_000:
        made.error(f"--points {min(options.points)} is too small: use 1000 or more")
    return options


def measured(kind: str, size: int, options: argparse.Namespace, bytes_per_second: float) -> dict[str, Any]:
    """Everything of one graph; ``wrong``: what did not answer right."""
    say(f"{kind}, {size:,} points: building the graph")
    features = torch.from_numpy(points.points(kind, size, 50 if size <= 100_000 else 64))
    natural = Natural(transition(knn(features, GRAPH_K)))
    graph, wrong, others = natural.graph, [], []
    row: dict[str, Any] = {"kind": kind, "points": size, "edges": len(graph.indices), "steps": graph.default_steps}
    for n_classes in options.classes:
        if size * n_classes > _LARGEST:
            say(f"{n_classes} classes are left out: X alone would be {size * n_classes * 4 / 1e9:.1f} GB")
            continue
        timed = stepped(natural, n_classes, options.repeats)
        wrong += _wrong(timed, f"{n_classes} classes", all)
        floor = step_bytes(size, len(graph.indices), n_classes) / bytes_per_second
        ms = {name: 1e3 * median(taken) for name, taken in timed.seconds.items()}
        row[f"step_{n_classes}"] = {"floor_ms": 1e3 * floor, "ms": ms, "repeats": len(timed.seconds[OURS])}
        others += timed.cores_of_others
    for new in NEW:
        timed = restricted(natural, new, options.repeats)
        wrong += _wrong(timed, f"{new} new", lambda answers: all(right for _, right in answers))
        row[f"new_{new}"] = {
            name: _times(timed.seconds[name], [one for one, _ in answers]) for name, answers in timed.answers.items()
        }
        others += timed.cores_of_others
    return row | {"wrong": wrong, "cores_of_others": others}


def stepped(natural: Natural, n_classes: int, repeats: int) -> Repeated:
    """Products; of their answers, whether they are right."""
    values = some_values(natural.graph.size, n_classes)
    right, makers = right_products(natural, values), products(natural, values)
    interleaved(makers, 1, lambda name, answer: None)  # the first of a shape finds its code and its memory
    return interleaved(makers, repeats if values.numel() <= _MANY else min(2, repeats), right)


def restricted(natural: Natural, new: int, repeats: int) -> Repeated:
    """Restrictions; their answers, and whether they are right."""
    first, pool = (pool_of(natural.graph.size, _CLASSES, KNOWN + more) for more in (0, new))
    right, makers = right_candidates(natural, pool, RESTRICTED), restrictions(natural, first, pool, RESTRICTED)
    interleaved(makers, 1)
    return interleaved(makers, repeats, lambda name, answer: (answer, right(name, answer)))


def tied_selection(size: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of selecting RESTRICTED points where 99 % are tied at the lowest score; the graph has no edges."""
    rng, ties = torch.Generator().manual_seed(0), TieBreak(0, size)
    nothing = torch.zeros(0)
    no_edges = torch.zeros(size + 1, dtype=torch.int32)
    graph = Graph(no_edges, nothing, nothing, nothing, torch.randperm(size, generator=rng), GRAPH_K, True)
    heat = torch.rand(size, 1, generator=rng)
    heat[: int(0.99 * size)] = 0
    scores, minima = rank_scores(lambda heat: heat[:, 0], heat, torch.arange(KNOWN))
    graph.nodes  # noqa: B018 - made once for a graph

    def rank_all() -> torch.Tensor:
        return graph.points[smallest(scores[:size], RESTRICTED, graph.points, ties)]

    makers = {
        OURS: lambda: lambda: lowest_scores(graph, scores, minima, RESTRICTED, ties)[0],
        RANK_ALL: lambda: rank_all,
    }
    timed = interleaved(makers, repeats)
    ms = {name: 1e3 * median(taken) for name, taken in timed.seconds.items()}
    equal = all(torch.equal(*pair) for pair in zip(timed.answers[OURS], timed.answers[RANK_ALL], strict=True))
    return {"points": size, "ms": ms, "wrong": [] if equal else [f"selection of {size:,}"]}


def _tied_text(row: Mapping[str, Any]) -> str:
    ours, others = row["ms"][OURS], row["ms"][RANK_ALL]
    return f"{row['points']:,} points, 99 % tied: {ours:.2f} ms, {RANK_ALL} {others:.2f} ({others / ours:.0f} times)"


def tied_goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [row["ms"][OURS] for row in rows if row["points"] == 10_000_000]
    what = "10,000,000 points, 99 % tied: a selection, ms"
    return [{"what": what, "value": ms, "limit": 1, "reached": ms <= 1, "sign": -1} for ms in found]


def _wrong(timed: Repeated, what: str, right: Callable[[list[Any]], bool]) -> list[str]:
    return [f"{name}, {what}" for name, answers in timed.answers.items() if not right(answers)]


def _times(taken: Sequence[float], answers: Sequence[Restricted]) -> dict[str, float]:
    return {
        "ms": 1e3 * median(taken),
        "diffuse_ms": 1e3 * median(answer.seconds["diffuse"] for answer in answers),
        "select_ms": 1e3 * median(answer.seconds["select"] for answer in answers),
        "touched": answers[0].touched,
    }


def table(row: Mapping[str, Any]) -> str:
    lines = [f"\n{row['kind']}, {row['points']:,} points, {row['edges']:,} edges, T = {row['steps']}"]
    for key, one in row.items():
        if key.startswith("step_"):
            ours, floor = one["ms"][OURS], one["floor_ms"]
            lines.append(f"\n  a step, C = {key[5:]:<24}{'ms':>9}{'x ours':>9}{'x floor':>9}")
            lines.append(f"  {'floor':<36}{floor:>9.2f}{floor / ours:>9.2f}{1:>9.2f}")
            lines += [f"  {name:<36}{ms:>9.2f}{ms / ours:>9.2f}{ms / floor:>9.2f}" for name, ms in one["ms"].items()]
        if key.startswith("new_"):
            full, columns = one[FULL]["ms"], f"{'ms':>9}{'x full':>9}{'diffuse':>9}{'select':>9}{'edges':>9}"
            lines.append(f"\n  {f'a restriction, {key[4:]} new labels':<36}{columns}")
            lines += [
                f"  {name:<36}{its['ms']:>9.2f}{its['ms'] / full:>9.2f}{its['diffuse_ms']:>9.2f}"
                f"{its['select_ms']:>9.2f}{its['touched']:>9.1%}"
                for name, its in one.items()
            ]
    lines += [f"  WRONG: {name} is wrong" for name in row["wrong"]]
    return "\n".join(lines) + "\n"


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What issue 8 asks for, where a row is of the size it names; ``sign`` -1: at most."""
    found = []

    def goal(what: str, value: float, limit: float, sign: int) -> None:
        found.append(
            {"what": what, "value": value, "limit": limit, "reached": sign * value >= sign * limit, "sign": sign}
        )

    for row in rows:
        name, million = f"{row['kind']} {row['points']:,}", row["points"] == 1_000_000
        ten, hundred, new = row.get("step_10"), row.get("step_100"), row[f"new_{NEW[0]}"]
        if million and row["kind"] == "clustered":
            if ten:
                goal(f"{name}: a step, C = 10, x floor", ten["ms"][OURS] / ten["floor_ms"], 4, -1)
                goal(f"{name}: torch CSR, natural order, x ours", ten["ms"][TORCH] / ten["ms"][OURS], 5, 1)
            goal(f"{name}: full x incremental, 10 new labels", new[FULL]["ms"] / new[INCREMENTAL]["ms"], 5, 1)
        if million:
            goal(f"{name}: a full restriction, ms", new[FULL]["ms"], 600, -1)
        if row["points"] == 60_000:
            if hundred:
                goal(f"{name}: torch CSR x ours, C = 100", hundred["ms"][TORCH] / hundred["ms"][OURS], 3, 1)
            goal(f"{name}: scipy and argpartition x full", new[PEER]["ms"] / new[FULL]["ms"], 3, 1)
            goal(f"{name}: a full restriction, ms: the bar", new[FULL]["ms"], 25, -1)
            goal(f"{name}: a full restriction, ms: the goal", new[FULL]["ms"], 15, -1)
    return found


def _goal_text(one: Mapping[str, Any]) -> str:
    bound = "at least" if one["sign"] > 0 else "at most"
    verdict = "reached" if one["reached"] else "NOT reached"
    return f"goal: {one['what']}: {bound} {one['limit']:g}: {one['value']:.2f}, {verdict}"


if __name__ == "__main__":
    sys.exit(main())
