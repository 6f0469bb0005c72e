"""Files below a folder, files that a reader sees whole, folders that take files; what to turn where a disk refuses."""

import os
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from dgal_bench.errors import ResultsError


def below(root: Path, pattern: str) -> list[Path]:
    """Files and folders under ``root`` by their name, sorted; what others take away meanwhile is not there.

    (``Path.rglob`` fails where a folder, a lease say, goes between being listed and being looked into.)
    """
    named = (Path(at, name) for at, folders, files in os.walk(root) for name in [*folders, *files])
    return sorted(path for path in named if fnmatchcase(path.name, pattern))


def write_whole(path: Path, content: bytes, knob: str) -> None:
    """A file in one rename, its folder made where there is none: a reader sees what was there before, or all of this.

    Raises:
        ResultsError: the folder takes no file; it ends with ``knob``, what the user can do.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise ResultsError(f"{path} cannot be written: {error.strerror}: {knob}") from error


def make_writable(folder: Path, name: str, knob: str) -> None:
    """Make the folder where there is none, and see that files can be made in it.

    Raises:
        ResultsError: they cannot; it begins with ``name``, the folder as the user has said it, and ends with ``knob``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{name} cannot be written: {error.strerror}: {knob}") from error
    if not os.access(folder, os.W_OK):
        raise ResultsError(f"{name} cannot be written: {knob}")
