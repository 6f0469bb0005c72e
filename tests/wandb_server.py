"""A W&B server as small as one can be: it takes runs and gives them back, to wandb's own client and reader.

It knows the requests that wandb 0.31 makes for a run without files. What a run would be on the real server is in
``Server.runs``: ``history`` holds a row for each line that the client counted, in its order.
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "k" * 40

USER = {"id": "u1", "entity": "me", "username": "me", "email": "", "name": "me", "flags": "{}", "admin": False}


@dataclass
class Run:
    """A run as its client has told it so far."""

    told: dict[str, Any] = field(default_factory=dict)  # of upsertBucket: groupName, displayName, tags, jobType
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by line number
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def state(self) -> str:
        return "running" if self.exit_code is None else "failed" if self.exit_code else "finished"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [self.history[number] for number in sorted(self.history)]


class Server(ThreadingHTTPServer):
    """``status``: what every request is answered with instead, where set; ``asked``: names of requests, in order."""

    daemon_threads = True

    def __init__(self, status: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.runs: dict[str, Run] = {}
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no mistake of ours."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "DGAL_OFFLINE": "false"}


@contextmanager
def serving(status: int | None = None) -> Iterator[Server]:
    server = Server(status)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self.server.lock:
            if self.path.endswith("/file_stream"):
                self._answer(self._streamed(self.path.split("/")[-2], json.loads(body)))
            elif self.path.endswith("/graphql"):
                self._answer({"data": self._asked(json.loads(body))})
            else:
                self._answer({})

    def do_PUT(self) -> None:
        self.do_POST()

    def _answer(self, content: dict[str, Any]) -> None:
        text = json.dumps({} if self.server.status else content).encode()
        self.send_response(self.server.status or 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request["query"], request.get("variables") or {}
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or [query, "?"])[1]
        self.server.asked.append(name)
        if name == "RunResumeStatus":
            return {
                "model": {
                    "id": "p1",
                    "name": variables["project"],
                    "entity": _ENTITY,
                    "bucket": self._bucket(variables["name"]),
                }
            }
        if name == "UpsertBucket":
            return {"upsertBucket": self._upserted(variables)}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if "viewer" in query:
            return {"viewer": USER | {"teams": {"edges": []}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if name == "Run":
            found = self.server.runs.get(variables["name"])
            return {"project": {"internalId": "cDox", "run": found and self._whole(variables["name"], found)}}
        return {}

    def _bucket(self, run_id: str) -> dict[str, Any] | None:
        run = self.server.runs.get(run_id)
        if run is None:
            return None
        tail = [json.dumps(row) for row in run.rows[-1:]]
        return {
            "id": run_id, "name": run_id, "displayName": run.told.get("displayName"), "tags": run.told.get("tags"),
            "summaryMetrics": json.dumps(run.summary), "config": json.dumps(run.config), "notes": None,
            "historyLineCount": len(run.history), "historyTail": json.dumps(tail), "eventsLineCount": 0,
            "eventsTail": "[]", "logLineCount": 0, "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip

    def _upserted(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("name") or variables["id"]
        new = run_id not in self.server.runs
        run = self.server.runs.setdefault(run_id, Run())
        run.told |= {key: value for key, value in variables.items() if value is not None}
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        project = {"id": "p1", "name": run.told["project"], "entity": _ENTITY}
        bucket = {
            "id": run_id, "name": run_id, "displayName": run.told.get("displayName"), "description": None,
            "config": json.dumps(run.config), "sweepName": None, "project": project,
            "historyLineCount": len(run.history),
        }  # fmt: skip
        return {"bucket": bucket, "inserted": new}

    def _whole(self, run_id: str, run: Run) -> dict[str, Any]:
        return {
            "id": run_id, "name": run_id, "displayName": run.told.get("displayName"), "state": run.state,
            "tags": run.told.get("tags", []), "group": run.told.get("groupName"), "config": json.dumps(run.config),
            "systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history),
            "user": {"name": "me", "username": "me"}, "historyKeys": {}, "jobType": run.told.get("jobType"),
            "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "commit": None,
            "description": None, "notes": None, "sweepName": None, "readOnly": False, "projectId": "1",
        }  # fmt: skip

    def _streamed(self, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.setdefault(run_id, Run())
        files = body.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], start=history["offset"]):
            run.history[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            run.summary = json.loads(line)
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {}


_ENTITY = {"id": "e1", "name": "me"}
