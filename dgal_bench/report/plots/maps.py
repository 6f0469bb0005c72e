"""Maps: where picks lie among the features, and the penalty matrix over all data sets."""

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from dgal_bench.core.errors import ResultsError
from dgal_bench.report.costs import Penalties
from dgal_bench.report.groups import Group
from dgal_bench.report.plots.style import FAINT, GRID, Canvas, canvas, short_name, styles
from dgal_bench.results.projection_file import Projection, file_name, read_file, unusable_error
from dgal_bench.results.rows import RoundRecord, RunLog


def read_projection(folder: Path, features_sha256: str) -> Projection | None:
    """The projection of these features, from the folder of a data set; None where there is none.

    Raises:
        ResultsError: the file is damaged, another version's, or of other features.
    """
    path = folder / file_name(features_sha256)
    projection = read_file(path)
    if projection is not None and projection.features_sha256 != features_sha256:
        raise unusable_error(path, "is of other latents")
    return projection


def unreadable_projections(group: Group) -> list[str]:
    """Errors of the projections of a group's finished runs; the report omits them."""
    keys = {
        (log.path.parent.parent, str(log.header["fingerprint"].get("latents")))
        for strategy in group.strategies
        for log in group.finished(strategy).values()
    }
    lines = []
    for folder, sha256 in sorted(keys):
        try:
            read_projection(folder, sha256)
        except ResultsError as error:
            lines.append(f"No map of the latents: {error}")
    return lines


_COLUMNS = 4
_SHOWN = 60  # picks of a third in a panel: more would hide each other
_COLUMN, _ROW, _EDGE = 2.4, 2.75, 1.08  # from one panel's middle to the next, and to its frame; a projection is 2 wide
_CORNERS = np.array([[-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1]])
_WIDE = 5.6  # inches of the axes
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#5B6BD6", "#6B8E23", "#7A7A7A")
_EARLY, _LATE = "#FFFFFE", "#14171B"  # the same on light and dark pages: not the page's colours
_DOTS: tuple[dict[str, Any], dict[str, Any]] = (
    {"marker": "o", "markerfacecolor": _EARLY, "markeredgecolor": _LATE},
    {"marker": "s", "markerfacecolor": _LATE, "markeredgecolor": _EARLY},
)
for one in _DOTS:
    one.update(linestyle="", markersize=3.6, markeredgewidth=0.6)
SHADES = LinearSegmentedColormap.from_list("penalty", ["#FFFFFF00", "#D55E00"])


def picks_on_map(group: Group) -> Canvas | None:
    """Figs. 3 and 4 of the paper for every strategy: picks of the first and the last third of the queries.

    Of the first seed of each; None where the results folder has no projection of these features.
    """
    known: dict[str, Projection | None] = {}
    own = styles(group)
    shown = {name: found for name in own if (found := _first_projection(group, name, known))}
    if not shown:
        return None
    rows = ceil(len(shown) / _COLUMNS)
    drawing = canvas(
        f"Where batches lie among the latents: {group.dataset_label}",
        dict(zip(("first third of the queries", "last third"), _DOTS, strict=True)),
        f"one panel a strategy, its first seed; colours are classes; of many picks every n-th, at most {_SHOWN} of a "
        "third; the projection keeps neighbourhoods, not distances",
        height=0.14 + rows * _ROW / _COLUMN * _WIDE / _COLUMNS, left=0.12, below=0.06, own_key=True,
    )  # fmt: skip
    (axes,) = drawing.axes
    pictures = {sha256: density(one) for sha256, one in known.items() if one is not None}
    batches: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for place, (name, (log, projection)) in enumerate(shown.items()):
        row, column = divmod(place, _COLUMNS)
        middle = np.array([column * _COLUMN, -row * _ROW])
        _panel(axes, middle, own[name].name, pictures[projection.features_sha256])
        for batch, records in zip(batches, _thirds(log), strict=True):
            points, _ = projection.of(_positions(records))
            batch.append(points[:: ceil(len(points) / _SHOWN) or 1] + middle)
    for batch, dots in zip(batches, _DOTS, strict=True):
        points = np.concatenate(batch)
        axes.plot(points[:, 0], points[:, 1], gid="line:picks", **dots)
    rim = _EDGE + 0.02
    axes.set(xlim=(-rim, (_COLUMNS - 1) * _COLUMN + rim), ylim=((1 - rows) * _ROW - rim, _ROW - _EDGE))
    axes.set_axis_off()
    return drawing


def _panel(axes: Axes, middle: np.ndarray, name: str, picture: np.ndarray) -> None:
    """All panels share one axes, which draws in a fraction of the time of separate axes."""
    x, y = middle
    axes.imshow(picture, extent=(x - 1, x + 1, y - 1, y + 1), origin="lower", interpolation="none", aspect="auto")
    axes.plot(x + _EDGE * _CORNERS[0], y + _EDGE * _CORNERS[1], color=GRID, linewidth=0.8)
    axes.text(x, y + _EDGE + 0.08, name, ha="center", fontsize=10 if len(name) < 16 else 8)


def _thirds(log: RunLog) -> tuple[Sequence[RoundRecord], Sequence[RoundRecord]]:
    queries = [record for record in log.records if record.indices]
    third = max(1, len(queries) // 3)
    return queries[:third], queries[-third:]


def _first_projection(
    group: Group, strategy: str, known: dict[str, Projection | None]
) -> tuple[RunLog, Projection] | None:
    """The first finished seed that has a projection; ``known`` caches projections by the hash of the features."""
    for _, log in sorted(group.finished(strategy).items()):
        sha256 = str(log.header["fingerprint"].get("latents"))
        if sha256 not in known:
            with suppress(ResultsError):  # the cautions have the error
                known[sha256] = None
                known[sha256] = read_projection(log.path.parent.parent, sha256)
        if (found := known[sha256]) is not None:
            return log, found
    return None


def _positions(records: Sequence[RoundRecord]) -> list[int]:
    return [position for record in records for position in record.indices or []]


def density(projection: Projection) -> np.ndarray:
    """A picture (n, n, 4): a square has the hue of its commonest class, and more opacity the more points it has."""
    n = int(np.clip(1.2 * np.sqrt(len(projection.labels)), 24, 100))
    squares = ((projection.positions + 1) / 2 * (n - 1)).round().astype(int)
    counts = np.zeros((len(_HUES), n * n))
    np.add.at(counts, (projection.labels % len(_HUES), squares[:, 1] * n + squares[:, 0]), 1.0)
    hues = np.array([[int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hue in _HUES])
    total = counts.sum(axis=0)
    share = np.minimum(total / np.percentile(total[total > 0], 90), 1.0)
    alpha = np.where(total > 0, 0.2 + 0.5 * np.ceil(4 * share) / 4, 0.0)  # few tones make a small file
    return np.concatenate([hues[counts.argmax(axis=0)], alpha[:, None]], axis=1).reshape(n, n, 4)


def penalty_matrix(penalties: Penalties) -> Canvas:
    """BADGE's matrix (Ash et al. 2020): rows beat columns; below, the share of rows in which each was beaten."""
    names = [textwrap.shorten(short_name(name), 24, placeholder="…") for name in penalties.names]
    n = len(names)
    side = min(0.5, 4.4 / n)
    title = f"Who beats whom: suite {penalties.suite}, profile {penalties.profile}"
    longest = max(map(len, names))
    below = max(0.58, 0.16 + 0.075 * longest)  # inches that slanted names need
    drawing = canvas(title, {}, penalty_note(penalties), height=0.1 + side * (n + 1) + below, left=1.55, below=below)
    (axes,) = drawing.axes
    lost = [np.nan if share is None else share for share in penalties.beaten_share]
    values = np.vstack([penalties.matrix, lost])
    axes.imshow(values, cmap=SHADES, vmin=0, vmax=max(1e-9, float(np.nanmax(values))), aspect="auto")
    size = 9 if n <= 12 else 6.5
    for i, j in np.ndindex(*values.shape):
        if i != j and not np.isnan(values[i, j]):
            axes.text(j, i, f"{values[i, j]:.1f}".replace("0.0", "0"), ha="center", va="center", fontsize=size)
    axes.set_yticks(range(n + 1), [*names, "beaten, share"], fontsize=max(size, 7.5))
    axes.set_xticks(range(n), names, fontsize=max(size, 7.5), rotation=60, ha="right", rotation_mode="anchor")
    axes.axhline(n - 0.5, color=FAINT, linewidth=1)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return drawing


def penalty_note(penalties: Penalties) -> str:
    n = int(penalties.n_compared.max(initial=0))
    return (
        "row beats column: the share of evaluations at which the paired 95 % interval is above 0, summed over up to "
        f"{n} data sets (one run on two kinds of machine counts twice); below, the share of its evaluations that a "
        "strategy lost: low is good"
    )
