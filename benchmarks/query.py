"""Seconds of one query, as the loop asks it: 100 candidates from the graph against criteria on the whole pool.

``python benchmarks/query.py`` asks every strategy for 10 of 60,000 points, 110 of them labeled, in turn and several
times over. The graph is built on features of benchmarks/points.py, the network is the CNN of conf/dataset/mnist on
generated images. Then the same with ResNet50, whose pass over the pool is timed on a sample and extrapolated.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.asking import (
    PHASES,
    Answer,
    MakePredictor,
    ask,
    experiment_of,
    pool_of,
    remembered,
    sampled_pass,
    synthetic_outputs,
    whole_pass,
)
from benchmarks.common import at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.floors import best_seconds
from benchmarks.inference import trained
from benchmarks.points import KINDS, points
from benchmarks.repetitions import Maker, interleaved, ratio, ratio_text, spread
from dgal_bench.config.schema import RunConfig
from dgal_bench.core.system import on_threads
from dgal_bench.core.types import Outputs
from dgal_bench.data.pool import Pool
from dgal_bench.engines.worker import hide_missing_gpus
from dgal_bench.experiment import Run
from dgal_bench.graph.graph import Graph
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import transition
from dgal_bench.models.task import TaskModule
from dgal_bench.models.trainer import silence_lightning

OURS, FIRST = "dgmg", "dgmg, nothing remembered"
RESTRICTED = ("dgmg", "dgbadge", "rsmg", "vae_seals", "random")
WHOLE = ("margin", "badge", "coreset")
"""Those that the goals are about; the rest of those that look at the whole pool: ``OTHERS``."""

OTHERS = ("lc", "entropy", "seals")
GOALS = {"cnn": (100, 150), "resnet": (400, 400)}
"""How many times dgmg's seconds the criteria on the whole pool must take at least, and better take."""

ROUND = 10  # 100 labels before the last round's, 10 in each
LABELED = 110
FEATURES = 50
NEIGHBORS = 20


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    silence_lightning()
    hide_missing_gpus()
    results: dict[str, Any] = header("query", options.threads, words) | {
        "points": options.points, "labeled": LABELED, "repeats": options.repeats, "graphs": [], "nets": [],
    }  # fmt: skip
    say(f"{options.points:,} points, {options.repeats} interleaved repetitions, {machine_text(results)}")
    with on_threads(options.threads):
        for kind in options.kinds:
            latents = torch.from_numpy(points(kind, options.points, FEATURES))
            start = perf_counter()
            graph = transition(knn(latents, NEIGHBORS))
            results["graphs"].append(
                {
                    "kind": kind, "seconds": perf_counter() - start, "edges": len(graph.indices),
                    "steps": graph.default_steps,
                }
            )  # fmt: skip
            nets = (cnn, resnet) if options.sample and kind == options.kinds[0] else (cnn,)
            for net in nets:
                results["nets"].append({"kind": kind} | net(options, latents, graph))
                say(f"\n{table(results['nets'][-1])}")
    others = [one for net in results["nets"] for one in net["cores_of_others"]]
    equal = all(net["equal"] for net in results["nets"])
    say(f"\nequal picks in all repetitions, remembered or not: {'yes' if equal else 'NO'}\n{quiet(others)}")
    say("not here: ganvae, whose seconds are those of the training steps that a profile gives its adversary")
    write(results, options.out)
    say(f"written: {options.out}")
    return int(not equal)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("query", __doc__)
    made.add_argument("--points", type=at_least_one, default=60_000, help="in the pool (default: 60000)")
    made.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS),
        help="of features (default: both); the heavy network is asked on the first, its seconds being its passes'",
    )  # fmt: skip
    made.add_argument("--repeats", type=at_least_one, default=3, help="of every query (default: 3; ResNet: at most 2)")
    made.add_argument("--net", default="resnet50", help="the heavy network, of timm's (default: resnet50)")
    made.add_argument("--sample", type=int, default=300, help="images of its pass; 0: leave it out (default: 300)")
    made.add_argument("--quick", action="store_true", help="2,000 points, a small ResNet: seconds")
    options = made.parse_args(words)
    if options.quick:
        options.points, options.repeats, options.net, options.sample = 2000, 2, "resnet10t", 120
    if options.points < LABELED + 1000:
        made.error(f"--points {options.points} is too small: use {LABELED + 1000} or more")
    return options


def cnn(options: argparse.Namespace, latents: Tensor, graph: Graph) -> dict[str, Any]:
    """Everybody, with the whole pass."""
    data = inputs.generated(options.points, 10)
    module = inputs.new_module(configured("cnn", OURS), data)
    module.net.load_state_dict(trained(data))
    experiment = experiment_of(configured("cnn", OURS), data, latents, graph)
    runs = {name: Run.of(configured("cnn", name), experiment) for name in (*RESTRICTED, *WHOLE, *OTHERS)}
    return measured("CNN", runs, module.eval(), options.repeats, whole_pass, GOALS["cnn"])


def resnet(options: argparse.Namespace, latents: Tensor, graph: Graph) -> dict[str, Any]:
    """DGMG's candidates pass whole, a sample of everybody else's; synthetic outputs then stand for the pool's."""
    overrides = ("net.pretrained=false", f"net.kind={options.net}", "restricted_size=100", "batch_size=10")
    configs = {name: configured("resnet", name, *overrides) for name in (OURS, *WHOLE)}
    data = inputs.coloured(inputs.generated(options.points, 10))
    module = inputs.new_module(configs[OURS], data).eval()
    experiment = experiment_of(configs[OURS], data, latents, graph)
    runs = {name: Run.of(config, experiment) for name, config in configs.items()}
    make = sampled_pass(options.sample, synthetic_outputs(options.points, 10))
    repeats = min(2, options.repeats)
    return measured(options.net, runs, module, repeats, make, GOALS["resnet"]) | {"sample": options.sample}


def configured(net: str, strategy: str, *overrides: str) -> RunConfig:
    """MNIST's protocol with its CNN, or CIFAR-10's with another network."""
    return inputs.settings(*overrides, strategy=strategy, dataset={"cnn": "mnist", "resnet": "cifar10"}[net])


def measured(
    net: str, runs: Mapping[str, Run], module: TaskModule, repeats: int, make: MakePredictor, goal: tuple[int, int]
) -> dict[str, Any]:
    """Every query in turn, ``repeats`` times after one for warmth; whole seconds, phases, and ratios to dgmg's."""
    some = runs[OURS]
    pool = pool_of(some.graph.size, 10, LABELED)
    answers = synthetic_outputs(pool.size, 10)
    makers: dict[str, Maker] = {name: query(run, pool, module, make, answers) for name, run in runs.items()}
    makers[FIRST] = query(some, pool, module, make, answers, first=True)
    interleaved(makers, 1)
    repeated = interleaved(makers, repeats)
    image_seconds = bare_seconds(some, pool, module)
    return {
        "net": net,
        "image_shape": list(some.experiment.data.image_shape),
        "bare_image_seconds": image_seconds,
        "cores_of_others": repeated.cores_of_others,
        **summary(repeated.answers, image_seconds, goal),
    }


def query(
    run: Run, pool: Pool, module: TaskModule, make: MakePredictor, answers: Outputs, first: bool = False
) -> Maker:
    """A query of round 10, and anew each time what the one before has left it; or nothing, as in a first round."""

    def maker() -> Callable[[], Answer]:
        memory = {} if first else remembered(run, pool, ROUND, module, answers)
        return lambda: ask(run, pool, ROUND, module, memory, make)

    return maker


@torch.inference_mode()
def bare_seconds(run: Run, pool: Pool, module: TaskModule) -> float:
    """An image's seconds in the bare network, on a batch that is ready: the floor of a pass."""
    batch, _ = next(iter(run.datamodule(pool, ROUND).positions(torch.arange(100))))
    return best_seconds(lambda: module.net(batch), repeats=3) / len(batch)


def summary(answers: Mapping[str, Sequence[Answer]], image_seconds: float, goal: tuple[int, int]) -> dict[str, Any]:
    ours = [one.seconds for one in answers[OURS]]
    rows = []
    for name, asked in answers.items():
        taken = [one.seconds for one in asked]
        rows.append(
            {
                "name": name,
                "seconds": spread(taken),
                "all_seconds": taken,
                "phases": {phase: median(one.phases[phase] for one in asked) for phase in PHASES},
                "x_dgmg": ratio(taken, ours),
                "x_floor": median(taken) / (asked[0].n_scored * image_seconds) if asked[0].n_scored else None,
                "extrapolated": asked[0].extrapolated,
                "n_scored": asked[0].n_scored,
                "n_candidates": asked[0].n_candidates,
            }
        )
    picks = {name: {tuple(one.picks) for one in asked} for name, asked in answers.items()}
    return {
        "measurements": sorted(rows, key=lambda row: row["seconds"]["median"]),
        "equal": all(len(found) == 1 for found in picks.values()) and picks[FIRST] == picks[OURS],
        "goals": [verdict(row, *goal) for row in rows if row["name"] in WHOLE],
    }


def verdict(row: Mapping[str, Any], least: int, wanted: int) -> dict[str, Any]:
    found = row["x_dgmg"]["median"]
    return {"name": row["name"], "least": least, "wanted": wanted, "found": found, "reached": found >= least}


def table(net: Mapping[str, Any]) -> str:
    channels, height, width = net["image_shape"]
    bare_ms = 1e3 * net["bare_image_seconds"]
    lines = [
        f"{net['net']}, {height}x{width}x{channels}, {net['kind']} points. s: median (lowest to highest). x dgmg: by",
        f"repetition. x floor: s / (points scored x {bare_ms:.3g} ms, an image in the bare network, its batch ready).",
        "ms: medians of the phases. *: the pass is timed on a sample and extrapolated.",
        "",
        f"{'':<26}{'scored':>8}{'s':>28}{'x dgmg':>28}{'x floor':>9}" + "".join(f"{one + ' ms':>12}" for one in PHASES),
    ]
    for row in net["measurements"]:
        floor = f"{row['x_floor']:.2f}" if row["x_floor"] else ""
        lines.append(
            f"{row['name'] + '*' * row['extrapolated']:<26}{row['n_scored']:>8,}{seconds_text(row['seconds']):>28}"
            f"{ratio_text(row['x_dgmg']):>28}{floor:>9}"
            + "".join(f"{1e3 * row['phases'][one]:>12.2f}" for one in PHASES)
        )
    lines.append("")
    for one in net["goals"]:
        better = "" if one["wanted"] == one["least"] else f", better {one['wanted']}"
        short = f", but not {one['wanted']}" if one["least"] <= one["found"] < one["wanted"] else ""
        lines.append(
            f"goal: {one['name']} takes at least {one['least']} times dgmg's seconds{better}: {one['found']:.0f}, "
            + ("reached" if one["reached"] else "NOT reached")
            + short
        )
    return "\n".join(lines)


def seconds_text(found: Mapping[str, float]) -> str:
    digits = 4 if found["max"] < 10 else 1
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
