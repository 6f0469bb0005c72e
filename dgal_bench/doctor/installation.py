"""Is what is installed fit to run: Python, ourselves, what we require, and what torch and FAISS see of the GPUs."""

import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from importlib.util import find_spec

from dgal_bench import __version__
from dgal_bench.doctor.base import ABSENT, Lines, Site, pip, swap

PYTHON = (3, 11)
SHOWN = (
    "torch", "lightning", "torchvision", "torchmetrics", "timm", "wandb", "omegaconf", "numpy", "scipy", "scikit-learn",
)  # fmt: skip
FAISS_EXTRAS = {"faiss-cpu": "cpu", "faiss-gpu": "gpu", "faiss-gpu-cuvs": "gpu-cuvs"}

ASK_DRIVER = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
ASK_TORCH = """import json, torch, torchvision
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(i) for i in range(count)]
found = {"torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda, "gpus": names}
print(json.dumps(found))"""
# torch first, as in graph.knn: their OpenMP and CUDA libraries must bear each other.
ASK_FAISS = """import json, torch, faiss
gpu_build = hasattr(faiss, "StandardGpuResources")
gpus = faiss.get_num_gpus() if gpu_build else 0
usable = gpus > 0 and torch.cuda.is_available()
print(json.dumps({"version": faiss.__version__, "gpu_build": gpu_build, "gpus": gpus, "usable": usable}))"""


def python(site: Site) -> Lines:
    found, least = (".".join(map(str, numbers)) for numbers in (sys.version_info[:3], PYTHON))
    if sys.version_info[:2] < PYTHON:
        yield "trouble", f"{found}, but {least} is needed", f"install python {least} or newer"
    else:
        yield "ok", f"{found} at {sys.executable}"


def itself(site: Site) -> Lines:
    from dgal_bench.provenance import git_state, revision

    commit = revision(git_state())
    yield "ok", f"{__version__}, " + (f"git {commit}" if commit else "installed, no checkout")


def packages(site: Site) -> Lines:
    """Our own requirements, and those of the extra whose FAISS is installed."""
    from packaging.requirements import Requirement

    extras = ["", *(extra for name, extra in FAISS_EXTRAS.items() if _version(name))]
    unmet = {}
    for need in map(Requirement, requires("dgal-bench") or ()):
        asked = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        found = _version(need.name)
        if asked and not (found and need.specifier.contains(found, prereleases=True)):
            wanted = f"{need.name}{need.specifier}"
            text = f"{need.name} {found or 'is not installed'}, but {wanted} is needed"
            unmet[need.name] = ("trouble", text, pip(f"install '{wanted}'"))
    yield "ok", ", ".join(f"{name} {_version(name)}" for name in SHOWN if name not in unmet) or "none"
    yield from unmet.values()


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def torch(site: Site) -> Lines:
    if site.torch.error:
        text = f"torch and torchvision cannot be imported together ({site.torch.error})"
        yield "trouble", text, pip("install --force-reinstall torch torchvision")
    else:
        found = site.torch.facts
        yield "ok", f"{found['torch']}, CUDA {found['cuda'] or 'none'}, fits torchvision {found['torchvision']}"


def faiss(site: Site) -> Lines:
    owners = sorted(set(packages_distributions().get("faiss", ())))
    fitting = "faiss-gpu" if site.driver.text else "faiss-cpu"
    owner = " and ".join(owners) or "of no package"
    if len(owners) > 1:
        text = f"{owner} own the same module: the last one installed has overwritten the others"
        yield "trouble", text, swap(owners, fitting)
    if not owners and find_spec("faiss") is None:
        yield "note", "not installed: torch searches (as fast for graphs; SEALS is slower)", pip(f"install {fitting}")
    elif site.torch.error:
        yield "note", f"{owner}: not tried, since torch fails", "put torch right first"
    elif site.faiss.error:
        text = f"{owner}: cannot be used beside torch ({site.faiss.error})"
        yield "trouble", text, swap(owners or [fitting], fitting)
    else:
        found = site.faiss.facts
        build = f"GPU build, sees {found['gpus']} GPUs" if found["gpu_build"] else "CPU build"
        yield "ok", f"{found['version']} ({owner}), {build}"


def gpu(site: Site) -> Lines:
    """What the driver, torch and FAISS see, and where they disagree."""
    driver = "; ".join(site.driver.text.splitlines()) or f"nvidia-smi: {site.driver.error}"
    seen, faiss = site.torch.facts.get("gpus", []), site.faiss.facts
    text = f"torch sees {len(seen)}: {', '.join(seen)} ({driver})"
    if site.torch.error:
        yield "note", f"{driver}; what torch sees is not known, since it fails", "put torch right first"
    elif not seen:
        yield _no_gpu(site, driver)
    elif faiss and not faiss["gpu_build"]:
        repair = swap(["faiss-cpu"], "faiss-gpu")
        yield "note", f"{text}; FAISS is the CPU build: torch builds the graphs on the GPU", repair
    elif faiss and not faiss["usable"]:
        repair = "update the driver to one for CUDA 12.6 or newer, or set graph.backend=torch"
        yield "note", f"{text}; FAISS sees none: torch builds the graphs on the GPU", repair
    else:
        yield "ok", f"{text}; FAISS sees {faiss.get('gpus', 0)}"


def _no_gpu(site: Site, driver: str) -> tuple[str, ...]:
    """torch sees none: is there one?"""
    hidden, cuda = os.environ.get("CUDA_VISIBLE_DEVICES"), site.torch.facts["cuda"]
    if site.driver.text and hidden is not None:
        return "note", f"{driver}: hidden by CUDA_VISIBLE_DEVICES='{hidden}'", "unset CUDA_VISIBLE_DEVICES"
    if site.driver.text:
        repair = "install the torch and torchvision that https://pytorch.org/get-started names for this driver"
        return "trouble", f"{driver}, but torch sees none (it is built for CUDA {cuda or 'none'})", repair
    if site.driver.error != ABSENT:
        return "note", f"none ({driver})", "if this machine has a GPU, load or reinstall its driver"
    return "ok", "none; device=auto uses the CPU"
