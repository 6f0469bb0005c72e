"""BADGE's penalty matrix against the same in plain loops."""

import numpy as np
import pytest
from scipy import stats

from dgal_bench.report.costs import penalties
from dgal_bench.report.groups import Group, group
from dgal_bench.results.reader import read_results
from tests.test_report import header, row, run


class Log:
    """A finished run without a file."""

    done = True

    def __init__(self, strategy, seed, records):
        self.header, self.records = header(strategy, seed), records


def made(rng, names, n_seeds, n_rows, step=10, gap=0.03):
    """A group with curves that differ by strategy and by seed; the first rows are random, and must not count."""

    def curve(quality):
        return [row(n, 10 + step * n, float(np.clip(0.5 + gap * quality + rng.normal(0, 0.03), 0, 1)))
                for n in range(n_rows)]  # fmt: skip

    runs = {name: [Log(name, seed, curve(at)) for seed in range(n_seeds)] for at, name in enumerate(names)}
    return Group("suite", "toy", "cpu", 1, runs)


def by_loops(groups, names):
    matrix, compared = np.zeros((len(names), len(names))), np.zeros((len(names), len(names)), int)
    for one in groups:
        for i, ours in enumerate(names):
            for j, theirs in enumerate(names):
                runs, others = one.finished(ours), one.finished(theirs)
                seeds = runs.keys() & others.keys()
                if i == j or len(seeds) < 2:
                    continue
                by_labels = {}
                for seed in seeds:
                    for a in runs[seed].records[1:]:
                        for b in others[seed].records[1:]:
                            if a.n_labeled == b.n_labeled:
                                by_labels.setdefault(a.n_labeled, []).append(a.accuracy - b.accuracy)
                rows = [found for found in by_labels.values() if len(found) == len(seeds)]
                if not rows:
                    continue
                compared[i, j] += 1
                for found in rows:
                    test = stats.ttest_1samp(found, 0)
                    matrix[i, j] += (test.confidence_interval(0.95).low > 0) / len(rows)
    return matrix, compared


def test_random_rows_against_plain_loops():
    rng = np.random.default_rng(0)
    names = ["margin", "dgmg", "lc", "badge"]
    groups = [
        made(rng, names, 5, 8),
        made(rng, names[1:], 3, 5, step=20),
        made(rng, ["lc"], 4, 4),
        made(rng, ["badge", "margin"], 1, 4),
    ]
    # runs of other seeds, and rows at other numbers of labels, that nobody can be compared with
    extra = made(rng, ["margin"], 9, 8).runs["margin"][4:]
    odd = made(rng, ["badge"], 5, 6, step=20).runs["badge"]
    # one seed of lc goes two rows further than the others
    longer = made(rng, ["lc"], 1, 10).runs["lc"]
    lc = made(rng, ["lc"], 5, 8).runs["lc"]
    dgmg = made(rng, ["dgmg"], 5, 10).runs["dgmg"]
    groups.append(Group("suite", "toy", "cpu", 1, {"lc": [*longer, *lc[1:]], "dgmg": dgmg}))
    groups.append(Group("suite", "toy", "cpu", 1, {**made(rng, names[:3], 5, 8).runs, "margin": extra, "badge": odd}))
    (found,) = penalties(groups)
    matrix, compared = by_loops(groups, found.names)
    assert found.matrix == pytest.approx(matrix)
    assert np.array_equal(found.n_compared, compared)
    assert 0 < matrix.max() <= compared.max()
    assert len(np.unique(compared)) > 2
    assert np.all(found.matrix + found.matrix.T <= found.n_compared + 1e-12)


def test_a_matrix_by_hand(tmp_path):
    """On one data set dgmg is above margin in one of two rows on both seeds, lc on one seed only."""
    for seed in (0, 1):
        shift = 0.001 * seed
        run(tmp_path, "margin", seed, [row(0, 10, 0.9, 1.0, 9), row(1, 20, 0.5, 1.0, 9), row(2, 30, 0.6)])
        rows = [row(0, 10, 0.2, 1.0, 9), row(1, 20, 0.7 + shift, 1.0, 9), row(2, 30, 0.6 + shift)]
        run(tmp_path, "dgmg", seed, rows)
    run(tmp_path, "lc", 0, [row(0, 10, 0.2, 1.0, 9), row(1, 20, 0.9, 1.0, 9), row(2, 30, 0.9)])
    (found,) = penalties(group(read_results(tmp_path)))
    assert found.names == ("dgmg", "lc", "margin")
    assert found.matrix.tolist() == [[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]
    assert found.n_compared.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert found.column_means == [0, None, 0.5]
    assert found.beaten_share == [0, None, 0.5]


def test_twice_the_data_sets_are_twice_the_penalty_and_the_same_share():
    one = made(np.random.default_rng(1), ["margin", "dgmg", "lc"], 5, 6)
    (once,), (twice,) = penalties([one]), penalties([one, one])
    assert np.array_equal(2 * once.matrix, twice.matrix)
    assert twice.column_means == pytest.approx([2 * mean for mean in once.column_means])
    assert twice.beaten_share == pytest.approx(once.beaten_share)


def test_ten_seeds_and_equal_curves():
    """From ten seeds the intervals are BCa's: what is better on every seed still wins every row, equals none."""
    one = made(np.random.default_rng(2), ["margin", "dgmg"], 10, 4, gap=0.4)
    same = [Log("copy", seed, log.records) for seed, log in enumerate(one.runs["margin"])]
    (found,) = penalties([Group("suite", "toy", "cpu", 1, {**one.runs, "copy": same})])
    assert found.matrix.tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_what_was_run_under_another_suite_profile_or_version_has_a_matrix_of_its_own():
    runs = made(np.random.default_rng(1), ["margin", "dgmg"], 3, 4).runs
    kinds = [("b", "cpu", 1), ("a", "cpu", 2), ("a", "gpu", 1), ("a", "cpu", 1)]
    found = penalties(
        [Group(suite, name, profile, version, runs) for name in "xy" for suite, profile, version in kinds]
    )
    assert [(one.suite, one.profile, one.algorithm_version) for one in found] == sorted(kinds)
    assert {one.n_compared.max() for one in found} == {2}
    assert penalties([]) == []


def test_a_group_without_a_finished_run_adds_nothing():
    (found,) = penalties([Group("suite", "toy", "cpu", 1, {})])
    assert (found.names, found.column_means, found.matrix.shape) == ((), [], (0, 0))
