"""What W&B's server has of a run: asked before anything there is changed. Imported by runs.py, which sets wandb up."""

from dataclasses import dataclass
from typing import Any

import wandb

from dgal_bench.record import CellLog
from dgal_bench.tracking import facts
from dgal_bench.tracking.settings import Tracking


@dataclass(frozen=True)
class Served:
    """A run as its summary on the server has it."""

    state: str
    n_rows: int
    rows_digest: str | None
    digest: str | None
    pictured: bool

    def whole(self, log: CellLog) -> bool:
        """Whether it has all that the file says, and has ended where the cell has."""
        ended = self.state == "finished" or log.status not in ("done", "skipped")
        return ended and self.digest == facts.digest(log)

    def earlier(self, log: CellLog) -> bool:
        """Whether its rows are of another making of the cell: deleted and run again, or of another results folder."""
        return self.n_rows > 0 and self.rows_digest != facts.rows_digest(log, self.n_rows)

    def lacks_pictures(self, log: CellLog, images: tuple[int, ...]) -> bool:
        """Whether pictures are asked for in rows that it has without any."""
        rounds = {record.round for record in log.records[: self.n_rows] if record.indices}
        return not self.pictured and bool(rounds & set(images))


class Asking:
    """wandb's reader of one project, made with the first question: it logs in."""

    def __init__(self, tracking: Tracking, seconds: int) -> None:
        self._tracking = tracking
        self._seconds = seconds
        self._api: Any = None

    def about(self, log: CellLog) -> Served | None:
        """None where there is no such run."""
        parts = (self._tracking.entity, self._tracking.project, facts.names(log).id)
        if self._api is None:
            self._api = wandb.Api(timeout=self._seconds)
        try:
            found = self._api.run("/".join(part for part in parts if part))
        except wandb.errors.CommError as error:
            if isinstance(error.exc, ValueError):  # how wandb says that there is no such run
                return None
            raise
        told = found.summary
        digests = told.get("rows_digest"), told.get("digest")
        return Served(found.state, int(told.get("rows") or 0), *digests, pictured=told.get("picked") is not None)
