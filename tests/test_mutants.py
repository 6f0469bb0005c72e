"""The table of mistakes fits the code; ``python tests/mutants.py`` makes them and runs their tests."""

import pytest

from tests.mutants import MUTANTS, PACKAGE, files_with, place


def test_names_are_distinct_and_there_are_twenty():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_has_one_place_and_its_tests_exist(mutant):
    assert len(files_with(mutant.old, PACKAGE)) == 1
    assert mutant.new != mutant.old
    assert [len(place(test)) for test in mutant.tests] == [1] * len(mutant.tests)
