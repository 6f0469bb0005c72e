"""Where things are for a command: results, data, caches, plugins; and whether a network is."""

import os
from pathlib import Path

from dgal_bench import plugins
from dgal_bench.arguments import Command
from dgal_bench.disk import make_writable
from dgal_bench.errors import ConfigError, ResultsError
from dgal_bench.request.words import truth


def results_root(command: Command) -> Path:
    """The results folder, there or not; refused where it can never be one."""
    results = Path(command.one("results", "results/runs"))
    nearest = next(path for path in (results, *results.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise ResultsError(f"results={results} cannot be a folder, {nearest} is a file: set another results=DIR")
    return results


def check_writable(results: Path) -> None:
    """Say so before hours of work, not after."""
    make_writable(results, f"results={results}", "set results=DIR")


def data_root(command: Command) -> Path:
    return Path(command.one("data", os.environ.get("DGAL_DATA", "data")))


def cache_root(command: Command) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgal_bench"
    return Path(command.one("cache", os.environ.get("DGAL_CACHE", str(home))))


def offline(command: Command) -> bool:
    return truth(command, "offline", os.environ.get("DGAL_OFFLINE", "false"), " (also in $DGAL_OFFLINE)")


def plugins_of(command: Command) -> tuple[str, ...]:
    """Loaded, so that their strategies can be asked for; with absolute paths, for another process."""
    if command.values.get("plugins") == []:
        raise ConfigError("plugins= is an empty list: name a .py file or an entry point")
    return plugins.install(command.values.get("plugins", []))
