"""The pass of a query's candidates: our Predictor against the bare network on batches that are ready for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.repetitions import Maker, interleaved, ratio, ratio_text, spread
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.seeding import rng_for
from dgal_bench.data.image_data import ImageData
from dgal_bench.models.predict import Predictor

SIZES = (100, 500, 1000, 5000)
OURS, BARE = "ours", "bare"
_CPU = torch.device("cpu")
_MORE = 5  # times as often as asked: small passes are short, and easily disturbed


def compared(data: ImageData, weights: Mapping[str, Tensor], repeats: int) -> list[dict[str, Any]]:
    """A row for each of SIZES that the pool has: medians, ratio by repetition, and whether the answers' bits agree."""
    rows = []
    for size in SIZES:
        if size > data.size:
            continue
        makers = passes(data, weights, size)
        interleaved(makers, 2)
        repeated = interleaved(makers, repeats * _MORE if size < max(SIZES) else repeats)
        seconds, answers = repeated.seconds, repeated.answers
        rows.append(
            {
                "candidates": size,
                "seconds": {name: spread(seconds[name]) for name in makers},
                "x_bare": ratio(seconds[OURS], seconds[BARE]),
                "equal": all(one.equal(answers[BARE][0]) for name in makers for one in answers[name]),
            }
        )
    return rows


def passes(data: ImageData, weights: Mapping[str, Tensor], size: int) -> dict[str, Maker]:
    """Each answers with log probabilities (size, C). Ours picks its images, in no order, and makes them ready."""
    config = inputs.settings()
    module = inputs.new_module(config, data)
    module.net.load_state_dict(weights)
    module.eval()
    ids = torch.from_numpy(rng_for(inputs.SEED, "benchmark candidates", size).choice(data.size, size, replace=False))
    slices = inputs.datamodule(config, data, inputs.first_pool(data, 1), inputs.standardise(config, data))
    ready = [images for images, _ in slices.positions(ids)]

    @torch.inference_mode()
    def bare() -> Tensor:
        return torch.cat([torch.log_softmax(module.net(images)[0], dim=1) for images in ready])

    def ours() -> Callable[[], Tensor]:
        predict = Predictor(module, slices, _CPU, Stopwatch())
        return lambda: predict(ids).log_probs

    return {BARE: lambda: bare, OURS: ours}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "The candidates of a query, ms: the bare network on ready batches, and ours, which makes them ready.",
        "",
        f"{'candidates':<12}{'bare':>24}{'ours':>24}{'x bare':>22}  same bits",
    ]
    for row in rows:
        bare, ours = (
            ratio_text({key: 1e3 * value for key, value in row["seconds"][name].items()}) for name in (BARE, OURS)
        )
        lines.append(
            f"{row['candidates']:<12,}{bare:>24}{ours:>24}{ratio_text(row['x_bare']):>22}  "
            + ("yes" if row["equal"] else "NO")
        )
    return "\n".join(lines)
