"""Real sweeps of worker processes, for tests that disturb them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dgal_bench.disk import below
from dgal_bench.laws import PRACTICE, practice, run_here
from dgal_bench.record import choice, read_results

HERE = Path(__file__).parent.parent


def command(root, cache, *words, report=False):
    base = ["bench", "representation=pca", "profile=smoke", f"results={root}", f"cache={cache}", *PRACTICE]
    base += ["full_supervision=false", f"report={str(report).lower()}"]
    return [sys.executable, "-m", "dgal_bench.cli", *base, *words]


def finish(words, limit=240, **environment):
    return subprocess.run(
        words, capture_output=True, text=True, timeout=limit, cwd=HERE, check=False, env=os.environ | environment
    )


def descendants(pid):
    """Process ids below ``pid``, from /proc."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def written(root):
    """Bytes of results so far."""
    return sum(path.stat().st_size for path in below(root, "*.jsonl"))


def choices_of(root):
    return {log.header["cell"]: [choice(r) for r in log.records] for log in read_results(root)}


def texts_of(root):
    """The choice fields of every cell, and its first labels, as JSON: equal where the bits are."""
    return {
        log.header["cell"]: json.dumps([log.header["initial"], *(choice(r) for r in log.records)])
        for log in read_results(root)
    }


def alone(lab, root, strategies, seeds, *overrides):
    """The same cells one after the other in this process, undisturbed."""
    for strategy in strategies:
        for seed in seeds:
            config = practice(strategy, f"seed={seed}", *overrides)
            run_here(lab, root / "s" / "digits" / strategy / f"seed-{seed}.jsonl", config)
    return choices_of(root)


def listing(root):
    """Every file below a folder and its bytes."""
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
