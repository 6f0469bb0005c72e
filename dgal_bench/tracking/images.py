"""Picked images of a few rounds as tables: they need the data set, the results file has only positions."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgal_bench.errors import DataError, UserError
from dgal_bench.record import CellLog, RoundRecord
from dgal_bench.tracking.settings import Tracking

if TYPE_CHECKING:
    from dgal_bench.data.images import ImageData

COLUMNS: list[str | int] = ["position", "image", "class"]


class Pictures:
    """The pictures that were asked for; where they cannot be had ``warn`` is told once, and there are none."""

    def __init__(self, tracking: Tracking, warn: Callable[[str], None]) -> None:
        self._tracking = tracking
        self._warn = warn
        self._loaded: dict[str, ImageData | None] = {}  # by the sha256 in the fingerprint

    def table(self, log: CellLog, record: RoundRecord) -> dict[str, Any]:
        """``picked``: a table of the batch of a round that was asked for, else nothing."""
        if record.round not in self._tracking.images or not record.indices:
            return {}
        images = self._images(log)
        if images is None:
            return {}
        import wandb

        rows = zip(record.indices, record.classes or [], strict=True)
        shown = [[position, wandb.Image(_pixels(images, position)), label] for position, label in rows]
        return {"picked": wandb.Table(columns=COLUMNS, data=shown)}

    def _images(self, log: CellLog) -> "ImageData | None":
        content = str(log.header["fingerprint"].get("data"))
        if content not in self._loaded:
            self._loaded = {content: self._load(log, content)}  # one data set in memory at a time
        return self._loaded[content]

    def _load(self, log: CellLog, content: str) -> "ImageData | None":
        from dgal_bench.config import dataset_of
        from dgal_bench.data.datasets import load
        from dgal_bench.data.images import Request

        where = Path(self._tracking.data), Path(self._tracking.cache)
        try:
            found = load(Request(dataset_of(log.header["config"]), *where, lambda *_: None))
            if found.sha256 != content:
                raise DataError("the data set there is another one")
            if found.images.dtype.itemsize > 1:
                raise DataError("feature vectors are no images")
        except UserError as error:
            self._warn(f"W&B gets no picked images of {log.header['cell'].rsplit('/', 2)[0]}: {error}")
            return None
        return found


def _pixels(data: "ImageData", position: int) -> Any:
    """Height, width and channels of 0..255, as wandb takes them."""
    channels_last = data.images[position].permute(1, 2, 0).int() * 255 // data.maximum
    return channels_last.byte().squeeze(-1).numpy()
