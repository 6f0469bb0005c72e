"""Results folders of any size whose rows nobody ran: shaped like real ones, numbers from a seeded generator.

``python -m benchmarks.generated DIR`` writes those of benchmarks/reporting.py: six data sets, twelve strategies, five
seeds.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgal_bench.engines.sweep import PlannedRun, SweepSettings, plan_runs
from dgal_bench.results.projection_file import LEVELS, PROJECTION_VERSION, file_name
from dgal_bench.results.resume import header_outline
from dgal_bench.results.rows import PHASES
from dgal_bench.results.schema import SCHEMA_VERSION

PAPER = ("random", "lc", "margin", "entropy", "badge", "coreset", "seals", "vae_seals", "ganvae", "rsmg",
         "dglc", "dgmg")  # fmt: skip
TWENTY = (*PAPER, "rslc", "rsbadge", "rscoreset", "dgent", "dgbadge", "dgcoreset", "seals_matched", "vae_seals_matched")
SIX = ("mnist", "emnist", "svhn", "cifar10", "cifar100", "mini_imagenet")
LATENTS = "0123456789abcdef0123"
CLASSES = {"mnist": 10, "emnist": 26, "svhn": 10, "cifar10": 10, "cifar100": 100, "mini_imagenet": 100, "digits": 10}
POOL = {"mnist": 60_000, "emnist": 124_800, "svhn": 73_257, "cifar10": 50_000, "cifar100": 50_000,
        "mini_imagenet": 48_000, "digits": 1_437}  # fmt: skip


def generate(
    root: Path,
    datasets: Sequence[str] = ("digits",),
    strategies: Sequence[str] = PAPER,
    seeds: Iterable[int] = range(5),
    rounds: int | None = None,
    overrides: Sequence[str] = (),
    suite: str = "paper",
    projections: bool = False,
) -> list[Path]:
    """Finished runs of every combination, and of full supervision; returns their files."""
    axes = {"dataset": list(datasets), "representation": ["default"], "profile": ["cpu"],
            "seed": [str(seed) for seed in seeds], "strategy": list(strategies)}  # fmt: skip
    axes |= {} if rounds is None else {"rounds": [str(rounds)]}
    axes |= {key: [value] for key, _, value in (one.partition("=") for one in overrides)}
    settings = SweepSettings(
        Path(root), suite, Path("data"), Path("cache"), None, False, True, (), full_supervision=True
    )
    files = []
    for job in plan_runs(axes, settings):
        lines = [header(job), *rows(job)]
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(job.path)
    for name in datasets if projections else ():
        write_projection(Path(root) / suite / name, POOL[name], min(100, CLASSES[name]))
    return files


def header(job: PlannedRun) -> dict[str, Any]:
    """As a worker writes it, of a machine that is not there."""
    config, known = job.config, header_outline(job.config, job.name)
    n_classes, pool = CLASSES[config.dataset.kind], POOL[config.dataset.kind]
    rng = np.random.default_rng(config.seed)
    initial = rng.permutation(pool)[: config.initial_size or pool].tolist()
    provenance = {
        "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "versions": {"dgal-bench": "0.1.0", "torch": "2.15.0"},
        "machine": {"cpu": "AMD EPYC", "vectors": "AVX2", "cores": 2, "gpu": None, "system": "Linux x86_64"},
    }
    setup = {
        "representation": {
            "kind": "vae", "seconds": 300.0, "label_share": {"latents": 0.87, "pca": 0.92, "pixels": 0.92},
            "explained_variance": 0.8, "active_latents": 15,
        },
        "graph": {"seconds": 9.0, "components": 1, "exact": True, "recall": 1.0, "share_outside_largest": 0.0},
    }  # fmt: skip
    return {
        **known, "kind": "header", "schema_version": SCHEMA_VERSION, "provenance": provenance,
        "command": list(job.command),
        "fingerprint": {
            **known["fingerprint"], "data": config.dataset.name.encode().hex() * 4, "weights": None, "files": None,
            "latents": LATENTS, "graph": "fedcba9876543210fedc", "git": provenance["git"]["revision"],
            "torch": "2.15.0", "cpu": "AMD EPYC", "vectors": "AVX2", "device": "cpu", "threads": 1,
        },
        "data": {"pool": pool, "test": 10_000, "shape": [1, 28, 28], "n_classes": n_classes},
        "network": {"parameters": 11_760, "flops_per_image": 171_624},
        "setup": {} if config.full_supervision else setup,
        "initial": initial if not config.full_supervision else initial[:100],
        "initial_classes": rng.integers(0, n_classes, len(initial[:100])).tolist(),
    }  # fmt: skip


def rows(job: PlannedRun) -> Iterator[dict[str, Any]]:
    """Curves that rise at a rate of the strategy's own, and queries that cost what its kind costs."""
    config = job.config
    number = sum(config.strategy.name.encode())
    rng = np.random.default_rng([config.seed, number])
    n_classes, pool = CLASSES[config.dataset.kind], POOL[config.dataset.kind]
    restricted = config.strategy.restrict["kind"] != "everything"
    n_candidates = config.restricted_size if restricted else pool
    n_scored = 0 if config.strategy.acquire["kind"] in ("random", "adversary") else n_candidates
    if config.full_supervision:
        yield {**row(0, pool, 0.978, rng, 0.0), "train_seconds": 35.0}
        return
    rate, labels = 0.5 + (number % 7) / 7, config.initial_size
    free = rng.permutation(pool)
    for n in range(config.rounds + 1):
        accuracy = 0.95 - 0.8 * float(np.exp(-rate * 4 * (n + 1) / config.rounds)) + float(rng.normal(0, 0.015))
        line = row(n, labels, min(max(accuracy, 0.0), 1.0), rng, min(1.0, 0.2 + n / 20))
        if n in (0, config.rounds // 2, config.rounds):
            line["propagated"] = {"accuracy": 0.6 + 0.2 * n / config.rounds, "unreached": 0.02,
                                  "converged_accuracy": 0.7, "converged_unreached": 0.0, "iterations": 40,
                                  "residual": 1e-6}  # fmt: skip
        if n < config.rounds:
            seconds = {"infer": 1e-5 * n_scored, "acquire": 1e-6 * n_scored + 2e-4}
            if not n_scored:
                seconds = {"acquire": 2e-4}
            if config.strategy.restrict["kind"] == "diffusion":
                seconds |= {"diffuse": 0.01, "select": 0.002}
            if config.strategy.acquire["kind"] == "adversary":
                seconds = {"aux_train": 3.0, "acquire": 0.1}
            seconds = {phase: value * float(rng.uniform(0.8, 1.25)) for phase, value in seconds.items()}
            assert seconds.keys() <= PHASES
            line |= {
                "indices": free[n * config.batch_size : (n + 1) * config.batch_size].tolist(),
                "classes": rng.integers(0, n_classes, config.batch_size).tolist(),
                "n_candidates": n_candidates, "candidates": f"{int(free[n]):020x}", "n_scored": n_scored,
                "boundary_share": min(1.0, 0.1 + 0.02 * n), "ties": 1.0 if n == 0 else 0.0,
                "query_seconds": sum(seconds.values()) + 1e-5, "seconds": seconds,
            }  # fmt: skip
        labels += config.batch_size
        yield line


def row(n: int, labels: int, accuracy: float, rng: np.random.Generator, reach: float) -> dict[str, Any]:
    return {
        "kind": "round", "round": n, "n_labeled": labels, "accuracy": accuracy, "underfit": False, "epochs": 40,
        "train_loss": 0.05, "reach": reach, "train_seconds": 10.0 * float(rng.uniform(0.9, 1.1)), "test_seconds": 0.5,
        "threads": 1, "jobs": 1, "load": 1.0, "busy_elsewhere": 0.01, "extra": {}, "extra_seconds": 0.01,
    }  # fmt: skip


def write_projection(folder: Path, n_points: int, n_classes: int = 10, seed: int = 0) -> None:
    """Beside the results of a data set: a cluster for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_points)
    angles = 2 * np.pi * np.arange(n_classes) / n_classes
    middles = 4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    positions = middles[labels] + rng.normal(0, 0.6, (n_points, 2))
    levels = np.clip((positions + 6) / 12 * LEVELS, 0, LEVELS).astype(np.uint16)
    np.savez_compressed(
        folder / file_name(LATENTS), version=PROJECTION_VERSION, latents=LATENTS, positions=levels,
        labels=labels.astype(np.uint8), n_classes=n_classes,
    )  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(f"{len(generate(Path(sys.argv[1]), SIX, rounds=30, projections=True))} runs in {sys.argv[1]}\n")
