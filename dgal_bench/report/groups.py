"""Runs that may be compared, and those that may be averaged."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgal_bench.config.schema import SECTIONS, differences, without_paths
from dgal_bench.core.errors import ResultsError
from dgal_bench.report.times import by_run, hardware, machine_of_run, timings_of
from dgal_bench.results.resume import ALGORITHM_VERSION
from dgal_bench.results.rows import RunLog, Timings, check_report_facts

REFERENCE = "margin"
"""The strategy that speed-ups are against."""

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
    """The start of the data's hash, where other runs of this name rest on other data."""
    unbegun: Sequence[RunLog] = ()
    """Runs that failed or were skipped before they began: of whatever strategy, and nobody knows on what data."""
    timings: Sequence[Timings] = ()
    """Replays, of these runs or of others."""
    elsewhere: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Seeds of each strategy that are in another group of this name: on another machine, of other data."""
    machine: str = ""
    """Where other runs of this name and data were made on another kind: ``AMD EPYC, 2 cores``."""

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.told}"

    @property
    def told(self) -> str:
        """The data set, and what tells it from another group of this suite and data set."""
        content = f" (data {self.content})" if self.content else ""
        return self.dataset + content + (f" (on {self.machine})" if self.machine else "")

    @property
    def slug(self) -> str:
        """The start of its figures' file names."""
        version = "" if self.algorithm_version == ALGORITHM_VERSION else f"-v{self.algorithm_version}"
        machine = hashlib.sha256(self.machine.encode()).hexdigest()[:6] if self.machine else ""
        apart = "".join(f"-{part}" for part in (self.content, machine) if part)
        return in_addresses(f"{self.suite}-{self.dataset}-{self.profile}{version}{apart}", self.suite, self.dataset)

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

    def replayed(self, strategy: str) -> dict[int, Timings]:
        """By seed the replays of finished runs that found the rows' own picks again, all of one kind of machine.

        Where there are several it is the one that timed most: seconds of two are never averaged.
        """
        known = by_run(self.timings)
        found = {seed: timings_of(log, known) for seed, log in self.finished(strategy).items()}
        usable = {seed: timings for seed, timings in found.items() if timings is not None}
        machines = Counter(hardware(timings.header) for timings in usable.values())
        most = max(sorted(machines), key=lambda one: machines[one], default="")
        return {seed: timings for seed, timings in usable.items() if hardware(timings.header) == most}


def in_addresses(text: str, *parts: str) -> str:
    """A text as part of a file's name, an address and a style sheet alike; different ``parts`` make different ones."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", text)
    plain = safe == text and not any("-" in part for part in parts)
    return safe if plain else f"{safe}-{hashlib.sha256('/'.join([text, *parts]).encode()).hexdigest()[:6]}"


def group(logs: Iterable[RunLog], timings: Sequence[Timings] = ()) -> list[Group]:
    """Runs kept apart by suite, data set, its content, profile, algorithm version and machine: never averaged over.

    Raises:
        ResultsError: a file does not say what a report tells.
    """
    apart: dict[_Key, dict[_Origin, dict[str, list[RunLog]]]] = {}
    unbegun: dict[_Key, list[RunLog]] = {}
    for log in logs:
        check_report_facts(log)
        if log.begun:
            origin = (log.header["fingerprint"]["data"][:8], machine_of_run(log))
            runs = apart.setdefault(_key(log), {}).setdefault(origin, {})
            _file(runs.setdefault(log.path.resolve().parent.name, []), log)
        else:
            unbegun.setdefault(_key(log), []).append(log)
    groups = []
    for key in sorted(apart.keys() | unbegun.keys()):
        origins: Mapping[_Origin, Mapping[str, Sequence[RunLog]]] = apart.get(key) or {("", ""): {}}
        never = unbegun.get(key, [])
        for origin, sharing in sorted(origins.items()):
            others = _seeds(runs for other, runs in origins.items() if other != origin)
            groups.append(_group(key, sharing, _distinguishing(origin, list(origins)), never, timings, others))
            never = []  # told once
    return groups


def _seeds(of: Iterable[Mapping[str, Sequence[RunLog]]]) -> dict[str, frozenset[int]]:
    """Of each strategy's folder, over several groups."""
    found: dict[str, frozenset[int]] = {}
    for runs in of:
        for label, logs in runs.items():
            found[label] = found.get(label, frozenset()) | {log.header["config"]["seed"] for log in logs}
    return found


def _file(runs: list[RunLog], log: RunLog) -> None:
    """Raises ResultsError where a seed is there twice: of two trees with a suite of one name, say."""
    twice = [one for one in runs if one.path.name == log.path.name]
    if twice:
        raise ResultsError(f"{twice[0].path} and {log.path} are the same run: report on one folder at a time")
    runs.append(log)


def _distinguishing(origin: _Origin, origins: Sequence[_Origin]) -> _Origin:
    """Of the data and the machine those that tell this origin from another one."""
    contents, machines = ({one[part] for one in origins} for part in (0, 1))
    return origin[0] if len(contents) > 1 else "", origin[1] if len(machines) > 1 else ""


def _key(log: RunLog) -> _Key:
    header = log.header
    name, version = header["config"]["dataset"]["name"], header["fingerprint"]["algorithm_version"]
    return log.path.resolve().parts[-4], name, header["profile"], version


def _group(
    key: _Key, runs: Mapping[str, Sequence[RunLog]], origin: _Origin, unbegun: Sequence[RunLog],
    timings: Sequence[Timings], elsewhere: Mapping[str, frozenset[int]],
) -> Group:  # fmt: skip
    references = [log for logs in runs.values() for log in logs if is_reference(log)]
    strategies = {label: logs for label, logs in runs.items() if not is_reference(logs[0])}
    content, machine = origin
    return Group(*key, _by_configuration(strategies), references, content, unbegun, timings, elsewhere, machine)


def is_reference(log: RunLog) -> bool:
    """Whether all of the pool was labeled at once: full supervision."""
    return log.header["config"]["initial_size"] is None


def _by_configuration(runs: Mapping[str, Sequence[RunLog]]) -> dict[str, list[RunLog]]:
    """Seeds of a folder are averaged only where nothing but the seed differs; a difference becomes part of the name."""
    kept: dict[str, list[RunLog]] = {}
    for label, logs in runs.items():
        first = _without_seed(logs[0])
        for log in logs:
            changes = differences(first, _without_seed(log))
            name = f"{label} ({'; '.join(changes)})" if changes else label
            kept.setdefault(name, []).append(log)
    return kept


def _without_seed(log: RunLog) -> dict[str, Any]:
    """What the seeds of a strategy must have in common; where a user's files lie is none of it, what they hold is.

    A representation that was made anew, on another machine say, is none of it either: its seeds differ as much.
    """
    config, fingerprint = log.header["config"], log.header["fingerprint"]
    common = {key: without_paths(value) if key in SECTIONS else value for key, value in config.items() if key != "seed"}
    return common | {"content": {name: str(fingerprint[name])[:8] for name in ("weights", "files")}}
