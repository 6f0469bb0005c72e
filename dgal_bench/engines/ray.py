"""The Ray engine: cells as tasks on this machine or a cluster, whose rows stream to the driver, the only writer."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dgal_bench.engines.base import Event, Teller, message
from dgal_bench.engines.cargo import Cargo
from dgal_bench.engines.cluster import connect, told
from dgal_bench.engines.docket import Docket
from dgal_bench.engines.local import lanes
from dgal_bench.errors import ConfigError, ResultsError
from dgal_bench.lease import HeldError
from dgal_bench.process import ENDINGS, environment, visible_gpus
from dgal_bench.recorder import Recorder, UnwritableError
from dgal_bench.sweep import Job, Settings

_LOOK_AGAIN_SECONDS = 0.2
_COUNT_AGAIN_SECONDS = 5.0
_MORE_THAN_FIT = 2  # of a cluster: it is never idle, and grows where it can


def _work(*arguments: Any) -> Iterator[Event]:
    from dgal_bench.engines.task import work  # torch and lightning, which the driver does without

    yield from work(*arguments)


def _warm() -> None:
    import dgal_bench.engines.task  # noqa: F401 - ten seconds that the first cell of a process need not wait


@dataclass(eq=False)
class Flight:
    """A cell under way: its file, held by the driver, what that held before, and the stream of events."""

    job: Job
    recorder: Recorder
    held: ExitStack
    before: bytes
    events: Any


class Ray:
    """Tasks that Ray does not retry: what is tried again, and when it is enough, is the docket's to say, as elsewhere.

    Every attempt has a stream of its own, so that nobody listens to what is left of an earlier one.

    Raises:
        ConfigError: no Ray, or more is asked of it than it has.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings, tell: Teller) -> None:
        share = settings.gpus_per_cell
        if share > 1 and share != int(share):
            raise ConfigError(f"gpus_per_cell={share:g}: Ray gives a part of one GPU, or whole ones")
        if settings.gpus and settings.gpus < share:
            raise ConfigError(f"gpus={settings.gpus} is less than the gpus_per_cell={share:g} of one cell")
        self._settings, self._tell = settings, tell
        self._flights: list[Flight] = []
        self._lanes = min(lanes(jobs, settings, len(visible_gpus())), len(jobs))
        n_cpus = self._lanes * max(job.config.threads for job in jobs)
        self._ray = connect(settings.ray_address, n_cpus, settings.gpus)
        self._task = self._ray.remote(_work)  # once: what is new to Ray costs each task a lease
        self._cargo = Cargo(self._ray, settings.cache.absolute())
        self._counted, self._has = -math.inf, dict[str, float]()
        for key, name, wanted in (("gpus_per_cell", "GPU", share), ("threads", "CPU", n_cpus // self._lanes)):
            if 0 < (most := self._most(name)) < wanted:
                self.close()
                raise ConfigError(f"{key}={wanted:g}, but no machine of this Ray has more than {most:g} {name}s")
        if settings.ray_address is None and not self._on_gpu(jobs[0]):
            warm = self._ray.remote(_warm).options(max_retries=0, **self._needs(jobs[0]))
            for _ in range(self._lanes - 1):  # the other one does the set-up
                warm.remote()

    def ask(self, kind: str, job: Job) -> Iterator[Event]:
        events = self._start(kind, job)
        while True:
            if not self._ray.wait([events], timeout=_LOOK_AGAIN_SECONDS)[0]:
                continue  # so that Ctrl-C gets through
            event = self._next(events)
            if event["event"] == "ready" and kind == "setup":
                self._cargo.note(job, event)
            yield event
            if event["event"] in ENDINGS:
                return

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        docket = Docket(jobs, self._tell)
        try:
            while not docket.over:
                while len(self._flights) < self._room(jobs) and (job := docket.take()) is not None:
                    self._launch(docket, job)
                self._listen(docket)
        finally:
            for flight in self._flights:
                flight.held.close()
        if docket.fatal is not None:
            raise docket.fatal
        return docket.failed

    def close(self) -> None:
        for flight in self._flights:
            self._ray.cancel(flight.events, force=True)
        self._flights.clear()
        self._ray.shutdown()

    def _room(self, jobs: Sequence[Job]) -> int:
        """How many cells may be under way: as many as run side by side, and on a cluster some that wait there."""
        if self._settings.jobs or not self._settings.ray_address:
            return self._lanes
        has, threads = self._resources(), max(job.config.threads for job in jobs)
        fit = int(has.get("CPU", 0)) // threads
        if any(self._on_gpu(job) for job in jobs):
            n_gpus = has["GPU"] if self._settings.gpus is None else min(has["GPU"], self._settings.gpus)
            fit = min(fit, int(n_gpus / self._settings.gpus_per_cell + 1e-9))
        return max(1, fit) if self._settings.gpus else fit + _MORE_THAN_FIT

    def _resources(self) -> Mapping[str, float]:
        """What the cluster has altogether; it may grow and shrink."""
        if time.monotonic() - self._counted > _COUNT_AGAIN_SECONDS:
            self._counted, self._has = time.monotonic(), self._ray.cluster_resources()
        return self._has

    def _most(self, name: str) -> float:
        """Of a resource, on one machine."""
        return max((node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]), default=0)

    def _on_gpu(self, job: Job) -> bool:
        return job.config.device != "cpu" and self._settings.gpus != 0 and self._resources().get("GPU", 0) > 0

    def _needs(self, job: Job) -> dict[str, Any]:
        """Of a task: its share of the machine, and the environment of its process.

        Processes go on to the next cell of the same environment, imports and data in memory; those of GPU tasks do
        not, as is Ray's default: the next cell's GPU may be another, which a process that has CUDA open never sees.
        """
        on_gpu = self._on_gpu(job)
        return {
            "num_cpus": job.config.threads,
            "num_gpus": self._settings.gpus_per_cell if on_gpu else 0,
            "runtime_env": {"env_vars": environment(job.config, None if on_gpu else "")},
        }

    def _start(self, kind: str, job: Job, before: bytes = b"") -> Any:
        """A job as a task; the stream of its events."""
        task = self._task.options(name=job.name, num_returns="streaming", max_retries=0, **self._needs(job))
        places = {
            "data": str(self._settings.data.absolute()),
            "cache": str(self._settings.cache.absolute()),
            "folder": os.getcwd(),
            "entries": self._cargo.entries(job) if kind == "cell" else [],
        }
        return task.remote(message(kind, job, self._settings) | places, before, self._cargo.parcels(job))

    def _launch(self, docket: Docket, job: Job) -> None:
        held = ExitStack()
        try:
            recorder = held.enter_context(Recorder(job.path))
        except ResultsError as error:
            docket.hear(job, _refusal(error))
            return
        before = job.path.read_bytes()
        self._flights.append(Flight(job, recorder, held, before, self._start("cell", job, before)))

    def _listen(self, docket: Docket) -> None:
        """Take one event of each cell that has any; wait a little where none has."""
        if not self._flights:
            time.sleep(_LOOK_AGAIN_SECONDS)
            return
        streams = [flight.events for flight in self._flights]
        self._ray.wait(streams, timeout=_LOOK_AGAIN_SECONDS)
        ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
        for flight in [flight for flight in self._flights if any(flight.events is one for one in ready)]:
            self._hear(docket, flight, self._next(flight.events))

    def _next(self, events: Any) -> Event:
        """The next event of a stream that has one, or the end of its worker."""
        try:
            event: Event = self._ray.get(next(events))
        except self._ray.exceptions.RayError as error:
            return {"event": "failed", "exit_code": 1, "stop": False, **told(error, self._ray)}
        return event

    def _hear(self, docket: Docket, flight: Flight, event: Event) -> None:
        if event["event"] == "line":
            try:
                _write(flight.recorder, event["line"])
            except ResultsError as error:
                self._ray.cancel(flight.events, force=True)
                self._land(docket, flight, _refusal(error))
        elif event["event"] == "lacking":
            self._supply(docket, flight, event["keys"])
        elif event["event"] in ENDINGS:
            self._land(docket, flight, event)
        else:
            docket.hear(flight.job, event)

    def _land(self, docket: Docket, flight: Flight, end: Event) -> None:
        """The file is let go before the docket hears, who may have a word to write in it."""
        self._flights.remove(flight)
        flight.held.close()
        docket.hear(flight.job, end)

    def _supply(self, docket: Docket, flight: Flight, keys: Sequence[str]) -> None:
        """Start a cell again with the cache entries that its node was without; made again if they are gone."""
        if not self._cargo.pack(flight.job, keys):
            self._tell("warn", f"{flight.job.config.dataset.name}: the node that had its graph is gone; set up again")
            *_, end = self.ask("setup", flight.job)
            if end["event"] != "ready":
                self._land(docket, flight, end)
                return
        flight.events = self._start("cell", flight.job, flight.before)


def _write(recorder: Recorder, line: Mapping[str, Any]) -> None:
    if line["kind"] == "header":
        recorder.write_header(line)
    else:
        recorder.append(line)


def _refusal(error: ResultsError) -> Event:
    """Why the driver cannot take a cell, or goes no further with one, as a worker would say it."""
    kind, stop = "held" if isinstance(error, HeldError) else "failed", isinstance(error, UnwritableError)
    said = " ".join(str(error).split())
    return {"event": kind, "error": said, "exit_code": error.exit_code, "stop": stop, "refused": True}
