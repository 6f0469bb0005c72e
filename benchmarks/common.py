"""What the scripts of this folder share: what they say and write, and the processes that they start."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgal_bench.config.schema import parse_positive
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.system import provenance

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
_BUSY = 0.2  # cores that other processes use, above which timings are noise


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser(name: str, document: str | None) -> argparse.ArgumentParser:
    """Of the script ``name``.py, whose docstring begins with what it does: with ``--out`` and ``--threads``."""
    made = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=(document or "").partition("\n")[0])
    default = ROOT / "results" / "benchmarks" / f"{name}.json"
    made.add_argument("--out", type=Path, default=default, help="the JSON file (default: results/benchmarks)")
    made.add_argument(
        "--threads", type=at_least_one, default=1, help="for torch, BLAS and OpenMP alike (default: 1, as a run has)"
    )
    return made


def at_least_one(word: str) -> int:
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small: use 1 or more")
    return number


def positive_seconds(word: str) -> float:
    try:
        return parse_positive("seconds", word, "a number above 0")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def header(name: str, threads: int, words: Sequence[str] | None) -> dict[str, Any]:
    """The command and the machine: what stands before the figures in every JSON file."""
    given = sys.argv[1:] if words is None else words
    return {
        "command": " ".join(["python", f"benchmarks/{name}.py", *given]),
        "threads": threads,
        "provenance": provenance(),
    }


def machine_text(results: Mapping[str, Any]) -> str:
    machine = results["provenance"]["machine"]
    return f"{results['threads']} thread(s); {machine['cpu']}, {machine['cores']} cores"


def write(results: Mapping[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def quiet(others: Iterable[float | None]) -> str:
    """Whether the seconds can be trusted: two threads that wait for each other suffer most from a third process."""
    known = [cores for cores in others if cores is not None]
    busy = sum(cores > _BUSY for cores in known)
    if busy:
        return f"NOISE: other processes kept more than {_BUSY:g} cores busy in {busy} of {len(known)} measurements"
    return f"quiet machine: other processes kept at most {max(known, default=0.0):.2f} cores busy"


def answer(
    module: str, request: Mapping[str, Any], threads: int, patience: float, heard: bool = False
) -> dict[str, Any]:
    """What ``python -m module REQUEST`` prints last; its thread counts must be there before it loads a library.

    ``status`` is over_limit after ``patience`` seconds, over_memory where the system killed it, failed with the
    ``error`` where it ended otherwise. ``heard``: what it says on stderr is let through, how far it is.
    """
    words = [sys.executable, "-m", module, json.dumps(request)]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, timeout=patience, text=True, check=False,
            stdout=subprocess.PIPE, stderr=None if heard else subprocess.PIPE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"status": "over_limit", "peak_mb": None}
    if done.returncode == -9:  # the system's own guard of memory
        return {"status": "over_memory", "peak_mb": None}
    if done.returncode != 0:
        return {"status": "failed", "peak_mb": None, "error": last_line(done.stderr)}
    answered: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answered


def last_line(errors: str | None) -> str:
    return "see above" if errors is None else (errors.strip().splitlines() or ["no message"])[-1]
