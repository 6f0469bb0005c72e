"""The file of a projection beside the rows: where each point lies in two dimensions, and of which class it is."""

import base64
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
"""Raised with any change of the positions or of what the file holds: cached ones are made again, files refused."""

LEVELS = 65_535
"""What a coordinate in a file is at the upper end of the longer side, where 0 is the lower: finer than any pixel."""


def file_name(features_sha256: str) -> str:
    """Of the file in the folder of a data set, which may hold results of several representations."""
    return f"projection-{features_sha256[:8]}.npz"


def write_projection(told: Mapping[str, str], folder: Path) -> None:
    """Write what a set-up has told of into the folder of a data set, unless it lies there already.

    Raises:
        ResultsError: the folder takes no file.
    """
    path, content = folder / Path(told["name"]).name, base64.b64decode(told["content"])
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    write_atomic(path, content, "make room, or set results=DIR")


@dataclass(frozen=True, eq=False)
class Projection:
    """Where points lie in a square from -1 to 1, and their true classes.

    ``ids`` (n,), ascending: the positions in the pool of those that were kept; None: all of it. ``classes``: their
    names where the data set has them, else the numbers.
    """

    features_sha256: str
    positions: np.ndarray  # (n, 2) float32
    labels: np.ndarray  # (n,) int64
    ids: np.ndarray | None
    classes: Sequence[str]

    def of(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions of those of the pool's points ``ids`` that have one, in order, and a mask (m,) of which have."""
        wanted = np.asarray(ids, dtype=np.int64)
        if self.ids is None:
            found = (wanted >= 0) & (wanted < len(self.positions))
            return self.positions[wanted[found]], found
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        found = self.ids[places] == wanted
        return self.positions[places[found]], found


def read_file(path: Path) -> Projection | None:
    """Whatever latents it is of; None where there is none, errors as in ``read_projection``."""
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
    # what NumPy and zipfile say of a torn, an empty and a foreign file
    except (
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        OSError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise unusable_error(path, f"is damaged ({error})") from error


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> Projection:
    """Raises ValueError or KeyError where the arrays do not make a picture."""
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
