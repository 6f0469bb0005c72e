"""Seconds of the network's pass over a whole pool: ours against the usual one, and where the gain comes from.

``python benchmarks/inference.py`` passes 60,000 generated images of 28x28 (``--data DIR``: MNIST's own) through the
CNN of conf/dataset/mnist. Ours: a Predictor, slices of one tensor, channels_last. The usual: eager, in the default
layout, from a DataLoader over single images. Same weights, and the answers must be the same. Then a query's candidates.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import candidates, inputs
from benchmarks.common import at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.repetitions import Maker, interleaved, ratio, ratio_text, spread
from dgal_bench.config.schema import available_cores
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import DataError
from dgal_bench.core.seeding import isolated
from dgal_bench.core.system import on_threads
from dgal_bench.data.image_data import ImageData
from dgal_bench.engines.worker import hide_missing_gpus
from dgal_bench.models.predict import Predictor
from dgal_bench.models.task import TaskModule, fit, new_trainer
from dgal_bench.models.trainer import silence_lightning

GOAL = 1.7
TIE = 1e-4
"""Log probabilities nearer than this are one at float rounding: layouts sum in other orders, some 1e-6 apart."""

_CPU = torch.device("cpu")
_TRAINED_ON = 500  # images: enough for answers of all classes
_EPOCHS = 10
_WARM_UP = 1000  # images


@dataclass(frozen=True)
class Contender:
    """A way to feed the network: slices of one tensor or single images, in which layout, by how many workers."""

    name: str
    slices: bool
    channels_last: bool
    workers: int = 0


OURS = Contender("slices, channels_last: ours", slices=True, channels_last=True)
USUAL = Contender("per item, default layout: the usual", slices=False, channels_last=False)


def contenders(workers: int) -> list[Contender]:
    """Ours and the usual, and between them each half of the difference."""
    found = [
        OURS,
        Contender("slices, default layout", slices=True, channels_last=False),
        Contender("per item, channels_last", slices=False, channels_last=True),
        USUAL,
    ]
    if workers:
        found.append(Contender(f"per item, default layout, {workers} workers", False, False, workers))
    return found


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    silence_lightning()
    hide_missing_gpus()
    config = inputs.settings()
    try:
        data = (
            inputs.mnist(config, options.data, options.images) if options.data else inputs.generated(options.images, 10)
        )
    except DataError as error:
        say(str(error))
        return error.exit_code
    rows = contenders(options.workers)
    results = header("inference", options.threads, words) | {
        "images": data.size, "data": data.name, "batch": config.predict_batch_size, "repeats": options.repeats,
    }  # fmt: skip
    say(f"{data.size:,} images ({data.name}), {options.repeats} interleaved repetitions, {machine_text(results)}")
    with on_threads(options.threads):
        weights = trained(data)
        interleaved(passes(rows, beginning(data), weights), 1)  # the first convolution of a shape picks its kernel
        repeated = interleaved(passes(rows, data, weights), options.repeats)
        few = candidates.compared(data, weights, options.repeats)
    results |= summary(rows, repeated.seconds, repeated.answers) | {"candidates": few}
    results["cores_of_others"] = repeated.cores_of_others
    say(f"\n{table(results)}\n\n{candidates.table(few)}\n\n{quiet(repeated.cores_of_others)}")
    write(results, options.out)
    say(f"written: {options.out}")
    return int(not (results["equal"] and all(row["equal"] for row in few)))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("inference", __doc__)
    made.add_argument("--images", type=at_least_one, default=60_000, help="in the pool (default: 60000)")
    made.add_argument("--data", type=Path, help="real MNIST out of this folder, in torchvision's layout")
    made.add_argument("--repeats", type=at_least_one, default=5, help="of every contender (default: 5)")
    default = 2 if available_cores() > 1 else 0
    made.add_argument("--workers", type=int, default=default, help="of a DataLoader with processes; 0: no such row")
    return made.parse_args(words)


def trained(data: ImageData) -> dict[str, Tensor]:
    """Weights after a few epochs: an untrained network's answers are all of one or two classes."""
    config = inputs.settings(f"training.max_epochs={_EPOCHS}", "training.optimizer=adam", "training.momentum=0")
    module = inputs.new_module(config, data)
    pool = inputs.first_pool(data, min(_TRAINED_ON, data.size))
    slices = inputs.datamodule(config, data, pool, inputs.standardise(config, data))
    with isolated(config.seed, "training", 0):
        fit(new_trainer(config, _CPU), module, slices)
    return module.net.state_dict()


def beginning(data: ImageData) -> ImageData:
    return replace(data, images=data.images[:_WARM_UP], labels=data.labels[:_WARM_UP])


def passes(rows: Sequence[Contender], data: ImageData, weights: Mapping[str, Tensor]) -> dict[str, Maker]:
    """By name: what makes a pass of the whole pool, which answers with log probabilities (N, C)."""
    return {row.name: maker(row, data, weights) for row in rows}


def maker(row: Contender, data: ImageData, weights: Mapping[str, Tensor]) -> Maker:
    """The pass of one contender, with its own network of the same weights in its own layout."""
    config = inputs.settings(f"net.channels_last={row.channels_last}")
    module = inputs.new_module(config, data)
    module.net.load_state_dict(weights)
    module.eval()
    if row.slices:
        slices = inputs.datamodule(config, data, inputs.first_pool(data, 1), inputs.standardise(config, data))
        everything = torch.arange(data.size)
        return lambda: lambda: Predictor(module, slices, _CPU, Stopwatch())(everything).log_probs
    loader = DataLoader(inputs.PerItem(data), batch_size=config.predict_batch_size, num_workers=row.workers)
    layout = torch.channels_last if row.channels_last else torch.contiguous_format
    return lambda: usual_pass(module, loader, layout)


def usual_pass(module: TaskModule, loader: DataLoader[Any], layout: torch.memory_format) -> Callable[[], Tensor]:
    """What anybody writes; it keeps features too, as ours does."""

    @torch.inference_mode()
    def call() -> Tensor:
        log_probs, features = [], []
        for images, _ in loader:
            logits, its_features = module.net(images.contiguous(memory_format=layout))
            log_probs.append(torch.log_softmax(logits, dim=1))
            features.append(its_features)
        torch.cat(features)
        return torch.cat(log_probs)

    return call


def summary(
    rows: Sequence[Contender], seconds: Mapping[str, Sequence[float]], answers: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """Seconds and ratios of each, what differs from the usual answers, and whether the goal is reached."""
    ours, usual = seconds[OURS.name], answers[USUAL.name][0]
    measurements = []
    for row in rows:
        taken = seconds[row.name]
        worst = max((difference(usual, one) for one in answers[row.name]), key=lambda found: found["beyond_ties"])
        measurements.append(
            asdict(row) | {"seconds": spread(taken), "all_seconds": list(taken), "x_ours": ratio(taken, ours)} | worst
        )
    found = ratio(seconds[USUAL.name], ours)
    return {
        "measurements": measurements,
        "equal": all(one["beyond_ties"] == 0 for one in measurements),
        "classes_answered": len(usual.argmax(dim=1).unique()),
        "goal": {"x_ours": GOAL, "found": found, "reached": found["median"] >= GOAL},
    }


def difference(usual: Tensor, other: Tensor) -> dict[str, Any]:
    """How many classes differ between log probabilities (N, C), and how many of them are no tie at float rounding.

    A tie: the usual network gives the other's class a log probability within TIE of its own class's. NaN is no answer.
    """
    odd = other.isnan().any(dim=1)
    rows = torch.nonzero((usual.argmax(dim=1) != other.argmax(dim=1)) | odd).flatten()
    gaps = usual[rows].amax(dim=1) - usual[rows, other[rows].argmax(dim=1)]
    return {
        "different": len(rows),
        "beyond_ties": int(((gaps > TIE) | odd[rows]).sum()),
        "largest_difference": float((usual - other).abs().max()),
    }


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "s: median of the repetitions (lowest to highest). x ours: their seconds / ours, the same way. differ: images",
        f"whose class is not the usual pass's; largest |difference| of log probabilities. Gaps to {TIE:g} are ties.",
        "",
        f"{'':<38}{'s':>22}{'images/s':>10}{'x ours':>22}{'differ':>8}{'largest':>10}",
    ]
    for one in results["measurements"]:
        taken = one["seconds"]
        lines.append(
            f"{one['name']:<38}{ratio_text(taken):>22}{results['images'] / taken['median']:>10,.0f}"
            f"{ratio_text(one['x_ours']):>22}{one['different']:>8}{one['largest_difference']:>10.1e}"
        )
    goal = results["goal"]
    beyond = sum(one["beyond_ties"] for one in results["measurements"])
    lines += [
        "",
        f"equal classes on all {results['images']:,} images: {'yes' if results['equal'] else f'NO, {beyond} differ'}",
        f"goal: the usual pass takes at least {goal['x_ours']:g} times ours: {ratio_text(goal['found'])}, "
        + ("reached" if goal["reached"] else "NOT reached"),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
