"""What the README shows works as shown."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import one_hot

from dgal_bench.arrays import Index, smallest
from dgal_bench.cli import main
from dgal_bench.config import StrategyConfig
from dgal_bench.data.pool import Pool
from dgal_bench.lab import Cell
from dgal_bench.record import RoundRecord
from dgal_bench.strategies import ACQUISITIONS, Query
from tests.conftest import run_tiny, tiny

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()


def block(kind):
    (found,) = re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)
    return found


@pytest.fixture
def added(monkeypatch):
    """The example's part in the registry, and its strategy's configuration."""
    names = {"dataclass": dataclass, "one_hot": one_hot, "smallest": smallest, "Index": Index, "Query": Query}
    exec(block("python"), names)
    monkeypatch.setitem(ACQUISITIONS, "classwise_margin", names["ClasswiseMargin"])
    shown = OmegaConf.create({"restricted_size": 20, **OmegaConf.create(block("yaml"))})
    return StrategyConfig(**OmegaConf.to_container(shown, resolve=True)["strategy"])


def test_the_example_strategy_runs(lab, tmp_path, added):
    rows = run_tiny(lab, tmp_path / "seed-0.jsonl", replace(tiny("dgmg"), strategy=added))
    assert len(rows) == 3
    assert all(row.n_scored == 20 for row in rows[:-1])


def test_the_example_takes_predicted_classes_in_turn(lab, added):
    cell = Cell.of(replace(tiny("dgmg"), strategy=added), lab)
    first = torch.arange(10)
    pool = Pool(200, 10, first, lab.data.labels[first])
    probs = torch.tensor([[0.50, 0.49, 0.01], [0.6, 0.3, 0.1], [0.55, 0.44, 0.01], [0.1, 0.9, 0.0], [0.0, 0.2, 0.8]])

    class Outputs:
        def __init__(self, ids):
            self.probs = probs[ids - 50]

    query = replace(cell.query(pool, None, None, 0), predict=Outputs)
    # margins .01, .3, .11 of class 0, .8 of class 1, .6 of class 2: one of each by margin, then class 0's second
    assert cell.strategy.acquire(query, torch.arange(50, 55), 4).tolist() == [50, 54, 53, 52]


def test_the_fields_it_names_are_those_of_a_row():
    table = README.partition("| field | meaning |")[2].partition("\n\n")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == set(RoundRecord.__dataclass_fields__) - {"extra"}


def test_every_path_and_make_target_it_names_is_there():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (HERE / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize(
    "line", [line for line in README.splitlines() if line.startswith(("make bench ", ".venv/bin/dgal-bench "))]
)
def test_its_commands_are_understood(line, tmp_path, capsys):
    """Each is planned, not run: a renamed key or choice would be refused."""
    line = line.partition("  #")[0].strip()
    if line.startswith("make"):
        names = {"DATASET": "dataset", "STRATEGIES": "strategy", "SEEDS": "seed"}
        pairs = dict(re.findall(r"([A-Z]+)=('[^']*'|\S+)", line))
        words = [
            "bench",
            *pairs.pop("OVERRIDES", "").strip("'").split(),
            *[f"{names[k]}={v}" for k, v in pairs.items()],
        ]
    else:
        words = line.split()[1:]
    if words[0] == "report":
        pytest.skip("needs results")
    assert main([*words, f"results={tmp_path}", "--dry-run"]) == 0
    assert "cells" in capsys.readouterr().out or "--print-config" in words
