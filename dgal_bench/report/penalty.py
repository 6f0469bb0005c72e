"""The pairwise penalty matrix of BADGE (Ash et al. 2020, section 4): who beats whom, over data sets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgal_bench.report.groups import Group
from dgal_bench.report.statistics import Floats, mean_intervals


@dataclass(frozen=True, eq=False)
class Penalties:
    """Of n strategies, over the groups of one suite, profile and algorithm version.

    ``matrix`` [i, j] adds up, over groups, the share of rows in which i beat j; ``compared`` [i, j] counts the groups
    in which the two met, and so is the most that the entry could be.
    """

    suite: str
    profile: str
    algorithm_version: int
    names: tuple[str, ...]
    matrix: Floats  # (n, n)
    compared: NDArray[np.int64]  # (n, n)

    @property
    def column_means(self) -> list[float | None]:
        """BADGE's bottom row, lower is better: the mean of j's column over those it met; None where it met nobody."""
        return _ratios(self.matrix.sum(axis=0), (self.compared > 0).sum(axis=0))

    @property
    def beaten(self) -> list[float | None]:
        """The share of its rows in which j was beaten: fair to strategies that have not run on every data set."""
        return _ratios(self.matrix.sum(axis=0), self.compared.sum(axis=0))


def _ratios(parts: NDArray[Any], wholes: NDArray[Any]) -> list[float | None]:
    return [float(part / whole) if whole else None for part, whole in zip(parts, wholes, strict=True)]


def penalties(groups: Iterable[Group]) -> list[Penalties]:
    """One matrix for each suite, profile and algorithm version: what was run under another is never added to it."""
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
    """(strategies, seeds, rows) at each number of labels that any was evaluated at; NaN where one was not.

    The rows of the initial sets are left out: they are the same for every strategy of a seed.
    """
    cells = [group.finished(strategy) for strategy in group.strategies]
    seen = [
        {(seed, row.n_labeled): row.accuracy for seed, log in of.items() for row in log.records[1:]} for of in cells
    ]
    seeds, labels = (sorted({key[part] for one in seen for key in one}) for part in (0, 1))
    flat = [[one.get((seed, label), np.nan) for seed in seeds for label in labels] for one in seen]
    return np.array(flat, dtype=np.float64).reshape(len(seen), len(seeds), len(labels))


def _shares(ours_SR: Floats, theirs_SR: Floats) -> tuple[float, float] | None:
    """The shares of rows in which ours is better and worse, its paired interval without 0; None if they never met.

    They meet on two seeds or more, in the rows that all of these have in both.
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
