"""Lines of text for the page and summary.md: how rows were made, what is missing, and the source of the query times."""

import shlex
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from dgal_bench.report.formatting import align_table, mark_values, numbers
from dgal_bench.report.groups import Group, is_reference
from dgal_bench.report.plots.maps import unreadable_projections
from dgal_bench.report.summary import SummaryRow
from dgal_bench.report.times import BUSY_CORES, REPLAY, busy_state, either_busy, is_usable, machine
from dgal_bench.results.rows import COMMON, RunLog, Timing, Timings, timings_path


def supervision_lines(group: Group) -> list[str]:
    """The accuracy with all labels of the pool: the reference line of the figures."""
    lines = []
    for log in group.references:
        if log.done:
            last = log.records[-1]
            varied = "".join(f", {part}" for part in log.path.parent.name.split("+")[1:])
            lines.append(
                f"Full supervision: {100 * last.accuracy:.1f} % with all {last.n_labeled:,} labels (one training, "
                f"{last.epochs} epochs, {last.train_seconds:.0f} s{varied})."
            )
    return [*lines, ""] if lines else []


def protocol(group: Group) -> list[str]:
    configs = [log.header["config"] for log in group.logs or group.references]
    if not configs:
        return ["No run has begun."]

    def values(*path: str) -> str:
        return "/".join(dict.fromkeys(str(reduce(lambda node, key: node[key], path, config)) for config in configs))

    spaces = " / ".join(dict.fromkeys(space(config["representation"]) for config in configs))
    records = [record for log in [*group.logs, *group.references] for record in log.records]
    threads, jobs = (sorted({getattr(record, name) for record in records}) for name in ("threads", "jobs"))
    return [
        f"{values('initial_size')} first labels, {values('rounds')} queries of {values('batch_size')}, "
        f"{values('restricted_size')} candidates after a restriction; graph on {spaces}, "
        f"K = {values('graph', 'graph_k')}.",
        f"{' / '.join(machines(group))}; {numbers(threads)} thread(s) a run, {numbers(jobs)} run(s) side by side.",
        *_plugins(group),
    ]


def space(representation: Mapping[str, Any]) -> str:
    """The representation under a graph: ``vae (resnet18)``, ``npy (mine.npy)``, ``timm (resnet50)``, ``pca``."""
    kind = representation["kind"]
    detail = {
        "vae": representation["encoder"].replace("cnn", ""),
        "npy": Path(representation["path"] or "").name,
        "timm": representation["model"],
    }.get(kind)
    return f"{kind} ({detail})" if detail else str(kind)


def _plugins(group: Group) -> list[str]:
    """The strategies from plugins, and their code."""
    sentences = {log.path.parent.name: log.header["config"]["strategy"] for log in group.logs}
    found = [
        f"{name} ({part['plugin']})"
        for name, sentence in sentences.items()
        for part in (sentence["restrict"], sentence["acquire"])
        if "plugin" in part
    ]
    return [f"From plugins: {', '.join(dict.fromkeys(found))}."] if found else []


def machines(group: Group) -> list[str]:
    """Every machine and revision that made these rows."""
    return sorted({machine(log.header) for log in [*group.logs, *group.references]})


def _made_by_line(ledger: Mapping[str, Any]) -> str:
    """``, made on AMD EPYC, 2 cores, 2 threads``: the cache entry may come from another machine than the rows."""
    maker = ledger.get("made_by", {}).get("machine")
    if not maker:
        return ""
    threads = f", {ledger['threads']} threads" if "threads" in ledger else ""
    gpu = f" with {maker['gpu']}" if maker.get("gpu") else ""
    return f", made on {maker['cpu']}, {maker['cores']} cores{gpu}{threads}"


def ledger_lines(group: Group) -> list[str]:
    """The one-off cost and the quality of each representation and graph of these rows."""
    made = {
        log.header["fingerprint"]["graph"]: (space(log.header["config"]["representation"]), log.header["setup"])
        for log in group.logs
    }
    lines = []
    for name, setup in made.values():
        representation, graph = setup["representation"], setup["graph"]
        shares = ", ".join(f"{name} {share:.3f}" for name, share in representation["label_share"].items())
        lines.append(
            f"Once, in no query time: {name} {representation['seconds']:.1f} s, "
            f"graph {graph['seconds']:.2f} s ({graph['components']} component(s), "
            f"{'exact' if graph['exact'] else f'''recall {graph['recall']:.3f}'''}){_made_by_line(representation)}. "
            f"Share of the 20 nearest neighbours with a point's label: {shares}."
        )
    rehearsed = [
        (seconds, name)
        for name, logs in group.runs.items()
        for log in logs
        for record in log.records
        if (seconds := record.rehearsal_seconds) is not None
    ]
    if rehearsed:
        longest, name = max(rehearsed)
        lines.append(
            f"Once a run, in no query time either: a rehearsal of one query, at most {longest:.2f} s ({name})."
        )
    return lines


def cautions(group: Group) -> list[str]:
    lines = unfinished_lines(group)
    for log in [*group.logs, *group.references]:
        if changed := [change for one in log.continuations for change in one["changed"]]:
            lines.append(f"Continued elsewhere: {_name(log)} ({'; '.join(changed)})")
    lines += _lengths(group)
    lines += [*unusable_replays(group), *unreadable_projections(group)]
    lines += _substitutes(group)
    underfit = sum(record.underfit for log in group.logs for record in log.records)
    if underfit:
        total = sum(len(log.records) for log in group.logs)
        lines.append(f"Underfit: {underfit} of {total} trainings ended above half the loss of a guess.")
    return ["", *lines] if lines else []


def _lengths(group: Group) -> list[str]:
    """Curves with other numbers of labels have areas and final accuracies that do not compare."""
    spans: dict[str, list[str]] = {}
    for name in group.strategies:
        records = next(iter(group.finished(name).values())).records
        spans.setdefault(f"{records[0].n_labeled:,} to {records[-1].n_labeled:,}", []).append(name)
    if len(spans) < 2:
        return []
    text = "; ".join(f"{span}: {', '.join(names)}" for span, names in spans.items())
    return [
        "Not of one length: areas and final accuracies are over different labels, and only their paired differences, "
        f"over the labels both have, compare them ({text})."
    ]


def unfinished_lines(group: Group) -> list[str]:
    """Runs that failed, were skipped, are partial or missing: no number includes them."""
    lines = [_unfinished_line(log) for log in [*group.logs, *group.references, *group.unstarted] if not log.done]
    return lines + [f"MISSING: {name} has no seed {numbers(seeds)}." for name, seeds in missing_seeds(group).items()]


def _name(log: RunLog) -> str:
    return f"{log.path.parent.name}/{log.path.stem}"


def _unfinished_line(log: RunLog) -> str:
    """The number of its rows, and the last line of its error, or why it was skipped."""
    reason = log.failure["error"] if log.failure else log.skipped["why"] if log.skipped else ""
    why = f": {reason.strip().splitlines()[-1]}" if reason.strip() else ""
    return f"{log.status.upper()}, not counted: {_name(log)}, {len(log.records)} of {log.rounds + 1} rows{why}"


def missing_seeds(group: Group) -> dict[str, list[int]]:
    """By strategy the seeds that only other strategies have a file of: they were never tried, or a file is lost."""
    seeds: dict[str, set[int]] = {}
    for log in [*group.logs, *(log for log in group.unstarted if not is_reference(log))]:
        seeds.setdefault(log.path.parent.name, set()).add(log.header["config"]["seed"])
    for name in seeds:
        seeds[name] |= group.seeds_elsewhere.get(name, frozenset())
    every = set().union(*seeds.values())
    return {name: sorted(every - known) for name, known in seeds.items() if every - known}


def _substitutes(group: Group) -> list[str]:
    """Steps of a query besides the task network, and queries that could not go as intended."""
    lines = []
    for name, logs in group.runs.items():
        records = [record for log in logs for record in log.records]
        queries = [record for record in records if record.indices]
        if short := [record for record in queries if record.extra.get("topped_up")]:
            drawn = sum(record.extra["topped_up"] for record in short)
            lines.append(
                f"Topped up: {len(short)} of {len(queries)} queries of {name} left fewer candidates than a batch; "
                f"{drawn:.0f} points were drawn uniformly."
            )
        if alike := sum(record.extra.get("indistinct", 0) for record in queries):
            picks = sum(len(record.indices or ()) for record in queries)
            lines.append(
                f"Drawn uniformly: {alike:.0f} of {picks} picks of {name}, among points it could not tell apart."
            )
        if passed := [record.extra["aux_scored"] for record in queries if "aux_scored" in record.extra]:
            steps = sum(record.extra["aux_steps"] for record in queries) / len(passed)
            lines.append(
                f"A network of its own: {name} trains one for {steps:,.0f} steps a query, and passes "
                f"{sum(passed) / len(passed):,.0f} points through it."
            )
        if halved := [record.halved_to for record in records if record.halved_to]:
            lines.append(
                f"Out of memory: {len(halved)} rounds of {name} went on with down to {min(halved)} images a pass."
            )
    return lines


RERUN_FOLDER = "again"
"""The results folder of repeated runs, not the default one: a report over both would find each run twice."""


def rerun_command(log: RunLog) -> str | None:
    """``dgal-bench run dataset=digits strategy=dgmg seed=3 ...``; None where the header has none.

    Full supervision has no strategy, and older headers say nothing of the command.
    """
    words = log.header.get("command")
    return shlex.join(["dgal-bench", "run", *words, f"results={RERUN_FOLDER}"]) if words else None


LEGEND = (
    f"Times marked * were taken beside other work: other runs on the machine, or more than {BUSY_CORES} core kept "
    "busy by other processes in a round."
)


REPLAY_HINT = "`dgal-bench replay RESULTS` times the queries again, one after the other, and marked replays, too."
REPLAY_COMMON_HINT = "`dgal-bench replay RESULTS --common {}` times them again."


def sources(group: Group, rows: Sequence[SummaryRow]) -> list[str]:
    """Notes below the table: what its mark means, which load is not known, and the source of times."""
    lines = [LEGEND, REPLAY_HINT] if any(row.query.busy or row.speedup_busy for row in rows) else []
    lines += _unknown_load(rows)
    if replayed := [row for row in rows if row.query.source == REPLAY]:
        lines += [*_replayed_line(group, replayed, rows), *_mixed_line(group, replayed, rows)]
    return ["", *lines] if lines else []


def _unknown_load(rows: Sequence[SummaryRow]) -> list[str]:
    """Times without a mark whose load was not recorded."""
    what = {
        "query times": [row.strategy for row in rows if row.query.busy is None],
        "speed-ups": [row.strategy for row in rows if row.speedup and row.speedup_busy is None],
    }
    parts = [f"the {times} of {_join_names(names, rows)}" for times, names in what.items() if names]
    if not parts:
        return []
    return [f"It is not known what else ran during {' and '.join(parts)}: the rows or the machine do not tell."]


def _replayed_line(group: Group, replayed: Sequence[SummaryRow], rows: Sequence[SummaryRow]) -> list[str]:
    by_origin: dict[str, list[SummaryRow]] = {}
    for row in replayed:
        by_origin.setdefault(_origin(group.replays(row.strategy)), []).append(row)
    load = {True: "beside other work where marked", None: "what else ran is not known", False: "nothing ran beside"}
    return [
        f"Query times of {_join_names([row.strategy for row in some], rows)} are replayed: {origin}; "
        f"{load[either_busy(*(row.query.busy for row in some))]}."
        for origin, some in by_origin.items()
    ]


def _mixed_line(group: Group, replayed: Sequence[SummaryRow], rows: Sequence[SummaryRow]) -> list[str]:
    """What must not be compared: columns of several sources, or of different rounds."""
    lines = []
    if len(replayed) < len(rows):
        lines.append("Query times of the others are the rows' own.")
    if len({one for row in rows for one in _rounds(group, row)}) > 1:
        lines.append("These query times are means over different rounds: do not compare them with each other.")
    if others := [row.strategy for row in rows if row.speedup and row.speedup_source != REPLAY]:
        lines.append(
            f"Speed-ups of {_join_names(others, rows)} are of the rows' own times: no replay of the same rounds on the "
            "same machine for both sides."
        )
    return lines


def _rounds(group: Group, row: SummaryRow) -> list[tuple[int, ...]]:
    """The rounds of its query times, by seed."""
    if row.query.source == REPLAY:
        return [tuple(timings.rounds) for timings in group.replays(row.strategy).values()]
    return [tuple(range(log.rounds)) for log in group.finished(row.strategy).values()]


def _join_names(names: Sequence[str], rows: Sequence[SummaryRow]) -> str:
    return "all strategies" if len(names) == len(rows) else ", ".join(names)


def _origin(replayed: Mapping[int, Timings]) -> str:
    """``rounds 0, 7, 14 of seed 0, median of 3, on AMD EPYC, 2 cores, ...``."""
    seeds: dict[tuple[str, int, str], list[int]] = {}
    for seed, timings in replayed.items():
        seeds.setdefault((numbers(timings.rounds), timings.repeats, machine(timings.header)), []).append(seed)
    return "; and ".join(
        f"rounds {rounds} of seed {numbers(of)}, median of {repeats}, on {where}"
        for (rounds, repeats, where), of in seeds.items()
    )


def common_lines(group: Group) -> list[str]:
    """A table for each run whose states were used to time every strategy."""
    return [
        line
        for log, timings in _of_group(group, common=True)
        if is_usable(timings, log)
        for line in _common_table(log, timings)
    ]


def _common_table(log: RunLog, timings: Timings) -> list[str]:
    by_strategy: dict[str, list[Timing]] = {}
    for timing in timings.timings:
        by_strategy.setdefault(timing.strategy, []).append(timing)
    means = {name: sum(one.median_seconds for one in found) / len(found) for name, found in by_strategy.items()}
    order = sorted(means, key=lambda name: means[name])
    busy = [busy_state(by_strategy[name]) for name in order]
    mean = mark_values([f"{1000 * means[name]:.2f}" for name in order], busy)
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
        *align_table(head, rows),
        *(["", LEGEND, REPLAY_COMMON_HINT.format(timings.header["cell"])] if any(busy) else []),
        *(["", "It is not known what else ran meanwhile: the machine does not tell."] if None in busy else []),
    ]


def unusable_replays(group: Group) -> list[str]:
    """Replays that no table uses, and why."""
    lines = []
    for log, timings in [*_of_group(group, common=False), *_of_group(group, common=True)]:
        run = f"{log.path.parent.name}/{log.path.stem}"
        if not timings.of(log):
            lines.append(f"Replay not used: {timings.path.name} is of other rows than {run} has now.")
        elif not timings.picks_equal:
            rounds = ", ".join(str(timing.round) for timing in timings.own if not timing.picks_equal)
            lines.append(f"Replay not used: {run} picked others than its rows say in round {rounds}.")
    return lines


def _of_group(group: Group, common: bool) -> list[tuple[RunLog, Timings]]:
    """The finished runs of a group that were replayed, each with its timings."""
    pairs = []
    for log in group.logs:
        path = log.path.parent.parent / COMMON if common else timings_path(log.path)
        for timings in group.timings:
            name = f"{log.path.parent.name}/{log.path.stem}"
            run = timings.header["cell"].partition("/")[2]
            if log.done and timings.path == path and run == name:
                pairs.append((log, timings))
    return pairs
