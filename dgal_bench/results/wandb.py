"""Mirrors results files to W&B runs, online or as folders on disk, in a sweep (``RunMirror``) or later (``push``)."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before the import: wandb sends crash reports over the network, offline too, and greets at each login.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_SILENT", "true")

import wandb
from tqdm import tqdm

from dgal_bench.core.errors import DataError, UserError, error_text
from dgal_bench.core.files import ensure_writable, lock_holder
from dgal_bench.results.metrics import area_under_curve, cumulative_query_seconds, mean_query_seconds, mean_scored
from dgal_bench.results.reader import read_results
from dgal_bench.results.rows import RoundRecord, RunLog
from dgal_bench.results.wandb_process import Tracking, runs_folder

if TYPE_CHECKING:
    from dgal_bench.data.image_data import ImageData


# The content of a W&B run: names, rows, summary. Pure functions of a results file.

MIRROR_VERSION = 1
"""Raised with any change of the content: runs of another version are written again where that is possible."""

AXES = ("labels", "query_seconds", "round")

DEFINITIONS = (
    ("accuracy/by_labels", "labels"),
    ("accuracy/by_query_seconds", "query_seconds"),
    *((f"{family}/*", "round") for family in ("query", "train", "test", "graph", "propagated", "extra", "machine")),
)
"""Metrics and their axes. W&B takes one axis for a metric, so accuracy is there twice."""

EXIT_CODES = {"done": 0, "skipped": 0, "failed": 1, "partial": 255}
"""255: as wandb itself ends an interrupted run."""


@dataclass(frozen=True)
class RunNames:
    """Identity and labels of a W&B run: ``id`` is how it is found again, the others are for display."""

    id: str
    suite: str
    dataset: str
    strategy: str  # the folder's name: dgmg, dgmg+graph.graph_k=10
    seed: int
    profile: str
    algorithm_version: int

    @property
    def group(self) -> str:
        return f"{self.dataset}/{self.strategy}"

    @property
    def name(self) -> str:
        return f"{self.strategy}/seed-{self.seed}"

    @property
    def tags(self) -> list[str]:
        """W&B takes tags of 1 to 64 characters, once each."""
        tags = (self.suite, self.dataset, self.profile, self.strategy, f"algorithm-{self.algorithm_version}")
        return list(dict.fromkeys(tag[:64] for tag in tags))


def suite_of(log: RunLog) -> str:
    """The folder above the data set's."""
    parents = log.path.absolute().parents
    return parents[min(2, len(parents) - 1)].name


def run_names(log: RunLog) -> RunNames:
    """Independent of time and machine; another configuration or other data gives another id."""
    header = log.header
    dataset, strategy, _ = header["cell"].rsplit("/", 2)
    suite, fingerprint = suite_of(log), header["fingerprint"]
    version = fingerprint["algorithm_version"]
    content = [suite, header["cell"], fingerprint["config"], fingerprint.get("data"), version, header.get("initial")]
    return RunNames(
        _sha256(content)[:20], suite, dataset, strategy, int(header["config"]["seed"]), header["profile"], version
    )


def run_config(log: RunLog) -> dict[str, Any]:
    """The resolved configuration, and the keys by which runs are grouped and filtered."""
    header, names = log.header, run_names(log)
    sections = ("cell", "fingerprint", "provenance", "network", "data")
    return {
        **header["config"],
        "suite": names.suite,
        "dataset_name": names.dataset,
        "strategy_name": names.strategy,
        "profile": names.profile,
        "algorithm_version": names.algorithm_version,
        **{name: header[name] for name in sections if name in header},
    }


def logged_rows(log: RunLog) -> list[dict[str, Any]]:
    """What is logged of each round, at the step of its number, without the fields that a row lacks."""
    spent = cumulative_query_seconds(log.records)[: len(log.records)]  # without records it still has one value
    return [
        {
            "round": record.round,
            "labels": record.n_labeled,
            "query_seconds": seconds,
            "accuracy/by_labels": record.accuracy,
            "accuracy/by_query_seconds": record.accuracy,
            **_facts(record),
        }
        for record, seconds in zip(log.records, spent, strict=True)
    ]


def _facts(record: RoundRecord) -> dict[str, Any]:
    facts = {
        "query/seconds": record.query_seconds,
        "query/candidates": record.n_candidates,
        "query/points_scored": record.n_scored,
        "train/seconds": record.train_seconds,
        "train/loss": record.train_loss,
        "train/epochs": record.epochs,
        "train/underfit": int(record.underfit),
        "test/seconds": record.test_seconds,
        "graph/reach": record.reach,
        "graph/boundary_share": record.boundary_share,
        "graph/ties": record.ties,
        "machine/jobs": record.jobs,
        "machine/load": record.load,
        "machine/busy_elsewhere": record.busy_elsewhere,
    }
    families = {"query/phase": record.seconds, "propagated": record.propagated, "extra": record.extra}
    for family, values in families.items():
        facts |= {f"{family}/{name}": value for name, value in (values or {}).items()}
    return {name: value for name, value in facts.items() if value is not None}


def run_summary(log: RunLog) -> dict[str, Any]:
    """The values in a table of runs. The area and the means need two rows."""
    n_rows = len(log.records)
    digests = {"digest": mirror_digest(log), "rows_digest": rows_digest(log, n_rows)}
    summary: dict[str, Any] = {"status": log.status, "rows": n_rows, **digests, **_setup(log)}
    if log.records:
        summary["final_accuracy"] = log.records[-1].accuracy
    if len(log.records) > 1:
        summary["area"] = area_under_curve(log.records)
        summary["mean_query_seconds"] = mean_query_seconds(log.records)
        summary["mean_points_scored"] = mean_scored(log.records)
    if log.status == "failed" and log.failure:
        summary["error"] = log.failure["error"]
    return summary


def _setup(log: RunLog) -> dict[str, Any]:
    """Seconds of each part of the set-up, and the diagnostics of the graph."""
    setup = log.header.get("setup", {})
    seconds = {f"setup/{name}_seconds": part["seconds"] for name, part in setup.items() if part and "seconds" in part}
    plain = {k: v for k, v in (setup.get("graph") or {}).items() if isinstance(v, bool | int | float | str)}
    return seconds | {f"graph/{name}": value for name, value in plain.items() if not name.endswith("seconds")}


def mirror_digest(log: RunLog) -> str:
    """Equal where the W&B run would have the same content."""
    failure = log.failure["error"] if log.failure else None
    return _sha256([MIRROR_VERSION, log.lines[0], _lines_of(log, len(log.records)), log.status, failure])[:20]


def rows_digest(log: RunLog, n_rows: int) -> str:
    """Of the first rows: a run executed again has the same id and other seconds."""
    return _sha256(_lines_of(log, n_rows))[:20]


def _lines_of(log: RunLog, n_rows: int) -> list[Mapping[str, Any]]:
    """As in the file: later versions of the package read more fields, with their defaults."""
    return [line for line in log.lines if line["kind"] == "round"][:n_rows]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Images of picked points as tables, for a few rounds. They need the data set: a results file has positions alone.

COLUMNS: list[str | int] = ["position", "image", "class"]


class PickedImages:
    """Tables of the rounds in ``wandb.images``. Without the data set there are none, and one call of ``warn``."""

    def __init__(self, tracking: Tracking, warn: Callable[[str], None]) -> None:
        self._tracking = tracking
        self._warn = warn
        self._loaded: dict[str, ImageData | None] = {}  # by the sha256 in the fingerprint

    def table(self, log: RunLog, record: RoundRecord) -> dict[str, Any]:
        """``picked``: a table of the round's batch; empty for a round that is not in ``wandb.images``."""
        if record.round not in self._tracking.images or not record.indices:
            return {}
        images = self._images(log)
        if images is None:
            return {}
        rows = zip(record.indices, record.classes or [], strict=True)
        table = [[position, wandb.Image(_pixels(images, position)), label] for position, label in rows]
        return {"picked": wandb.Table(columns=COLUMNS, data=table)}

    def _images(self, log: RunLog) -> "ImageData | None":
        content = str(log.header["fingerprint"].get("data"))
        if content not in self._loaded:
            self._loaded = {content: self._load(log, content)}  # one data set in memory at a time
        return self._loaded[content]

    def _load(self, log: RunLog, content: str) -> "ImageData | None":
        from dgal_bench.config.schema import dataset_config
        from dgal_bench.data.datasets import load
        from dgal_bench.data.image_data import DatasetRequest

        folders = Path(self._tracking.data), Path(self._tracking.cache)
        try:
            data = load(DatasetRequest(dataset_config(log.header["config"]), *folders, lambda *_: None))
            if data.sha256 != content:
                raise DataError("the data set there is another one")
            if data.images.dtype.itemsize > 1:
                raise DataError("feature vectors are no images")
        except UserError as error:
            self._warn(f"W&B gets no picked images of {log.header['cell'].rsplit('/', 2)[0]}: {error}")
            return None
        return data


def _pixels(data: "ImageData", position: int) -> Any:
    """Height, width and channels of 0..255, as wandb takes them."""
    channels_last = data.images[position].permute(1, 2, 0).int() * 255 // data.maximum
    return channels_last.byte().squeeze(-1).numpy()


# The state of a run on the server, read before anything there is changed.


@dataclass(frozen=True)
class ServerRun:
    """A run as in its summary on the server."""

    state: str
    n_rows: int
    rows_digest: str | None
    digest: str | None
    has_images: bool

    def is_complete(self, log: RunLog) -> bool:
        """Whether it has the content of the file, and is finished if the run is."""
        ended = self.state == "finished" or log.status not in ("done", "skipped")
        return ended and self.digest == mirror_digest(log)

    def is_of_other_rows(self, log: RunLog) -> bool:
        """Whether its rows are of another execution of the run: a deleted one, or one in another results folder."""
        return self.n_rows > 0 and self.rows_digest != rows_digest(log, self.n_rows)

    def lacks_images(self, log: RunLog, images: tuple[int, ...]) -> bool:
        """Whether it has rows of the rounds in ``images``, without images."""
        rounds = {record.round for record in log.records[: self.n_rows] if record.indices}
        return not self.has_images and bool(rounds & set(images))


class ServerReader:
    """Reads runs of one project. The first call of ``about`` logs in."""

    def __init__(self, tracking: Tracking, seconds: int) -> None:
        self._tracking = tracking
        self._seconds = seconds
        self._api: Any = None

    def about(self, log: RunLog) -> ServerRun | None:
        """None where there is no such run."""
        parts = (self._tracking.entity, self._tracking.project, run_names(log).id)
        if self._api is None:
            self._api = wandb.Api(timeout=self._seconds)
        try:
            run = self._api.run("/".join(part for part in parts if part))
        except wandb.errors.CommError as error:
            if isinstance(error.exc, ValueError):  # wandb's answer for a run that does not exist
                return None
            raise
        summary = run.summary
        digests, has_images = (summary.get("rows_digest"), summary.get("digest")), summary.get("picked") is not None
        return ServerRun(run.state, int(summary.get("rows") or 0), *digests, has_images)


# Folders of offline runs. wandb cannot continue one, so an incomplete folder is replaced by a new one. A complete
# folder has a marker, written last, and is not changed; a folder is locked while a process writes to it.

MARKER = "dgal-bench.json"


class FolderLock:
    """Locks the folder of a run until ``release`` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._file = os.open(self.folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        os.close(self._file)


class RunFolders:
    """The folders of offline runs, in one folder for each results folder. ``images``: rounds whose picks are shown."""

    def __init__(self, images: Sequence[int]) -> None:
        self._images = images

    def of(self, log: RunLog) -> Path:
        return runs_folder(results_root_of(log))

    def prepare(self, log: RunLog) -> None:
        """Check that the folder is writable: wandb itself would use a temporary folder instead.

        Raises:
            ResultsError: it is not.
        """
        folder = self.of(log)
        ensure_writable(folder, str(folder), "set WANDB_DIR=DIR")
        os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # else images for upload are stored in the home folder

    def has(self, log: RunLog) -> bool:
        """Whether there is a complete one with the content of the file and the images of the rounds."""
        rounds = set(self._images) & {record.round for record in log.records if record.indices}
        markers, digest = [_marker(folder) for folder in self._all(log)], mirror_digest(log)
        return any(marker.get("digest") == digest and rounds <= set(marker["images"]) for marker in markers)

    def mark(self, log: RunLog, folder: Path) -> None:
        """Mark a folder as complete."""
        marker = {"cell": log.header["cell"], "digest": mirror_digest(log), "images": list(self._images)}
        (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")

    def clear(self, log: RunLog, lock: FolderLock) -> None:
        """Remove a run's other folders, unless locked: 'wandb sync' would replace this one's content with theirs."""
        for folder in self._all(log):
            if folder != lock.folder and not _is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)  # another process may remove it too
        lock.release()

    def _all(self, log: RunLog) -> list[Path]:
        return sorted(self.of(log).glob(f"*run-*-{run_names(log).id}"))


def results_root_of(log: RunLog) -> Path:
    """RESULTS of RESULTS/suite/dataset/strategy/seed-0.jsonl."""
    parents = log.path.absolute().parents
    return parents[min(3, len(parents) - 1)]


def _is_locked(folder: Path) -> bool:
    try:
        file = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _marker(folder: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError):
        marker: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker
    return {}


INIT_SECONDS = 10
"""Time limit for an answer of the server; wandb's own 90 s are longer than many sweeps."""

FINISH_SECONDS = 60
"""Time limit for sending a run's last rows, in ``push``."""

FOREIGN = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DISABLED")
"""Variables that 'wandb agent' or a script sets for one run: with them every run would become that one."""

CONNECTION_ERRORS = (wandb.Error, OSError)
"""Raised for a server that does not answer or refuses the key; wandb's timeouts are OSErrors."""


class UnreachableError(UserError):
    """W&B does not answer, or refuses the key."""

    exit_code = 1


def wandb_settings(finish_seconds: float = FINISH_SECONDS) -> wandb.Settings:
    """Send only the content of the results file (no console, code, git or system metrics); every wait is bounded."""
    values: dict[str, Any] = {
        "silent": True, "console": "off", "save_code": False, "disable_code": True, "disable_git": True,
        "program": "dgal-bench", "x_save_requirements": False, "x_disable_stats": True, "x_disable_machine_info": True,
        "init_timeout": INIT_SECONDS, "finish_timeout": finish_seconds, "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1,  # else a kill loses the rows of the last 15 s
    }  # fmt: skip
    return wandb.Settings(**{name: value for name, value in values.items() if name in wandb.Settings.model_fields})


@dataclass(eq=False)
class OpenRun:
    """A W&B run that is being written, with the lock on its folder; ``n_rows`` are logged."""

    run: Any
    lock: FolderLock
    n_rows: int = 0


class RunMirror:
    """Writes the W&B runs of one process.

    If W&B cannot be reached, ``warn`` is called once and all later runs are offline; with ``strict`` it is an
    UnreachableError. A server that needs over ``finish_seconds`` for a run's last rows counts as unreachable.
    """

    def __init__(
        self,
        tracking: Tracking,
        warn: Callable[[str], None],
        strict: bool = False,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        os.environ["WANDB_MODE"] = tracking.mode  # wandb refuses an empty one
        for name in FOREIGN:
            os.environ.pop(name, None)
        self.tracking = tracking
        self._strict = strict
        self._warn = warn
        self._images = PickedImages(tracking, warn)
        self._folders = RunFolders(tracking.images)
        self._finish_seconds = finish_seconds
        self._server = ServerReader(tracking, INIT_SECONDS)
        self._open: dict[str, OpenRun | None] = {}  # None: the server has other rows, do not write
        self._warned_of_images = False

    @property
    def online(self) -> bool:
        return self.tracking.mode == "online"

    def has(self, log: RunLog) -> bool:
        """Whether W&B has the run already, with the content of the file.

        Raises:
            UnreachableError: see ``strict``.
        """
        if self.online:
            try:
                on_server = self._on_server(log)
                return on_server is not None and on_server.is_complete(log)
            except CONNECTION_ERRORS as error:
                self._go_offline(log, error)
        return self._folders.has(log)

    def is_open(self, log: RunLog) -> bool:
        return run_names(log).id in self._open

    def update(self, log: RunLog) -> bool:
        """Log the rows that the W&B run lacks, and the summary.

        False where W&B has rows of another execution of the run: they cannot be replaced, and nothing is logged.
        """
        run_id = run_names(log).id
        if run_id not in self._open:
            self._open[run_id] = self._open_run(log)
        writing = self._open[run_id]
        if writing is None:
            return False
        for row, record in list(zip(logged_rows(log), log.records, strict=True))[writing.n_rows :]:
            # A continued online run has its first rows already: W&B drops steps that it has.
            writing.run.log(row | self._images.table(log, record), step=record.round, commit=True)
        writing.n_rows = max(writing.n_rows, len(log.records))
        writing.run.summary.update(run_summary(log))
        return True

    def finish(self, log: RunLog) -> None:
        """End the W&B run with the exit code of the run's status, and remove other folders of it.

        If the server does not take it to the end, it is written again, offline.
        """
        writing = self._open.pop(run_names(log).id)
        if writing is None:
            return
        try:
            writing.run.finish(exit_code=EXIT_CODES[log.status])
        except CONNECTION_ERRORS as error:
            if not self.online:
                raise
            writing.lock.release()
            self._go_offline(log, error)
            self.update(log)
            self.finish(log)
            return
        if not self.online:
            self._folders.mark(log, writing.lock.folder)
        self._folders.clear(log, writing.lock)

    def _open_run(self, log: RunLog) -> OpenRun | None:
        self._folders.prepare(log)
        if self.online:
            try:
                return self._resume(log)
            except CONNECTION_ERRORS as error:
                self._go_offline(log, error)
        return self._start(log)

    def _resume(self, log: RunLog) -> OpenRun | None:
        """Continue the run on the server, if any. Its rows are checked first: opening alone would change it."""
        on_server = self._on_server(log)
        if on_server is None or not on_server.is_of_other_rows(log):
            return self._start(log)
        self._warn(
            f"{log.header['cell']}: W&B has rows of an earlier execution of this run and cannot replace them: "
            "use another wandb.project=NAME"
        )
        return None

    def _start(self, log: RunLog) -> OpenRun:
        run = self._init(log)
        return OpenRun(run, FolderLock(Path(run.settings.sync_dir)))

    def _on_server(self, log: RunLog) -> ServerRun | None:
        on_server = self._server.about(log)
        if on_server and not self._warned_of_images and on_server.lacks_images(log, self.tracking.images):
            self._warned_of_images = True
            self._warn(
                f"{log.header['cell']}: W&B has these rows without images and cannot replace them: "
                "leave out wandb.images, or use another wandb.project=NAME"
            )
        return on_server

    def _go_offline(self, log: RunLog, error: Exception) -> None:
        """wandb can only drop all runs of a process at once: those still open are written again, offline."""
        reason = error_text(error)
        for writing in self._open.values():
            if writing is not None:
                writing.lock.release()
        self._open.clear()
        wandb.teardown()
        if self._strict:
            raise UnreachableError(f"W&B cannot be reached ({reason}): wandb.mode=offline keeps runs on disk")
        self.tracking = replace(self.tracking, mode="offline")
        self._warn(f"W&B cannot be reached ({reason}): runs are kept offline, in {self._folders.of(log)}")

    def _init(self, log: RunLog) -> Any:
        names = run_names(log)
        run = wandb.init(
            id=names.id, name=names.name, group=names.group, tags=names.tags, job_type=names.suite,
            project=self.tracking.project, entity=self.tracking.entity, config=run_config(log),
            dir=self._folders.of(log).parent, mode="online" if self.online else "offline",
            resume="allow" if self.online else None, reinit="create_new", settings=wandb_settings(self._finish_seconds),
        )  # fmt: skip
        for axis in AXES:
            run.define_metric(axis)
        for metric, axis in DEFINITIONS:
            run.define_metric(metric, step_metric=axis)
        return run


# Complete runs from results files: after a crash, or from a machine without a network.


@dataclass
class PushResult:
    """Counts of a results folder's runs, by outcome."""

    mode: str
    pushed: int = 0
    present: int = 0
    refused: int = 0
    not_begun: list[str] = field(default_factory=list)
    at_work: list[str] = field(default_factory=list)
    folders: set[Path] = field(default_factory=set)

    @property
    def exit_code(self) -> int:
        """1 where W&B keeps rows of an earlier execution."""
        return 1 if self.refused else 0

    @property
    def text(self) -> str:
        n_runs = self.pushed + self.present + self.refused
        where = "online" if self.mode == "online" else f"offline, in {', '.join(map(str, sorted(self.folders)))}"
        counts = f"{n_runs} run{'s' * (n_runs != 1)}: {self.pushed} pushed, {self.present} already there"
        counts += f", {self.refused} refused" if self.refused else ""
        lines = [f"{counts}; {where}"]
        if self.mode == "offline" and self.folders:
            paths = " ".join(f"{folder}/offline-run-*" for folder in sorted(self.folders))
            lines[0] += f"; 'wandb sync {paths}' sends them"
        if self.not_begun:
            lines.append(f"Not begun, and so no runs: {_some(self.not_begun)}")
        if self.at_work:
            lines.append(f"At work now, push again later: {_some(self.at_work)}")
        return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def push(results: Path, tracking: Tracking, strict: bool, warn: Callable[[str], None]) -> PushResult:
    """Write the W&B runs of a results folder; those with the content of their files are not touched.

    Raises:
        ResultsError: there are no results, or a file is damaged.
        UnreachableError: W&B cannot be reached, and ``strict``.
    """
    logs = read_results(results)
    mirror, outcome = RunMirror(tracking, warn, strict), PushResult(tracking.mode)
    for log in _with_progress(logs):
        if not log.begun:
            outcome.not_begun.append(log.header["cell"])
        elif lock_holder(log.path) is not None:
            outcome.at_work.append(log.header["cell"])
        elif mirror.has(log):
            outcome.present += 1
        else:
            written = mirror.update(log)
            mirror.finish(log)
            outcome.pushed += written
            outcome.refused += not written
        if log.begun:
            outcome.folders.add(runs_folder(results_root_of(log)))
    outcome.mode = mirror.tracking.mode
    return outcome


def _with_progress(logs: list[RunLog]) -> Iterable[RunLog]:
    """A bar on a terminal, nothing elsewhere."""
    bar: Iterable[RunLog] = tqdm(logs, desc="push", unit="run", file=sys.stderr, leave=False, disable=None)
    return bar
