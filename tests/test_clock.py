"""Time belongs to the innermost phase."""

import gc

import pytest

from dgal_bench.core import clock
from dgal_bench.core.clock import Stopwatch


@pytest.fixture
def seconds(monkeypatch):
    """A clock that moves only when told to."""
    now = [100.0]
    monkeypatch.setattr(clock, "perf_counter", lambda: now[0])

    def wait(duration):
        now[0] += duration

    return wait


def test_phases_are_exclusive_and_sum_to_the_total(seconds):
    watch = Stopwatch()
    with watch.running():
        with watch.phase("select"):
            seconds(1)
            with watch.phase("diffuse"):
                seconds(2)
            seconds(4)
        with watch.phase("acquire"):
            with watch.phase("infer"):
                seconds(8)
            seconds(16)
    assert dict(watch.seconds) == {"select": 5, "diffuse": 2, "acquire": 16, "infer": 8}
    assert watch.total == 31 == sum(watch.seconds.values())


def test_time_outside_any_phase_is_in_the_total_alone(seconds):
    watch = Stopwatch()
    with watch.running():
        seconds(3)
        with watch.phase("select"):
            seconds(1)
    seconds(50)
    assert watch.total == 4
    assert dict(watch.seconds) == {"select": 1}


def test_a_phase_left_by_an_error_is_charged_and_closed(seconds):
    watch = Stopwatch()

    def fail():
        with watch.phase("infer"):
            seconds(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with watch.phase("acquire"):
        seconds(1)
    assert dict(watch.seconds) == {"infer": 2, "acquire": 1}


def test_no_garbage_is_collected_on_the_clock():
    watch = Stopwatch()
    with watch.running():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with watch.running():
            pass
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()
