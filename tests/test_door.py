"""The names that ``from dgal_bench import ...`` gives, and what two of them do."""

import json
import math
from pathlib import Path

import pandas
import pytest

import dgal_bench
from dgal_bench import ConfigError, ResultsError, RoundRecord, load_results, run
from dgal_bench.results.reader import read_results
from dgal_bench.results.rows import choice

GOLDEN = Path(__file__).parent / "golden" / "schema-2" / "golden"


def test_every_name_is_there_and_has_a_docstring():
    for name in dgal_bench.__all__:
        value = getattr(dgal_bench, name)
        ours = getattr(value, "__module__", "").startswith("dgal_bench")  # Index is torch's Tensor, by its own name
        assert not ours or value.__doc__, name
    assert set(dgal_bench.__all__) <= set(dir(dgal_bench))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dgal_bench.nothing  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (Path(dgal_bench.__file__).parent / "py.typed").is_file()


def test_a_row_for_each_evaluation_with_every_fact():
    table = load_results(GOLDEN)
    logs = read_results(GOLDEN)
    assert len(table) == sum(len(log.records) for log in logs) > 0
    rows = iter(table.to_dict("records"))
    for log in logs:
        for record in log.records:
            row = next(rows)
            assert (row["dataset"], row["strategy"], row["seed"]) == ("digits", log.path.parent.name, 0)
            assert (row["status"], row["config"]) == (log.status, log.header["fingerprint"]["config"])
            for name, value in vars(record).items():
                pairs = (
                    {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
                )
                for column, one in pairs.items():
                    missing = one is None or one == {}
                    assert missing or row[column] == one, column
                    assert not (missing and column in row) or row[column] is None or math.isnan(row[column])


def test_the_table_keeps_everything_as_parquet(tmp_path):
    table = load_results(GOLDEN)
    table.to_parquet(tmp_path / "rows.parquet")
    again = pandas.read_parquet(tmp_path / "rows.parquet")
    assert list(again.columns) == list(table.columns)
    plain = [json.loads(one.to_json(orient="records")) for one in (table, again)]
    assert plain[0] == plain[1]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("settings", "results", "why"),
    [
        (["strategy=dgmgg"], None, "did you mean 'dgmg'"),
        (["seed=0"], None, "run needs a strategy"),
        (["strategy=random,margin"], None, "strategy takes one value, not 2"),
        (["strategy=random", "results=a"], "b", "results= is given twice"),
        (["strategy=random", "--out"], None, "--out means nothing here"),
    ],
)
def test_a_mistake_in_a_setting_is_the_command_lines(settings, results, why):
    with pytest.raises(ConfigError, match=why):
        run(*settings, results=results)


@pytest.mark.slow
def test_a_run_returns_the_rows_that_its_folder_holds(tmp_path):
    settings = ["strategy=dgmg", "profile=smoke", "representation=pca", f"cache={tmp_path / 'cache'}"]
    rows = run(*settings, results=tmp_path / "kept")
    assert all(isinstance(row, RoundRecord) for row in rows)
    (log,) = read_results(tmp_path / "kept")
    assert rows == list(log.records)
    assert run(*settings, results=tmp_path / "kept") == rows  # done already: read, not repeated
    assert [choice(row) for row in run(*settings)] == [choice(row) for row in rows]
