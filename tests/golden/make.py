"""Writes the golden files of the present schema: ``python tests/golden/make.py tests/golden/schema-N``.

Run once, when a version is raised, by the last commit of the old one or the first of the new; never again after that.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from dgal_bench.config.schema import RunConfig, StrategyConfig
from dgal_bench.conformance import example_config, example_experiment, run_in_process
from dgal_bench.experiment import open_experiment
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.results.resume import header_outline
from dgal_bench.results.writer import FileWriter

TRACE = "Traceback (most recent call last):\n  ...\nValueError: the loss is not a number\n"


def cut(path: Path, n_lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:n_lines]))


def failed(path: Path) -> None:
    with FileWriter(path) as writer:
        writer.write_failure("ValueError: the loss is not a number (mine.py, line 7)", TRACE)


def whole_pool() -> RunConfig:
    everything = {"restrict": {"kind": "everything"}, "acquire": {"kind": "random"}}
    strategy = StrategyConfig("full_supervision", **everything)
    return replace(example_config("random"), rounds=0, initial_size=None, propagation="none", strategy=strategy)


def main(root: Path) -> None:
    silence_lightning()
    suite = root / "golden" / "digits"
    with tempfile.TemporaryDirectory() as cache:
        experiment = example_experiment(Path(cache))
        for name in ("margin", "dgmg", "random", "rsmg"):
            run_in_process(experiment, suite / name / "seed-0.jsonl", example_config(name))
        reference = open_experiment(whole_pool(), Path(), Path(cache), lambda what, done, of: None)
        run_in_process(reference, suite / "full_supervision" / "seed-0.jsonl", whole_pool())
        cut(suite / "dgmg" / "seed-0.jsonl", 2)  # partial
        cut(suite / "random" / "seed-0.jsonl", 2)
        failed(suite / "random" / "seed-0.jsonl")
        cut(suite / "rsmg" / "seed-0.jsonl", 2)
        failed(suite / "rsmg" / "seed-0.jsonl")
        run_in_process(experiment, suite / "rsmg" / "seed-0.jsonl", example_config("rsmg"))  # failed, continued, done
    for name in ("badge", "ganvae"):  # before they began
        with FileWriter(suite / name / "seed-0.jsonl") as writer:
            writer.write_header(header_outline(example_config(name), f"digits/{name}/seed-0"))
            if name == "badge":
                writer.write_failure("ValueError: the loss is not a number (mine.py, line 7)", TRACE)
            else:
                writer.write_skipped("ganvae trains a VAE on images, and these are embeddings")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
