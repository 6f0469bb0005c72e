"""The cells of a results folder, put together by data set: over all suites, never over machines."""

from collections.abc import Iterable, Mapping, Sequence

from dgal_bench.record import CellLog
from dgal_bench.report.claims.bench import PAPER_SETS, Bench
from dgal_bench.report.groups import Group
from dgal_bench.report.times import made_on

NO_EVIDENCE = "smoke"
"""A profile that is there to try a set-up out: nothing is judged by its rows."""

_Key = tuple[str, str, int, str, str]


def benches(groups: Iterable[Group]) -> list[Bench]:
    """A bench for each data set and profile: the cells of all suites that may be compared, the most that there are.

    Rows of another machine, of other data under the same name or of another algorithm version are said, and not
    judged: differences and ratios are of one kind of machine alone.
    """
    merged: dict[_Key, dict[str, list[CellLog]]] = {}
    slugs: dict[_Key, dict[str, None]] = {}
    timings = {id(one): one for group in groups for one in group.timings}
    for group in groups:
        if group.profile == NO_EVIDENCE:
            continue
        for label, logs in group.cells.items():
            sets: dict[_Key, list[CellLog]] = {}
            for one in logs:
                sets.setdefault(_key(group, one), []).append(one)
            for key, own in sets.items():
                slugs.setdefault(key, {})[group.slug] = None
                known = merged.setdefault(key, {}).get(label, [])
                merged[key][label] = max(known, own, key=lambda some: sum(log.done for log in some))
    apart: dict[tuple[str, str], list[_Key]] = {}
    for key in merged:
        if _n_done(merged[key]):
            apart.setdefault(key[:2], []).append(key)
    profiles: dict[str, set[str]] = {}
    for dataset, profile in apart:
        profiles.setdefault(dataset, set()).add(profile)
    found = []
    for (dataset, profile), keys in apart.items():
        best = max(keys, key=lambda key: (key[2], _n_done(merged[key])))
        others = sum(_n_done(merged[key]) for key in keys if key != best)
        name = dataset if len(profiles[dataset]) == 1 else f"{dataset} (profile {profile})"
        said = f"{others} finished cells of another machine, data or version are not judged" if others else ""
        group = Group("", dataset, profile, best[2], merged[best], timings=list(timings.values()))
        found.append(Bench(name, group, said, list(slugs[best])))
    return sorted(found, key=lambda one: (_place(one.group.dataset), one.name))


def one_each(benches: Sequence[Bench]) -> list[Bench]:
    """Of each data set the bench of most finished cells: run under two profiles it counts once."""
    most: dict[str, Bench] = {}
    for bench in benches:
        known = most.setdefault(bench.group.dataset, bench)
        if bench.n_finished > known.n_finished:
            most[bench.group.dataset] = bench
    return list(most.values())


def _key(group: Group, log: CellLog) -> _Key:
    return group.dataset, group.profile, group.algorithm_version, log.header["fingerprint"]["data"][:8], made_on(log)


def _n_done(cells: Mapping[str, Sequence[CellLog]]) -> int:
    return sum(log.done for logs in cells.values() for log in logs)


def _place(dataset: str) -> int:
    """The paper's in its order, then others."""
    return PAPER_SETS.index(dataset) if dataset in PAPER_SETS else len(PAPER_SETS)
