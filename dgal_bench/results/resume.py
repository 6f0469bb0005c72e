"""The identity of a result, and whether a file's rows may be continued by the present program on this machine.

A run goes on from its file in ``loop.start_or_resume``.
"""

from collections.abc import Mapping
from typing import Any

from dgal_bench.config.schema import RunConfig, comparable_config, differences, to_dict
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.system import provenance
from dgal_bench.results.rows import RunLog

ALGORITHM_VERSION = 2
"""Raised with any change that alters picks; tests/test_golden.py fails otherwise. Versions are never mixed.

2: equal scores are ordered by ranks of a permutation, in 1 by a hash.
"""


def header_outline(config: RunConfig, name: str) -> dict[str, Any]:
    """The part of a header that is known before the data are loaded: all of it for a run that never began."""
    return {
        "cell": name,
        "profile": config.profile,
        "config": to_dict(config),
        "fingerprint": {"algorithm_version": ALGORITHM_VERSION, "config": config.hash},
        "provenance": provenance(),
    }


IDENTITY_FIELDS = ("algorithm_version", "config", "data", "latents", "graph", "weights", "files")
"""Fields of a fingerprint that define the result. The others say where it was made."""


def check_same_content(log: RunLog, content: Mapping[str, Any]) -> None:
    """Raises ResultsError for a finished run that was made from other content."""
    fingerprint = log.header["fingerprint"]
    fingerprint = fingerprint | {name: value for name, value in content.items() if name in fingerprint}
    check_resumable(log, {"fingerprint": fingerprint, "config": log.header["config"]}, anyway=True)


def check_resumable(log: RunLog, header: Mapping[str, Any], anyway: bool) -> list[str]:
    """Harmless differences between the file and the present; raises ResultsError for any other difference."""
    old, new = log.header["fingerprint"], header["fingerprint"]
    wrong = [name for name in IDENTITY_FIELDS if old.get(name) != new.get(name)]
    if "config" in wrong:
        before, now = (comparable_config(config) for config in (log.header["config"], header["config"]))
        what = "; ".join(differences(before, now)[:3])
        raise ResultsError(f"{log.path} holds results of another configuration ({what}): use another results=DIR")
    if wrong:
        what = ", ".join(f"{name} {str(old.get(name))[:8]} -> {str(new.get(name))[:8]}" for name in wrong)
        instead = ", or file it under another dataset.name=NAME" if "data" in wrong else ""
        raise ResultsError(f"{log.path} was made from something else ({what}): use another results=DIR{instead}")
    changes = differences(old, new)
    if changes and not log.done and not anyway:
        raise ResultsError(f"{log.path} was begun elsewhere ({'; '.join(changes)}): add resume=anyway to go on anyway")
    return changes
