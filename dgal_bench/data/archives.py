"""Archives of published data: what is inside of them, read in one pass, and the download of a published one."""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from dgal_bench.arrays import Progress
from dgal_bench.errors import DataError

_MEGABYTE = 1_000_000

Contents: TypeAlias = Iterator[tuple[str, bytes]]
"""(name of a file of the data set, its next megabyte); the chunks of a file follow each other and end with an empty."""

Unpack: TypeAlias = Callable[[Path, Mapping[str, str]], Contents]
"""The contents of an archive; its members wanted are given as (path inside of it -> name of the data set's file)."""


@dataclass(frozen=True)
class Archive:
    """What is published: ``members`` are (path inside of it -> name of the data set's file).

    ``unpack`` None: nothing is packed, it is the data set's file itself.
    """

    name: str
    members: Mapping[str, str]
    unpack: Unpack | None


def gzipped(packed: Path, members: Mapping[str, str]) -> Contents:
    """A .gz of one file."""
    with _blamed(packed), gzip.open(packed) as file:
        for name in members.values():
            yield from _chunks(name, file)


def tarred(packed: Path, members: Mapping[str, str]) -> Contents:
    """A .tar.gz, read as a stream: what is not wanted is passed over, and nothing is written by the names inside."""
    with _blamed(packed), gzip.open(packed) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() and entry.name in members else None
            if file:
                yield from _chunks(members[entry.name], file)


def zipped_gz(packed: Path, members: Mapping[str, str]) -> Contents:
    """A .zip whose members are a .gz of one file each."""
    with _blamed(packed), zipfile.ZipFile(packed) as archive:
        for path in archive.namelist():
            if path in members:
                with archive.open(path) as member, gzip.open(member) as file:
                    yield from _chunks(members[path], file)


def _chunks(name: str, file: IO[bytes] | gzip.GzipFile) -> Contents:
    while chunk := file.read(_MEGABYTE):
        yield name, chunk
    yield name, b""


@contextmanager
def _blamed(packed: Path) -> Iterator[None]:
    """What goes wrong while an archive is read is the archive's fault; a full disk is met outside of this."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{packed.resolve()} cannot be unpacked ({error}): delete it and try again") from error


@dataclass(frozen=True)
class Address:
    """Where something is published: the md5 of what is there, and where to ask, in turn."""

    md5: str
    urls: tuple[str, ...]


class NotServedError(Exception):
    """No address served the published content; the message says which and why, one after the other."""


def download(address: Address, target: Path, progress: Progress) -> str:
    """Put there what the first address serves that has the published md5; returns the address.

    Raises:
        NotServedError: none does.
        OSError: the file system refuses it.
    """
    import pooch  # type: ignore[import-untyped]
    import requests

    pooch.get_logger().setLevel("ERROR")
    errors = []
    for url in address.urls:
        fetch = pooch.HTTPDownloader(progressbar=_Counter(f"downloading {target.name}", progress), timeout=20)
        try:
            pooch.retrieve(url, f"md5:{address.md5}", fname=target.name, path=target.parent, downloader=fetch)
            return url
        except (requests.RequestException, ValueError) as error:  # of a full disk, no other mirror knows better
            errors.append(f"{url}: {_reason(error)}")
    raise NotServedError("; ".join(errors))


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
