"""Where a number comes from: the code's revision, the packages, the machine."""

import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "dgal-bench", "torch", "lightning", "torchvision", "torchmetrics", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs",
    "numpy", "scipy", "omegaconf",
)  # fmt: skip


@cache
def provenance() -> dict[str, Any]:
    """Plain types only: git revision and whether the tree was dirty, package versions, and the machine."""
    return {"git": git_state(), "versions": versions(), "machine": machine()}


def git_state() -> dict[str, Any]:
    """The revision of the checkout this package runs from; None outside one (an installed wheel)."""
    here = Path(__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", "provenance.py") is None:
        return {"revision": None, "dirty": None}
    dirty = _git(here.parent, "status", "--porcelain", "--", "dgal_bench", "conf")
    return {"revision": _git(here, "rev-parse", "HEAD"), "dirty": bool(dirty)}


def revision(git: Mapping[str, Any]) -> str | None:
    """The revision, marked where the tree was not as committed."""
    return f"{git['revision']}+modified" if git["dirty"] else git["revision"]


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
