"""What W&B is told of a cell: its names, its rows, its summary. Pure functions of a results file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgal_bench.record import CellLog, RoundRecord
from dgal_bench.report.areas import area_under_curve, cumulative_query_seconds, mean_query_seconds, mean_scored

MIRROR_VERSION = 1
"""Raised with any change of what W&B is told: runs of another version are made again where that can be done."""

AXES = ("labels", "query_seconds", "round")

DEFINITIONS = (
    ("accuracy/by_labels", "labels"),
    ("accuracy/by_query_seconds", "query_seconds"),
    *((f"{family}/*", "round") for family in ("query", "train", "test", "graph", "propagated", "extra", "machine")),
)
"""Metrics and the axis that each is drawn against. One metric has one, so that accuracy is there twice."""

EXIT_CODES = {"done": 0, "skipped": 0, "failed": 1, "partial": 255}
"""255: how wandb itself ends an interrupted run."""


@dataclass(frozen=True)
class Names:
    """Where a run is filed: by ``id`` it is found again, the rest is for people."""

    id: str
    suite: str
    dataset: str
    strategy: str  # the folder's name: dgmg, dgmg+graph.graph_k=10
    seed: int
    profile: str
    algorithm_version: int

    @property
    def group(self) -> str:
        return f"{self.dataset}/{self.strategy}"

    @property
    def name(self) -> str:
        return f"{self.strategy}/seed-{self.seed}"

    @property
    def tags(self) -> list[str]:
        """W&B takes tags of 1 to 64 characters, once each."""
        tags = (self.suite, self.dataset, self.profile, self.strategy, f"algorithm-{self.algorithm_version}")
        return list(dict.fromkeys(tag[:64] for tag in tags))


def suite_of(log: CellLog) -> str:
    """The folder above the data set's."""
    parents = log.path.absolute().parents
    return parents[min(2, len(parents) - 1)].name


def names(log: CellLog) -> Names:
    """The same whenever and from wherever a cell is mirrored; another configuration or other data is another run."""
    header = log.header
    dataset, strategy, _ = header["cell"].rsplit("/", 2)
    suite, said = suite_of(log), header["fingerprint"]
    version = said["algorithm_version"]
    content = [suite, header["cell"], said["config"], said.get("data"), version, header.get("initial")]
    return Names(
        _sha256(content)[:20], suite, dataset, strategy, int(header["config"]["seed"]), header["profile"], version
    )


def config(log: CellLog) -> dict[str, Any]:
    """The resolved configuration, and beside it what runs are grouped and filtered by."""
    header, known = log.header, names(log)
    about = ("cell", "fingerprint", "provenance", "network", "data")
    return {
        **header["config"],
        "suite": known.suite,
        "dataset_name": known.dataset,
        "strategy_name": known.strategy,
        "profile": known.profile,
        "algorithm_version": known.algorithm_version,
        **{name: header[name] for name in about if name in header},
    }


def rows(log: CellLog) -> list[dict[str, Any]]:
    """What is logged of each round, at the step of its number; what a row lacks is left out."""
    spent = cumulative_query_seconds(log.records)[: len(log.records)]  # 0 s before a first row that is not there yet
    return [
        {
            "round": record.round,
            "labels": record.n_labeled,
            "query_seconds": seconds,
            "accuracy/by_labels": record.accuracy,
            "accuracy/by_query_seconds": record.accuracy,
            **_facts(record),
        }
        for record, seconds in zip(log.records, spent, strict=True)
    ]


def _facts(record: RoundRecord) -> dict[str, Any]:
    facts = {
        "query/seconds": record.query_seconds,
        "query/candidates": record.n_candidates,
        "query/points_scored": record.n_scored,
        "train/seconds": record.train_seconds,
        "train/loss": record.train_loss,
        "train/epochs": record.epochs,
        "train/underfit": int(record.underfit),
        "test/seconds": record.test_seconds,
        "graph/reach": record.reach,
        "graph/boundary_share": record.boundary_share,
        "graph/ties": record.ties,
        "machine/jobs": record.jobs,
        "machine/load": record.load,
        "machine/busy_elsewhere": record.busy_elsewhere,
    }
    families = {"query/phase": record.seconds, "propagated": record.propagated, "extra": record.extra}
    for family, values in families.items():
        facts |= {f"{family}/{name}": value for name, value in (values or {}).items()}
    return {name: value for name, value in facts.items() if value is not None}


def summary(log: CellLog) -> dict[str, Any]:
    """What a table of runs shows; of a cell of one row there is no area, of one without a query no mean."""
    n_rows = len(log.records)
    digests = {"digest": digest(log), "rows_digest": rows_digest(log, n_rows)}
    told: dict[str, Any] = {"status": log.status, "rows": n_rows, **digests, **_setup(log)}
    if log.records:
        told["final_accuracy"] = log.records[-1].accuracy
    if len(log.records) > 1:
        told["area"] = area_under_curve(log.records)
        told["mean_query_seconds"] = mean_query_seconds(log.records)
        told["mean_points_scored"] = mean_scored(log.records)
    if log.status == "failed" and log.failure:
        told["error"] = log.failure["error"]
    return told


def _setup(log: CellLog) -> dict[str, Any]:
    """What came before the first round: seconds, and the diagnostics of the graph."""
    setup = log.header.get("setup", {})
    told = {f"setup/{part}_seconds": made["seconds"] for part, made in setup.items() if made and "seconds" in made}
    plain = {k: v for k, v in (setup.get("graph") or {}).items() if isinstance(v, bool | int | float | str)}
    return told | {f"graph/{name}": value for name, value in plain.items() if not name.endswith("seconds")}


def digest(log: CellLog) -> str:
    """Equal where W&B would be told the same."""
    failure = log.failure["error"] if log.failure else None
    return _sha256([MIRROR_VERSION, log.lines[0], _written(log, len(log.records)), log.status, failure])[:20]


def rows_digest(log: CellLog, n_rows: int) -> str:
    """Of the first rows: a cell made again has the same name and other seconds."""
    return _sha256(_written(log, n_rows))[:20]


def _written(log: CellLog, n_rows: int) -> list[Mapping[str, Any]]:
    """As they stand in the file: a later version of the package reads more fields into them, each with its default."""
    return [line for line in log.lines if line["kind"] == "round"][:n_rows]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
