"""What a diffusion keeps from round to round: iterates and scores, at the end of a turn that later ones write over."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Index, Labels
from dgal_bench.graph.diffusion import score
from dgal_bench.graph.journal import Journal, Name, Scratch
from dgal_bench.graph.ranking import Score, rank_bytes, ranks_without_heat
from dgal_bench.graph.transition import Graph


@dataclass(frozen=True)
class Course:
    """What a diffusion's state follows from beside the labels; equal where the state of one is that of the other."""

    graph: Graph  # the object: another one of the same content is another graph
    n_classes: int
    steps: int
    score: str
    p: float

    @property
    def measure(self) -> Score:
        return score(self.score, self.p)

    @property
    def n_bytes(self) -> int:
        """The most that a state, the way back out of a turn and an iterate about to be written can take.

        A turn may replace every tensor, or write to each of its rows and note which those were.
        """
        size, iterate = self.graph.size, 4 * self.graph.size * self.n_classes
        state = (self.steps + 1) * iterate + rank_bytes(size)
        places, scratch = 8 * size * (self.steps + 3), 4 * size
        return 2 * state + places + iterate + 2 * scratch  # a state that is begun anew has a scratch of its own


@dataclass(frozen=True, eq=False)
class Kept:
    """``journal`` holds the iterates 0..T (N, C) and the ranks by the last, by node, and ``turn`` is when it did so.

    ``labeled`` positions and ``labels`` are those that had been diffused.
    """

    course: Course
    journal: Journal
    scratch: Scratch
    turn: int
    labeled: Index
    labels: Labels

    @property
    def n_labeled(self) -> int:
        return len(self.labeled)

    def goes_on(self, course: Course, labeled: Index, labels: Labels) -> bool:
        """Begin a turn, if these labels are the kept ones and more, and the kept state is not written over for good."""
        old = slice(self.n_labeled)
        same = torch.equal(self.labeled, labeled[old]) and torch.equal(self.labels, labels[old])
        return self.course == course and same and self.journal.begin(self.turn)

    def ended(self, labeled: Index, labels: Labels) -> "Kept":
        """The state of these labels, which the turn has brought about."""
        return replace(self, turn=self.journal.end(), labeled=labeled, labels=labels)


def blank(course: Course) -> Kept:
    """A turn begun on no label at all."""
    graph, shape = course.graph, (course.graph.size, course.n_classes)
    # numpy's zeros and not torch's: on a CPU the system gives no memory for them before they are written to
    zeros = [torch.from_numpy(np.zeros(shape, dtype=np.float32)).to(graph.device) for _ in range(course.steps + 1)]
    iterates: dict[Name, Tensor] = dict(enumerate(zeros))
    journal = Journal(iterates | ranks_without_heat(course.measure, graph, course.n_classes))
    journal.begin(turn := 0)
    nothing = torch.empty(0, dtype=torch.int64)
    return Kept(course, journal, Scratch(graph.size, graph.device), turn, nothing, nothing)
