"""The lazy forward pass of a query: each point through the network at most once, and counted."""

import torch
from torch import Tensor

from dgal_bench.arrays import Index, Outputs
from dgal_bench.clock import Stopwatch
from dgal_bench.data.datamodule import PoolDataModule
from dgal_bench.models.task import TaskModule


class Predictor:
    """``predict(indices) -> Outputs`` in the order of ``indices``, memoised within the round.

    The network runs in eval mode under inference_mode on the module's device; its time is the phase ``infer``.
    ``n_scored`` is the number of different points passed through the network so far.
    """

    def __init__(self, module: TaskModule, data: PoolDataModule, device: torch.device, clock: Stopwatch) -> None:
        self._module = module.eval().to(device)
        self._data = data
        self._device = device
        self._clock = clock
        self._row = torch.full((data.pool.size,), -1, dtype=torch.int64)  # position -> row of the outputs below
        self._outputs: list[Outputs] = []
        self.n_scored = 0

    def __call__(self, indices: Index) -> Outputs:
        with self._clock.phase("infer"):
            missing = indices[self._row[indices] < 0]
            if len(missing):
                self._score(self._once(missing))
            if len(self._outputs) > 1:
                self._outputs = [_joined(self._outputs)]
            rows = self._row[indices]
            known = self._outputs[0]
            return Outputs(known.log_probs[rows], known.features[rows])

    def _once(self, ids: Index) -> Index:
        # A position given twice keeps the mark of one of its places: a scatter and a gather instead of a sort.
        places = torch.arange(len(ids))
        self._row[ids] = places
        return ids[self._row[ids] == places]

    @torch.inference_mode()
    def _score(self, ids: Index) -> None:
        results: list[tuple[Tensor, Tensor]] = []
        for images, _ in self._data.positions(ids):
            logits, features = self._module.net(images.to(self._device))
            results.append((torch.log_softmax(logits, dim=1).cpu(), features.cpu()))
        log_probs, features = (torch.cat(parts) for parts in zip(*results, strict=True))
        self._row[ids] = torch.arange(self.n_scored, self.n_scored + len(ids))
        self._outputs.append(Outputs(log_probs, features))
        self.n_scored += len(ids)


def _joined(parts: list[Outputs]) -> Outputs:
    return Outputs(torch.cat([p.log_probs for p in parts]), torch.cat([p.features for p in parts]))
