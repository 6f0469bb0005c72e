"""What to be wary of: cells that are not counted, and what a query did beside passing points through its network."""

from dgal_bench.record import CellLog
from dgal_bench.report.groups import Group, is_reference
from dgal_bench.report.projections import unreadable
from dgal_bench.report.replays import unusable
from dgal_bench.report.text import numbers


def cautions(group: Group) -> list[str]:
    lines = not_counted(group)
    for log in [*group.logs, *group.references]:
        if changed := [change for one in log.continuations for change in one["changed"]]:
            lines.append(f"Continued elsewhere: {_name(log)} ({'; '.join(changed)})")
    lines += _lengths(group)
    lines += [*unusable(group), *unreadable(group)]
    lines += _makeshifts(group)
    underfit = sum(record.underfit for log in group.logs for record in log.records)
    if underfit:
        total = sum(len(log.records) for log in group.logs)
        lines.append(f"Underfit: {underfit} of {total} trainings ended above half the loss of a guess.")
    return ["", *lines] if lines else []


def _lengths(group: Group) -> list[str]:
    """Areas and finals of curves that end elsewhere are of other numbers of labels."""
    spans: dict[str, list[str]] = {}
    for name in group.strategies:
        records = next(iter(group.finished(name).values())).records
        spans.setdefault(f"{records[0].n_labeled:,} to {records[-1].n_labeled:,}", []).append(name)
    if len(spans) < 2:
        return []
    told = "; ".join(f"{span}: {', '.join(names)}" for span, names in spans.items())
    return [
        "Not of one length: areas and final accuracies are over different labels, and only their paired differences, "
        f"over the labels both have, compare them ({told})."
    ]


def not_counted(group: Group) -> list[str]:
    """Cells that are failed, skipped, partial or missing: nothing of them is in any number."""
    lines = [_not_counted(log) for log in [*group.logs, *group.references, *group.unbegun] if not log.done]
    return lines + [f"MISSING: {name} has no seed {numbers(seeds)}." for name, seeds in missing_seeds(group).items()]


def _name(log: CellLog) -> str:
    return f"{log.path.parent.name}/{log.path.stem}"


def _not_counted(log: CellLog) -> str:
    """How far a cell has come, and what the matter is: an error's last line, or why it cannot be."""
    told = log.failure["error"] if log.failure else log.skipped["why"] if log.skipped else ""
    why = f": {told.strip().splitlines()[-1]}" if told.strip() else ""
    return f"{log.status.upper()}, not counted: {_name(log)}, {len(log.records)} of {log.rounds + 1} rows{why}"


def missing_seeds(group: Group) -> dict[str, list[int]]:
    """The seeds of which a strategy's folder holds no file and another's does: nobody has tried, or a file is gone."""
    seeds: dict[str, set[int]] = {}
    for log in [*group.logs, *(log for log in group.unbegun if not is_reference(log))]:
        seeds.setdefault(log.path.parent.name, set()).add(log.header["config"]["seed"])
    for name in seeds:
        seeds[name] |= group.elsewhere.get(name, frozenset())
    every = set().union(*seeds.values())
    return {name: sorted(every - known) for name, known in seeds.items() if every - known}


def _makeshifts(group: Group) -> list[str]:
    """What a query did beside passing points through the task network, and where it could not go as it should."""
    lines = []
    for name, logs in group.cells.items():
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
