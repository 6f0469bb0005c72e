"""The Ray engine: cells as tasks on this machine or a cluster, whose rows stream to the driver, the only writer."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dgal_bench.engines.base import Event, Teller, message
from dgal_bench.engines.capacity import Capacity
from dgal_bench.engines.cargo import Cargo
from dgal_bench.engines.cluster import connect, told
from dgal_bench.engines.docket import MAX_DEATHS, Docket
from dgal_bench.engines.local import check_gpus, lanes
from dgal_bench.errors import ConfigError, ResultsError
from dgal_bench.lease import HeldError
from dgal_bench.process import ENDINGS, visible_gpus
from dgal_bench.recorder import Recorder, UnwritableError
from dgal_bench.sweep import Job, Settings

_LOOK_AGAIN_SECONDS = 0.2


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

    Raises:
        ConfigError: no Ray, or more is asked of it than it has.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings, tell: Teller) -> None:
        share, here = settings.gpus_per_cell, visible_gpus()
        if share > 1 and share != int(share):
            raise ConfigError(f"gpus_per_cell={share:g}: Ray gives a part of one GPU, or whole ones")
        if settings.gpus and settings.gpus < share:
            raise ConfigError(f"gpus={settings.gpus} is less than the gpus_per_cell={share:g} of one cell")
        own = not settings.ray_address
        if own and here:  # without any they are logical ones
            check_gpus(settings, here)
        self._settings, self._tell = settings, tell
        self._flights: list[Flight] = []
        # How many run side by side; on a cluster without jobs= that is not known, and changes.
        self._lanes = min(lanes(jobs, settings, len(here)), len(jobs)) if own else settings.jobs or 0
        n_cpus = self._lanes * max(job.config.threads for job in jobs)
        self._ray = connect(settings.ray_address, n_cpus, settings.gpus)
        # Once, for what is new to Ray costs each task a lease. A process that has CUDA open does not see another GPU,
        # which the next cell may be given: where GPUs are real, each of their tasks has a process of its own.
        self._task = self._gpu_task = self._ray.remote(_work)
        if here or not own:
            self._gpu_task = self._ray.remote(max_calls=1)(_work)
        self._cargo = Cargo(self._ray, settings.cache.absolute())
        self._capacity = Capacity(self._ray, jobs, settings, tell)
        if lacking := self._capacity.lacking():
            self.close()
            raise ConfigError(lacking)
        if own and not self._capacity.on_gpu(jobs[0]):
            warm = self._ray.remote(_warm).options(max_retries=0, **self._capacity.needs(jobs[0]))
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

    def run(self, docket: Docket) -> None:
        try:
            while not docket.over:
                room = self._lanes or self._capacity.cells()
                while len(self._flights) < room and (job := docket.take()) is not None:
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

    def _start(self, kind: str, job: Job, before: bytes = b"") -> Any:
        """A job as a task; the stream of its events."""
        needs = self._capacity.needs(job, kind)
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
