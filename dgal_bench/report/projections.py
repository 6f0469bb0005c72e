"""Reads the projections of latents that set-up leaves beside the results: for figures, never for a number."""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgal_bench.errors import ResultsError
from dgal_bench.projection import LEVELS, PROJECTION_VERSION, file_name
from dgal_bench.report.groups import Group


@dataclass(frozen=True, eq=False)
class Projection:
    """Where points lie in a square from -1 to 1, and their true classes.

    ``ids`` (n,), ascending: the positions in the pool of those that were kept; None: all of it. ``classes``: their
    names where the data set has them, else the numbers.
    """

    latents_sha256: str
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


def read_projection(folder: Path, latents_sha256: str) -> Projection | None:
    """Of these latents, from the folder of a data set; None where there is none.

    Raises:
        ResultsError: the file is damaged, another version's, or of other latents.
    """
    path = folder / file_name(latents_sha256)
    found = read_file(path)
    if found is not None and found.latents_sha256 != latents_sha256:
        raise _unusable(path, "is of other latents")
    return found


def unreadable(group: Group) -> list[str]:
    """What is wrong with the projections beside the finished cells of a group; the report does without them."""
    wanted = {
        (log.path.parent.parent, str(log.header["fingerprint"].get("latents")))
        for strategy in group.strategies
        for log in group.finished(strategy).values()
    }
    found = []
    for folder, latents in sorted(wanted):
        try:
            read_projection(folder, latents)
        except ResultsError as error:
            found.append(f"No map of the latents: {error}")
    return found


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
            raise _unusable(path, f"is of version {version}, where this dgal-bench reads {PROJECTION_VERSION}")
        return _checked(arrays)
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
        raise _unusable(path, f"is damaged ({error})") from error


def _checked(arrays: Mapping[str, np.ndarray]) -> Projection:
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


def _unusable(path: Path, what: str) -> ResultsError:
    return ResultsError(f"{path} {what}: remove it; the next set-up for these results writes it anew")
