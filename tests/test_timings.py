"""Timings files: written whole, read back as written, and refused when damaged."""

import json
import os
from dataclasses import replace

import pytest

from dgal_bench.core.errors import ResultsError
from dgal_bench.results.reader import read_all_timings, read_timings
from dgal_bench.results.rows import Timing, timings_path
from dgal_bench.results.writer import write_timings
from tests.headers import header

HEADER = {
    "cell": "digits/dgmg/seed-0", "common": None, "picks": "0123", "rounds": [0, 3], "repeats": 3, "changed": [],
    "when": "2026-11-23T11:00:00+00:00", **{name: header()[name] for name in ("fingerprint", "provenance")},
}  # fmt: skip
ONE = Timing("dgmg", 0, [0.3, 0.1, 0.2], {"diffuse": 0.15, "infer": 0.05}, 20, 20, True, 1, 0.5, 0.01)
TWO = replace(ONE, round=3, query_seconds=[0.4, 0.6], busy_elsewhere=None)


def test_what_is_read_is_what_was_written(tmp_path):
    path = timings_path(tmp_path / "seed-0.jsonl")
    assert path.name == "timings-seed-0.jsonl"
    assert read_timings(path) is None
    write_timings(path, HEADER, [ONE, TWO])
    made = read_timings(path)
    assert made.timings == (ONE, TWO)
    assert {name: made.header[name] for name in HEADER} == HEADER
    assert (made.rounds, made.repeats) == ([0, 3], 3)
    assert [timing.median_seconds for timing in made.timings] == [0.2, 0.5]
    assert list(tmp_path.rglob("seed-*.jsonl")) == []  # no results file to anybody
    assert [one.path for one in read_all_timings(tmp_path)] == [path]


def test_picks_are_equal_where_all_of_the_runs_own_are(tmp_path):
    path = tmp_path / "timings-common.jsonl"
    other = replace(ONE, strategy="margin", picks_equal=None)
    for timings, equal in (
        ([ONE, TWO, other], True),
        ([ONE, replace(TWO, picks_equal=False), other], False),
        ([other, replace(other, round=3)], False),
    ):
        write_timings(path, HEADER, timings)
        assert read_timings(path).picks_equal is equal


def test_the_last_file_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "timings-seed-0.jsonl"
    write_timings(path, HEADER, [ONE, TWO])
    before = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match="cannot be written: No space left"):
        write_timings(path, HEADER, [ONE, replace(TWO, query_seconds=[1.0])])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def changed(number, **facts):
    def change(lines):
        return [*lines[:number], {**lines[number], **facts}, *lines[number + 1 :]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(0, rounds=[0, 3, 5]),  # a round without a timing: cut off, perhaps
        lambda lines: lines[:2],
        lambda lines: lines[:1],
        changed(1, kind="round"),
        changed(1, query_seconds=[]),
        changed(2, query_seconds=[0.1, -1.0]),
        lambda lines: [{name: value for name, value in lines[0].items() if name != "picks"}, *lines[1:]],
        lambda lines: [],
        lambda lines: [[], *lines[1:]],
    ],
)
def test_a_damaged_file_is_one_line_that_says_what_to_do(tmp_path, change):
    path = tmp_path / "timings-seed-0.jsonl"
    write_timings(path, HEADER, [ONE, TWO])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    with pytest.raises(ResultsError, match=r"timings-seed-0.jsonl is damaged \(.+\): remove it, and replay again"):
        read_timings(path)


def test_a_torn_line_and_another_version_are_refused(tmp_path):
    path = tmp_path / "timings-seed-0.jsonl"
    write_timings(path, HEADER, [ONE, TWO])
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(ResultsError, match="is damaged"):
        read_timings(path)
    path.write_text(whole.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ResultsError, match="timings of schema 2, where this version reads 1"):
        read_timings(path)
