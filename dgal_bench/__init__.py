"""Diffusion Graph Active Learning against its rivals: accuracy, and what the query really costs.

``run("strategy=dgmg", "seed=0")`` makes the rows of one run, ``load_results("results/runs")`` reads those of a whole
folder. The other names are what a strategy of your own is made of. Nothing is imported before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgal_bench.cli.commands import run_settings as run
    from dgal_bench.core.errors import (
        ConfigError,
        DataError,
        NotApplicableError,
        ResultsError,
        StrategyError,
        UserError,
    )
    from dgal_bench.core.types import Index, Outputs, margins, smallest
    from dgal_bench.data.pool import Pool
    from dgal_bench.graph.graph import Graph
    from dgal_bench.results.frame import load_results
    from dgal_bench.results.rows import RoundRecord
    from dgal_bench.strategies.badge import Badge
    from dgal_bench.strategies.base import Acquisition, Query, Restriction, Selection, Strategy
    from dgal_bench.strategies.coreset import KCenter
    from dgal_bench.strategies.restrict import Diffusion, Everything, Uniform
    from dgal_bench.strategies.uncertainty import Entropy, LeastConfidence, Margin, Random

__version__ = "0.1.0"

__all__ = [
    "Acquisition", "Badge", "ConfigError", "DataError", "Diffusion", "Entropy", "Everything", "Graph", "Index",
    "KCenter", "LeastConfidence", "Margin", "NotApplicableError", "Outputs", "Pool", "Query", "Random", "Restriction",
    "ResultsError", "RoundRecord", "Selection", "Strategy", "StrategyError", "Uniform", "UserError", "__version__",
    "load_results", "margins", "run", "smallest",
]  # fmt: skip

_HOMES = {
    "cli.commands": ("run",),
    "core.errors": (
        "ConfigError", "DataError", "NotApplicableError", "ResultsError", "StrategyError", "UserError",
    ),
    "core.types": ("Index", "Outputs", "margins", "smallest"),
    "data.pool": ("Pool",),
    "graph.graph": ("Graph",),
    "results.frame": ("load_results",),
    "results.rows": ("RoundRecord",),
    "strategies.badge": ("Badge",),
    "strategies.base": ("Acquisition", "Query", "Restriction", "Selection", "Strategy"),
    "strategies.coreset": ("KCenter",),
    "strategies.restrict": ("Diffusion", "Everything", "Uniform"),
    "strategies.uncertainty": ("Entropy", "LeastConfidence", "Margin", "Random"),
}  # fmt: skip
_MODULES = {name: f"dgal_bench.{module}" for module, names in _HOMES.items() for name in names}
_NAMES_THERE = {"run": "run_settings"}  # ``run`` of that module is the verb


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dgal_bench' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), _NAMES_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
