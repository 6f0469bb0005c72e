"""Peak memory of set-up and of one round of margin and dgmg at EMNIST's size, and where the peak is.

``python benchmarks/memory.py`` generates 124,800 images of 28x28 with 26 classes and latents of 256 dimensions, and
has dgal_bench itself read them as a user's (dataset=npz, representation=npy): set-up first, then a round of each
strategy, every one in a process of its own. Megabytes are of the whole process, libraries included.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout

from benchmarks import inputs
from benchmarks.common import answer, header, machine_text, parser, say, write
from benchmarks.machine import reset_peak
from benchmarks.memory_worker import REST

GOAL_GB = 3.0
PARTS = ("setup", "margin", "dgmg")
N_CLASSES = 26
SIZES = {"points": 124_800, "test": 20_800, "latent_dim": 256, "epochs": 3}  # EMNIST letters; paper, Table 1
SMALL = {"points": 2_000, "test": 200, "latent_dim": 16, "epochs": 2}
_PATIENCE = 3600  # seconds for a part: an exact graph of 125,000 points takes minutes


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    if reset_peak() is None:
        say("the peak of memory is read and reset under Linux's /proc, which is not here: run this on Linux")
        return 2
    sizes = SMALL if options.small else SIZES
    results = header("memory", options.threads, words) | {
        "sizes": sizes, "classes": N_CLASSES, "goal": {"peak_gb": GOAL_GB},
    }  # fmt: skip
    say(f"{sizes['points']:,} points, {len(PARTS)} parts, {machine_text(results)}")
    with tempfile.TemporaryDirectory() as folder:
        inputs.write_files(Path(folder), sizes["points"], sizes["test"], N_CLASSES, sizes["latent_dim"])
        results["parts"] = [part_row(name, folder, sizes, options.threads) for name in PARTS]
    say(f"\n{table(results)}")
    write(results, options.out)
    say(f"written: {options.out}")
    return int(any(row["status"] != "measured" for row in results["parts"]))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser("memory", __doc__)
    made.add_argument("--small", action="store_true", help="2,000 points with 16 dimensions: a trial in seconds")
    return made.parse_args(words)


def part_row(name: str, folder: str, sizes: Mapping[str, int], threads: int) -> dict[str, Any]:
    request = {"part": name, "folder": folder, "threads": threads, **sizes}
    row = {"part": name} | answer("benchmarks.memory_worker", request, threads, _PATIENCE)
    peak = row["peak_mb"]
    row["reached"] = None if peak is None else peak <= GOAL_GB * 1000
    say(f"{name}: {row.get('error', row['status']) if peak is None else f'{peak:,.0f} MB'}")
    return row


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "MB: peak of the whole process in that phase. more: than it had when the phase first began. s: of the phase.",
        "x: of the part's own peak.",
        "",
        f"{'part':<8}{'phase':<22}{'MB':>8}{'more':>8}{'x':>7}{'s':>9}",
    ]
    for row in results["parts"]:
        if row["status"] != "measured":
            lines.append(f"{row['part']:<8}{row['status']} {row.get('error', '')}".rstrip())
            continue
        lines.append(
            f"{row['part']:<8}{'imports':<22}{row['imports_mb']:>8,.0f}{'':>8}{_share(row, row['imports_mb'])}"
        )
        lines += [
            f"{'':<8}{name:<22}{phase['peak_mb']:>8,.0f}{phase['peak_mb'] - phase['before_mb']:>8,.0f}"
            f"{_share(row, phase['peak_mb'])}{phase['seconds']:>9.1f}"
            for name, phase in row["phases"].items()
        ]
    return "\n".join([*lines, "", *map(verdict, results["parts"])])


def _share(row: Mapping[str, Any], megabytes: float) -> str:
    return f"{megabytes / row['peak_mb']:>7.2f}"


def verdict(row: Mapping[str, Any]) -> str:
    """One line: the part's peak, in which phase, against the goal."""
    if row["status"] != "measured":
        return f"goal for {row['part']}: not known, {row['status']}"
    # memory that a phase does not give back is there in the rest too: the phase is to be named
    where = max(row["phases"], key=lambda name: (round(row["phases"][name]["peak_mb"]), name != REST))
    said = "reached" if row["reached"] else "NOT reached"
    return f"goal for {row['part']}: under {GOAL_GB:g} GB, {said}: {row['peak_mb'] / 1000:.2f} GB, in {where}"


if __name__ == "__main__":
    sys.exit(main())
