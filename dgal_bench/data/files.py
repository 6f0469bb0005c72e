"""The files of a data set: checked on every load, fetched only by the prepare step, under a lock."""

import fcntl
import gzip
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dgal_bench.arrays import Progress
from dgal_bench.errors import DataError

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
    return [name for name in source.files if not os.path.isfile(where / name)]


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

    One process at a time; only whole files of the published content get their names, so that a kill leaves nothing
    half. Files that are there are never replaced; once in a manifest, they are left to the check of every load.

    Raises:
        DataError: a file cannot be had or put there, or one that is there is not the published one.
    """
    where = source.at(root)
    gone = missing(source, where)
    if offline and not all(os.path.isfile(_packed(where, name)) for name in gone):
        raise _absent(source, where, " and offline=true forbids to download it")
    if gone:
        with _locked(source, where, progress):
            for name in missing(source, where):
                _write_manifest(source, where, {name: _fetch(source, name, where, progress)})
            check(source, root)
    elif not os.path.isfile(where / MANIFEST):
        check(source, root)
        with suppress(DataError), _locked(source, where, progress):  # a shared read-only folder needs none of ours
            _write_manifest(source, where, {})


@contextmanager
def _locked(source: Source, where: Path, progress: Progress) -> Iterator[None]:
    """The folder, made and locked (released by the holder's death); a refusal of the file system is one line."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with (where / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that fetches it", 0, 1)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise _absent(source, where, f" and cannot be put there ({error.strerror})") from error


def _packed(where: Path, name: str) -> Path:
    return where / f"{name}.gz"


def _fetch(source: Source, name: str, where: Path, progress: Progress) -> str:
    """Put one file in its place, out of the .gz beside it or else a downloaded one; returns where it came from."""
    packed = _packed(where, name)
    if packed.is_file():
        _unpack(source, name, packed)
        return packed.name
    url = _download(source, packed, progress)
    _unpack(source, name, packed)
    packed.unlink()
    return url


def _unpack(source: Source, name: str, packed: Path) -> None:
    """Beside its place first, and there only as the published file."""
    part = packed.with_name(f"{name}.part")
    try:
        with part.open("wb") as file:
            for chunk in _chunks(packed):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if trouble := _trouble(part, *source.files[name]):
            raise DataError(f"{packed.resolve()} holds another file: unpacked, it {trouble}; delete it and try again")
        part.rename(packed.with_name(name))
    finally:
        part.unlink(missing_ok=True)


def _chunks(packed: Path) -> Iterator[bytes]:
    """The content of an archive, by the megabyte; what goes wrong here is the archive's fault, not the disk's."""
    try:
        with gzip.open(packed) as archive:
            while chunk := archive.read(_MEGABYTE):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed.resolve()} cannot be unpacked ({error}): delete it and try again") from error


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
        except (requests.RequestException, ValueError) as error:  # of a full disk, no other mirror knows better
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
    """What lies there, checked when, and where each file came from; for people."""
    try:
        known = json.loads((where / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        known = {}
    files = {
        name: {
            "bytes": size,
            "sha256": sha256,
            "from": origins.get(name) or known.get(name, {}).get("from", "found there"),
        }
        for name, (size, sha256) in source.files.items()
        if os.path.isfile(where / name)
    }
    beside = where / f"{MANIFEST}.part"
    content = {"data_set": source.name, "checked": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": files}
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.rename(where / MANIFEST)
