"""A results folder as one pandas table."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgal_bench.results.reader import read_results
from dgal_bench.results.rows import RunLog

if TYPE_CHECKING:
    import pandas


def load_results(folder: str | Path) -> "pandas.DataFrame":
    """Every evaluation under ``folder`` as a row, in order of file and round.

    Columns: first those that identify the run (``suite``, ``dataset``, ``representation``, ``profile``, ``strategy``,
    ``seed``, ``config`` the hash of the configuration, ``algorithm_version``, ``torch``, ``cpu``, ``device``), the
    run's ``status`` (done, partial, failed or skipped) and ``path``; then every field of ``RoundRecord``. A dictionary
    becomes a column for each of its keys: ``seconds.infer``, ``extra.topped_up``, ``propagated.accuracy``. A value that
    a row lacks is NaN or None; ``indices`` and ``classes`` are lists. A run without an evaluation has no row.
    ``strategy`` is the name of the run's folder, with its settings: ``dgmg+graph.graph_k=10``.

    ``load_results(folder).to_parquet("rows.parquet")`` saves it as Parquet.

    Raises:
        ResultsError: there is no such folder, it holds no run, or a file in it is damaged.
    """
    import pandas

    return pandas.DataFrame([row for log in read_results(Path(folder)) for row in _rows(log)])


def _rows(log: RunLog) -> Iterator[dict[str, Any]]:
    columns = _run_columns(log)
    for record in log.records:
        facts: dict[str, Any] = {}
        for name, value in asdict(record).items():
            if isinstance(value, Mapping):
                facts |= {f"{name}.{key}": item for key, item in value.items()}
            elif name not in ("seconds", "extra", "propagated"):
                facts[name] = value
        yield columns | facts


def _run_columns(log: RunLog) -> dict[str, Any]:
    config, fingerprint = log.header["config"], log.header["fingerprint"]
    return {
        "suite": log.path.parents[2].name,
        "dataset": config["dataset"]["name"],
        "representation": config["representation"]["kind"],
        "profile": log.header["profile"],
        "strategy": log.path.parent.name,
        "seed": config["seed"],
        "config": fingerprint["config"],
        "algorithm_version": fingerprint["algorithm_version"],
        **{name: fingerprint.get(name) for name in ("torch", "cpu", "device")},
        "status": log.status,
        "path": str(log.path),
    }
