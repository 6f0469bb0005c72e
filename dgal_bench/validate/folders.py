"""What files of one results folder must keep between them, and what else lies about there."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgal_bench.disk import below
from dgal_bench.lease import at_work, holder, name_of
from dgal_bench.validate.cells import Report


def check_doubles(reports: Sequence[Report]) -> None:
    """A suite holds a cell once, by the hash of its configuration."""
    first: dict[tuple[Path, str], Path] = {}
    for report in reports:
        if report.header is None:
            continue
        suite = report.path.resolve().parents[2]
        other = first.setdefault((suite, report.header["fingerprint"]["config"]), report.path)
        if other != report.path:
            report.problems.append((1, f"the same cell as {other}"))


def check_initial_sets(reports: Sequence[Report]) -> None:
    """Every strategy of a seed starts from the same labels: those with less say so, against the first of them."""
    begun: dict[tuple[Any, ...], list[Report]] = defaultdict(list)
    for report in reports:
        if report.header is not None and report.begun:
            config, said = report.header["config"], report.header["fingerprint"]
            names = ("seed", "initial_size", "balanced")
            content = (config["dataset"]["name"], said["data"], said["algorithm_version"])
            begun[(*content, *(config.get(name) for name in names))].append(report)
    for same in begun.values():
        sets: dict[tuple[int, ...], list[Report]] = defaultdict(list)
        for report in same:
            sets[tuple((report.header or {})["initial"])].append(report)
        usual = max(sets, key=lambda initial: len(sets[initial]))
        for initial, odd in sets.items():
            for report in odd if initial != usual else []:
                report.problems.append((1, f"other first labels than those of {sets[usual][0].path}"))


def leftovers(root: Path) -> list[tuple[Path, str]]:
    """Leases, and files that a process which was killed could not put away: no harm in any of them."""
    found = []
    for lease in below(root, "seed-*.jsonl.lease"):
        path = lease.with_suffix("")
        working = at_work(path)
        if working is not None:
            found.append((path, f"{name_of(working)} is at work on it: what it writes from now on is not in here"))
        elif (said := holder(path)) is not None:
            found.append((lease, f"left behind by {name_of(said)}, which is gone: the next run takes it over"))
    names = (".seed-*.jsonl.*", ".timings-*.jsonl.*", ".projection-*.npz.*")
    rest = sorted(path for pattern in names for path in below(root, pattern))
    return found + [(path, "left behind by a process that was killed: it may be removed") for path in rest]
