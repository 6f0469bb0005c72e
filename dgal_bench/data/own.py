"""What all data of a user's own have in common: a path, and a split where they bring none."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dgal_bench.arrays import Index, Labels
from dgal_bench.data.images import Request
from dgal_bench.errors import ConfigError, DataError
from dgal_bench.seeding import rng_for


def own_path(request: Request, what: str) -> Path:
    """``dataset.path``, which a user's own data cannot do without."""
    config = request.config
    if not config.path:
        raise ConfigError(
            f"dataset={config.name} needs to know where your data are: set dataset.path={what} (make: DATA_PATH={what})"
        )
    return Path(os.path.expanduser(config.path))


def stratified_split(labels: Labels, classes: Sequence[str], share: float) -> tuple[Index, Index]:
    """Pool and test places, ascending: of every class ``share``, rounded, is drawn for the test with seed 0.

    A class's draw depends on its name and size alone.

    Raises:
        ConfigError: the share is not within (0, 1), or leaves a class without a place in the pool or in the test.
        DataError: a class has one example.
    """
    if not 0 < share < 1:
        raise ConfigError(f"dataset.test_share={share}: use a share above 0 and below 1, such as 0.2")
    by_class = np.split(labels.argsort(stable=True).numpy(), np.cumsum(labels.bincount(minlength=len(classes)))[:-1])
    test = []
    for name, members in zip(classes, by_class, strict=True):
        n, n_test = len(members), int(share * len(members) + 0.5)
        if n == 1:
            raise DataError(
                f"class '{name}' has a single example, and a split needs one for the pool and one for the test: "
                "add examples, remove the class or bring a test split of your own"
            )
        if not 0 < n_test < n:
            side, way = ("pool", "lower") if n_test else ("test", "raise")
            raise ConfigError(
                f"dataset.test_share={share} leaves class '{name}' of {n} examples none for the {side}: {way} it"
            )
        test.append(members[rng_for(0, "test split", name).permutation(n)[:n_test]])
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(test)] = True
    return torch.from_numpy(np.flatnonzero(~chosen)), torch.from_numpy(np.flatnonzero(chosen))
