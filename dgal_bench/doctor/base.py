"""What the checks are made of: findings, what is examined, other processes asked, and repairs by pip.

In this room third-party packages, and rooms that need them, are imported inside the checks: a missing one is said,
not raised.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

TIMEOUT = 120  # seconds: torch on a cold network disk
ABSENT = "not there"
LONGEST = 300  # characters of another's error: its cause, and not its C++ stack


@dataclass(frozen=True)
class Finding:
    """``state``: ok, note (works, worth knowing) or trouble. ``repair``: what to do; never empty for a trouble."""

    topic: str
    state: str
    text: str
    repair: str = ""


Lines = Iterator[tuple[str, ...]]
"""Findings as the checks yield them: (state, text) or (state, text, repair). Their topic is in the table of checks."""


@dataclass(frozen=True)
class Answer:
    """What a command printed, or in one line why it failed: exactly one of them is not empty."""

    text: str = ""
    error: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON of the last line; nothing where the command failed."""
        return dict(json.loads(self.text.rpartition("\n")[2])) if self.text else {}


@dataclass(frozen=True)
class Site:
    """What is examined: three folders, and what other processes answered."""

    data: Path
    cache: Path
    results: Path
    driver: Answer
    torch: Answer
    faiss: Answer


def guarded(check: Callable[[], Lines]) -> Lines:
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other checks are wanted all the more
        text = _one_line(f"cannot be examined: {type(error).__name__}: {error}")
        yield "trouble", text, f"put right what this line names, or install again: {pip('install ' + _ourselves())}"


def ask(command: Sequence[str]) -> Answer:
    """Run it in a process of its own: a broken library may abort, and takes no one with it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        return Answer(error=ABSENT)
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer in {TIMEOUT} s")
    except OSError as error:
        return Answer(error=f"cannot be started: {error.strerror}")
    if done.returncode == 0 and done.stdout.strip():
        return Answer(done.stdout.strip())
    said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").rpartition("\n")[2]
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return Answer(error=_one_line(f"{how}: {said}"))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def pip(words: str) -> str:
    """For this interpreter: the pip of the PATH may be another's."""
    return f"{quote(sys.executable)} -m pip {words}"


def swap(old: Sequence[str], new: str) -> str:
    return f"{pip('uninstall -y ' + ' '.join(old))} && {pip('install ' + new)}"


def _ourselves() -> str:
    checkout = Path(__file__).resolve().parents[2]
    return f"-e {quote(str(checkout))}" if (checkout / "pyproject.toml").is_file() else "dgal-bench"
