"""What a report says of times: which are replayed, which were taken beside other work, and all on one state."""

from collections.abc import Mapping, Sequence

from dgal_bench.record import CellLog
from dgal_bench.report.groups import Group
from dgal_bench.report.summary import SummaryRow
from dgal_bench.report.text import aligned, numbers
from dgal_bench.report.times import BUSY_CORES, REPLAY, beside, either, machine, usable
from dgal_bench.timings import COMMON, Timing, Timings, timings_path

MARK = " *"
LEGEND = (
    f"Times marked * were taken beside other work: other cells on the machine, or more than {BUSY_CORES} core kept "
    "busy by other processes in a round."
)


AGAIN = "`dgal-bench replay RESULTS` times the queries again, one after the other, and marked replays, too."
AGAIN_COMMON = "`dgal-bench replay RESULTS --common {}` times them again."


def marked(texts: Sequence[str], beside: Sequence[bool | None]) -> list[str]:
    """A column with marks where they belong, and room for them elsewhere if there is any."""
    room = " " * len(MARK) if any(beside) else ""
    return [text + (MARK if one else room) for text, one in zip(texts, beside, strict=True)]


def sources(group: Group, rows: Sequence[SummaryRow]) -> list[str]:
    """Below the table: what its mark means, what is not known, and which times are of which replay."""
    lines = [LEGEND, AGAIN] if any(row.query.beside or row.speedup_beside for row in rows) else []
    lines += _unknown(rows)
    if replayed := [row for row in rows if row.query.source == REPLAY]:
        lines += [*_replayed(group, replayed, rows), *_mixed(group, replayed, rows)]
    return ["", *lines] if lines else []


def _unknown(rows: Sequence[SummaryRow]) -> list[str]:
    """Neither marked nor told to have been alone."""
    what = {
        "query times": [row.strategy for row in rows if row.query.beside is None],
        "speed-ups": [row.strategy for row in rows if row.speedup and row.speedup_beside is None],
    }
    told = [f"the {times} of {_whose(names, rows)}" for times, names in what.items() if names]
    if not told:
        return []
    return [f"It is not known what else ran during {' and '.join(told)}: the rows or the machine do not tell."]


def _replayed(group: Group, replayed: Sequence[SummaryRow], rows: Sequence[SummaryRow]) -> list[str]:
    by_origin: dict[str, list[SummaryRow]] = {}
    for row in replayed:
        by_origin.setdefault(_origin(group.replayed(row.strategy)), []).append(row)
    told = {True: "beside other work where marked", None: "what else ran is not known", False: "nothing ran beside"}
    return [
        f"Query times of {_whose([row.strategy for row in some], rows)} are replayed: {origin}; "
        f"{told[either(*(row.query.beside for row in some))]}."
        for origin, some in by_origin.items()
    ]


def _mixed(group: Group, replayed: Sequence[SummaryRow], rows: Sequence[SummaryRow]) -> list[str]:
    """Where columns are not of one source, or of one choice of rounds: what may not be compared."""
    lines = []
    if len(replayed) < len(rows):
        lines.append("Query times of the others are the rows' own.")
    if len({one for row in rows for one in _rounds(group, row)}) > 1:
        lines.append("These query times are means over different rounds: do not compare them with each other.")
    if others := [row.strategy for row in rows if row.speedup and row.speedup_source != REPLAY]:
        lines.append(
            f"Speed-ups of {_whose(others, rows)} are of the rows' own times: no replay of the same rounds on the "
            "same machine for both sides."
        )
    return lines


def _rounds(group: Group, row: SummaryRow) -> list[tuple[int, ...]]:
    """Over which its query times are means, by seed."""
    if row.query.source == REPLAY:
        return [tuple(made.rounds) for made in group.replayed(row.strategy).values()]
    return [tuple(range(log.rounds)) for log in group.finished(row.strategy).values()]


def _whose(names: Sequence[str], rows: Sequence[SummaryRow]) -> str:
    return "all strategies" if len(names) == len(rows) else ", ".join(names)


def _origin(replayed: Mapping[int, Timings]) -> str:
    """``rounds 0, 7, 14 of seed 0, median of 3, on AMD EPYC, 2 cores, ...``."""
    seeds: dict[tuple[str, int, str], list[int]] = {}
    for seed, made in replayed.items():
        seeds.setdefault((numbers(made.rounds), made.repeats, machine(made.header)), []).append(seed)
    return "; and ".join(
        f"rounds {rounds} of seed {numbers(of)}, median of {repeats}, on {where}"
        for (rounds, repeats, where), of in seeds.items()
    )


def common_lines(group: Group) -> list[str]:
    """A table for each cell on whose states every strategy was timed."""
    return [
        line for log, timings in _of_group(group, common=True) if usable(timings, log) for line in _on(log, timings)
    ]


def _on(log: CellLog, timings: Timings) -> list[str]:
    by_strategy: dict[str, list[Timing]] = {}
    for timing in timings.timings:
        by_strategy.setdefault(timing.strategy, []).append(timing)
    means = {name: sum(one.median_seconds for one in found) / len(found) for name, found in by_strategy.items()}
    order = sorted(means, key=lambda name: means[name])
    ran = [beside(by_strategy[name]) for name in order]
    mean = marked([f"{1000 * means[name]:.2f}" for name in order], ran)
    rows = [
        [
            name,
            *(f"{1000 * timing.median_seconds:.2f}" for timing in by_strategy[name]),
            one,
            f"{sum(timing.n_scored for timing in by_strategy[name]) / len(by_strategy[name]):,.0f}",
        ]
        for name, one in zip(order, mean, strict=True)
    ]
    head = [
        "query ms",
        *(f"{log.records[round_].n_labeled} labels" for round_ in timings.rounds),
        "mean",
        "points scored",
    ]
    return [
        "",
        f"Every strategy on one state, the network and pool of {timings.header['cell']} at rounds "
        f"{', '.join(map(str, timings.rounds))}: median of {timings.repeats}; {machine(timings.header)}.",
        "",
        *aligned(head, rows),
        *(["", LEGEND, AGAIN_COMMON.format(timings.header["cell"])] if any(ran) else []),
        *(["", "It is not known what else ran meanwhile: the machine does not tell."] if None in ran else []),
    ]


def unusable(group: Group) -> list[str]:
    """Replays that no table is made from, and why."""
    lines = []
    for log, timings in [*_of_group(group, common=False), *_of_group(group, common=True)]:
        cell = f"{log.path.parent.name}/{log.path.stem}"
        if not timings.of(log):
            lines.append(f"Replay not used: {timings.path.name} is of other rows than {cell} has now.")
        elif not timings.picks_equal:
            rounds = ", ".join(str(timing.round) for timing in timings.own if not timing.picks_equal)
            lines.append(f"Replay not used: {cell} picked others than its rows say in round {rounds}.")
    return lines


def _of_group(group: Group, common: bool) -> list[tuple[CellLog, Timings]]:
    """The finished cells of a group that were replayed, each with its timings."""
    pairs = []
    for log in group.logs:
        place = log.path.parent.parent / COMMON if common else timings_path(log.path)
        for timings in group.timings:
            name = f"{log.path.parent.name}/{log.path.stem}"
            whose = timings.header["cell"].partition("/")[2]
            if log.done and timings.path == place and whose == name:
                pairs.append((log, timings))
    return pairs
