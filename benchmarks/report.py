"""From measurements to ratios, a table and a figure. Ratios are seconds theirs / ours: above 1, ours is faster."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.plan import IMPLEMENTATIONS, MEMORY_SHARE, N_CENTRES, N_FEATURES, Case, floor_bytes

Row = Mapping[str, Any]
OTHERS = IMPLEMENTATIONS[1:]
LEGEND = f"""\
s: seconds of the criterion alone, after the network's forward pass; the fastest of 3 to 7 calls if the first took under
   2 s, else that one. MB: peak memory beyond the inputs. x floor: seconds over those that only reading the floats takes
   at the measured bandwidth, for every pick again (margin: once); below 1 where they stay in the processor's caches.
x ours: their seconds / ours. picks: are theirs ours? (margin: as sets; "own draws": random, from a stream of its own)
"> 120": stopped at that limit, and the ratio is a lower bound; "*": not started, a smaller case was stopped already.
"needs 20 GB": more than {MEMORY_SHARE:.0%} of this machine's memory, not started.
d = {N_FEATURES} features. badge and margin depend on the classes C; coreset does not: it is measured once per N and B,
   from {N_CENTRES} labeled points."""


def comparisons(rows: Iterable[Row], read_gb_per_second: float, limit: float) -> list[dict[str, Any]]:
    """One per criterion and size: ours, its distance from the floor, and each other against it."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(Case.of(row).sizes, {})[row["implementation"]] = row
    return [_comparison(group, read_gb_per_second, limit) for group in groups.values()]


def _comparison(group: Mapping[str, Row], read_gb_per_second: float, limit: float) -> dict[str, Any]:
    ours = group["ours"]
    case = Case.of(ours)
    floor = floor_bytes(case) / (read_gb_per_second * 1e9)
    facts = {key: value for key, value in case.facts().items() if key != "implementation"}
    seconds = ours.get("seconds")
    return facts | {
        "ours": _brief(ours) | {"floor_seconds": floor, "x_floor": seconds / floor if seconds else None},
        **{name: _against(group[name], ours, limit) for name in OTHERS if name in group},
    }


def _brief(row: Row) -> dict[str, Any]:
    return {key: row.get(key) for key in ("status", "seconds", "peak_mb", "needs_gb")}


def _against(theirs: Row, ours: Row, limit: float) -> dict[str, Any]:
    """``x_ours``, and whether it is a lower bound only; None where a time is missing on either side."""
    stopped = theirs["status"] in ("over_limit", "not_started")
    seconds = limit if stopped else theirs.get("seconds")
    ratio = seconds / ours["seconds"] if seconds and ours.get("seconds") else None
    return _brief(theirs) | {"x_ours": ratio, "lower_bound": stopped, "shared_picks": shared_picks(theirs, ours)}


def shared_picks(theirs: Row, ours: Row) -> int | None:
    """How many of their picks are ours: in a list up to the first difference, in margin's set all. None: unknown."""
    if "chosen" not in theirs or "chosen" not in ours or draws_its_own(theirs):
        return None
    if theirs["criterion"] == "margin":
        return len(set(theirs["chosen"]) & set(ours["chosen"]))
    equal = [mine == its for mine, its in zip(ours["chosen"], theirs["chosen"], strict=True)]
    return equal.index(False) if False in equal else len(equal)


def draws_its_own(row: Row) -> bool:
    return (row["criterion"], row["implementation"]) == ("badge", "scikit-activeml")


def table(compared: Sequence[Row], limit: float) -> str:
    """Plain text, a block per criterion."""
    blocks = [LEGEND.replace("> 120", f"> {limit:g}")]
    for criterion in dict.fromkeys(one["criterion"] for one in compared):
        lines = [
            f"{criterion:<20}|{'ours':^27}" + "".join(f"|{name:^41}" for name in OTHERS),
            f"{'N':>9}{'C':>5}{'B':>5} |{'s':>9}{'MB':>8}{'x floor':>9} "
            + "|{:>12}{:>8}{:>9}{:>11} ".format("s", "MB", "x ours", "picks") * len(OTHERS),
        ]
        lines += [_line(one, limit) for one in compared if one["criterion"] == criterion]
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def _line(one: Row, limit: float) -> str:
    ours = one["ours"]
    classes = "any" if one["classes"] is None else one["classes"]
    x_floor = f"{ours['x_floor']:.1f}" if ours["x_floor"] else "-"
    parts = [
        f"{one['points']:>9,}{classes:>5}{one['picks']:>5} ",
        f"{seconds_text(ours, limit):>9}{_megabytes(ours):>8}{x_floor:>9} ",
    ]
    for name in OTHERS:
        its = one[name]
        ratio = f"{'> ' if its['lower_bound'] else ''}{_significant(its['x_ours'])}" if its["x_ours"] else "-"
        picks = _picks_text(its, one, name)
        parts.append(f"{seconds_text(its, limit):>12}{_megabytes(its):>8}{ratio:>9}{picks:>11} ")
    return "|".join(parts)


def seconds_text(row: Row, limit: float) -> str:
    match row["status"]:
        case "measured":
            return f"{row['seconds']:.2g}" if row["seconds"] < 0.1 else f"{row['seconds']:.3g}"
        case "over_limit":
            return f"> {limit:g}"
        case "not_started":
            return f"> {limit:g}*"
        case "over_memory":
            return f"needs {row['needs_gb']:.0f} GB" if row.get("needs_gb") else "no memory"
        case _:
            return "failed"


def _megabytes(row: Row) -> str:
    return "-" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"


def _significant(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _picks_text(its: Row, one: Row, name: str) -> str:
    if its["status"] != "measured":
        return "-"
    if draws_its_own({"criterion": one["criterion"], "implementation": name}):
        return "own draws"
    shared = its["shared_picks"]
    return "same" if shared == one["picks"] else f"{shared} of {one['picks']}"
