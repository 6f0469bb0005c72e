"""summary.md: what was run, a table, the one-off ledger, and what to be wary of."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from dgal_bench.report.propagation import propagation_lines
from dgal_bench.report.summary import REFERENCE, Group, SummaryRow, summarise
from dgal_bench.report.text import aligned, speedup, spread


def summary_md(groups: Sequence[Group]) -> str:
    """A section per group: what was run, the table, the one-off ledger, and what to be wary of."""
    return "\n".join(_section(one) for one in groups)


def _section(group: Group) -> str:
    lines = [
        f"## {group.name}, profile {group.profile}, algorithm {group.algorithm_version}",
        "",
        *_protocol(group),
        "",
    ]
    if group.strategies:
        lines += aligned(
            ["strategy", "seeds", "final accuracy %", "area under curve %", "query ms", "points scored", "speed-up"],
            [_cells(row) for row in summarise(group)],
        )
        lines += ["", "Mean and 95 % t interval over seeds. Area: mean accuracy over the range of labels. Query: mean"]
        lines += [
            f"seconds of one query, nothing else; speed-up: {REFERENCE}'s query time over the strategy's, by seed.",
            *propagation_lines(group),
            "",
        ]
    lines += supervision_lines(group)
    return "\n".join([*lines, *_ledger(group), *_warnings(group)]) + "\n"


def supervision_lines(group: Group) -> list[str]:
    """What the network reaches with every label of the pool: the reference line of the figures."""
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


def _protocol(group: Group) -> list[str]:
    configs = [log.header["config"] for log in group.logs or group.references]

    def values(*path: str) -> str:
        return "/".join(dict.fromkeys(str(reduce(lambda node, key: node[key], path, config)) for config in configs))

    spaces = " / ".join(dict.fromkeys(space(config["representation"]) for config in configs))
    records = [record for log in [*group.logs, *group.references] for record in log.records]
    threads, jobs = (sorted({getattr(record, name) for record in records}) for name in ("threads", "jobs"))
    return [
        f"{values('initial_size')} first labels, {values('rounds')} queries of {values('batch_size')}, "
        f"{values('restricted_size')} candidates after a restriction; graph on {spaces}, "
        f"K = {values('graph', 'graph_k')}.",
        f"{' / '.join(machines(group))}; {_numbers(threads)} thread(s) a cell, {_numbers(jobs)} cell(s) side by side.",
        *_plugins(group),
    ]


def space(representation: Mapping[str, Any]) -> str:
    """What made the points of a graph: ``vae (resnet18)``, ``npy (mine.npy)``, ``timm (resnet50)``, ``pca``."""
    kind = representation["kind"]
    # rows of before there was a choice have no such keys
    detail = {
        "vae": representation.get("encoder", "cnn").replace("cnn", ""),
        "npy": Path(representation.get("path") or "").name,
        "timm": representation.get("model"),
    }.get(kind)
    return f"{kind} ({detail})" if detail else str(kind)


def _plugins(group: Group) -> list[str]:
    """Which strategies are not this package's, and the code they came from."""
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
    return sorted({_machine(log.header) for log in [*group.logs, *group.references]})


def _machine(header: Mapping[str, Any]) -> str:
    where, print_ = header["provenance"], header["fingerprint"]
    # Installed from a wheel there is no revision, but a version.
    revision = (where["git"]["revision"] or where["versions"].get("dgal-bench", "?"))[:8]
    revision += " (modified)" if where["git"]["dirty"] else ""
    device = where["machine"]["cpu"] if print_["device"] == "cpu" else print_["device"]
    return f"{device}, {where['machine']['cores']} cores, torch {print_['torch']}, dgal-bench {revision}"


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "?"


def _cells(row: SummaryRow) -> list[str]:
    return [
        row.strategy,
        str(row.final_accuracy.n),
        spread(row.final_accuracy, 100, 1),
        spread(row.area, 100, 1),
        spread(row.query_seconds, 1000, 2),
        f"{row.n_scored:,.0f}",
        speedup(row.speedup),
    ]


def _ledger(group: Group) -> list[str]:
    """The one-off cost and quality of each representation and graph under these rows."""
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
            f"{'exact' if graph['exact'] else f'''recall {graph['recall']:.3f}'''}). "
            f"Share of the 20 nearest neighbours with a point's label: {shares}."
        )
    rehearsed = [
        (seconds, name)
        for name, logs in group.cells.items()
        for log in logs
        for record in log.records
        if (seconds := record.rehearsal_seconds) is not None
    ]
    if rehearsed:
        longest, name = max(rehearsed)
        lines.append(
            f"Once a cell, in no query time either: a rehearsal of one query, at most {longest:.2f} s ({name})."
        )
    return lines


def _warnings(group: Group) -> list[str]:
    lines = []
    for log in [*group.logs, *group.references]:
        if not log.done:
            why = f": {log.failure['error']}" if log.failure else ""
            cell = f"{log.path.parent.name}/{log.path.stem}"
            lines.append(f"{log.status.upper()}, not counted: {cell}, {len(log.records)} of {log.rounds + 1} rows{why}")
        changed = [change for one in log.continuations for change in one["changed"]]
        if changed:
            lines.append(f"Continued elsewhere: {log.path.parent.name}/{log.path.stem} ({'; '.join(changed)})")
    lines += _makeshifts(group)
    underfit = sum(record.underfit for log in group.logs for record in log.records)
    if underfit:
        total = sum(len(log.records) for log in group.logs)
        lines.append(f"Underfit: {underfit} of {total} trainings ended above half the loss of a guess.")
    if any(record.jobs > 1 for log in group.logs for record in log.records):
        lines.append("Query times were taken with other cells running beside.")
    return ["", *lines] if lines else []


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
