"""summary.md: what was run, a table, the one-off ledger, and what to be wary of."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from dgal_bench.report.cautions import cautions
from dgal_bench.report.propagation import propagation_lines
from dgal_bench.report.replays import common_lines, marked, sources
from dgal_bench.report.summary import REFERENCE, Group, SummaryRow, summarise
from dgal_bench.report.text import aligned, numbers, speedup, spread
from dgal_bench.report.times import machine


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
        rows = summarise(group)
        lines += _table(rows)
        lines += ["", "Mean and 95 % t interval over seeds. Area: mean accuracy over the range of labels. Query: mean"]
        lines += [
            f"seconds of one query, nothing else; speed-up: {REFERENCE}'s query time over the strategy's, by seed.",
            *sources(group, rows),
            *common_lines(group),
            *propagation_lines(group),
            "",
        ]
    lines += supervision_lines(group)
    return "\n".join([*lines, *_ledger(group), *cautions(group)]) + "\n"


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
    if not configs:
        return ["No cell has begun."]

    def values(*path: str) -> str:
        return "/".join(dict.fromkeys(str(reduce(lambda node, key: node[key], path, config)) for config in configs))

    spaces = " / ".join(dict.fromkeys(space(config["representation"]) for config in configs))
    records = [record for log in [*group.logs, *group.references] for record in log.records]
    threads, jobs = (sorted({getattr(record, name) for record in records}) for name in ("threads", "jobs"))
    return [
        f"{values('initial_size')} first labels, {values('rounds')} queries of {values('batch_size')}, "
        f"{values('restricted_size')} candidates after a restriction; graph on {spaces}, "
        f"K = {values('graph', 'graph_k')}.",
        f"{' / '.join(machines(group))}; {numbers(threads)} thread(s) a cell, {numbers(jobs)} cell(s) side by side.",
        *_plugins(group),
    ]


def space(representation: Mapping[str, Any]) -> str:
    """What made the points of a graph: ``vae (resnet18)``, ``npy (mine.npy)``, ``timm (resnet50)``, ``pca``."""
    kind = representation["kind"]
    detail = {
        "vae": representation["encoder"].replace("cnn", ""),
        "npy": Path(representation["path"] or "").name,
        "timm": representation["model"],
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
    return sorted({machine(log.header) for log in [*group.logs, *group.references]})


def _table(rows: Sequence[SummaryRow]) -> list[str]:
    query = marked([spread(row.query_seconds, 1000, 2) for row in rows], [row.query.beside for row in rows])
    faster = marked([speedup(row.speedup) for row in rows], [row.speedup_beside for row in rows])
    return aligned(
        ["strategy", "seeds", "final accuracy %", "area under curve %", "query ms", "points scored", "speed-up"],
        [
            [
                row.strategy,
                str(row.final_accuracy.n),
                spread(row.final_accuracy, 100, 1),
                spread(row.area, 100, 1),
                query_ms,
                f"{row.n_scored:,.0f}",
                times_faster,
            ]
            for row, query_ms, times_faster in zip(rows, query, faster, strict=True)
        ],
    )


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
