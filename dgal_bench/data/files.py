"""The files of a data set: checked on every load, fetched only by the prepare step, under a lock."""

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgal_bench.arrays import Progress
from dgal_bench.errors import DataError, ResultsError

MANIFEST = "manifest.json"
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Source:
    """Where a data set's files lie under the root, what they must be, and where they can be had.

    ``files``: name -> (bytes, sha256), unpacked. ``torchvision_class``: its ``mirrors`` and ``resources`` say where
    the .gz archives of the same names are, and their md5.
    """

    name: str
    folder: str
    torchvision_class: str
    files: Mapping[str, tuple[int, str]]

    def at(self, root: Path) -> Path:
        return root / self.folder

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())


def missing(source: Source, where: Path) -> list[str]:
    """The names of the files that are not in the folder."""
    return [name for name in source.files if not (where / name).is_file()]


def check(source: Source, root: Path) -> None:
    """Every file is there and is, byte for byte, the published one.

    Raises:
        DataError: a file is missing, truncated or another; says which, by how much and what to do.
    """
    where = source.at(root)
    if missing(source, where):
        raise _absent(source, where)
    for name, (size, sha256) in source.files.items():
        if trouble := _trouble(where / name, size, sha256):
            raise DataError(
                f"{(where / name).resolve()} of data set '{source.name}' {trouble}: delete it and run "
                f"`dgal-bench data {source.name}`, or put the published file there"
            )


def _absent(source: Source, where: Path, why: str = "") -> DataError:
    """The one line that says what to put where."""
    gone = missing(source, where)
    what = "there" if len(gone) == len(source.files) else "complete"
    return DataError(
        f"data set '{source.name}' is not {what} at {where.resolve()}{why}: run `dgal-bench data {source.name}` where "
        f"there is a network, or put {', '.join(gone)} (or their .gz) there, or set DGAL_DATA (or data=DIR) to the "
        f"folder that holds {source.folder}"
    )


def _trouble(path: Path, size: int, sha256: str) -> str | None:
    try:
        if (found := path.stat().st_size) != size:
            return f"has {found:,} bytes where {size:,} are published"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == sha256 else f"is not the published one (sha256 {digest[:12]}, not {sha256[:12]})"


def obtain(source: Source, root: Path, progress: Progress, offline: bool = False) -> None:
    """The prepare step: unpack what lies there packed, download what does not, check, and keep a manifest.

    One process at a time; whole files are moved into place, so that a kill leaves nothing half. Files that are there
    are never replaced.

    Raises:
        DataError: a file cannot be had, or one that is there is not the published one.
        ResultsError: the folder cannot be written.
    """
    where = source.at(root)
    if missing(source, where):
        with _locked(where, source.name):
            origins = {name: _fetch(source, name, where, progress, offline) for name in missing(source, where)}
            check(source, root)
            _write_manifest(source, where, origins)
        return
    check(source, root)
    if not (where / MANIFEST).exists():
        with suppress(ResultsError), _locked(where, source.name):  # a shared read-only folder needs no manifest of ours
            _write_manifest(source, where, {})


@contextmanager
def _locked(where: Path, name: str) -> Iterator[None]:
    """The folder, made and locked (released by the holder's death); a refusal of the file system is one line."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        lock = (where / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with lock:
            yield
    except OSError as error:
        raise ResultsError(
            f"data set '{name}' cannot be put at {where}: {error.strerror}; set data=DIR or DGAL_DATA"
        ) from error


def _fetch(source: Source, name: str, where: Path, progress: Progress, offline: bool) -> str:
    """Put one file in its place, out of the .gz beside it or else a downloaded one; returns where it came from."""
    packed = where / f"{name}.gz"
    if packed.is_file():
        _unpack(packed, where / name)
        return packed.name
    if offline:
        raise _absent(source, where, " and offline=true forbids to download it")
    url = _download(source, packed, progress)
    _unpack(packed, where / name)
    packed.unlink()
    return url


def _unpack(packed: Path, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    try:
        with gzip.open(packed) as archive, part.open("wb") as file:
            shutil.copyfileobj(archive, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, EOFError, zlib.error) as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{packed.resolve()} cannot be unpacked ({error}): delete it and try again") from error
    part.rename(target)


def _download(source: Source, target: Path, progress: Progress) -> str:
    """From the first mirror that serves the archive with its published md5; returns the address."""
    import pooch  # type: ignore[import-untyped]
    import requests
    import torchvision

    publisher = getattr(torchvision.datasets, source.torchvision_class)
    md5 = dict(publisher.resources)[target.name]
    pooch.get_logger().setLevel("ERROR")
    errors = []
    for mirror in publisher.mirrors:
        url = f"{mirror}{target.name}"
        fetch = pooch.HTTPDownloader(progressbar=_Counter(f"downloading {target.name}", progress), timeout=20)
        try:
            pooch.retrieve(url, f"md5:{md5}", fname=target.name, path=target.parent, downloader=fetch)
            return url
        except (requests.RequestException, ValueError, OSError) as error:
            errors.append(f"{url}: {_reason(error)}")
    raise _absent(source, target.parent, f" and cannot be downloaded ({'; '.join(errors)})")


def _reason(error: Exception) -> str:
    """The innermost cause of a failed request, in a few words."""
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in 20 s"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return " ".join(str(error).split())[:100]


class _Counter:
    """A progress bar as pooch wants one, in whole megabytes."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.total = 0
        self._what, self._progress = what, progress
        self._done, self._told = 0, -1

    def update(self, n_bytes: int) -> None:
        self._done += n_bytes
        whole = self._done // _MEGABYTE
        if whole != self._told:
            self._told = whole
            self._progress(f"{self._what} (MB)", whole, max(1, self.total // _MEGABYTE))

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        pass


def _write_manifest(source: Source, where: Path, origins: Mapping[str, str]) -> None:
    """What lies there, checked when, and where each file came from; for people and for ``doctor``."""
    files: dict[str, dict[str, Any]] = {
        name: {"bytes": size, "sha256": sha256, "from": origins.get(name, "found there")}
        for name, (size, sha256) in source.files.items()
    }
    beside = where / f"{MANIFEST}.part"
    content = {"data_set": source.name, "checked": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": files}
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.rename(where / MANIFEST)
