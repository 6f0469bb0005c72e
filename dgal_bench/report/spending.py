"""What accuracy has cost: query seconds so far, by phase, and the set-up that they rest on."""

from collections.abc import Mapping, Sequence

from dgal_bench.record import PHASES, CellLog
from dgal_bench.report import measures
from dgal_bench.report.areas import cumulative
from dgal_bench.report.groups import Group
from dgal_bench.report.looks import short_name
from dgal_bench.report.statistics import interpolated
from dgal_bench.report.times import hardware
from dgal_bench.timings import Timings

NEEDS: Mapping[str, tuple[str, ...]] = {
    "everything": (), "uniform": (), "model_neighbors": (), "graph_neighbors": ("representation",),
    "diffusion": ("representation", "graph"),
}  # fmt: skip
"""By kind of restriction what of the set-up a query rests on; a plugin's part is taken to rest on all of it."""


def one_off(group: Group, strategy: str) -> float:
    """Seconds of the representation and graph that a strategy's queries rest on, mean over its finished seeds."""
    each = [set_up(log) for log in group.finished(strategy).values()]
    return sum(each) / len(each)


def set_up(log: CellLog) -> float:
    config, ledger = log.header["config"]["strategy"], log.header["setup"]
    needs = NEEDS.get(config["restrict"]["kind"], ("representation", "graph"))
    if any("plugin" in config[part] for part in ("restrict", "acquire")):
        needs = ("representation", "graph")
    return float(sum(ledger[part]["seconds"] for part in needs))


def alike(group: Group) -> bool:
    """Whether every strategy has replays of the same rounds on one kind of machine: sums of them can be compared."""
    found = {
        (tuple(timings.rounds), hardware(timings.header))
        for strategy in group.strategies
        for timings in drawn(group, strategy).values()
    }
    return len(found) == 1 and all(drawn(group, strategy) for strategy in group.strategies)


def sources_note(group: Group) -> str:
    """Where the times of one figure are not of one source."""
    replayed = [strategy for strategy in group.strategies if group.replayed(strategy)]
    if not replayed or alike(group):
        return "query times replayed" if replayed else ""
    return f"query times of {', '.join(map(short_name, replayed))} replayed, of others the rows' own: see the table"


def sums_note(group: Group) -> str:
    """Which query times were added up."""
    replayed = any(group.replayed(strategy) for strategy in group.strategies)
    if alike(group):
        return times_note(group)
    return "query times are the rows' own: not all were replayed alike" if replayed else ""


def query_seconds(group: Group, strategy: str) -> list[float]:
    """Of each query in turn, mean over seeds: replayed ones where all strategies have them alike, else the rows' own.

    A replay knows some rounds only, between which it is taken for linear.
    """
    return _seconds(group, strategy, drawn(group, strategy) if alike(group) else {})


def spent(group: Group, strategy: str) -> list[float]:
    """Set-up and query seconds that each row has cost so far, mean over seeds; one source for all strategies."""
    return measures.spent(one_off(group, strategy), query_seconds(group, strategy))


def _seconds(group: Group, strategy: str, replayed: Mapping[int, Timings]) -> list[float]:
    logs = group.finished(strategy)
    if replayed:
        return _mean(
            [
                interpolated({one.round: one.median_seconds for one in timings.timings}, logs[seed].rounds)
                for seed, timings in replayed.items()
            ]
        )
    return _mean([[record.query_seconds or 0.0 for record in log.records[:-1]] for log in logs.values()])


def paid(group: Group, strategy: str) -> list[float]:
    """The query seconds that each row has cost so far, mean over seeds: replayed ones where there are any."""
    return cumulative(_seconds(group, strategy, drawn(group, strategy)))


def drawn(group: Group, strategy: str) -> dict[int, Timings]:
    """The replays that reach from the first query to the last: of what lies outside one nothing is known."""
    logs, replayed = group.finished(strategy), group.replayed(strategy)
    return {seed: made for seed, made in replayed.items() if {0, logs[seed].rounds - 1} <= set(made.rounds)}


def phase_seconds(group: Group, strategy: str) -> dict[str, float]:
    """Mean seconds of one query by exclusive phase, from where the query times of the table are from."""
    replayed = group.replayed(strategy)
    if replayed:
        queries = [one.seconds for timings in replayed.values() for one in timings.timings]
    else:
        logs = group.finished(strategy).values()
        queries = [record.seconds for log in logs for record in log.records if record.seconds]
    means = {phase: sum(query.get(phase, 0.0) for query in queries) / max(1, len(queries)) for phase in sorted(PHASES)}
    return {phase: seconds for phase, seconds in means.items() if seconds > 0}


def times_note(group: Group) -> str:
    """Which query times a figure of cumulative ones shows."""
    replayed = [strategy for strategy in group.strategies if drawn(group, strategy)]
    if not replayed:
        return ""
    others = [strategy for strategy in group.strategies if strategy not in replayed]
    few = (replayed, "of") if len(replayed) < len(others) else (others, "of all but")
    whose = f" {few[1]} {', '.join(map(short_name, few[0]))}" if others else ""
    found = [timings.rounds for strategy in replayed for timings in drawn(group, strategy).values()]
    rounds = " or ".join(dict.fromkeys(", ".join(map(str, one)) for one in found))
    return f"query times{whose} replayed at rounds {rounds}, linear between them"


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    """Over seeds, as far as all of them go."""
    return [sum(values) / len(values) for values in zip(*columns, strict=False)]
