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
from dgal_bench.engines.docket import MAX_DEATHS, Docket
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
    from dgal_bench.engines.task import work  # lightning and more, which the driver does without

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
    sent: int = 0
    """How often its node had to be sent what the set-up made."""


class Ray:
    """Tasks that Ray does not retry: what is tried again, and when it is enough, is the docket's to say, as elsewhere.

    Every attempt has a stream of its own, so that nobody listens to what is left of an earlier one.

    Whether cells run on GPUs is found once, at the start: when the last GPU of a cluster goes they wait for another.

    Raises:
        ConfigError: no Ray, or more is asked of it than it has.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings, tell: Teller) -> None:
        share, here = settings.gpus_per_cell, visible_gpus()
        if share > 1 and share != int(share):
            raise ConfigError(f"gpus_per_cell={share:g}: Ray gives a part of one GPU, or whole ones")
        if settings.gpus and settings.gpus < share:
            raise ConfigError(f"gpus={settings.gpus} is less than the gpus_per_cell={share:g} of one cell")
        if not settings.ray_address and settings.gpus and 0 < len(here) < settings.gpus:
            raise ConfigError(f"gpus={settings.gpus}, but this machine has {len(here)}: leave it out, or add --dry-run")
        self._settings, self._tell = settings, tell
        self._flights: list[Flight] = []
        self._threads = max(job.config.threads for job in jobs)
        # How many run side by side; on a cluster without jobs= that is not known, and changes.
        own = not settings.ray_address
        self._lanes = min(lanes(jobs, settings, len(here)), len(jobs)) if own else settings.jobs or 0
        self._ray = connect(settings.ray_address, self._lanes * self._threads, settings.gpus)
        # Once, for what is new to Ray costs each task a lease. A process that has CUDA open does not see another GPU,
        # which the next cell may be given: where GPUs are real, each of their tasks has a process of its own.
        self._task = self._gpu_task = self._ray.remote(_work)
        if here or not own:
            self._gpu_task = self._ray.remote(max_calls=1)(_work)
        self._cargo = Cargo(self._ray, settings.cache.absolute())
        self._counted, self._has = -math.inf, dict[str, float]()
        self._gpus = settings.gpus != 0 and self._most("GPU") > 0 and any(job.config.device != "cpu" for job in jobs)
        if wrong := self._impossible(jobs):
            self.close()
            raise ConfigError(wrong)
        if own and not self._on_gpu(jobs[0]):
            warm = self._ray.remote(_warm).options(max_retries=0, **self._needs(jobs[0]))
            for _ in range(self._lanes - 1):  # the other one does the set-up
                warm.remote()

    def _impossible(self, jobs: Sequence[Job]) -> str:
        """What is asked of one machine and no machine has; "" where all of it can be had."""
        if self._settings.gpus and not self._most("GPU"):
            return f"gpus={self._settings.gpus}, but no machine of this Ray has a GPU: leave it out"
        asked = [("threads", "CPU", float(self._threads))]
        if self._gpus:
            devices = max(job.config.trainer.devices for job in jobs)
            asked += [("gpus_per_cell", "GPU", self._settings.gpus_per_cell), ("trainer.devices", "GPU", devices)]
        for key, name, wanted in asked:
            if 0 < (most := self._most(name)) < wanted:
                return f"{key}={wanted:g}, but no machine of this Ray has more than {most:g} {name}s"
        return ""

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

    def run(self, docket: Docket) -> None:
        try:
            while not docket.over:
                while len(self._flights) < self._room() and (job := docket.take()) is not None:
                    self._launch(docket, job)
                self._listen(docket)
        finally:
            for flight in self._flights:
                flight.held.close()

    def close(self) -> None:
        for flight in self._flights:
            self._ray.cancel(flight.events, force=True)
        self._flights.clear()
        self._ray.shutdown()

    def _room(self) -> int:
        """How many cells may be under way: as many as run side by side, and on a cluster some that wait there."""
        if self._lanes:
            return self._lanes
        has = self._resources()
        fit = int(has.get("CPU", 0)) // self._threads
        if self._gpus:
            n_gpus = min(has.get("GPU", 0), self._settings.gpus or math.inf)
            if not n_gpus:
                self._tell("warn", "no machine of this Ray has a GPU any more: cells wait for one")
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
        return self._gpus and job.config.device != "cpu"

    def _needs(self, job: Job, at_least: int = 0) -> dict[str, Any]:
        """Of a task: its share of the machine, ``at_least`` so many GPUs, and the environment of its process.

        Processes without a GPU go on to the next cell of the same environment, imports and data in memory.
        """
        on_gpu = self._on_gpu(job)
        return {
            "num_cpus": job.config.threads,
            "num_gpus": max(self._settings.gpus_per_cell, at_least) if on_gpu else 0,
            "runtime_env": {"env_vars": environment(job.config, None if on_gpu else "")},
        }

    def _start(self, kind: str, job: Job, before: bytes = b"") -> Any:
        """A job as a task; the stream of its events."""
        devices = job.config.trainer.devices
        needs = self._needs(job, devices if kind == "setup" and devices > 1 else 0)
        task = self._gpu_task if needs["num_gpus"] else self._task
        task = task.options(name=job.name, num_returns="streaming", max_retries=0, **needs)
        places = {
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
        flight.sent += 1
        if flight.sent > MAX_DEATHS:
            lost = f"its node was sent {', '.join(keys)} {MAX_DEATHS} times, and has them not"
            self._land(docket, flight, {"event": "failed", "error": lost, "exit_code": 1, "stop": False, "died": True})
            return
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
