"""The projection file of a data set's results: each point's position in two dimensions, and its class."""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import write_atomic

PROJECTION_VERSION = 1
"""Raised with any change of positions or format: cached ones are made again, older files refused."""

LEVELS = 65_535
"""Coordinates in a file are integers from 0 to this, along the longer side: finer than any pixel."""


def file_name(features_sha256: str) -> str:
    """Name in the folder of a data set, which may hold results of several representations."""
    return f"projection-{features_sha256[:8]}.npz"


def write_projection(folder: Path, features_sha256: str, content: bytes) -> None:
    """Write a projection to a data set's folder, unless it is there.

    Raises:
        ResultsError: the folder is not writable.
    """
    path = folder / file_name(features_sha256)
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    write_atomic(path, content, "make room, or set results=DIR")


@dataclass(frozen=True, eq=False)
class Projection:
    """Positions of points in a square from -1 to 1, and their true classes.

    ``ids`` (n,), ascending: the points' positions in the pool; None: all of it. ``classes``: names, else numbers.
    """

    features_sha256: str
    positions: np.ndarray  # (n, 2) float32
    labels: np.ndarray  # (n,) int64
    ids: np.ndarray | None
    classes: Sequence[str]

    def of(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the pool's points ``ids`` (m,) that have one, in order, and a mask (m,) of these."""
        points = np.asarray(ids, dtype=np.int64)
        if self.ids is None:
            present = (points >= 0) & (points < len(self.positions))
            return self.positions[points[present]], present
        rows = np.searchsorted(self.ids, points).clip(max=len(self.ids) - 1)
        present = self.ids[rows] == points
        return self.positions[rows[present]], present


# what NumPy and zipfile raise for a torn, an empty and a foreign file
_UNREADABLE = ValueError, TypeError, KeyError, EOFError, OSError, AttributeError, zipfile.BadZipFile, zlib.error


def read_file(path: Path) -> Projection | None:
    """None where there is no file.

    Raises:
        ResultsError: the file cannot be read, is damaged, or of another version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}: allow it, or remove the file") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if (version := int(arrays["version"])) != PROJECTION_VERSION:
            raise unusable_error(path, f"is of version {version}, where this dgal-bench reads {PROJECTION_VERSION}")
        return _check_arrays(arrays)
    except _UNREADABLE as error:
        raise unusable_error(path, f"is damaged ({error})") from error


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> Projection:
    """Raises ValueError or KeyError where the arrays do not fit together."""
    positions, labels, ids = arrays["positions"], arrays["labels"].astype(np.int64), arrays.get("ids")
    n_points, n_classes = len(labels), int(arrays["n_classes"])
    if positions.dtype != np.uint16 or positions.shape != (n_points, 2) or labels.ndim != 1:
        raise ValueError(f"positions {positions.shape} {positions.dtype} of {n_points} labels")
    if n_points and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"labels that are none of {n_classes} classes")
    if ids is not None and (ids.shape != labels.shape or (np.diff(ids.astype(np.int64)) <= 0).any()):
        raise ValueError(f"{len(ids)} ids of {n_points} points, or out of order")
    classes = arrays.get("classes", np.arange(n_classes))
    return Projection(
        str(arrays["latents"]),
        positions.astype(np.float32) * (2 / LEVELS) - 1,
        labels,
        None if ids is None else ids.astype(np.int64),
        [str(name) for name in classes],
    )


def unusable_error(path: Path, what: str) -> ResultsError:
    return ResultsError(f"{path} {what}: remove it; the next set-up for these results writes it anew")
