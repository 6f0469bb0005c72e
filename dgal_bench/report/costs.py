"""What accuracy has cost: query seconds so far, by phase, and the set-up that they need.

Also targets of accuracy, budgets of time, the pay-off of a set-up, and BADGE's penalty matrix over data sets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgal_bench.report.groups import Group
from dgal_bench.report.plots.style import short_name
from dgal_bench.report.statistics import Estimate, Floats, interpolate, mean_interval, mean_intervals
from dgal_bench.report.times import hardware
from dgal_bench.results.metrics import PayOff, accuracy_at, cumulative, labels_to, pay_off, total_seconds
from dgal_bench.results.rows import PHASES, RunLog, Timings

SHARES = (0.6, 0.8, 0.95)
"""Of the best mean final accuracy of a group: so some strategy reaches every target."""


def targets(group: Group) -> list[float]:
    """Accuracies in whole percents, the lowest first."""
    finals = [
        sum(log.records[-1].accuracy for log in logs.values()) / len(logs)
        for strategy in group.strategies
        if (logs := group.finished(strategy))
    ]
    return sorted({floor(100 * share * max(finals)) / 100 for share in SHARES})


@dataclass(frozen=True)
class TargetReached:
    """``labels``: the mean over the ``n_reached`` of ``n`` seeds that reach the target; None if none does."""

    labels: float | None
    n_reached: int
    n: int


def reach_target(group: Group, strategy: str, target: float) -> TargetReached:
    logs = group.finished(strategy).values()
    found = [labels for log in logs if (labels := labels_to(log.records, target)) is not None]
    return TargetReached(sum(found) / len(found) if found else None, len(found), len(logs))


def budgets(group: Group) -> list[tuple[str, float]]:
    """Budgets in seconds: the total of set-up and queries of a strategy, with its name.

    They are those of two restricted strategies, the reference and the slowest.
    """
    totals = {name: cumulative_seconds(group, name)[-1] for name in group.strategies}
    slowest = max(totals, key=lambda name: totals[name])
    chosen = {name: totals[name] for name in totals if name in ("rsmg", "dgmg", "margin", slowest)}
    return sorted(chosen.items(), key=lambda item: item[1])


def at_budget(group: Group, strategy: str, seconds: float) -> Estimate | None:
    """Accuracy of the last evaluation within the budget, set-up included; None if it does not pay for one query."""
    seconds_spent = cumulative_seconds(group, strategy)
    logs = group.finished(strategy).values()
    found = [accuracy_at([record.accuracy for record in log.records], seconds_spent, seconds) for log in logs]
    known = [one for one in found if one is not None]
    return mean_interval(known) if known else None


@dataclass(frozen=True)
class Investment:
    """A strategy's set-up in seconds, and its pay-off against each of the ledger's rivals, in their order."""

    strategy: str
    seconds: float
    pay_offs: Sequence[PayOff]


@dataclass(frozen=True)
class Ledger:
    """The one-off costs against ``rivals``, the strategies whose queries need no set-up."""

    rivals: Sequence[str]
    investments: Sequence[Investment]
    n_queries: int


def ledger(group: Group) -> Ledger | None:
    """None where no strategy needs a set-up, or all do."""
    costs = {name: one_off(group, name) for name in group.strategies}
    rivals = [name for name in group.strategies if costs[name] == 0]
    with_setup = [name for name in group.strategies if costs[name] > 0]
    if not rivals or not with_setup:
        return None
    seconds = {name: query_seconds(group, name) for name in costs}
    rivals.sort(key=lambda name: -sum(seconds[name]))
    investments = [
        Investment(name, costs[name], [pay_off(costs[name], seconds[name], seconds[rival]) for rival in rivals])
        for name in sorted(with_setup, key=lambda name: sum(seconds[name]))
    ]
    return Ledger(rivals, investments, max(map(len, seconds.values())))


def ledger_text(point: PayOff) -> str:
    """``12``: after so many queries; ``(60)``: beyond those that were made, at their mean seconds."""
    return "never" if point.queries is None else f"({point.queries:,})" if point.extrapolated else f"{point.queries:,}"


NEEDS: Mapping[str, tuple[str, ...]] = {
    "everything": (), "uniform": (), "model_neighbors": (), "graph_neighbors": ("representation",),
    "diffusion": ("representation", "graph"),
}  # fmt: skip
"""By kind of restriction the parts of the set-up that a query needs; a plugin's is assumed to need all."""


def one_off(group: Group, strategy: str) -> float:
    """Seconds of the representation and graph that a strategy's queries need, mean over its finished seeds."""
    each = [setup_seconds(log) for log in group.finished(strategy).values()]
    return sum(each) / len(each)


def setup_seconds(log: RunLog) -> float:
    config, ledger = log.header["config"]["strategy"], log.header["setup"]
    needs = NEEDS.get(config["restrict"]["kind"], ("representation", "graph"))
    if any("plugin" in config[part] for part in ("restrict", "acquire")):
        needs = ("representation", "graph")
    return float(sum(ledger[part]["seconds"] for part in needs))


def replays_are_comparable(group: Group) -> bool:
    """Whether all strategies have replays of the same rounds on one kind of machine, so that sums compare."""
    found = {
        (tuple(timings.rounds), hardware(timings.header))
        for strategy in group.strategies
        for timings in full_replays(group, strategy).values()
    }
    return len(found) == 1 and all(full_replays(group, strategy) for strategy in group.strategies)


def sources_note(group: Group) -> str:
    """The source of the query times in a figure."""
    replayed = [strategy for strategy in group.strategies if group.replays(strategy)]
    if not replayed or replays_are_comparable(group):
        return "query times replayed" if replayed else ""
    return f"query times of {', '.join(map(short_name, replayed))} replayed, of others the rows' own: see the table"


def sums_note(group: Group) -> str:
    """The source of query times in a figure of sums."""
    replayed = any(group.replays(strategy) for strategy in group.strategies)
    if replays_are_comparable(group):
        return times_note(group)
    return "query times are the rows' own: not all were replayed alike" if replayed else ""


def query_seconds(group: Group, strategy: str) -> list[float]:
    """Of each query in turn, mean over seeds: replayed where ``replays_are_comparable``, else the rows' own.

    A replay times some rounds only; seconds are interpolated linearly between them.
    """
    return _seconds(group, strategy, full_replays(group, strategy) if replays_are_comparable(group) else {})


def cumulative_seconds(group: Group, strategy: str) -> list[float]:
    """Set-up and query seconds that each row has cost so far, mean over seeds; one source for all strategies."""
    return total_seconds(one_off(group, strategy), query_seconds(group, strategy))


def _seconds(group: Group, strategy: str, replayed: Mapping[int, Timings]) -> list[float]:
    logs = group.finished(strategy)
    if replayed:
        return _mean(
            [
                interpolate({one.round: one.median_seconds for one in timings.timings}, logs[seed].rounds)
                for seed, timings in replayed.items()
            ]
        )
    return _mean([[record.query_seconds or 0.0 for record in log.records[:-1]] for log in logs.values()])


def cumulative_query_means(group: Group, strategy: str) -> list[float]:
    """The query seconds that each row has cost so far, mean over seeds: replayed where there are replays."""
    return cumulative(_seconds(group, strategy, full_replays(group, strategy)))


def full_replays(group: Group, strategy: str) -> dict[int, Timings]:
    """The replays with the first and the last query: seconds outside a replay's rounds are not known."""
    logs, replayed = group.finished(strategy), group.replays(strategy)
    return {seed: one for seed, one in replayed.items() if {0, logs[seed].rounds - 1} <= set(one.rounds)}


def phase_seconds(group: Group, strategy: str) -> dict[str, float]:
    """Mean seconds of one query by exclusive phase, from the same source as the query times of the table."""
    replayed = group.replays(strategy)
    if replayed:
        queries = [one.seconds for timings in replayed.values() for one in timings.timings]
    else:
        logs = group.finished(strategy).values()
        queries = [record.seconds for log in logs for record in log.records if record.seconds]
    means = {phase: sum(query.get(phase, 0.0) for query in queries) / max(1, len(queries)) for phase in sorted(PHASES)}
    return {phase: seconds for phase, seconds in means.items() if seconds > 0}


def times_note(group: Group) -> str:
    """The note of a figure of cumulative query times: which strategies' times come from replays."""
    replayed = [strategy for strategy in group.strategies if full_replays(group, strategy)]
    if not replayed:
        return ""
    others = [strategy for strategy in group.strategies if strategy not in replayed]
    few = (replayed, "of") if len(replayed) < len(others) else (others, "of all but")
    whose = f" {few[1]} {', '.join(map(short_name, few[0]))}" if others else ""
    found = [timings.rounds for strategy in replayed for timings in full_replays(group, strategy).values()]
    rounds = " or ".join(dict.fromkeys(", ".join(map(str, one)) for one in found))
    return f"query times{whose} replayed at rounds {rounds}, linear between them"


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    """Over seeds, up to the shortest."""
    return [sum(values) / len(values) for values in zip(*columns, strict=False)]


@dataclass(frozen=True, eq=False)
class Penalties:
    """BADGE's pairwise penalty matrix (Ash et al. 2020, section 4), over groups of one suite, profile and version.

    ``matrix`` [i, j] sums over groups the share of rows in which i beats j; ``n_compared`` [i, j] counts the groups in
    which both were run, and so is the entry's upper bound.
    """

    suite: str
    profile: str
    algorithm_version: int
    names: tuple[str, ...]
    matrix: Floats  # (n, n)
    n_compared: NDArray[np.int64]  # (n, n)

    @property
    def column_means(self) -> list[float | None]:
        """BADGE's bottom row, lower is better: the mean of j's column over those compared with it; None if none was."""
        return _ratios(self.matrix.sum(axis=0), (self.n_compared > 0).sum(axis=0))

    @property
    def beaten_share(self) -> list[float | None]:
        """The share of its rows in which j was beaten: fair to strategies that did not run on every data set."""
        return _ratios(self.matrix.sum(axis=0), self.n_compared.sum(axis=0))


def _ratios(parts: NDArray[Any], wholes: NDArray[Any]) -> list[float | None]:
    return [float(part / whole) if whole else None for part, whole in zip(parts, wholes, strict=True)]


def penalties(groups: Iterable[Group]) -> list[Penalties]:
    """One matrix for each suite, profile and algorithm version; they are never mixed."""
    ordered = sorted(groups, key=_kind)
    return [_penalties(kind, list(alike)) for kind, alike in groupby(ordered, _kind)]


def _kind(group: Group) -> tuple[str, str, int]:
    return group.suite, group.profile, group.algorithm_version


def _penalties(kind: tuple[str, str, int], groups: Sequence[Group]) -> Penalties:
    names = tuple(dict.fromkeys(name for group in groups for name in group.strategies))
    matrix, compared = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2, dtype=np.int64)
    for group in groups:
        at = [names.index(name) for name in group.strategies]
        for (i, ours), (j, theirs) in combinations(zip(at, _accuracies(group), strict=True), 2):
            shares = _shares(ours, theirs)
            if shares is not None:
                matrix[i, j] += shares[0]
                matrix[j, i] += shares[1]
                compared[[i, j], [j, i]] += 1
    return Penalties(*kind, names, matrix, compared)


def _accuracies(group: Group) -> Floats:
    """(strategies, seeds, rows) at every number of labels that occurs; NaN where a run was not evaluated.

    The rows of the initial sets are left out: they are the same for every strategy of a seed.
    """
    by_strategy = [group.finished(strategy) for strategy in group.strategies]
    seen = [
        {(seed, row.n_labeled): row.accuracy for seed, log in runs.items() for row in log.records[1:]}
        for runs in by_strategy
    ]
    seeds, labels = (sorted({key[part] for one in seen for key in one}) for part in (0, 1))
    flat = [[one.get((seed, label), np.nan) for seed in seeds for label in labels] for one in seen]
    return np.array(flat, dtype=np.float64).reshape(len(seen), len(seeds), len(labels))


def _shares(ours_SR: Floats, theirs_SR: Floats) -> tuple[float, float] | None:
    """The shares of rows in which ours is better and worse: the paired interval excludes 0. None if not comparable.

    Comparable are rows that both have for all of their common seeds, which must be two or more.
    """
    differences_SR = ours_SR - theirs_SR
    known_SR = ~np.isnan(differences_SR)
    seeds = known_SR.any(axis=1)
    rows = known_SR[seeds].all(axis=0)
    if seeds.sum() < 2 or not rows.any():
        return None
    intervals = mean_intervals(differences_SR[seeds][:, rows])
    better, worse = (sum(wins) for wins in zip(*((one.low > 0, one.high < 0) for one in intervals), strict=True))
    return better / len(intervals), worse / len(intervals)
