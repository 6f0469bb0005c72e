"""Numbers and tables as text."""

import re
from collections.abc import Iterable, Sequence
from math import inf, isinf

from dgal_bench.report.statistics import MANY, Estimate


def spread(estimate: Estimate, factor: float, digits: int) -> str:
    """``91.2 ± 0.8``; only the mean with one seed, ``91.2 [90.1, 91.9]`` where the interval may be asymmetric."""
    mean = f"{estimate.mean * factor:.{digits}f}"
    if isinf(estimate.high):
        return mean
    if estimate.n < MANY:
        return f"{mean} ± {(estimate.high - estimate.mean) * factor:.{digits}f}"
    return f"{mean} [{estimate.low * factor:.{digits}f}, {estimate.high * factor:.{digits}f}]"


def difference(estimate: Estimate, factor: float, digits: int) -> str:
    """``+1.2 [0.3, 2.1]``; only the difference with one seed."""
    mean = f"{estimate.mean * factor:+.{digits}f}"
    if isinf(estimate.high):
        return mean
    return f"{mean} [{estimate.low * factor:.{digits}f}, {estimate.high * factor:.{digits}f}]"


def p_value(p: float | None) -> str:
    """Two digits; empty where there was no test."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}"


def speedup(estimate: Estimate | None) -> str:
    """``61 [58, 65]`` times; only the ratio with one seed."""
    if estimate is None:
        return ""
    if isinf(estimate.high):
        return three_digits(estimate.mean)
    return f"{three_digits(estimate.mean)} [{three_digits(estimate.low)}, {three_digits(estimate.high)}]"


def three_digits(value: float) -> str:
    """``0.00343``, ``5.64``, ``3,150``: an interval over a few seeds supports no more."""
    return f"{float(f'{value:.3g}'):,.0f}" if 1000 <= abs(value) < inf else f"{value:.3g}"


def escape_html(text: str) -> str:
    """Escapes what Markdown would read as an HTML tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)


def numbers(values: Iterable[int]) -> str:
    """``1, 2, 3``; a question mark for none."""
    return ", ".join(map(str, values)) or "?"


def align_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up in a terminal too."""
    head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in [head, *rows]]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    pads = ["<", *[">"] * (len(head) - 1)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(f"{c:{pad}{w}}" for c, pad, w in zip(cells, pads, widths, strict=True)) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + (":" if pad == ">" else "-") for w, pad in zip(widths, pads, strict=True)) + "|"
    )
    return [line(head), rule, *map(line, rows)]


MARK = " *"


def mark_values(texts: Sequence[str], busy: Sequence[bool | None]) -> list[str]:
    """Marks busy values, and pads the others where any is marked."""
    room = " " * len(MARK) if any(busy) else ""
    return [text + (MARK if one else room) for text, one in zip(texts, busy, strict=True)]
