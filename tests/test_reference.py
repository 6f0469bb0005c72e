"""The reference rows: runs run again from their headers, on the committed latents.

Where the machine is the rows' own kind they must be the same bits. Elsewhere a trained network is not, and neither are
the picks that follow from it; but what comes before any network must be the same, and accuracies within the spread of
the recorded seeds. Which of the two a machine can tell is said by the reason that the other is skipped for.
"""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dgal_bench.config.schema import from_trusted_dict
from dgal_bench.conformance import run_in_process
from dgal_bench.core.system import provenance
from dgal_bench.experiment import open_experiment
from dgal_bench.report.claims.text import write_claims
from dgal_bench.results.metrics import area_under_curve
from dgal_bench.results.reader import read_run
from dgal_bench.results.resume import ALGORITHM_VERSION
from dgal_bench.results.rows import choice

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
DIGITS = REFERENCE / "all" / "digits"
RUNS = {"dgmg": 0, "badge": 1, "vae_seals": 2, "dgcoreset": 3, "rsmg": 4}
WHOLE, FIRST = "dgmg", 6
"""Which one is run to its end, and how many rows of the others are."""


def recorded(strategy, seed):
    return read_run(DIGITS / strategy / f"seed-{seed}.jsonl")


def differences_of_machine():
    """What of the fingerprint of the rows is another here: one machine and algorithm made them all."""
    made = recorded("dgmg", 0).header["fingerprint"]
    here = provenance()
    now = {
        "torch": here["versions"]["torch"], "cpu": here["machine"]["cpu"], "vectors": here["machine"]["vectors"],
        "algorithm_version": ALGORITHM_VERSION,
    }  # fmt: skip
    return ", ".join(f"{name} {value}, here {now[name]}" for name in now if (value := made[name]) != now[name])


ELSEWHERE = differences_of_machine()


@pytest.fixture(params=RUNS, scope="module")
def pair(request, tmp_path_factory):
    """The record of a run as far as it is run again, and the rows of the same run run now."""
    log = recorded(request.param, RUNS[request.param])
    config = from_trusted_dict(log.header["config"])
    if request.param != WHOLE:
        config = replace(config, rounds=FIRST)
    root = tmp_path_factory.mktemp(request.param)
    shutil.copytree(REFERENCE / "cache", root / "cache")
    experiment = open_experiment(config, root / "nowhere", root / "cache", lambda what, done, of: None)
    assert experiment.prepared.features_sha256 == log.header["fingerprint"]["latents"], (
        "these are not the committed latents"
    )
    path = root / "again" / "digits" / request.param / log.path.name
    rows = run_in_process(experiment, path, config)
    if request.param != WHOLE:
        rows = rows[:FIRST]  # the last one asks for nothing
    return replace(log, records=log.records[: len(rows)]), rows, read_run(path)


def test_latents_of_ten_seeds_are_committed():
    made = {recorded("dgmg", seed).header["fingerprint"]["latents"] for seed in range(10)}
    assert len(made) == 10
    assert len(list((REFERENCE / "cache").glob("*/latents.npy"))) == 10


@pytest.mark.slow
def test_the_committed_verdicts_are_those_of_the_committed_rows(tmp_path):
    growth = REFERENCE.parent / "benchmarks" / "scaling.json"
    verdicts, numbers = write_claims(REFERENCE, tmp_path, growth).files
    assert verdicts.read_text() == (REFERENCE / "report" / verdicts.name).read_text()
    lines = [list(csv.reader(path.read_text().splitlines())) for path in (numbers, REFERENCE / "report" / numbers.name)]
    for ours, theirs in zip(*lines, strict=True):
        assert [number(one) for one in ours] == [number(one) for one in theirs]


def number(text):
    try:
        return pytest.approx(float(text), rel=1e-9)
    except ValueError:
        return text


@pytest.mark.slow
@pytest.mark.skipif(
    bool(ELSEWHERE), reason=f"not of this machine and algorithm ({ELSEWHERE}): compared in their spread"
)
def test_a_run_run_again_on_its_machine_is_the_same_bits(pair):
    log, rows, again = pair
    assert again.header["initial"] == log.header["initial"]
    assert again.header["fingerprint"]["graph"] == log.header["fingerprint"]["graph"]
    assert [choice(row) for row in rows] == [choice(row) for row in log.records]


@pytest.mark.slow
@pytest.mark.skipif(not ELSEWHERE, reason="the rows are of this kind of machine: compared bit by bit")
def test_a_run_run_again_elsewhere_begins_alike_and_ends_within_the_spread(pair):
    log, rows, again = pair
    assert again.header["initial"] == log.header["initial"]
    assert rows[0].n_candidates == log.records[0].n_candidates
    if log.header["fingerprint"]["algorithm_version"] == ALGORITHM_VERSION:
        assert rows[0].candidates == log.records[0].candidates
    strategy = log.path.parent.name
    others = [recorded(strategy, seed).records[: len(rows)] for seed in range(10)]
    for measure in (area_under_curve, lambda records: records[-1].accuracy):
        values = [measure(records) for records in others]
        assert abs(measure(rows) - np.mean(values)) <= 3 * np.std(values, ddof=1)
