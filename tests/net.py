"""The net under a move of the code: the same command before and after, and what came out compared bit by bit.

    python tests/net.py write DIR        the suites paper, ablation and smoke on digits, seed 0, into the new folder DIR
    python tests/net.py compare OLD NEW  what of two such folders differs; exit code 1 where something does

The bits of a trained network belong to the kind of CPU: both folders must be written on one machine. Nothing is
imported from the package: the command line and the files that it writes stay what they are while modules move.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference"
SUITES = ("paper", "ablation", "smoke")
# As the reference rows were made: their features are in the committed cache, one VAE for each seed.
SETTINGS = ("seed=0", "jobs=2", "threads=1", "representation.seed=cell", "representation.threads=2", "report=false")
HEADER = ("cell", "profile", "initial", "initial_classes")
CIRCUMSTANCES = {"kind", "threads", "jobs", "load", "busy_elsewhere", "seconds", "halved_to"}  # and all *_seconds


def command() -> list[str]:
    """The console command of this checkout, whichever module it lives in today."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["dgal-bench"].partition(":")
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


def write(folder: Path) -> int:
    if folder.exists():
        raise SystemExit(f"{folder} exists: rows that are there would not be made again; name a new folder")
    shutil.copytree(REFERENCE / "cache", folder / "cache")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "DGAL_OFFLINE": "true"}
    places = [f"results={folder / 'results'}", f"cache={folder / 'cache'}"]
    began = time.perf_counter()
    for suite in SUITES:
        words = [*command(), "bench", f"suite={suite}", *places, *SETTINGS]
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
    check_features(folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.perf_counter() - began
    sys.stdout.write(f"{len(files(folder))} files, {seconds:.0f} s, CPU {used.ru_utime + used.ru_stime:.0f} s\n")
    return 0


def check_features(folder: Path) -> None:
    """The rows of digits rest on the committed features, and not on a VAE that was trained here."""
    compared = 0
    for name, path in files(folder).items():
        reference = REFERENCE / "all" / Path(*Path(name).parts[1:])
        if not name.startswith("smoke") and reference.exists():
            ours, theirs = (read(one)[0]["fingerprint"]["latents"] for one in (path, reference))
            if ours != theirs:
                raise SystemExit(f"{path} rests on features {ours}, the reference rows on {theirs}")
            compared += ours != "none"  # the training on all labels has no graph
    sys.stdout.write(f"{compared} files rest on the committed features\n")
    if not compared:
        raise SystemExit("no file could be compared with the reference rows")


def files(folder: Path) -> dict[str, Path]:
    """The file of every run, by its place."""
    root = folder / "results"
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("seed-*.jsonl"))}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Line, field and value (as JSON: equal where the bits are) of all that a repetition must reproduce."""
    for line in read(path):
        if line["kind"] == "header":
            where = "header"
            values = {name: line.get(name) for name in HEADER}
            # Also CPU, torch, device: with others the rows cannot be compared. Only the revision may be another.
            values |= {f"fingerprint.{name}": one for name, one in line["fingerprint"].items() if name != "git"}
        else:
            where = f"round {line['round']}" if line["kind"] == "round" else line["kind"]
            values = {name: one for name, one in line.items() if name not in CIRCUMSTANCES and "_seconds" not in name}
        for name, value in values.items():
            yield where, name, json.dumps(value, sort_keys=True)


def compare(old: Path, new: Path) -> int:
    sides = (files(old), files(new))
    alone, shared = (sorted(names) for names in (sides[0].keys() ^ sides[1].keys(), sides[0].keys() & sides[1].keys()))
    lines = [f"{name}: only in {old if name in sides[0] else new}" for name in alone]
    compared = rounds = 0
    for name in shared:
        before, after = ({(where, what): value for where, what, value in facts(side[name])} for side in sides)
        keys = list(before | after)
        compared += len(keys)
        rounds += sum(what == "round" for _, what in keys)
        for key in keys:
            if before.get(key) != after.get(key):
                lines.append(f"{name}, {key[0]}, {key[1]}: {before.get(key)} -> {after.get(key)}")
    lines.append(f"{len(lines)} differences in {len(shared)} files, {rounds} rounds, {compared} values")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if len(lines) > 1 or not compared else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            sys.exit(write(Path(folder).resolve()))
        case ["compare", old, new]:
            sys.exit(compare(Path(old), Path(new)))
        case _:
            sys.exit(__doc__)
