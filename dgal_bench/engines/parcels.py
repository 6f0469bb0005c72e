"""Cache entries on their way to machines that do not share the cache: the bytes of their files, piece by piece."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dgal_bench import cache

PIECE_BYTES = 64 * 1024**2
"""Of a file at a time: what an entry needs of memory on its way, however large it is."""

Piece = tuple[str, bytes]
"""The name of a file, and its next bytes."""


def missing(root: Path, keys: Iterable[str]) -> list[str]:
    """Those of the keys that the cache under ``root`` has no entry of."""
    return [key for key in keys if not cache.holds(root, key)]


def pieces(root: Path, key: str, size: int = PIECE_BYTES) -> Iterator[Piece]:
    """An entry as pieces of at most ``size`` bytes, each file in order; raises OSError where there is none."""
    for path in sorted((root / key).iterdir()):
        with path.open("rb") as file:
            while piece := file.read(size):
                yield path.name, piece


def unpack(root: Path, key: str, arriving: Iterable[Piece]) -> None:
    """Write an entry from its pieces into the cache under ``root``, unless it has come there in the meantime.

    Raises:
        CacheError: the cache cannot be written, or the pieces are not what was packed.
    """

    def fill(folder: Path) -> None:
        for name, piece in arriving:
            with (folder / Path(name).name).open("ab") as file:
                file.write(piece)

    cache.adopt(root, key, fill)
