"""One small experiment on real digits for all tests; nothing is downloaded."""

import atexit
import gc
import logging
import os
import subprocess

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, and for every process of a test
os.environ["WANDB_ERROR_REPORTING"] = "false"  # before wandb is imported, by whichever test comes first

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from dgal_bench.config.compose import group_names, read_group

# Nothing that takes seconds to import: the process that hands out tests would wait for it before it starts others.
if TYPE_CHECKING:
    from dgal_bench.experiment import Experiment

gc.disable()  # until the tests are imported, of which it takes a third
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # the last function at its exit: to take all that was imported apart would cost seconds, and tell nothing
    atexit.register(os._exit, 0)

# No test is timed: a machine that is busy is no mistake.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: no need to look through it again and again
    gc.set_threshold(20_000)
    gc.enable()


def pytest_unconfigure() -> None:
    if not WORKER:
        gc.unfreeze()  # else libraries report what was not freed at the end


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What runs in this process and not in its own may set variables; the commands of later tests must not see them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def silent_and_sooner() -> None:
    import torch
    from lightning.fabric.utilities import registry

    from dgal_bench.models.trainer import silence_lightning

    silence_lightning()
    registry.entry_points = cache(registry.entry_points)  # every Trainer asks all installed packages: 20 ms
    if not torch.cuda.is_available():
        torch.cuda._cached_device_count = 0  # else every step of an optimizer looks for the driver: 0.4 ms
    os.fsync = lambda file: None  # type: ignore[assignment]  # no test cuts the power
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch"):  # pytest gives its handlers to all loggers that keep to themselves: 6 times a test
            logging.getLogger(name).propagate = True


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    """For this process and those it starts: missing data is an error everywhere, also where there is a network."""
    os.environ["DGAL_OFFLINE"] = "true"


@pytest.fixture(scope="session", autouse=True)
def warm_processes() -> None:
    from tests.warm import WarmPopen

    subprocess.Popen = WarmPopen  # type: ignore[misc]


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def experiment(cache_root: Path) -> "Experiment":
    from dgal_bench.conformance import example_experiment

    return example_experiment(cache_root)


def strategies() -> Iterator[Any]:
    """Every strategy: in slow tests where strategies before it have its parts, or where it trains for each query."""
    seen: set[tuple[str, str]] = set()
    for name in group_names("strategy"):
        content = read_group("strategy", name).strategy
        parts = {(part, str(content[part].kind)) for part in ("restrict", "acquire")}
        yield name if parts - seen and name != "ganvae" else pytest.param(name, marks=pytest.mark.slow)
        seen |= parts


@pytest.fixture(params=strategies())
def strategy(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    from dgal_bench.config import compose
    from dgal_bench.conformance import example_config
    from dgal_bench.engines import sweep
    from dgal_bench.strategies import ACQUISITIONS, PLUGIN_ORIGINS, RESTRICTIONS, plugins

    tables: list[dict[Any, Any]] = [
        compose._ADDED_CHOICES,
        RESTRICTIONS,
        ACQUISITIONS,
        PLUGIN_ORIGINS,
        plugins.INSTALLED,
    ]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    compose.forget_choices()
    example_config.cache_clear()
    sweep._configure.cache_clear()


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: two figures are drawn as thirteen are, small, and in this process."""
    from dgal_bench.report import figures, write

    kept = {name: figures.FIGURES[name] for name in ("accuracy-query-time", "query-time")}
    monkeypatch.setattr(figures, "FIGURES", kept)
    monkeypatch.setattr(figures, "DPI", 10)
    monkeypatch.setattr(write, "available_cores", lambda: 1)
