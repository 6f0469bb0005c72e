"""Claim 11: how the seconds of the diffusion grow with the pool, from a file of benchmarks/scaling.py."""

import json
from collections.abc import Mapping, Sequence
from math import inf, log
from pathlib import Path
from typing import Any

from scipy.stats import linregress
from scipy.stats import t as student

from dgal_bench.errors import ResultsError
from dgal_bench.report.claims.judge import Finding
from dgal_bench.report.claims.rules import EXPONENT, LINEAR, NOT_RUN, UNDECIDED
from dgal_bench.report.statistics import Estimate

ENOUGH = 5
"""Sizes under which nothing is decided: an interval of a slope through fewer is wide, or chance."""

ABSENT = Finding(
    "", "a step of the diffusion takes time in proportion to the pool's size", LINEAR.words, NOT_RUN, None, EXPONENT,
    0, 0, why="not given: growth=FILE, as benchmarks/scaling.py writes it",
)  # fmt: skip


def growth(path: Path) -> list[Finding]:
    """A finding for each kind of points of the file.

    Raises:
        ResultsError: there is no such file, or it is none of benchmarks/scaling.py's.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        sizes = [one for one in told["sizes"] if one["status"] == "measured"]
        kinds = list(dict.fromkeys(one["kind"] for one in sizes))
        where = told["provenance"]["machine"]["cpu"]
        found = [_finding(kind, [one for one in sizes if one["kind"] == kind], where) for kind in kinds]
    except OSError as error:
        raise ResultsError(f"growth={path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"growth={path} is no file of benchmarks/scaling.py ({error!r})") from error
    if not found:
        raise ResultsError(f"growth={path} has no size that was measured")
    return found


def _finding(kind: str, sizes: Sequence[Mapping[str, Any]], where: str) -> Finding:
    steps = {int(one["points"]): seconds for one in sizes if (seconds := _step(one)) is not None}
    words = f"a step over {', '.join(f'{n:,}' for n in sorted(steps))} {kind} points ({where})"
    effect = exponent(steps)
    few = len(steps) < ENOUGH
    return Finding(
        "", words, LINEAR.words, UNDECIDED if few or effect is None else LINEAR.verdict(effect), effect, EXPONENT,
        len(steps), 0, why=f"fewer than {ENOUGH} sizes" if few else "",
    )  # fmt: skip


def _step(size: Mapping[str, Any]) -> float | None:
    """Seconds of one step of DGMG's whole diffusion; None where it was not measured."""
    for query in size["queries"]:
        if query["name"] == "dgmg" and query["how"] == "full":
            return float(query["phases"]["diffuse"]) / int(size["steps"])
    return None


def exponent(seconds: Mapping[int, float]) -> Estimate | None:
    """The slope of log seconds over log size, with Student's interval of a least-squares line; None under 2 sizes."""
    if len(seconds) < 2:
        return None
    sizes = sorted(seconds)
    line = linregress([log(n) for n in sizes], [log(seconds[n]) for n in sizes])
    free = len(sizes) - 2
    half = float(student.ppf(0.975, free)) * float(line.stderr) if free else inf
    return Estimate(float(line.slope), float(line.slope) - half, float(line.slope) + half, len(sizes))
