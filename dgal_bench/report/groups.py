"""Which runs may be compared, and which may be averaged."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dgal_bench.config.schema import SECTIONS, differences, without_paths
from dgal_bench.core.errors import ResultsError
from dgal_bench.report.times import by_run, hardware, machine_of_run, timings_of
from dgal_bench.results.rows import RunLog, Timings
from dgal_bench.results.schema import RESTORE

BASELINE = "margin"
"""The strategy that speed-ups are relative to."""

_Key = tuple[str, str, str, int]
_Origin = tuple[str, str]  # the start of the data's hash, and the machine


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that may be compared: one suite, data set, profile, algorithm version and kind of machine.

    ``runs`` by strategy label.
    """

    suite: str
    dataset: str
    profile: str
    algorithm_version: int
    runs: Mapping[str, Sequence[RunLog]]
    references: Sequence[RunLog] = ()
    """Full supervision: trainings on the whole labeled pool, no strategies."""
    content: str = ""
    """The start of the data's hash, where other runs of this name have other data."""
    unstarted: Sequence[RunLog] = ()
    """Runs of all strategies that failed or were skipped before they began: their data and machine are not known."""
    timings: Sequence[Timings] = ()
    """Replays of these runs, and of others."""
    seeds_elsewhere: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Seeds of each strategy in other groups of this name: on another machine, or of other data."""
    several_versions: bool = False
    """Whether other runs of this suite, data set and profile are of another algorithm version."""
    machine: str = ""
    """``AMD EPYC, 2 cores``, where other runs of this name and data were made on another kind."""

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.dataset_label}"

    @property
    def dataset_label(self) -> str:
        """The data set, and what distinguishes this group from others of its suite and data set."""
        content = f" (data {self.content})" if self.content else ""
        return self.dataset + content + (f" (on {self.machine})" if self.machine else "")

    @property
    def slug(self) -> str:
        """The start of its figures' file names."""
        version = f"-v{self.algorithm_version}" if self.several_versions else ""
        machine = hashlib.sha256(self.machine.encode()).hexdigest()[:6] if self.machine else ""
        origin = "".join(f"-{part}" for part in (self.content, machine) if part)
        return in_addresses(f"{self.suite}-{self.dataset}-{self.profile}{version}{origin}", self.suite, self.dataset)

    @property
    def logs(self) -> list[RunLog]:
        return [log for logs in self.runs.values() for log in logs]

    def finished(self, strategy: str) -> dict[int, RunLog]:
        """Finished runs by seed; partial and failed ones are never averaged in."""
        return {log.header["config"]["seed"]: log for log in self.runs.get(strategy, ()) if log.done}

    @property
    def strategies(self) -> list[str]:
        """Those with a finished run."""
        return [strategy for strategy in self.runs if self.finished(strategy)]

    def replays(self, strategy: str) -> dict[int, Timings]:
        """By seed the replays of finished runs that reproduced the rows' picks, all of one kind of machine.

        Of several kinds the one with most replays: seconds of two are never averaged.
        """
        known = by_run(self.timings)
        replays = {seed: timings_of(log, known) for seed, log in self.finished(strategy).items()}
        usable = {seed: timings for seed, timings in replays.items() if timings is not None}
        machines = Counter(hardware(timings.header) for timings in usable.values())
        most = max(sorted(machines), key=lambda one: machines[one], default="")
        return {seed: timings for seed, timings in usable.items() if hardware(timings.header) == most}


def in_addresses(text: str, *parts: str) -> str:
    """A text made safe for file names, addresses and style sheets; different ``parts`` give different texts."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", text)
    plain = safe == text and not any("-" in part for part in parts)
    return safe if plain else f"{safe}-{hashlib.sha256('/'.join([text, *parts]).encode()).hexdigest()[:6]}"


def group(logs: Iterable[RunLog], timings: Sequence[Timings] = ()) -> list[Group]:
    """Runs by suite, data set, its content, profile, algorithm version and machine: never averaged over these.

    Raises:
        ResultsError: a row lacks the query that a report compares.
    """
    begun: dict[_Key, dict[_Origin, dict[str, list[RunLog]]]] = {}
    unstarted: dict[_Key, list[RunLog]] = {}
    for log in logs:
        _check_queries(log)
        if log.begun:
            origin = (log.header["fingerprint"]["data"][:8], machine_of_run(log))
            runs = begun.setdefault(_key(log), {}).setdefault(origin, {})
            _add(runs.setdefault(log.path.resolve().parent.name, []), log)
        else:
            unstarted.setdefault(_key(log), []).append(log)
    groups = []
    versions = Counter(key[:-1] for key in begun.keys() | unstarted.keys())
    for key in sorted(begun.keys() | unstarted.keys()):
        origins: Mapping[_Origin, Mapping[str, Sequence[RunLog]]] = begun.get(key) or {("", ""): {}}
        group_unstarted = unstarted.get(key, [])
        for origin, own in sorted(origins.items()):
            others = _seeds(runs for other, runs in origins.items() if other != origin)
            one = _group(key, own, _distinguishing(origin, list(origins)), group_unstarted, timings, others)
            groups.append(replace(one, several_versions=versions[key[:-1]] > 1))
            group_unstarted = []  # reported once
    return groups


def _seeds(groups: Iterable[Mapping[str, Sequence[RunLog]]]) -> dict[str, frozenset[int]]:
    """By strategy folder, over several groups."""
    seeds: dict[str, frozenset[int]] = {}
    for runs in groups:
        for label, logs in runs.items():
            seeds[label] = seeds.get(label, frozenset()) | {log.header["config"]["seed"] for log in logs}
    return seeds


def _add(runs: list[RunLog], log: RunLog) -> None:
    """Raises ResultsError where a seed occurs twice, as in two trees with a suite of one name."""
    same = [one for one in runs if one.path.name == log.path.name]
    if same:
        raise ResultsError(f"{same[0].path} and {log.path} are the same run: report on one folder at a time")
    runs.append(log)


def _distinguishing(origin: _Origin, origins: Sequence[_Origin]) -> _Origin:
    """The data and the machine, each empty unless it distinguishes this origin from another one."""
    contents, machines = ({one[part] for one in origins} for part in (0, 1))
    return origin[0] if len(contents) > 1 else "", origin[1] if len(machines) > 1 else ""


def _key(log: RunLog) -> _Key:
    header = log.header
    name, version = header["config"]["dataset"]["name"], header["fingerprint"]["algorithm_version"]
    return log.path.resolve().parts[-4], name, header["profile"], version


def _group(
    key: _Key, runs: Mapping[str, Sequence[RunLog]], origin: _Origin, unstarted: Sequence[RunLog],
    timings: Sequence[Timings], seeds_elsewhere: Mapping[str, frozenset[int]],
) -> Group:  # fmt: skip
    references = [log for logs in runs.values() for log in logs if is_reference(log)]
    strategies = {label: logs for label, logs in runs.items() if not is_reference(logs[0])}
    content, machine = origin
    return Group(
        *key, _by_configuration(strategies), references, content, unstarted, timings, seeds_elsewhere, machine=machine
    )


def _check_queries(log: RunLog) -> None:
    for record in () if is_reference(log) else log.records[:-1]:
        if not record.query_seconds or record.query_seconds < 0 or record.n_scored is None:
            raise ResultsError(
                f"{log.path}: no seconds or no points scored of the query of round {record.round}: {RESTORE}"
            )


def is_reference(log: RunLog) -> bool:
    """Whether the whole pool was labeled at once: full supervision."""
    return log.header["config"]["initial_size"] is None


def _by_configuration(runs: Mapping[str, Sequence[RunLog]]) -> dict[str, list[RunLog]]:
    """Seeds of a folder are averaged only where nothing but the seed differs; a difference becomes part of the name."""
    by_name: dict[str, list[RunLog]] = {}
    for label, logs in runs.items():
        first = _without_seed(logs[0])
        for log in logs:
            changes = differences(first, _without_seed(log))
            name = f"{label} ({'; '.join(changes)})" if changes else label
            by_name.setdefault(name, []).append(log)
    return by_name


def _without_seed(log: RunLog) -> dict[str, Any]:
    """What the seeds of a strategy must have in common: the content of a user's files, but not their paths.

    A representation may be made anew, on another machine say: representations of different seeds differ as much.
    """
    config, fingerprint = log.header["config"], log.header["fingerprint"]
    common = {key: without_paths(value) if key in SECTIONS else value for key, value in config.items() if key != "seed"}
    return common | {"content": {name: str(fingerprint[name])[:8] for name in ("weights", "files")}}
