"""One small lab on real digits for all tests, and helpers that make configurations and cells of it."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from dgal_bench.compose import compose
from dgal_bench.config import RunConfig
from dgal_bench.lab import Cell, Lab, open_lab
from dgal_bench.loop import run_cell
from dgal_bench.record import Recorder, RoundRecord, read_cell
from dgal_bench.strategies import resolved
from dgal_bench.worker import quiet

TINY = ("representation.threads=1", "dataset.pool_size=200", "dataset.test_size=60", "restricted_size=20")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def silence() -> None:
    quiet()


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@cache
def tiny(strategy: str, *overrides: str) -> RunConfig:
    """Two queries of five on 200 digits, PCA instead of a VAE: a cell takes a third of a second."""
    choices = {"dataset": "digits", "representation": "pca", "profile": "smoke", "strategy": strategy}
    config = compose(choices, [*TINY, *overrides])
    return RunConfig(**{**vars(config), "strategy": resolved(config.strategy)})


@pytest.fixture(scope="session")
def lab(cache_root: Path) -> Lab:
    return open_lab(tiny("random"), Path("no-data-needed"), cache_root, lambda what, done, of: None)


def run_tiny(lab: Lab, path: Path, config: RunConfig) -> tuple[RoundRecord, ...]:
    """Run a cell in this process; its rows as read back from the file."""
    with Recorder(path) as recorder:
        run_cell(Cell.of(config, lab), recorder, lambda record: None)
    log = read_cell(path)
    assert log is not None
    return log.records
