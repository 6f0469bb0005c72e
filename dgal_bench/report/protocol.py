"""What was run and where, what it cost once, and what every label would give: lines for the page and summary.md."""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from dgal_bench.report.groups import Group
from dgal_bench.report.text import numbers
from dgal_bench.report.times import machine


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


def protocol(group: Group) -> list[str]:
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


def _made_on(ledger: Mapping[str, Any]) -> str:
    """``, made on AMD EPYC, 2 cores, 2 threads``: a cache may have been filled on another machine than the rows'."""
    maker = ledger.get("made_by", {}).get("machine")
    if not maker:
        return ""
    threads = f", {ledger['threads']} threads" if "threads" in ledger else ""
    gpu = f" with {maker['gpu']}" if maker.get("gpu") else ""
    return f", made on {maker['cpu']}, {maker['cores']} cores{gpu}{threads}"


def ledger_lines(group: Group) -> list[str]:
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
            f"{'exact' if graph['exact'] else f'''recall {graph['recall']:.3f}'''}){_made_on(representation)}. "
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
