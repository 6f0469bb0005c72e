"""Seconds of a round's training: under Lightning against a bare loop over the same slices.

``python benchmarks/training.py`` trains the CNN of conf/dataset/mnist on 10, 100 and 1,000 generated images of 28x28
for a fixed number of epochs: as a round of a run does (the Trainer's construction counts too), in a bare loop, and
under Lightning as it is usually used. Same first weights, same order, and the last weights must be the same.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

from benchmarks import inputs
from benchmarks.common import at_least_one, header, machine_text, parser, quiet, say, write
from benchmarks.loops import BARE, OURS, USUAL, Task, Trained, trainings
from benchmarks.repetitions import interleaved, ratio, ratio_text, spread
from dgal_bench.core.system import on_threads
from dgal_bench.engines.worker import hide_missing_gpus
from dgal_bench.models.trainer import silence_lightning

GOAL = 1.10
EPOCHS = {10: 300, 100: 150, 1_000: 30}
"""By size of the labeled set: seconds of each, and about as many epochs as a round's rule lets the small ones run."""

TOLERANCES = {BARE: 1e-6, OURS: 1e-6, USUAL: 1e-3}
"""Between weights at the end. Ours trains on the bare loop's own tensors; single images come in another layout, and
where a machine sums it in another order the roundings grow to some 1e-4."""

_WARM_UP = 2  # epochs


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    silence_lightning()
    hide_missing_gpus()
    data = inputs.generated(max(options.sizes) + 1, 10)
    results = header("training", options.threads, words) | {"repeats": options.repeats, "goal": {"x_bare": GOAL}}
    say(f"{options.repeats} interleaved repetitions, {machine_text(results)}")
    rows, others = [], []
    with on_threads(options.threads):
        for n_labeled in options.sizes:
            epochs = options.epochs or EPOCHS[n_labeled]
            interleaved(trainings(Task.of(data, n_labeled, _WARM_UP)), 1)
            repeated = interleaved(trainings(Task.of(data, n_labeled, epochs)), options.repeats)
            rows.append({"labels": n_labeled, "epochs": epochs} | summary(repeated.seconds, repeated.answers))
            others += repeated.cores_of_others
            say(f"{n_labeled:,} labels: done")
    results |= {"sizes": rows, "cores_of_others": others}
    say(f"\n{table(results)}\n\n{quiet(others)}")
    write(results, options.out)
    say(f"written: {options.out}")
    return int(not all(row["equal"] for row in rows))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("training", __doc__)
    made.add_argument("--sizes", type=at_least_one, nargs="+", default=list(EPOCHS), help="of the labeled set")
    made.add_argument("--epochs", type=at_least_one, help=f"of all sizes (default: {EPOCHS})")
    made.add_argument("--repeats", type=at_least_one, default=5, help="of every contender (default: 5)")
    options = made.parse_args(words)
    if options.epochs is None and (unknown := set(options.sizes) - set(EPOCHS)):
        made.error(f"--sizes {sorted(unknown)}: say with --epochs how many epochs they get")
    if options.epochs == 1:
        made.error("--epochs 1 is too small: use 2 or more, the first one does not tell what an epoch takes")
    return options


def summary(seconds: Mapping[str, Sequence[float]], answers: Mapping[str, Sequence[Trained]]) -> dict[str, Any]:
    """Seconds in all and per epoch, both against the bare loop's, and how far the weights are from its."""
    per_epoch = {name: [one.per_epoch for one in answers[name]] for name in answers}
    measurements = [
        {
            "name": name,
            "seconds": spread(seconds[name]),
            "all_seconds": list(seconds[name]),
            "construction_seconds": median(one.construction for one in answers[name]),
            "epoch_seconds": spread(per_epoch[name]),
            "x_bare": ratio(seconds[name], seconds[BARE]),
            "x_bare_per_epoch": ratio(per_epoch[name], per_epoch[BARE]),
            "epochs": min(len(one.ends) for one in answers[name]),
            "largest_difference": difference(answers[BARE][0], answers[name]),
        }
        for name in answers
    ]
    (ours,) = (one for one in measurements if one["name"] == OURS)
    return {
        "measurements": measurements,
        "equal": all(one["largest_difference"] <= TOLERANCES[one["name"]] for one in measurements),
        "bit_equal": ours["largest_difference"] == 0,
        "reached": ours["x_bare"]["median"] <= GOAL,
    }


def difference(truth: Trained, others: Sequence[Trained]) -> float:
    """The largest over all weights of all others, absolute; infinite where one is no number."""
    found = max(
        float((truth.weights[name] - other.weights[name]).abs().max()) for other in others for name in truth.weights
    )
    return found if isfinite(found) else inf


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "s: median of the repetitions (lowest to highest), the Trainer's construction among them; ms: a middle epoch.",
        "x bare: seconds / the bare loop's, the same way. weights: largest difference to the bare loop's at the end.",
        "",
        f"{'labels epochs':<14}{'':<32}{'s':>22}{'x bare':>22}{'ms/epoch':>10}{'x bare':>22}{'weights':>11}",
    ]
    for row in results["sizes"]:
        for one in row["measurements"]:
            same = "same bits" if one["largest_difference"] == 0 else f"{one['largest_difference']:.1e}"
            lines.append(
                f"{row['labels']:>6,}{row['epochs']:>7} {one['name']:<32}{ratio_text(one['seconds']):>22}"
                f"{ratio_text(one['x_bare']):>22}{one['epoch_seconds']['median'] * 1000:>10.2f}"
                f"{ratio_text(one['x_bare_per_epoch']):>22}{same:>11}"
            )
    lines.append("")
    for row in results["sizes"]:
        verdict = "reached" if row["reached"] else "NOT reached"
        same = "the same bits" if row["bit_equal"] else f"within {TOLERANCES[OURS]:g}"
        lines.append(
            f"goal at {row['labels']:,} labels: Lightning at most {results['goal']['x_bare']:g} times the bare loop: "
            f"{verdict}; weights: {same if row['equal'] else 'NOT EQUAL'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
