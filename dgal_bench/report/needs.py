"""What a report takes from a file beside what every file must say: looked for once, before anything is reckoned."""

from types import NoneType

from dgal_bench.errors import ResultsError
from dgal_bench.record import CellLog
from dgal_bench.schema import RESTORE, Wanted, check

IDENTITY: Wanted = {"fingerprint.algorithm_version": (int,), "fingerprint.config": (str,)}
"""Of every cell."""

CONTENT: Wanted = {
    "fingerprint.data": (str,), "fingerprint.weights": (str, NoneType), "fingerprint.files": (str, NoneType),
    "initial": (list,),
}  # fmt: skip
"""Of one that has begun."""

MADE_BY: Wanted = {
    "config.batch_size": (int,), "config.restricted_size": (int,), "config.graph.graph_k": (int,),
    "config.representation.kind": (str,), "config.representation.encoder": (str,),
    "config.representation.path": (str, NoneType), "config.representation.model": (str, NoneType),
    "fingerprint.device": (str,), "fingerprint.torch": (str,),
    "provenance.git.revision": (str, NoneType), "provenance.git.dirty": (bool, NoneType),
    "provenance.machine.cpu": (str,), "provenance.machine.cores": (int,), "provenance.versions": (dict,),
}  # fmt: skip
"""Of one that has begun, for a report alone."""

SET_UP: Wanted = {
    "fingerprint.graph": (str,), "fingerprint.latents": (str,), "setup.representation.seconds": (float, int),
    "setup.representation.label_share": (dict,), "setup.graph.seconds": (float, int), "setup.graph.components": (int,),
    "setup.graph.exact": (bool,), "setup.graph.recall": (float, int),
}  # fmt: skip
"""Of one that needs a graph: full supervision does not."""


OPTIONAL: Wanted = {"data": (dict,), "data.n_classes": (int, NoneType), "initial_classes": (list,)}
"""Of whichever says so."""


def check_content(log: CellLog) -> None:
    """Raises ResultsError where a file does not tell what its rows are of."""
    check(log.header, {**IDENTITY, **(CONTENT if log.begun else {})}, str(log.path))


def check_told(log: CellLog) -> None:
    """Raises ResultsError for the first that a report would miss."""
    strategy = log.header["config"]["initial_size"] is not None
    check_content(log)
    if log.begun:
        check(log.header, {**MADE_BY, **(SET_UP if strategy else {})}, str(log.path))
    _check_options(log)
    for record in log.records[:-1] if strategy else ():
        if not record.query_seconds or record.query_seconds < 0 or record.n_scored is None:
            raise ResultsError(
                f"{log.path}: no seconds or no points scored of the query of round {record.round}: {RESTORE}"
            )


def _check_options(log: CellLog) -> None:
    """What a header may say of the evaluation: of the right type where it does."""
    there = {name: kinds for name, kinds in OPTIONAL.items() if name.partition(".")[0] in log.header}
    data = log.header.get("data")
    if isinstance(data, dict) and "n_classes" not in data:
        there.pop("data.n_classes", None)
    check(log.header, there, str(log.path))
    if any(type(one) is not int for one in log.header.get("initial_classes", ())):
        raise ResultsError(f"{log.path}, line 1: in initial_classes: not all are whole numbers: {RESTORE}")
