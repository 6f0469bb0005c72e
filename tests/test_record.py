"""The results file: what is torn is cut, what is damaged is refused, and only one may write."""

import json

import pytest

from dgal_bench.errors import ResultsError
from dgal_bench.record import SCHEMA_VERSION, Recorder, RoundRecord, choice, picks, read_cell, read_results

HEADER = {"cell": "toy/random/seed-0", "config": {"rounds": 3, "seed": 0}, "fingerprint": {}}


def record(round_, **facts):
    base = {
        "n_labeled": 10 + 2 * round_, "accuracy": 0.5 + 0.1 * round_, "underfit": False, "epochs": 4, "train_loss": 0.2,
        "reach": 1.0, "train_seconds": 1.0, "test_seconds": 0.5, "threads": 1, "jobs": 1, "load": 0.3,
    }  # fmt: skip
    return RoundRecord(round=round_, **{**base, **facts})


def write(path, *rounds):
    with Recorder(path) as recorder:
        if recorder.log is None:
            recorder.write_header(HEADER)
        for round_ in rounds:
            recorder.write(record(round_, indices=[round_, 100 + round_]))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "suite" / "toy" / "random" / "seed-0.jsonl"


def test_rows_come_back_as_written(path):
    write(path, 0, 1)
    log = read_cell(path)
    assert log.records == (record(0, indices=[0, 100]), record(1, indices=[1, 101]))
    assert log.header["schema_version"] == SCHEMA_VERSION
    assert (log.status, log.done) == ("partial", False)
    assert picks(log.records) == [0, 100, 1, 101]
    write(path, 2, 3)
    assert read_cell(path).status == "done"


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_torn_last_line_is_cut_and_the_cell_goes_on(path, lost):
    write(path, 0, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert [r.round for r in read_cell(path).records] == [0]
    write(path, 1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_file_without_a_whole_header_is_started_over(path, kept):
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    assert read_cell(path) is None
    write(path, 0)
    assert read_cell(path).header["cell"] == "toy/random/seed-0"


@pytest.mark.parametrize("broken", [b"{not json}\n", b"[1]\n", b'{"no": "kind"}\n', b'{"kind": "round", "round": 0}\n'])
def test_a_damaged_earlier_line_is_refused_by_file_and_number(path, broken):
    write(path, 0, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + broken + lines[2]
    path.write_bytes(damaged)
    for use in (read_cell, write):
        with pytest.raises(ResultsError, match=f"{path}, line 2"):
            use(path)
    assert path.read_bytes() == damaged  # nothing was lost


def test_rows_out_of_order_are_refused(path):
    write(path, 0, 1, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[3])
    with pytest.raises(ResultsError, match=r"rounds \[0, 2\] are not 0, 1, 2"):
        read_cell(path)


def test_another_schema_is_refused(path):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"kind": "header", "schema_version": 99, **HEADER}) + "\n")
    with pytest.raises(ResultsError, match="schema 99, where this version reads 1"):
        read_cell(path)


def test_a_failure_is_the_status_until_rows_follow(path):
    with Recorder(path) as recorder:
        recorder.write_header(HEADER)
        recorder.write(record(0))
        recorder.write_failure("ValueError: diverged", "Traceback ...")
    assert read_cell(path).status == "failed"
    assert read_cell(path).failure["error"] == "ValueError: diverged"
    with Recorder(path) as recorder:
        recorder.write_continuation({"changed": []})
        recorder.write(record(1))
    assert read_cell(path).status == "partial"
    assert len(read_cell(path).continuations) == 1


def test_one_writer_at_a_time(path):
    with Recorder(path) as first:
        first.write_header(HEADER)
        second = Recorder(path, patience_seconds=0.2)
        with pytest.raises(ResultsError, match="being written by another process"):
            second.__enter__()
    with second:  # released
        assert second.log is not None


def test_nan_is_no_fact(path):
    with Recorder(path) as recorder:
        recorder.write_header(HEADER)
        with pytest.raises(ValueError, match="JSON"):
            recorder.write(record(0, accuracy=float("nan")))


def test_circumstances_are_no_choice():
    assert choice(record(0)) == choice(
        record(0, train_seconds=9.0, jobs=2, load=7.0, query_seconds=1.0, seconds={"infer": 1.0})
    )
    assert choice(record(0)) != choice(record(0, indices=[1]))
    assert choice(record(0)) != choice(record(0, accuracy=0.51))


def test_reading_a_folder_of_results(tmp_path, path):
    with pytest.raises(ResultsError, match="is not a folder of results"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match="holds no results"):
        read_results(tmp_path)
    write(path, 0)
    path.with_name("seed-1.jsonl").write_text("")  # just being started
    (tmp_path / "summary.csv").write_text("")
    assert [log.path for log in read_results(tmp_path)] == [path]


def test_a_place_that_cannot_be_written_names_the_knob(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ResultsError, match=r"cannot be written.*set results=DIR"),
        Recorder(tmp_path / "file" / "seed-0.jsonl"),
    ):
        pass
