"""Tensors that are written in place from turn to turn, with the way back out of the last turn."""

from collections.abc import Mapping
from itertools import count

import torch
from torch import Tensor

Name = str | int


class Journal:
    """Tensors that each turn changes a little, too large to be copied for that.

    A turn is known by its number. ``begin(turn)`` brings the tensors to what they were when that turn had ended, if it
    is the last one or the one before; ``end()`` names the new one. So whoever holds a number gets those very tensors
    or learns that they are gone, however often it is used, and also after a turn or a ``begin`` that was broken off.
    """

    def __init__(self, tensors: Mapping[Name, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._numbers = count()
        self._now: int | None = next(self._numbers)
        self._before: int | None = None
        self._log: list[tuple[Name, Tensor | None, Tensor]] = []

    def __getitem__(self, name: Name) -> Tensor:
        """To be read, and not beyond the turn."""
        return self._tensors[name]

    def begin(self, turn: int) -> bool:
        """Start from the end of that turn, 0 at first; False, and nothing is done, where no way leads back to it."""
        if turn not in (self._now, self._before):
            return False
        back = turn != self._now
        self._now = None  # first, so that half a way back is not taken for the end of a turn
        if back:
            self._undo()
        else:
            self._before = None  # the log leads from here to there no more
        self._log = []
        self._before = turn
        return True

    def _undo(self) -> None:
        """To the beginning of the log, from wherever it leads; it stays, so that this can be done again from midway."""
        for name, rows, old in reversed(self._log):
            if rows is None:
                self._tensors[name] = old
            else:
                self._tensors[name].index_copy_(0, rows, old)

    def end(self) -> int:
        self._now = next(self._numbers)
        return self._now

    def write(self, name: Name, rows: Tensor, values: Tensor) -> None:
        """Put values into distinct rows (r,) int64 of a tensor."""
        tensor = self._tensors[name]
        self._log.append((name, rows, tensor.index_select(0, rows)))
        tensor.index_copy_(0, rows, values)

    def replace(self, name: Name, tensor: Tensor) -> None:
        """Put another tensor in the place of one; it is the journal's from now on."""
        self._log.append((name, None, self._tensors[name]))
        self._tensors[name] = tensor

    def forget(self) -> None:
        """Give all memory back: every turn is gone, for whoever holds its number."""
        self._now = self._before = None
        self._tensors, self._log = {}, []


class Scratch:
    """An array that finds the distinct ones of many of N numbers."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._places = torch.empty(size, dtype=torch.int32, device=device)

    def distinct(self, numbers: Tensor) -> Tensor:
        """Each once, in no order: without a sort, and without a look at all N."""
        mine = torch.arange(len(numbers), dtype=torch.int32, device=numbers.device)
        self._places[numbers] = mine
        return numbers[self._places[numbers] == mine]
