"""What rows and their costs say: by hand, and by definition."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate, product
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from dgal_bench.results.metrics import (
    PayOff,
    accuracy_at,
    batch_balance,
    classes_seen,
    labels_to,
    pareto,
    pay_off,
    total_seconds,
)
from tests.test_report import ROWS, row

seconds = st.lists(st.integers(0, 9), max_size=6)


@pytest.mark.parametrize(("target", "labels"), [(0.0, 10), (0.2, 10), (0.21, 20), (0.6, 20), (0.8, 50), (0.81, None)])
def test_labels_to_a_target_are_those_of_the_first_row_there(target, labels):
    assert labels_to(ROWS, target) == labels
    fallen = [*ROWS, row(3, 60, 0.1)]
    assert labels_to(fallen, target) == labels


def test_a_rows_cost_is_set_up_and_the_queries_before_it():
    assert total_seconds(5.0, [1.0, 2.0]) == [5, 6, 8]
    assert total_seconds(0.0, []) == [0]
    costs = total_seconds(5.0, [1.0, 2.0])
    found = [accuracy_at([0.2, 0.6, 0.8], costs, budget) for budget in (4.9, 5, 5.9, 6, 7, 8, 100)]
    assert found == [None, 0.2, 0.2, 0.6, 0.6, 0.8, 0.8]


def test_classes_are_seen_once_they_have_been_trained_on():
    rows = [replace(ROWS[0], classes=[1, 1, 3]), replace(ROWS[1], classes=[0, 4]), ROWS[2]]
    assert classes_seen(rows, [1, 2]) == [2, 3, 5]
    assert classes_seen(rows, []) == [0, 2, 4]
    assert classes_seen(rows[2:], [7]) == [1]


def test_classes_that_were_not_recorded_are_not_guessed():
    rows = [replace(ROWS[0], classes=[1]), ROWS[1], ROWS[2]]
    assert classes_seen(rows, [1]) is None
    assert classes_seen(rows[:2], None) is None
    assert classes_seen(rows[:2], [1]) == [1, 1]


@pytest.mark.parametrize(
    ("classes", "balance"),
    [
        ([3], 1), ([3, 3], 0), ([3, 5], 1), ([0, 1, 2, 3, 4], 1), ([0, 1, 2, 3, 4, 4], 1), ([2] * 9, 0),
        ([0, 0, 0, 1], (0.75 * log(4 / 3) + 0.25 * log(4)) / log(4)),
    ],
)  # fmt: skip
def test_the_balance_of_a_batch_by_hand(classes, balance):
    assert batch_balance(classes, 5) == pytest.approx(balance)


@pytest.mark.parametrize(("size", "n_classes"), [(1, 1), (4, 1), (2, 3), (4, 3), (5, 3), (6, 3), (7, 2)])
def test_no_batch_of_its_size_is_more_even_than_one(size, n_classes):
    batches = list(product(range(n_classes), repeat=size))
    entropies = [entropy(list(Counter(batch).values())) for batch in batches]
    most = max(entropies)
    wanted = [found / most if most > 0 else 1.0 for found in entropies]
    assert [batch_balance(batch, n_classes) for batch in batches] == pytest.approx(wanted)


@given(st.dictionaries(st.text("abc", max_size=2), st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_the_front_is_what_nothing_dominates_by_cost(points):
    def dominated(name):
        cost, quality = points[name]
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())

    front = pareto(points)
    assert set(front) == {name for name in points if not dominated(name)}
    assert len(front) == len(set(front))
    assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)


@pytest.mark.parametrize(
    ("one_off", "ours", "theirs", "queries", "extrapolated"),
    [
        (0, [1, 1], [2, 2], 0, False),
        (2, [1, 1, 1], [2, 2, 2], 2, False),
        (2.5, [1, 1, 1], [2, 2, 2], 3, False),
        (3.5, [1, 1, 1], [2, 2, 2], 4, True),
        (300, [1, 1, 1], [4, 5, 6], 75, True),
        (1, [1, 9, 1], [3, 3, 9], 3, False),  # paid after one query, in debt after two
        (1, [2, 2], [2, 2], None, True),
        (1, [2, 3], [2, 2], None, True),
        (0, [2, 2], [1, 1], None, True),
        (0, [], [], 0, False),
        (1, [], [], None, True),
        (2, [1, 1, 1, 1], [2, 2], 2, False),  # as far as both have queries
    ],
)
def test_when_a_cost_has_been_paid(one_off, ours, theirs, queries, extrapolated):
    assert pay_off(one_off, ours, theirs) == PayOff(queries, extrapolated)


@given(st.integers(0, 30), seconds, seconds)
def test_paid_means_that_from_there_on_it_is_no_dearer(one_off, ours, theirs):
    n = min(len(ours), len(theirs))
    gains = [0, *accumulate(b - a for a, b in zip(ours[:n], theirs[:n], strict=True))]
    holds = [made for made in range(n + 1) if all(gain >= one_off for gain in gains[made:])]
    found = pay_off(one_off, ours, theirs)
    if holds:
        assert found == PayOff(holds[0], extrapolated=False)
    elif gains[-1] > 0:
        assert found.extrapolated
        assert found.queries > n
        assert (found.queries - 1) * gains[-1] < one_off * n <= found.queries * gains[-1]
    else:
        assert found == PayOff(None, extrapolated=True)
