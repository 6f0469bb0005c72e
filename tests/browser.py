"""A headless Chromium, spoken to in its DevTools protocol over two pipes, which needs no package.

``python -m tests.browser report.html out.png 390 dark`` takes a picture of the whole page, with a selector after it of
that part alone, and tells what goes wrong in it; ``print`` in place of ``dark``: as it is printed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

FLAGS = (
    "--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # seen by a test, but not sent
)  # fmt: skip

SECONDS = 60
"""For an answer; of a page with hundreds of figures on a busy machine."""

PHONE = 500
"""Narrower screens than this are phones, with touch and their own reading of the viewport."""


def _pipe():
    """Both ends above 9, out of the way of the 3 and 4 that Chromium reads and writes."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high


class Browser:
    """One process; use it in a ``with``. Messages are JSON, each ended by a zero byte, on its descriptors 3 and 4."""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (theirs, self._to), (self._from, answers) = _pipe(), _pipe()
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        command = [CHROMIUM, *FLAGS, *root, f"--user-data-dir={self._profile.name}", "about:blank"]
        # bash puts the two in place: subprocess hands descriptors on under their own numbers only
        places = f'exec "$@" 3<&{theirs} 4>&{answers} {theirs}<&- {answers}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", places, "bash", *command], pass_fds=(theirs, answers),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._rest, self._last, self.events = b"", 0, []
        return self

    def __exit__(self, *_):
        os.close(self._to)  # which it takes as the end
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._from)
        self._profile.cleanup()

    def ask(self, method, session=None, **params):
        """The answer to a command; what happens meanwhile is kept in ``events``."""
        self._last += 1
        wanted = {"id": self._last, "method": method, "params": params} | ({"sessionId": session} if session else {})
        message = json.dumps(wanted).encode() + b"\0"
        while message:
            message = message[os.write(self._to, message) :]
        number = self._last
        until = time.monotonic() + SECONDS
        while (answer := self._next(until)).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait_for(self, event, session):
        """The next event of that name, one that has come already included."""
        until = time.monotonic() + SECONDS
        while not any(one.get("method") == event and one.get("sessionId") == session for one in self.events):
            self.events.append(self._next(until))

    def _next(self, until):
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium is silent for {SECONDS} s")
            if not (more := os.read(self._from, 1 << 20)):
                raise RuntimeError(f"Chromium is gone, exit code {self._process.wait()}")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1280, height=900, dark=False, printed=False):
        """The page of a file, loaded and drawn."""
        return Page(self, Path(path).absolute().as_uri(), width, height, dark, printed)


class Page:
    """A tab of its own: what went wrong in it, what it asked the network for, and what it looks like."""

    def __init__(self, browser, url, width, height, dark, printed):
        self._browser, self._url = browser, url
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < PHONE}
        self._ask("Emulation.setDeviceMetricsOverride", **self._size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media="print" if printed else "", features=[scheme])
        if trouble := self._ask("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {trouble}")
        browser.wait_for("Page.loadEventFired", self._session)
        # fonts, then two frames: what scripts do on load, and what they have asked to be drawn
        frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
        self.evaluate(f"document.fonts.ready.then(() => new Promise(done => {frames}))")

    def _ask(self, method, **params):
        return self._browser.ask(method, self._session, **params)

    def _events(self, method):
        self._ask("Browser.getVersion")  # whatever has happened until now is told before this is answered
        ours = (one for one in self._browser.events if one.get("sessionId") == self._session)
        return [one["params"] for one in ours if one.get("method") == method]

    @property
    def errors(self):
        """Console errors, exceptions, and what the browser itself complains of: policies, loads that failed."""
        said = [
            " ".join(str(arg.get("value", arg.get("description"))) for arg in one["args"])
            for one in self._events("Runtime.consoleAPICalled")
            if one["type"] in ("error", "assert")
        ]
        thrown = [one["exceptionDetails"] for one in self._events("Runtime.exceptionThrown")]
        logged = [one["entry"] for one in self._events("Log.entryAdded")]
        failed = [one["errorText"] for one in self._events("Network.loadingFailed")]
        return [
            *said, *(one.get("exception", {}).get("description", one["text"]) for one in thrown),
            *(one["text"] for one in logged if one["level"] == "error"), *failed,
        ]  # fmt: skip

    @property
    def requests(self):
        """Addresses that were asked for, but for the file itself and what it carries in it."""
        asked = [one["request"]["url"] for one in self._events("Network.requestWillBeSent")]
        return [url for url in asked if url != self._url and not url.startswith(("data:", "blob:", "about:"))]

    def evaluate(self, script):
        """The value of an expression, or of the promise that it is."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if wrong := found.get("exceptionDetails"):
            raise RuntimeError(wrong.get("exception", {}).get("description", wrong["text"]))
        return found["result"].get("value")

    def click(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def screenshot(self, path, full_page=True, of=None):
        """``of``: the selector of what alone is shown."""
        area = {"x": 0, "y": 0, "width": self._size["width"]}
        if of:
            box = f"document.querySelector({json.dumps(of)}).getBoundingClientRect()"
            area = self.evaluate(
                f"(b => ({{x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}}))({box})"
            )
        elif full_page:
            # beyond what one picture can hold, the rest of the page is cut off
            area["height"] = min(self.evaluate("document.scrollingElement.scrollHeight"), 16_000)
        clip = {"clip": {**area, "scale": 1}, "captureBeyondViewport": True} if "height" in area else {}
        Path(path).write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", **clip)["data"]))


def main(page, picture, width="1280", scheme="light", of=None):
    with Browser() as browser:
        opened = browser.open(page, int(width), dark=scheme == "dark", printed=scheme == "print")
        opened.screenshot(picture, of=of)
        for line in (*opened.errors, *opened.requests):
            sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
