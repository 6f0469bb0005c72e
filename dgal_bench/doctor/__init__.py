"""What ``dgal-bench doctor`` shows: is this machine and installation fit to run, and each trouble with its repair."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dgal_bench.doctor import installation, surroundings
from dgal_bench.doctor.base import Finding, Lines, Site, ask, guarded
from dgal_bench.doctor.installation import ASK_DRIVER, ASK_FAISS, ASK_TORCH

__all__ = ["CHECKS", "Finding", "examine", "table"]

CHECKS: tuple[tuple[str, Callable[[Site], Lines]], ...] = (
    ("python", installation.python),
    ("dgal-bench", installation.itself),
    ("packages", installation.packages),
    ("torch", installation.torch),
    ("faiss", installation.faiss),
    ("gpu", installation.gpu),
    ("cores", surroundings.cores),
    ("data", surroundings.data),
    ("cache", surroundings.cache),
    ("results", surroundings.results),
    ("wandb", surroundings.wandb),
)


def examine(data: Path, cache: Path, results: Path) -> list[Finding]:
    """Every check's findings, in order. Nothing is left behind, and nothing raises: a check that fails is a trouble."""
    python = (sys.executable, "-P", "-c")  # -P: a folder torch/ where we stand is not torch
    with ThreadPoolExecutor() as pool:  # some seconds each
        driver, torch, faiss = pool.map(ask, (ASK_DRIVER, (*python, ASK_TORCH), (*python, ASK_FAISS)))
    site = Site(data, cache, results, driver, torch, faiss)
    return [Finding(topic, *line) for topic, check in CHECKS for line in guarded(partial(check, site))]


def table(findings: Sequence[Finding]) -> str:
    """A line for each finding, its repair below, and at the end the number of troubles."""
    width = max((len(finding.topic) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.topic:{width}}  {finding.text}")
        lines += [f"{'':8} {'':{width}}  -> {finding.repair}"] if finding.repair else []
    troubles = sum(finding.state == "trouble" for finding in findings)
    return "\n".join([*lines, f"{troubles or 'no'} trouble{'s' if troubles > 1 else ''} found"])
