"""Runs of W&B brought up to their results files, online or as folders on disk."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before the import: its crash reports go out over the network, offline too, and it greets whoever logs in.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_SILENT", "true")

import wandb

from dgal_bench.errors import UserError
from dgal_bench.record import CellLog
from dgal_bench.tracking import facts
from dgal_bench.tracking.folders import Folders, Lock
from dgal_bench.tracking.images import Pictures
from dgal_bench.tracking.served import Asking, Served
from dgal_bench.tracking.settings import Tracking

INIT_SECONDS = 10
"""For a server to answer; wandb's own 90 are longer than many a sweep."""

FINISH_SECONDS = 60
"""For a run's last rows to be taken, where nobody waits for anything else."""

FOREIGN = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DISABLED")
"""Variables of the one run that 'wandb agent' or a script has in mind: with them every cell would become that run."""

TROUBLE = (wandb.Error, OSError)
"""What a server that is gone, or that does not know the key, ends in; wandb's timeouts are OSErrors."""


class UnreachableError(UserError):
    """W&B does not answer, or does not know the key."""

    exit_code = 1


def settings(finish_seconds: float = FINISH_SECONDS) -> wandb.Settings:
    """Nothing but what the results file says: no console, code, git or system metrics; and every wait is bounded."""
    wanted: dict[str, Any] = {
        "silent": True, "console": "off", "save_code": False, "disable_code": True, "disable_git": True,
        "program": "dgal-bench", "x_save_requirements": False, "x_disable_stats": True, "x_disable_machine_info": True,
        "init_timeout": INIT_SECONDS, "finish_timeout": finish_seconds, "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1,  # else a kill takes the rows of the last 15 s with it
    }  # fmt: skip
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


@dataclass(eq=False)
class Open:
    """A run that is being written: the lock on its folder, and how many rows it has been told."""

    run: Any
    lock: Lock
    n_rows: int = 0


class Mirror:
    """The runs of one process.

    ``warn`` is told once if W&B cannot be reached, and from then on everything is kept offline; where ``strict``, it
    is an UnreachableError. A server that takes a run's last rows in more than ``finish_seconds`` counts as such.
    """

    def __init__(
        self,
        tracking: Tracking,
        warn: Callable[[str], None],
        strict: bool = False,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        os.environ["WANDB_MODE"] = tracking.mode  # decided; an empty one, which is none, wandb would refuse
        for name in FOREIGN:
            os.environ.pop(name, None)
        self.tracking = tracking
        self._strict = strict
        self._warn = warn
        self._pictures = Pictures(tracking, warn)
        self._folders = Folders(tracking.images)
        self._finish_seconds = finish_seconds
        self._asking = Asking(tracking, INIT_SECONDS)
        self._open: dict[str, Open | None] = {}  # None: of another making there, and so left alone
        self._unpictured = False

    @property
    def online(self) -> bool:
        return self.tracking.mode == "online"

    def has(self, log: CellLog) -> bool:
        """Whether the run is there already, with all that the file says.

        Raises:
            UnreachableError: see ``strict``.
        """
        if self.online:
            try:
                served = self._served(log)
                return served is not None and served.whole(log)
            except TROUBLE as error:
                self._go_offline(log, error)
        return self._folders.has(log)

    def is_open(self, log: CellLog) -> bool:
        return facts.names(log).id in self._open

    def update(self, log: CellLog) -> bool:
        """Log the rows that the cell's run lacks, and what is known of it by now.

        False where W&B has rows of another making of the cell: they cannot be replaced, and the run is left as it is.
        """
        run_id = facts.names(log).id
        if run_id not in self._open:
            self._open[run_id] = self._opened(log)
        opened = self._open[run_id]
        if opened is None:
            return False
        for row, record in list(zip(facts.rows(log), log.records, strict=True))[opened.n_rows :]:
            # A run that goes on online has its first rows already: W&B drops what comes again, by its step.
            opened.run.log(row | self._pictures.table(log, record), step=record.round, commit=True)
        opened.n_rows = max(opened.n_rows, len(log.records))
        opened.run.summary.update(facts.summary(log))
        return True

    def finish(self, log: CellLog) -> None:
        """End the run of a cell as the cell has ended; other folders of it go.

        One that the server does not take to its end is written anew, offline.
        """
        ended = self._open.pop(facts.names(log).id)
        if ended is None:
            return
        try:
            ended.run.finish(exit_code=facts.EXIT_CODES[log.status])
        except TROUBLE as error:
            if not self.online:
                raise
            ended.lock.release()
            self._go_offline(log, error)
            self.update(log)
            self.finish(log)
            return
        if not self.online:
            self._folders.mark(log, ended.lock.folder)
        self._folders.clear(log, ended.lock)

    def _opened(self, log: CellLog) -> Open | None:
        self._folders.prepare(log)
        if self.online:
            try:
                return self._resumed(log)
            except TROUBLE as error:
                self._go_offline(log, error)
        return self._begun(log)

    def _resumed(self, log: CellLog) -> Open | None:
        """What the server has of the run, if anything, is gone on with; asked first: opening alone would change it."""
        served = self._served(log)
        if served is None or not served.earlier(log):
            return self._begun(log)
        self._warn(
            f"{log.header['cell']}: W&B has rows of an earlier making of this cell, which it cannot replace: "
            "use another wandb.project=NAME"
        )
        return None

    def _begun(self, log: CellLog) -> Open:
        run = self._init(log)
        return Open(run, Lock(Path(run.settings.sync_dir)))

    def _served(self, log: CellLog) -> Served | None:
        served = self._asking.about(log)
        if served and not self._unpictured and served.lacks_pictures(log, self.tracking.images):
            self._unpictured = True
            self._warn(
                f"{log.header['cell']}: W&B has these rows without images and cannot replace them: "
                "leave out wandb.images, or use another wandb.project=NAME"
            )
        return served

    def _go_offline(self, log: CellLog, error: Exception) -> None:
        """wandb forgets the runs of a process only with all of them: those still open are written anew as well."""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        for opened in self._open.values():
            if opened is not None:
                opened.lock.release()
        self._open.clear()
        wandb.teardown()
        if self._strict:
            raise UnreachableError(f"W&B cannot be reached ({reason}): wandb.mode=offline keeps runs on disk")
        self.tracking = replace(self.tracking, mode="offline")
        self._warn(f"W&B cannot be reached ({reason}): runs are kept offline, in {self._folders.of(log)}")

    def _init(self, log: CellLog) -> Any:
        known = facts.names(log)
        run = wandb.init(
            id=known.id, name=known.name, group=known.group, tags=known.tags, job_type=known.suite,
            project=self.tracking.project, entity=self.tracking.entity, config=facts.config(log),
            dir=self._folders.of(log).parent, mode="online" if self.online else "offline",
            resume="allow" if self.online else None, reinit="create_new", settings=settings(self._finish_seconds),
        )  # fmt: skip
        for axis in facts.AXES:
            run.define_metric(axis)
        for metric, axis in facts.DEFINITIONS:
            run.define_metric(metric, step_metric=axis)
        return run
