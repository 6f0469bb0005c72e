"""The files of a data set: what they must be, and the one step that fetches them, under a lock."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dgal_bench.arrays import Progress
from dgal_bench.data.archives import Address, Archive, NotServedError, Unpack, download
from dgal_bench.errors import DataError


@dataclass(frozen=True)
class File:
    """What a file must be: its bytes and its ``digest``, "sha256:..." or "md5:...", as far as they are published."""

    size: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a data set's files lie under the root, what they must be, and what they come out of.

    ``folder``: of files and archives, "." for the root itself. ``torchvision_class`` knows where the archives are
    published, which ``addresses`` takes from it. ``counts``: images of the pool and of the test split.
    """

    name: str
    folder: str
    torchvision_class: str
    files: Mapping[str, File]
    archives: tuple[Archive, ...]
    addresses: Callable[[Any], Mapping[str, Address]]
    counts: tuple[int, int]

    def at(self, root: Path) -> Path:
        return root / self.folder

    @property
    def landmark(self) -> str:
        """What a root folder that holds this data set is known by."""
        return self.folder if self.folder != "." else next(iter(self.files)).split("/")[0]

    def published(self) -> Mapping[str, Address]:
        """Of every archive; asked only where something is missing, for torchvision takes a second to import."""
        import torchvision

        return self.addresses(getattr(torchvision.datasets, self.torchvision_class))


def missing(source: Source, where: Path) -> list[str]:
    """The names of the files that are not in the folder."""
    return [name for name in source.files if not os.path.isfile(where / name)]


def check(source: Source, root: Path) -> None:
    """Every file is there and is, as far as its size and digest are published, the published one.

    Raises:
        DataError: a file is missing, truncated or another; says which, by how much and what to do.
    """
    where = source.at(root)
    if missing(source, where):
        raise _absent(source, where)
    for name, file in source.files.items():
        if trouble := _trouble(where / name, file):
            raise DataError(
                f"{(where / name).resolve()} of data set '{source.name}' {trouble}: delete it and run "
                f"`dgal-bench data {source.name}`, or put the published file there"
            )


def _absent(source: Source, where: Path, why: str = "") -> DataError:
    """The one line that says what to put where."""
    gone = missing(source, where)
    what = "there" if len(gone) == len(source.files) else "complete"
    packed = [archive.name for archive in _needed(source, gone) if archive.unpack]
    if packed == [f"{name}.gz" for name in gone]:
        packed = ["their .gz"]
    files = ", ".join(gone[:4]) + (f" and {len(gone) - 4} more" if len(gone) > 4 else "")
    return DataError(
        f"data set '{source.name}' is not {what} at {where.resolve()}{why}: run `dgal-bench data {source.name}` where "
        f"there is a network, or put {files}{' (or ' + ', '.join(packed) + ')' if packed else ''} there, or set "
        f"DGAL_DATA (or data=DIR) to the folder that holds {source.landmark}"
    )


def _needed(source: Source, gone: Iterable[str]) -> list[Archive]:
    """The archives that the missing files come out of."""
    return [archive for archive in source.archives if set(archive.members.values()) & set(gone)]


def _trouble(path: Path, file: File) -> str | None:
    """What makes it another file than the published one."""
    try:
        found = path.stat().st_size
        if file.size is not None and found != file.size:
            return f"has {found:,} bytes where {file.size:,} are published"
        if file.digest is None:
            return None
        algorithm, _, digest = file.digest.partition(":")
        with path.open("rb") as opened:
            own = hashlib.file_digest(opened, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if own == digest:
        return None
    return f"is not the published one ({found:,} bytes, {algorithm} {own[:12]}, not {digest[:12]})"


def obtain(source: Source, root: Path, progress: Progress, offline: bool = False) -> None:
    """The prepare step: unpack what lies there packed, download what does not, check, and keep a manifest.

    One process at a time; only whole files of the published content get their names, so that a kill leaves nothing
    half. Files that are there are never replaced; once in a manifest, they are left to the check of whoever reads them.

    Raises:
        DataError: a file cannot be had or put there, or one that is there is not the published one.
    """
    where = source.at(root)
    gone = missing(source, where)
    if offline and not all(os.path.isfile(where / archive.name) for archive in _needed(source, gone)):
        raise _absent(source, where, " and offline=true forbids to download it")
    if gone:
        with _locked(source, where, progress):
            for archive in _needed(source, missing(source, where)):
                left = missing(source, where)
                _write_manifest(source, where, dict.fromkeys(left, _fetch(source, archive, where, progress)))
            check(source, root)
    elif not os.path.isfile(where / manifest_of(source)):
        check(source, root)
        with suppress(DataError), _locked(source, where, progress):  # a shared read-only folder needs none of ours
            _write_manifest(source, where, {})


def manifest_of(source: Source) -> str:
    """The name of its manifest: some data sets share a folder, the root."""
    return f"{source.name}.manifest.json"


@contextmanager
def _locked(source: Source, where: Path, progress: Progress) -> Iterator[None]:
    """The folder, made and locked (released by the holder's death); a refusal of the file system is one line."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with (where / f".{source.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that fetches it", 0, 1)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise _absent(source, where, f" and cannot be put there ({error.strerror})") from error


def _fetch(source: Source, archive: Archive, where: Path, progress: Progress) -> str:
    """Put missing files in their places, out of an archive that lies there or a downloaded one; returns its origin."""
    packed, origin = where / archive.name, archive.name
    by_hand = packed.is_file()
    if by_hand:
        _check_by_hand(source, archive, packed)
    else:
        try:
            origin = download(source.published()[archive.name], packed, progress)
        except NotServedError as error:
            raise _absent(source, where, f" and cannot be downloaded ({error})") from error
    if archive.unpack:
        _unpack(source, archive, archive.unpack, packed)
        if not by_hand:
            packed.unlink()
    return origin


def _check_by_hand(source: Source, archive: Archive, packed: Path) -> None:
    """Where files have no digest of their own, only the archive's says that they are the published ones."""
    if all(source.files[name].digest for name in archive.members.values()):
        return
    md5 = source.published()[archive.name].md5
    if trouble := _trouble(packed, File(digest=f"md5:{md5}")):
        raise DataError(f"{packed.resolve()} {trouble}: delete it and try again")


def _unpack(source: Source, archive: Archive, unpack: Unpack, packed: Path) -> None:
    """Put the missing ones of an archive's files in their places; those that are there are left alone."""
    where = packed.parent
    gone = missing(source, where)
    wanted = {path: name for path, name in archive.members.items() if name in gone}
    for name, chunks in groupby(unpack(packed, wanted), key=lambda content: content[0]):
        _place(where / name, source.files[name], packed, (chunk for _, chunk in chunks))
    for path, name in wanted.items():
        if not os.path.isfile(where / name):
            raise DataError(f"{packed.resolve()} has no {path} inside: delete it and try again")


def _place(path: Path, file: File, packed: Path, chunks: Iterable[bytes]) -> None:
    """Beside its place first, and there only as the published file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as opened:
            for chunk in chunks:
                opened.write(chunk)
            opened.flush()
            os.fsync(opened.fileno())
        if trouble := _trouble(part, file):
            raise DataError(
                f"{packed.resolve()} holds another file: unpacked, {path.name} {trouble}; delete it and try again"
            )
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _write_manifest(source: Source, where: Path, origins: Mapping[str, str]) -> None:
    """What lies there, checked when, and where each file came from; for people."""
    manifest = where / manifest_of(source)
    try:
        known = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError):
        known = {}
    files = {
        name: {
            "bytes": (where / name).stat().st_size,
            "digest": file.digest,
            "from": origins.get(name) or known.get(name, {}).get("from", "found there"),
        }
        for name, file in source.files.items()
        if os.path.isfile(where / name)
    }
    beside = manifest.with_name(f"{manifest.name}.part")
    content = {"data_set": source.name, "checked": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": files}
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.rename(manifest)
