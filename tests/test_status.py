"""dgal-bench status: every run is in the grid with what its file says, and what is wrong is said once."""

import json
import shutil
import time
from pathlib import Path

import pytest

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import lock
from dgal_bench.results.rows import RoundRecord
from dgal_bench.results.status import WIDTH, any_damaged, scan_folder, status_table
from dgal_bench.results.writer import FileWriter
from tests.headers import header

GOLDEN = Path(__file__).parent / "golden" / "schema-2"


def write(root, label, seed, rows=0, ending=None, profile="cpu", rounds=30, dataset="mnist", full=False):
    """A run with so many rows of ``rounds + 1``; ``ending``: ("failed", error) or ("skipped", why)."""
    path = root / "suite" / dataset / label / f"seed-{seed}.jsonl"
    config = {
        "seed": seed, "rounds": rounds, "initial_size": None if full else 10, "dataset": {"name": dataset},
        "strategy": {"name": label, "restrict": {"kind": "everything"}, "acquire": {"kind": "margin"}},
    }  # fmt: skip
    with FileWriter(path) as writer:
        writer.write_header(header(profile=profile, config=config))
        for round_ in range(rows):
            writer.write(RoundRecord(round_, 10, 0.5, False, 3, 0.1, 1.0, 1.0, 1.0, 1, 1, 0.5))
        if ending and ending[0] == "failed":
            writer.write_failure(ending[1], "Traceback")
        elif ending:
            writer.write_skipped(ending[1])
    return path


def marks(text, label):
    (row,) = [line for line in text.splitlines() if line.split()[:1] == [label]]
    return row.split()[1:]


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "margin", 0, rows=31)
    write(tmp_path, "margin", 2, rows=31)
    write(tmp_path, "margin", 10, rows=12)
    write(tmp_path, "dgmg", 0, rows=2, ending=("failed", "Traceback ...\nValueError: diverged\n"))
    write(tmp_path, "dgmg", 2, ending=("skipped", "these are embeddings"))
    write(tmp_path, "full_supervision", 0, rows=1, rounds=0, full=True)
    return tmp_path


def test_every_run_has_its_mark(root):
    text = status_table(scan_folder(root))
    assert text.startswith("suite/mnist, profile cpu\nseed ")
    assert marks(text, "seed") == ["0", "2", "10"]  # as numbers, not as words
    assert marks(text, "margin") == ["done", "done", "12/31"]
    assert marks(text, "dgmg") == ["FAILED", "skipped", "-"]
    assert marks(text, "full_supervision") == ["done"]  # its other seeds are not missing
    assert text.splitlines()[-1] == "6 runs: 3 done, 1 partial, 1 failed, 1 skipped; 1 not begun"


def test_failed_and_skipped_runs_say_why_in_a_line(root):
    text = status_table(scan_folder(root))
    assert "failed; retry=failed tries them again:\n  suite/mnist/dgmg/seed-0: ValueError: diverged\n" in text
    assert "skipped:\n  suite/mnist/dgmg/seed-2: these are embeddings\n" in text


def test_who_is_at_work_is_shown_and_counted_as_nothing_else(root):
    paths = [root / "suite" / "mnist" / label / f"seed-{seed}.jsonl" for label, seed in (("margin", 10), ("dgmg", 0))]
    with lock(paths[0]), lock(paths[1]), lock(paths[0].with_name("seed-0.jsonl")):
        text = status_table(scan_folder(root))
    assert marks(text, "margin") == ["done", "done", "12/31*"]  # nothing is left to do in one that is done
    assert marks(text, "dgmg") == ["FAILED*", "skipped", "-"]
    (line,) = [line for line in text.splitlines() if line.startswith("  process ")]
    assert line.endswith(": suite/mnist/dgmg/seed-0, suite/mnist/margin/seed-10")
    assert text.splitlines()[-1] == "6 runs: 3 done, 2 at work, 1 skipped; 1 not begun"
    assert marks(status_table(scan_folder(root)), "margin") == ["done", "done", "12/31"]  # they went home


def test_a_damaged_file_is_one_line_and_the_rest_of_the_grid_appears(root):
    path = root / "suite" / "mnist" / "margin" / "seed-2.jsonl"
    header, *rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b"{torn}\n" + b"".join(rows))
    other = root / "suite" / "mnist" / "margin" / "seed-0.jsonl"
    other.write_text(json.dumps({"kind": "header", "schema_version": 99}) + "\n")
    standings = scan_folder(root)
    text = status_table(standings)
    assert any_damaged(standings)
    assert marks(text, "margin") == ["damaged", "damaged", "12/31"]
    assert marks(text, "dgmg") == ["FAILED", "skipped", "-"]
    said = [line for line in text.splitlines() if line.startswith(f"  {root}")]
    assert len(said) == 2
    assert "update dgal-bench" in said[0]
    assert f"{path}, line 2: not JSON" in said[1]
    assert "2 damaged" in text.splitlines()[-1]
    assert text.count("profile") == 1  # the damaged ones stand where their siblings do


@pytest.mark.parametrize("header", [{}, {"config": {}, "fingerprint": {}, "profile": "cpu"}, {"config": 3}])
def test_a_header_that_lacks_what_a_header_has_is_damage_not_a_crash(root, header):
    path = root / "suite" / "mnist" / "margin" / "seed-2.jsonl"
    path.write_text(json.dumps({"kind": "header", "schema_version": 2, **header}) + "\n")
    standings = scan_folder(root)
    assert [one.path for one in standings if one.damage] == [path]
    assert marks(status_table(standings), "margin") == ["done", "damaged", "12/31"]


def test_a_file_that_is_just_being_started_is_in_the_grid(root):
    path = root / "suite" / "mnist" / "dgmg" / "seed-10.jsonl"
    path.write_text("")
    with lock(path):
        assert marks(status_table(scan_folder(root)), "dgmg") == ["FAILED", "skipped", "begun*"]
    assert marks(status_table(scan_folder(root)), "dgmg") == ["FAILED", "skipped", "begun"]


def test_profiles_and_data_sets_have_tables_of_their_own(root):
    write(root, "margin+profile=paper", 0, rows=3, profile="paper")
    write(root, "margin", 7, rows=3, dataset="digits")
    text = status_table(scan_folder(root))
    titles = [line for line in text.splitlines() if line.startswith("suite/")]
    assert titles == ["suite/digits, profile cpu", "suite/mnist, profile cpu", "suite/mnist, profile paper"]
    assert "7" not in marks(text.partition("suite/mnist")[2], "margin")  # a seed of digits is not missing in mnist
    assert text.splitlines()[-1].endswith("; 1 not begun")


def test_any_folder_of_the_results_can_be_asked_for(root):
    whole = status_table(scan_folder(root))
    assert status_table(scan_folder(root / "suite")) == whole
    assert status_table(scan_folder(root / "suite" / "mnist")) == whole
    assert marks(status_table(scan_folder(root / "suite" / "mnist" / "dgmg")), "dgmg") == ["FAILED", "skipped"]
    for place in (root / "nowhere", root / "suite" / "mnist" / "empty"):
        with pytest.raises(ResultsError, match="run 'dgal-bench bench"):
            scan_folder(place)


@pytest.mark.parametrize("n_seeds", [1, 5, 10, 20, 37])
@pytest.mark.parametrize("label", ["rsmg", "dgmg+strategy.restrict.score=negentropy+graph.graph_k=10+batch_size=50"])
def test_a_wide_grid_stays_within_the_terminal_and_loses_no_run(tmp_path, n_seeds, label):
    """More seeds than fit go into further tables; a label that is too long has a line of its own."""
    first = write(tmp_path, label, 0, rows=12)
    for seed in range(1, n_seeds):
        shutil.copy(first, first.with_name(f"seed-{seed}.jsonl"))
    write(tmp_path, "margin", 0, rows=1)
    write(tmp_path, "full_supervision", 0, rows=1, rounds=0, full=True)
    text = status_table(scan_folder(tmp_path))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("12/31 ") + text.count("12/31\n") == n_seeds
    rows = [line.split() for line in text.splitlines() if line.startswith("margin ")]
    assert [mark for _, *row in rows for mark in row] == ["1/31"] + ["-"] * (n_seeds - 1)
    seeds = [seed for line in text.splitlines() if line.startswith("seed") for seed in line.split()[1:]]
    assert seeds == [str(seed) for seed in range(n_seeds)]


def test_old_files_are_read_as_well():
    old = status_table(scan_folder(GOLDEN.parent / "schema-1"))
    assert old.splitlines()[-1] == "6 runs: 3 done, 2 partial, 1 failed"
    assert status_table(scan_folder(GOLDEN)).splitlines()[-1] == "7 runs: 3 done, 1 partial, 2 failed, 1 skipped"


def test_asking_changes_nothing(root):
    def listing():
        return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    before = listing()
    status_table(scan_folder(root))
    assert listing() == before


@pytest.mark.slow
def test_a_large_grid_takes_under_two_seconds(tmp_path):
    """12 strategies x 30 seeds of 31 rows, each as long as a real one."""
    source = Path(__file__).parent.parent / "results" / "reference" / "all" / "mnist" / "margin" / "seed-0.jsonl"
    for label in range(12):
        folder = tmp_path / "suite" / "mnist" / f"strategy{label}"
        folder.mkdir(parents=True)
        for seed in range(30):
            shutil.copy(source, folder / f"seed-{seed}.jsonl")
    started = time.process_time()  # its own seconds: what else the machine does is not its matter
    standings = scan_folder(tmp_path)
    text = status_table(standings)
    assert time.process_time() - started < 2
    assert text.splitlines()[-1] == "360 runs: 360 done"
