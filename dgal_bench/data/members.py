"""The arrays of an .npz file: known from their headers, read piece by piece, never unpickled."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dgal_bench.errors import DataError


@dataclass(frozen=True, eq=False)
class Member:
    """An array of the file as its header says; its content is read piece by piece, and no pickle ever."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def whole(self) -> np.ndarray:
        """All of it, in memory."""
        with _stream(self.path, self.name) as stream:
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
            stream.read(1)  # its end is where the checksum is looked at
        return array

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """So many rows at a time; of an array in Fortran's order, no row is whole before the last byte is read."""
        if self.fortran:
            whole = self.whole()
            yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
            return
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with _stream(self.path, self.name) as stream:
            _header(stream)
            for start in range(0, self.shape[0], rows):
                wanted = min(rows, self.shape[0] - start)
                if len(content := stream.read(wanted * row)) < wanted * row:
                    raise EOFError(f"{self.name} ends within row {start + len(content) // row}")
                yield np.frombuffer(content, self.dtype).reshape(wanted, *self.shape[1:])
            stream.read(1)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What NumPy, the archive or the disk has to say against a file, as one line."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read ({why}): is it whole? np.savez writes such a file") from error


@contextmanager
def _stream(path: Path, name: str) -> Iterator[IO[bytes]]:
    with reading(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        yield stream


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and type."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def members_of(path: Path) -> dict[str, Member]:
    """The arrays of the file by name, from their headers alone.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    if path.is_dir():
        raise DataError(f"dataset.path={path} is a folder, but must be an .npz file: dataset=folder reads image files")
    if not path.is_file():
        raise DataError(f"dataset.path={path} is not there, but must be an .npz file with images and labels")
    if not zipfile.is_zipfile(path):
        with reading(path), path.open("rb") as file:
            single = file.read(6) == np.lib.format.MAGIC_PREFIX
        what = "a single array" if single else "no .npz file, or a truncated one"
        raise DataError(f"dataset.path={path} is {what}: save it by np.savez(path, images=..., labels=...)")
    with reading(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    members = {}
    for name in names:
        with _stream(path, name) as stream:
            shape, fortran, dtype = _header(stream)
        members[name] = Member(path, name, shape, dtype, fortran)
    return members
