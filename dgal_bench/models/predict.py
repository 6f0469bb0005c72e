"""The lazy forward pass of a query: each point through the network at most once, and counted."""

import torch
from torch import Tensor

from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.types import Index, Outputs
from dgal_bench.data.datamodule import PoolDataModule
from dgal_bench.models.task import TaskModule, check_outputs


class Predictor:
    """``predict(indices) -> Outputs`` in the order of ``indices``, memoised within the round.

    The network runs in eval mode under inference_mode on the module's device; its time is charged to ``phase``.
    ``n_scored`` is the number of different points passed through the network so far. If a pass runs out of memory, it
    goes on with half the images at a time.
    """

    def __init__(self, module: TaskModule, data: PoolDataModule, device: torch.device, clock: Stopwatch) -> None:
        self._module = module.eval().to(device)
        self._data = data
        self._device = device
        self._clock = clock
        self._row = torch.full((data.pool.size,), -1, dtype=torch.int64)  # position -> row of the outputs below
        self._outputs: list[Outputs] = []
        self.n_scored = 0

    def __call__(self, indices: Index, phase: str = "infer") -> Outputs:
        """The outputs of any positions.

        Raises:
            UserError: the network answers NaN, or a single image needs too much memory.
        """
        with self._clock.phase(phase):
            missing = indices[self._row[indices] < 0]
            if len(missing):
                self._score(self._unique(missing))
            if len(self._outputs) > 1:
                self._outputs = [_join(self._outputs)]
            rows = self._row[indices]
            outputs = self._outputs[0]
            return Outputs(outputs.log_probs[rows], outputs.features[rows])

    def _unique(self, ids: Index) -> Index:
        # A repeated id keeps the mark of one of its places: a scatter and a gather instead of a sort.
        places = torch.arange(len(ids))
        self._row[ids] = places
        return ids[self._row[ids] == places]

    def _score(self, ids: Index) -> None:
        outputs = self._forward(ids)
        check_outputs(outputs.log_probs, outputs.features)
        self._row[ids] = torch.arange(self.n_scored, self.n_scored + len(ids))
        self._outputs.append(outputs)
        self.n_scored += len(ids)

    @torch.inference_mode()
    def _forward(self, ids: Index) -> Outputs:
        results: list[tuple[Tensor, Tensor]] = []
        n_done = 0
        while n_done < len(ids):
            try:
                for images, _ in self._data.positions(ids[n_done:]):
                    logits, features = self._module(images.to(self._device))
                    results.append((torch.log_softmax(logits, dim=1).cpu(), features.cpu()))
                    n_done += len(images)
            except torch.OutOfMemoryError:
                pass
            if n_done < len(ids):  # after the except block, whose traceback holds the pass's memory
                self._data.halve_batch()
        return Outputs(*(torch.cat(parts) for parts in zip(*results, strict=True)))


class Rehearsal(Predictor):
    """For a query off the clock: two batches pass through the network, and their outputs serve for all points."""

    def _forward(self, ids: Index) -> Outputs:
        outputs = super()._forward(ids[: 2 * self._data.predict_batch_size])
        rows = torch.arange(len(ids)) % len(outputs.log_probs)
        return Outputs(outputs.log_probs[rows], outputs.features[rows])


def _join(parts: list[Outputs]) -> Outputs:
    return Outputs(torch.cat([p.log_probs for p in parts]), torch.cat([p.features for p in parts]))
