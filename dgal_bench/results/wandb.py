"""Runs of W&B brought up to their results files, online or as folders on disk."""

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

import wandb
from tqdm import tqdm

from dgal_bench.core.errors import DataError, UserError
from dgal_bench.core.files import ensure_writable, live_holder
from dgal_bench.results.metrics import area_under_curve, cumulative_query_seconds, mean_query_seconds, mean_scored
from dgal_bench.results.reader import read_results
from dgal_bench.results.rows import RoundRecord, RunLog
from dgal_bench.results.tracking import Tracking, runs_folder

if TYPE_CHECKING:
    from dgal_bench.data.image_data import ImageData


# What W&B is told of a run: its names, its rows, its summary. Pure functions of a results file.


MIRROR_VERSION = 1
"""Raised with any change of what W&B is told: runs of another version are made again where that can be done."""

AXES = ("labels", "query_seconds", "round")

DEFINITIONS = (
    ("accuracy/by_labels", "labels"),
    ("accuracy/by_query_seconds", "query_seconds"),
    *((f"{family}/*", "round") for family in ("query", "train", "test", "graph", "propagated", "extra", "machine")),
)
"""Metrics and the axis that each is drawn against. One metric has one, so that accuracy is there twice."""

EXIT_CODES = {"done": 0, "skipped": 0, "failed": 1, "partial": 255}
"""255: how wandb itself ends an interrupted run."""


@dataclass(frozen=True)
class RunNames:
    """Where a run is filed: by ``id`` it is found again, the rest is for people."""

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
    """The same whenever and from wherever a run is mirrored; another configuration or other data is another run."""
    header = log.header
    dataset, strategy, _ = header["cell"].rsplit("/", 2)
    suite, said = suite_of(log), header["fingerprint"]
    version = said["algorithm_version"]
    content = [suite, header["cell"], said["config"], said.get("data"), version, header.get("initial")]
    return RunNames(
        _sha256(content)[:20], suite, dataset, strategy, int(header["config"]["seed"]), header["profile"], version
    )


def run_config(log: RunLog) -> dict[str, Any]:
    """The resolved configuration, and beside it what runs are grouped and filtered by."""
    header, known = log.header, run_names(log)
    about = ("cell", "fingerprint", "provenance", "network", "data")
    return {
        **header["config"],
        "suite": known.suite,
        "dataset_name": known.dataset,
        "strategy_name": known.strategy,
        "profile": known.profile,
        "algorithm_version": known.algorithm_version,
        **{name: header[name] for name in about if name in header},
    }


def logged_rows(log: RunLog) -> list[dict[str, Any]]:
    """What is logged of each round, at the step of its number; what a row lacks is left out."""
    spent = cumulative_query_seconds(log.records)[: len(log.records)]  # 0 s before a first row that is not there yet
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
    """What a table of runs shows; of a run of one row there is no area, of one without a query no mean."""
    n_rows = len(log.records)
    digests = {"digest": mirror_digest(log), "rows_digest": rows_digest(log, n_rows)}
    told: dict[str, Any] = {"status": log.status, "rows": n_rows, **digests, **_setup(log)}
    if log.records:
        told["final_accuracy"] = log.records[-1].accuracy
    if len(log.records) > 1:
        told["area"] = area_under_curve(log.records)
        told["mean_query_seconds"] = mean_query_seconds(log.records)
        told["mean_points_scored"] = mean_scored(log.records)
    if log.status == "failed" and log.failure:
        told["error"] = log.failure["error"]
    return told


def _setup(log: RunLog) -> dict[str, Any]:
    """What came before the first round: seconds, and the diagnostics of the graph."""
    setup = log.header.get("setup", {})
    told = {f"setup/{part}_seconds": made["seconds"] for part, made in setup.items() if made and "seconds" in made}
    plain = {k: v for k, v in (setup.get("graph") or {}).items() if isinstance(v, bool | int | float | str)}
    return told | {f"graph/{name}": value for name, value in plain.items() if not name.endswith("seconds")}


def mirror_digest(log: RunLog) -> str:
    """Equal where W&B would be told the same."""
    failure = log.failure["error"] if log.failure else None
    return _sha256([MIRROR_VERSION, log.lines[0], _lines_of(log, len(log.records)), log.status, failure])[:20]


def rows_digest(log: RunLog, n_rows: int) -> str:
    """Of the first rows: a run made again has the same name and other seconds."""
    return _sha256(_lines_of(log, n_rows))[:20]


def _lines_of(log: RunLog, n_rows: int) -> list[Mapping[str, Any]]:
    """As they stand in the file: a later version of the package reads more fields into them, each with its default."""
    return [line for line in log.lines if line["kind"] == "round"][:n_rows]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Picked images of a few rounds as tables: they need the data set, the results file has only positions.


COLUMNS: list[str | int] = ["position", "image", "class"]


class PickImages:
    """The pictures that were asked for; where they cannot be had ``warn`` is told once, and there are none."""

    def __init__(self, tracking: Tracking, warn: Callable[[str], None]) -> None:
        self._tracking = tracking
        self._warn = warn
        self._loaded: dict[str, ImageData | None] = {}  # by the sha256 in the fingerprint

    def table(self, log: RunLog, record: RoundRecord) -> dict[str, Any]:
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

    def _images(self, log: RunLog) -> "ImageData | None":
        content = str(log.header["fingerprint"].get("data"))
        if content not in self._loaded:
            self._loaded = {content: self._load(log, content)}  # one data set in memory at a time
        return self._loaded[content]

    def _load(self, log: RunLog, content: str) -> "ImageData | None":
        from dgal_bench.config.schema import dataset_config
        from dgal_bench.data.datasets import load
        from dgal_bench.data.image_data import DatasetRequest

        where = Path(self._tracking.data), Path(self._tracking.cache)
        try:
            found = load(DatasetRequest(dataset_config(log.header["config"]), *where, lambda *_: None))
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


# What W&B's server has of a run: asked before anything there is changed. Imported by runs.py, which sets wandb up.


@dataclass(frozen=True)
class ServerRun:
    """A run as its summary on the server has it."""

    state: str
    n_rows: int
    rows_digest: str | None
    digest: str | None
    pictured: bool

    def whole(self, log: RunLog) -> bool:
        """Whether it has all that the file says, and has ended where the run has."""
        ended = self.state == "finished" or log.status not in ("done", "skipped")
        return ended and self.digest == mirror_digest(log)

    def earlier(self, log: RunLog) -> bool:
        """Whether its rows are of another making of the run: deleted and run again, or of another results folder."""
        return self.n_rows > 0 and self.rows_digest != rows_digest(log, self.n_rows)

    def lacks_pictures(self, log: RunLog, images: tuple[int, ...]) -> bool:
        """Whether pictures are asked for in rows that it has without any."""
        rounds = {record.round for record in log.records[: self.n_rows] if record.indices}
        return not self.pictured and bool(rounds & set(images))


class ServerReader:
    """wandb's reader of one project, made with the first question: it logs in."""

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
            found = self._api.run("/".join(part for part in parts if part))
        except wandb.errors.CommError as error:
            if isinstance(error.exc, ValueError):  # how wandb says that there is no such run
                return None
            raise
        told = found.summary
        digests = told.get("rows_digest"), told.get("digest")
        return ServerRun(found.state, int(told.get("rows") or 0), *digests, pictured=told.get("picked") is not None)


# The folders of offline runs: wandb cannot go on with one, so that one which is not whole is written anew. A whole
# one has a marker, written last; one that is being written is locked. Whoever mirrors a run leaves a whole one as it
# is, and removes what others have left behind.


MARKER = "dgal-bench.json"


class FolderLock:
    """A lock on the folder of a run until ``release`` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._file = os.open(self.folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        os.close(self._file)


class RunFolders:
    """The folders of runs, a folder of them for each results folder. ``images``: rounds whose picks are to be shown."""

    def __init__(self, images: Sequence[int]) -> None:
        self._images = images

    def of(self, log: RunLog) -> Path:
        return runs_folder(results_root_of(log))

    def prepare(self, log: RunLog) -> None:
        """Make sure that runs can be written there: wandb itself would take a temporary folder instead.

        Raises:
            ResultsError: they cannot.
        """
        folder = self.of(log)
        ensure_writable(folder, str(folder), "set WANDB_DIR=DIR")
        os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # else pictures wait in the home for their upload

    def has(self, log: RunLog) -> bool:
        """Whether there is a whole one with all that the file says, and the pictures asked for."""
        rounds = set(self._images) & {record.round for record in log.records if record.indices}
        markers, digest = [_marker(folder) for folder in self._all(log)], mirror_digest(log)
        return any(marker.get("digest") == digest and rounds <= set(marker["images"]) for marker in markers)

    def mark(self, log: RunLog, folder: Path) -> None:
        """Mark a folder as whole."""
        marker = {"cell": log.header["cell"], "digest": mirror_digest(log), "images": list(self._images)}
        (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")

    def clear(self, log: RunLog, lock: FolderLock) -> None:
        """Remove the other folders of a run that nobody writes to: 'wandb sync' would send them over this one."""
        for folder in self._all(log):
            if folder != lock.folder and not _lock_folder(folder):
                shutil.rmtree(folder, ignore_errors=True)  # another process may be at the same
        lock.release()

    def _all(self, log: RunLog) -> list[Path]:
        return sorted(self.of(log).glob(f"*run-*-{run_names(log).id}"))


def results_root_of(log: RunLog) -> Path:
    """RESULTS of RESULTS/suite/dataset/strategy/seed-0.jsonl."""
    parents = log.path.absolute().parents
    return parents[min(3, len(parents) - 1)]


def _lock_folder(folder: Path) -> bool:
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
        found: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return found
    return {}


# Before the import: its crash reports go out over the network, offline too, and it greets whoever logs in.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_SILENT", "true")

INIT_SECONDS = 10
"""For a server to answer; wandb's own 90 are longer than many a sweep."""

FINISH_SECONDS = 60
"""For a run's last rows to be taken, where nobody waits for anything else."""

FOREIGN = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DISABLED")
"""Variables of the one run that 'wandb agent' or a script has in mind: with them every run would become that run."""

TROUBLE = (wandb.Error, OSError)
"""What a server that is gone, or that does not know the key, ends in; wandb's timeouts are OSErrors."""


class UnreachableError(UserError):
    """W&B does not answer, or does not know the key."""

    exit_code = 1


def wandb_settings(finish_seconds: float = FINISH_SECONDS) -> wandb.Settings:
    """Nothing but what the results file says: no console, code, git or system metrics; and every wait is bounded."""
    wanted: dict[str, Any] = {
        "silent": True, "console": "off", "save_code": False, "disable_code": True, "disable_git": True,
        "program": "dgal-bench", "x_save_requirements": False, "x_disable_stats": True, "x_disable_machine_info": True,
        "init_timeout": INIT_SECONDS, "finish_timeout": finish_seconds, "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1,  # else a kill takes the rows of the last 15 s with it
    }  # fmt: skip
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


@dataclass(eq=False)
class OpenRun:
    """A run that is being written: the lock on its folder, and how many rows it has been told."""

    run: Any
    lock: FolderLock
    n_rows: int = 0


class RunMirror:
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
        self._pictures = PickImages(tracking, warn)
        self._folders = RunFolders(tracking.images)
        self._finish_seconds = finish_seconds
        self._asking = ServerReader(tracking, INIT_SECONDS)
        self._open: dict[str, OpenRun | None] = {}  # None: of another making there, and so left alone
        self._unpictured = False

    @property
    def online(self) -> bool:
        return self.tracking.mode == "online"

    def has(self, log: RunLog) -> bool:
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

    def is_open(self, log: RunLog) -> bool:
        return run_names(log).id in self._open

    def update(self, log: RunLog) -> bool:
        """Log the rows that the run's run lacks, and what is known of it by now.

        False where W&B has rows of another making of the run: they cannot be replaced, and the run is left as it is.
        """
        run_id = run_names(log).id
        if run_id not in self._open:
            self._open[run_id] = self._opened(log)
        opened = self._open[run_id]
        if opened is None:
            return False
        for row, record in list(zip(logged_rows(log), log.records, strict=True))[opened.n_rows :]:
            # A run that goes on online has its first rows already: W&B drops what comes again, by its step.
            opened.run.log(row | self._pictures.table(log, record), step=record.round, commit=True)
        opened.n_rows = max(opened.n_rows, len(log.records))
        opened.run.summary.update(run_summary(log))
        return True

    def finish(self, log: RunLog) -> None:
        """End the run of a run as the run has ended; other folders of it go.

        One that the server does not take to its end is written anew, offline.
        """
        ended = self._open.pop(run_names(log).id)
        if ended is None:
            return
        try:
            ended.run.finish(exit_code=EXIT_CODES[log.status])
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

    def _opened(self, log: RunLog) -> OpenRun | None:
        self._folders.prepare(log)
        if self.online:
            try:
                return self._resumed(log)
            except TROUBLE as error:
                self._go_offline(log, error)
        return self._begun(log)

    def _resumed(self, log: RunLog) -> OpenRun | None:
        """What the server has of the run, if anything, is gone on with; asked first: opening alone would change it."""
        served = self._served(log)
        if served is None or not served.earlier(log):
            return self._begun(log)
        self._warn(
            f"{log.header['cell']}: W&B has rows of an earlier making of this run, which it cannot replace: "
            "use another wandb.project=NAME"
        )
        return None

    def _begun(self, log: RunLog) -> OpenRun:
        run = self._init(log)
        return OpenRun(run, FolderLock(Path(run.settings.sync_dir)))

    def _served(self, log: RunLog) -> ServerRun | None:
        served = self._asking.about(log)
        if served and not self._unpictured and served.lacks_pictures(log, self.tracking.images):
            self._unpictured = True
            self._warn(
                f"{log.header['cell']}: W&B has these rows without images and cannot replace them: "
                "leave out wandb.images, or use another wandb.project=NAME"
            )
        return served

    def _go_offline(self, log: RunLog, error: Exception) -> None:
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

    def _init(self, log: RunLog) -> Any:
        known = run_names(log)
        run = wandb.init(
            id=known.id, name=known.name, group=known.group, tags=known.tags, job_type=known.suite,
            project=self.tracking.project, entity=self.tracking.entity, config=run_config(log),
            dir=self._folders.of(log).parent, mode="online" if self.online else "offline",
            resume="allow" if self.online else None, reinit="create_new", settings=wandb_settings(self._finish_seconds),
        )  # fmt: skip
        for axis in AXES:
            run.define_metric(axis)
        for metric, axis in DEFINITIONS:
            run.define_metric(metric, step_metric=axis)
        return run


# Whole runs made from result files: after a crash, or from a machine that had no network.


@dataclass
class PushResult:
    """What became of the runs of a results folder."""

    mode: str
    pushed: int = 0
    there: int = 0
    refused: int = 0
    not_begun: list[str] = field(default_factory=list)
    at_work: list[str] = field(default_factory=list)
    folders: set[Path] = field(default_factory=set)

    @property
    def exit_code(self) -> int:
        """1 where W&B keeps rows of an earlier making in place of the file's."""
        return 1 if self.refused else 0

    @property
    def text(self) -> str:
        n_runs = self.pushed + self.there + self.refused
        where = "online" if self.mode == "online" else f"offline, in {', '.join(map(str, sorted(self.folders)))}"
        counts = f"{n_runs} run{'s' * (n_runs != 1)}: {self.pushed} pushed, {self.there} already there"
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
    """Bring the runs of all runs up to their files; a run that is there with all of it is not touched.

    Raises:
        ResultsError: no results there, or one of them is damaged.
        UnreachableError: W&B cannot be reached, and ``strict``.
    """
    logs = read_results(results)
    mirror, outcome = RunMirror(tracking, warn, strict), PushResult(tracking.mode)
    for log in _with_progress(logs):
        if not log.begun:
            outcome.not_begun.append(log.header["cell"])
        elif live_holder(log.path) is not None:
            outcome.at_work.append(log.header["cell"])
        elif mirror.has(log):
            outcome.there += 1
        else:
            taken = mirror.update(log)
            mirror.finish(log)
            outcome.pushed += taken
            outcome.refused += not taken
        if log.begun:
            outcome.folders.add(runs_folder(results_root_of(log)))
    outcome.mode = mirror.tracking.mode
    return outcome


def _with_progress(logs: list[RunLog]) -> Iterable[RunLog]:
    """A bar on a terminal, nothing elsewhere."""
    shown: Iterable[RunLog] = tqdm(logs, desc="push", unit="run", file=sys.stderr, leave=False, disable=None)
    return shown
