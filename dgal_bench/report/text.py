"""Numbers and tables as text."""

from collections.abc import Iterable
from math import isinf

from dgal_bench.report.statistics import Estimate


def spread(estimate: Estimate, factor: float, digits: int) -> str:
    """``91.2 +- 0.8``; the mean alone with one seed."""
    mean = f"{estimate.mean * factor:.{digits}f}"
    return mean if isinf(estimate.high) else f"{mean} ± {(estimate.high - estimate.mean) * factor:.{digits}f}"


def speedup(estimate: Estimate | None) -> str:
    """``61 [58, 65]`` times; the ratio alone with one seed."""
    if estimate is None:
        return ""
    if isinf(estimate.high):
        return f"{estimate.mean:.3g}"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def numbers(values: Iterable[int]) -> str:
    """``1, 2, 3``; a question mark for none."""
    return ", ".join(map(str, values)) or "?"


def aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    pads = ["<", *[">"] * (len(head) - 1)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(f"{c:{pad}{w}}" for c, pad, w in zip(cells, pads, widths, strict=True)) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + (":" if pad == ">" else "-") for w, pad in zip(widths, pads, strict=True)) + "|"
    )
    return [line(head), rule, *map(line, rows)]
