"""Which queries of a results folder a replay is to time, and which it cannot, or has timed already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from dgal_bench.config import SECTIONS, RunConfig, from_dict, to_dict, without_paths
from dgal_bench.errors import ConfigError, ResultsError, UserError, did_you_mean
from dgal_bench.identity import ALGORITHM_VERSION, check_resumable
from dgal_bench.provenance import provenance
from dgal_bench.record import CellLog, read_results
from dgal_bench.report.needs import check_content
from dgal_bench.report.times import disturbed, same_code_and_machine, usable
from dgal_bench.strategies import resolved
from dgal_bench.sweep import Job
from dgal_bench.timings import COMMON, Timings, read_timings, timings_path


@dataclass(frozen=True)
class Wanted:
    """What a command asks for. ``rounds``: None for 0, R/2 and R - 1, empty for all."""

    results: Path
    data: Path
    cache: Path
    seed: int | None = None
    rounds: Sequence[int] | None = None
    repeats: int = 3
    common: str | None = None
    again: bool = False
    offline: bool = False
    plugins: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Item:
    """One timings file to be: the cell whose state it is, the strategies to time on it (its own first), the rounds."""

    log: CellLog
    config: RunConfig
    strategies: Mapping[str, Mapping[str, Any]]
    rounds: Sequence[int]
    path: Path

    @cached_property
    def job(self) -> Job:
        return Job(self.config, self.log.path)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to do, what is done already, what cannot be (in a line each), and what was not asked of."""

    items: Sequence[Item]
    done: Sequence[Timings]
    refused: Sequence[str]
    left_out: Sequence[str]


def plan(wanted: Wanted) -> Plan:
    """Look at the results folder; nothing is run.

    Raises:
        ResultsError: no results, a damaged file, or no finished cell as asked for.
        ConfigError: a round that a cell does not have, or no such cell.
    """
    found = read_results(wanted.results)
    for log in found:
        check_content(log)
    logs = [log for log in found if log.rounds and log.header["config"]["initial_size"] is not None]
    chosen, left_out = _named(logs, wanted) if wanted.common else _of_one_seed(logs, wanted)
    items, done, refused = [], [], []
    for log in chosen:
        rounds = _rounds(log, wanted.rounds)
        try:
            item, others = _item(log, logs, rounds, wanted.common is not None)
        except (UserError, OmegaConfBaseException) as error:
            reason = error if isinstance(error, UserError) else _older(error)
            refused.append(f"{name_of(log)} is not replayed: {reason}")
            continue
        left_out += others
        made = None if wanted.again else _made_already(item, wanted.repeats)
        if made is None:
            items.append(item)
        else:
            done.append(made)
    return Plan(items, done, refused, left_out)


def name_of(log: CellLog) -> str:
    """``digits/dgmg/seed-0``."""
    return "/".join([*log.path.resolve().parts[-3:-1], log.path.stem])


def _older(error: Exception) -> str:
    return f"its configuration is another version's ({str(error).splitlines()[0]})"


def _of_one_seed(logs: Sequence[CellLog], wanted: Wanted) -> tuple[list[CellLog], list[str]]:
    """Of each data set's folder the finished cells of one seed: the one given, or that which most strategies have."""
    chosen, left_out = [], []
    for folder in dict.fromkeys(log.path.parent.parent for log in logs):
        here = [log for log in logs if log.path.parent.parent == folder]
        seeds = [log.header["config"]["seed"] for log in here if log.done]
        seed = wanted.seed if wanted.seed is not None else max(sorted(set(seeds)), key=seeds.count, default=None)
        of_seed = [log for log in here if log.header["config"]["seed"] == seed]
        chosen += [log for log in of_seed if log.done]
        left_out += [f"{name_of(log)} is {log.status}: left out" for log in of_seed if not log.done]
        absent = {log.path.parent for log in here} - {log.path.parent for log in of_seed}
        left_out += [f"{folder.name}/{path.name} has no seed {seed}: left out" for path in sorted(absent)]
    if not chosen:
        of = "" if wanted.seed is None else f" of seed {wanted.seed}"
        raise ResultsError(f"{wanted.results} has no finished cell{of} to replay: run 'dgal-bench bench' first")
    return chosen, left_out


def _named(logs: Sequence[CellLog], wanted: Wanted) -> tuple[list[CellLog], list[str]]:
    asked = tuple(Path(str(wanted.common).removesuffix(".jsonl")).parts)
    found = [log for log in logs if log.path.resolve().with_suffix("").parts[-len(asked) :] == asked]
    if not found:
        names = [name_of(log) for log in logs]
        near = did_you_mean(str(wanted.common), names)
        raise ConfigError(f"--common {wanted.common}: {wanted.results} holds no such cell{near}")
    if len(found) > 1:
        one = "/".join(found[0].path.resolve().with_suffix("").parts[-4:])
        raise ConfigError(f"--common {wanted.common} is {len(found)} cells: name the suite too, as in {one}")
    if not found[0].done:
        raise ResultsError(f"--common {wanted.common} is {found[0].status}: only a finished cell's states are known")
    return found, []


def _item(log: CellLog, logs: Sequence[CellLog], rounds: Sequence[int], common: bool) -> tuple[Item, list[str]]:
    """What is to be timed on a cell's states, and who is left out.

    Raises:
        ResultsError: its rows are of another algorithm.
        ConfigError: a strategy is of a plugin that is not loaded.
        OmegaConfBaseException: its configuration has other keys than this version's.
    """
    config = from_dict(log.header["config"])
    now = {"algorithm_version": ALGORITHM_VERSION, "config": config.hash}
    check_resumable(log, {"fingerprint": {**log.header["fingerprint"], **now}, "config": to_dict(config)}, anyway=True)
    if not common:
        return Item(log, config, _strategies([log]), rounds, timings_path(log.path)), []
    folder = log.path.parent.parent
    beside = [
        one for one in logs if one.done and one.path.parent.parent == folder and one.path.parent != log.path.parent
    ]
    others = {one.path.parent: one for one in beside if _setting(one) == _setting(log)}
    left_out = [
        f"{folder.name}/{path.name} has another configuration or content: left out"
        for path in dict.fromkeys(one.path.parent for one in beside)
        if path not in others
    ]
    return Item(log, config, _strategies([log, *others.values()]), rounds, folder / COMMON), left_out


def _strategies(logs: Sequence[CellLog]) -> dict[str, dict[str, Any]]:
    """By label; raises ConfigError for one of a plugin that is not loaded."""
    for log in logs:
        resolved(from_dict(log.header["config"]).strategy)
    return {log.path.parent.name: dict(log.header["config"]["strategy"]) for log in logs}


def _setting(log: CellLog) -> dict[str, Any]:
    """All but seed and strategy, and where a user's files lie."""
    config, print_ = log.header["config"], log.header["fingerprint"]
    common = {k: without_paths(v) if k in SECTIONS else v for k, v in config.items() if k not in ("seed", "strategy")}
    return common | {name: print_[name] for name in ("data", "weights", "files")}


def _rounds(log: CellLog, wanted: Sequence[int] | None) -> list[int]:
    if wanted is None:
        return sorted({0, log.rounds // 2, log.rounds - 1})
    if outside := [round_ for round_ in wanted if round_ >= log.rounds]:
        raise ConfigError(f"rounds={outside[0]}, but {name_of(log)} has queries in rounds 0 to {log.rounds - 1}")
    return sorted(set(wanted)) or list(range(log.rounds))


def _made_already(item: Item, repeats: int) -> Timings | None:
    """The timings of these very rows, rounds and repeats, made by this revision on this machine, alone on it."""
    made = read_timings(item.path)
    if made is None or not usable(made, item.log) or not same_code_and_machine(made.header, provenance()):
        return None
    strategies = {timing.strategy for timing in made.timings}
    same = made.rounds == item.rounds and made.repeats == repeats and strategies == item.strategies.keys()
    return made if same and not disturbed(made.timings) else None
