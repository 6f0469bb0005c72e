"""Data sets for tests, asked for by name."""

from pathlib import Path

from dgal_bench.config.schema import DatasetConfig
from dgal_bench.data import datasets
from dgal_bench.data.image_data import DatasetRequest, ImageData


def request(kind, root, cache=Path("no cache"), progress=lambda what, done, of: None, **settings):
    """What a reader is given; ``settings`` of the data set's configuration."""
    config = {
        "name": kind, "kind": kind, "n_classes": None, "path": None, "image_size": None, "test_share": 0.2,
        "pool_size": None, "test_size": None,
    }  # fmt: skip
    return DatasetRequest(DatasetConfig(**(config | settings)), root, cache, progress)


def load(kind, root, pool_size=None, test_size=None, **settings) -> ImageData:
    return datasets.load(request(kind, root, pool_size=pool_size, test_size=test_size, **settings))
