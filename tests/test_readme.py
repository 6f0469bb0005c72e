"""What the README shows works as shown."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgal_bench.cli.main import VERBS, main
from dgal_bench.conformance import LAWS, example_config, run_in_process
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Run
from dgal_bench.results.rows import RoundRecord
from dgal_bench.strategies import plugins

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()


def block(kind, section="Adding a strategy"):
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)
    return found


@pytest.fixture
def plugin(tmp_path, registries):
    """The example as a user would save it."""
    path = tmp_path / "my_strategies.py"
    path.write_text(block("python"))
    return path


def test_the_example_is_about_thirty_lines_and_keeps_every_law(plugin, capsys):
    assert len(block("python").splitlines()) <= 32
    assert main(["check", str(plugin)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dgcm"
    assert lines[-1] == f"{len(LAWS)} of {len(LAWS)} laws hold, 0 broken"


@pytest.mark.slow
def test_the_lines_from_python_give_rows_and_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DGAL_CACHE", str(tmp_path / "cache"))
    names = {}
    quick = block("python", "Sweeps that survive").replace(
        '"seed=0"', '"seed=0", "profile=smoke", "representation=pca"'
    )
    exec(quick, names)
    assert len(names["rows"]) == len(names["table"]) > 1
    assert list(names["table"]["accuracy"]) == [row.accuracy for row in names["rows"]]


def test_the_example_runs_beside_the_others(experiment, tmp_path, plugin):
    plugins.install([str(plugin)])
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", example_config("dgcm"))
    assert len(rows) == 3
    assert all(row.n_scored == 20 for row in rows[:-1])


def test_the_example_takes_predicted_classes_in_turn(experiment, plugin):
    plugins.install([str(plugin)])
    run = Run.of(example_config("dgcm"), experiment)
    first = torch.arange(10)
    pool = Pool(200, 10, first, experiment.data.labels[first])
    probs = torch.tensor([[0.50, 0.49, 0.01], [0.6, 0.3, 0.1], [0.55, 0.44, 0.01], [0.1, 0.9, 0.0], [0.0, 0.2, 0.8]])

    class Outputs:
        def __init__(self, ids):
            self.probs = probs[ids - 50]

    query = replace(run.query(pool, None, None, 0), predict=Outputs)
    # margins .01, .3, .11 of class 0, .8 of class 1, .6 of class 2: one of each by margin, then class 0's second
    assert run.strategy.acquire(query, torch.arange(50, 55), 4).tolist() == [50, 54, 53, 52]


def test_the_fields_it_names_are_those_of_a_row():
    table = README.partition("| field | meaning |")[2].partition("\n\n")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == set(RoundRecord.__dataclass_fields__)


def test_what_came_out_is_what_the_claims_say():
    """Headlines, verdicts and what is not run yet, word for word, and the first figure is of the same report."""
    report = HERE / "results" / "reference" / "report"
    told = (report / "claims.md").read_text().partition("\nFixed before")[0].splitlines()
    said = [line for line in told if line.startswith(("- On ", "|", "Not run yet"))]
    assert len(said) > 14
    assert [line for line in said if line not in README] == []
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert [picture.startswith("results/reference/report/figures/all-mnist") for picture in pictures] == [True]


def test_every_path_and_make_target_it_names_is_there():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (HERE / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize(
    "line", [line for line in README.splitlines() if line.startswith(("make bench ", ".venv/bin/dgal-bench "))]
)
def test_its_commands_are_understood(line, tmp_path, capsys, plugin, monkeypatch):
    """Each is planned, not run: a renamed key or choice would be refused."""
    monkeypatch.chdir(tmp_path)
    line = line.partition("  #")[0].strip()
    if line.startswith("make"):
        names = {"DATA_PATH": "dataset.path", "STRATEGIES": "strategy", "SEEDS": "seed"}
        pairs = dict(re.findall(r"([A-Z_]+)=('[^']*'|\S+)", line))
        words = ["bench", *pairs.pop("OVERRIDES", "").strip("'").split()]
        words += [f"{names.get(name, name.lower())}={value}" for name, value in pairs.items()]
    else:
        words = line.split()[1:]
    if words[0] not in ("bench", "run"):
        assert words[0] in VERBS  # and each has tests of its own
        return
    assert main([*words, f"results={tmp_path}", "--dry-run"]) == 0
    assert "runs" in capsys.readouterr().out or "--print-config" in words
