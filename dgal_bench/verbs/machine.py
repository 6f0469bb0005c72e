"""Verbs about what is on this machine: ``data`` sets, plugins to ``check``, and the ``doctor``."""

from functools import partial
from pathlib import Path

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError, choose
from dgal_bench.verbs.saying import say


def data(command: Command) -> int:
    from dgal_bench.data.datasets import DATASETS, fetch, whereabouts
    from dgal_bench.progress import new_progress
    from dgal_bench.request import data_root, offline, only_flags, only_places

    only_flags(command)
    only_places(command, "data", "offline")
    root, alone = data_root(command), offline(command)
    for name in command.words:
        choose(DATASETS, name, "data set")
    progress = new_progress({})
    try:
        for name in command.words:
            fetch(name, root, partial(progress.setting_up, name), alone)
    finally:
        progress.close()
    for name in command.words or DATASETS:
        say(f"{name:15} {whereabouts(name, root)}")
    return 0


def check(command: Command) -> int:
    from dgal_bench.judge import check_plugins, table
    from dgal_bench.request import only_flags, only_places

    only_flags(command)
    only_places(command)
    if not command.words:
        raise ConfigError("check takes plugin files: dgal-bench check my_strategies.py")
    verdicts = check_plugins(command.words)
    say(table(verdicts))
    return 1 if any(verdict.broken for verdict in verdicts) else 0


def doctor(command: Command) -> int:
    from dgal_bench.doctor import examine, table
    from dgal_bench.request import cache_root, data_root, only_flags, only_places

    if command.words:
        raise ConfigError(f"doctor takes no '{command.words[0]}', only data=DIR, cache=DIR and results=DIR")
    only_flags(command)
    only_places(command, "data", "cache", "results")
    findings = examine(data_root(command), cache_root(command), Path(command.one("results", "results/runs")))
    say(table(findings))
    return 1 if any(finding.state == "trouble" for finding in findings) else 0
