"""``dgal-bench doctor``: is this machine and installation fit to run, with a repair for each trouble.

Third-party packages, and modules that need them, are imported inside the checks: a missing one is a finding, no crash.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import urlsplit

from dgal_bench import __version__
from dgal_bench.core.errors import DataError
from dgal_bench.results.wandb_process import key_place

TIMEOUT = 120  # seconds: torch on a cold network disk
ABSENT = "not there"
MAX_CHARACTERS = 300  # of a library's error: its cause, and not its C++ stack


@dataclass(frozen=True)
class DoctorFinding:
    """``state``: ok, note (works, worth knowing) or trouble. ``repair``: what to do; never empty for a trouble."""

    topic: str
    state: str
    text: str
    repair: str = ""


FindingLines = Iterator[tuple[str, ...]]
"""Findings as the checks yield them: (state, text) or (state, text, repair). The topic is in CHECKS."""


@dataclass(frozen=True)
class ProbeAnswer:
    """A command's output, or in one line why it failed: exactly one of them is not empty."""

    text: str = ""
    error: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON of the last line; nothing where the command failed."""
        return dict(json.loads(self.text.rpartition("\n")[2])) if self.text else {}


@dataclass(frozen=True)
class ProbeSite:
    """What the checks examine: three folders, and the answers of other processes."""

    data: Path
    cache: Path
    results: Path
    driver: ProbeAnswer
    torch: ProbeAnswer
    faiss: ProbeAnswer


def run_check(check: Callable[[], FindingLines]) -> FindingLines:
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - the other checks must go on
        checkout = Path(__file__).resolve().parents[2]
        package = f"-e {quote(str(checkout))}" if (checkout / "pyproject.toml").is_file() else "dgal-bench"
        text = _one_line(f"cannot be examined: {type(error).__name__}: {error}")
        yield "trouble", text, f"repair what this line names, or install again: {pip_command('install ' + package)}"


def run_probe(command: Sequence[str]) -> ProbeAnswer:
    """Run the command in a process of its own: a broken library may abort, and must not end this one."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        return ProbeAnswer(error=ABSENT)
    except subprocess.TimeoutExpired:
        return ProbeAnswer(error=f"no answer in {TIMEOUT} s")
    except OSError as error:
        return ProbeAnswer(error=f"cannot be started: {error.strerror}")
    if done.returncode == 0 and done.stdout.strip():
        return ProbeAnswer(done.stdout.strip())
    text = (done.stderr.strip() or done.stdout.strip() or "no output").rpartition("\n")[2]
    end = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return ProbeAnswer(error=_one_line(f"{end}: {text}"))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]} ..."


def pip_command(arguments: str) -> str:
    """The pip of this interpreter: the one on the PATH may belong to another."""
    return f"{quote(sys.executable)} -m pip {arguments}"


def reinstall_command(old: Sequence[str], new: str) -> str:
    return f"{pip_command('uninstall -y ' + ' '.join(old))} && {pip_command('install ' + new)}"


MIN_PYTHON = (3, 11)
LISTED_PACKAGES = (
    "torch", "lightning", "torchvision", "torchmetrics", "timm", "wandb", "omegaconf", "numpy", "scipy", "scikit-learn",
)  # fmt: skip
FAISS_EXTRAS = {"faiss-cpu": "cpu", "faiss-gpu": "gpu", "faiss-gpu-cuvs": "gpu-cuvs"}

DRIVER_PROBE = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
TORCH_PROBE = """import json, torch, torchvision
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(i) for i in range(count)]
facts = {"torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda, "gpus": names}
print(json.dumps(facts))"""
# torch first, as in graph.knn: their OpenMP and CUDA libraries must be compatible.
FAISS_PROBE = """import json, torch, faiss
gpu_build = hasattr(faiss, "StandardGpuResources")
gpus = faiss.get_num_gpus() if gpu_build else 0
usable = gpus > 0 and torch.cuda.is_available()
print(json.dumps({"version": faiss.__version__, "gpu_build": gpu_build, "gpus": gpus, "usable": usable}))"""


def check_python(site: ProbeSite) -> FindingLines:
    actual, least = (".".join(map(str, numbers)) for numbers in (sys.version_info[:3], MIN_PYTHON))
    if sys.version_info[:2] < MIN_PYTHON:
        yield "trouble", f"{actual}, but {least} is needed", f"install python {least} or newer"
    else:
        yield "ok", f"{actual} at {sys.executable}"


def check_package(site: ProbeSite) -> FindingLines:
    from dgal_bench.core.system import git_state, revision

    commit = revision(git_state())
    yield "ok", f"{__version__}, " + (f"git {commit}" if commit else "installed, no checkout")


def check_packages(site: ProbeSite) -> FindingLines:
    """Our own requirements, and those of the extra whose FAISS is installed."""
    from packaging.requirements import Requirement

    extras = ["", *(extra for name, extra in FAISS_EXTRAS.items() if _version(name))]
    unmet = {}
    for need in map(Requirement, requires("dgal-bench") or ()):
        applies = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        actual = _version(need.name)
        if applies and not (actual and need.specifier.contains(actual, prereleases=True)):
            package = f"{need.name}{need.specifier}"
            text = f"{need.name} {actual or 'is not installed'}, but {package} is needed"
            unmet[need.name] = ("trouble", text, pip_command(f"install '{package}'"))
    yield "ok", ", ".join(f"{name} {_version(name)}" for name in LISTED_PACKAGES if name not in unmet) or "none"
    yield from unmet.values()


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def check_torch(site: ProbeSite) -> FindingLines:
    if site.torch.error:
        text = f"torch and torchvision cannot be imported together ({site.torch.error})"
        yield "trouble", text, pip_command("install --force-reinstall torch torchvision")
    else:
        facts = site.torch.facts
        yield "ok", f"{facts['torch']}, CUDA {facts['cuda'] or 'none'}, fits torchvision {facts['torchvision']}"


def check_faiss(site: ProbeSite) -> FindingLines:
    owners = sorted(set(packages_distributions().get("faiss", ())))
    package = "faiss-gpu" if site.driver.text else "faiss-cpu"
    owner = " and ".join(owners) or "of no package"
    if len(owners) > 1:
        text = f"{owner} own the same module: the last one installed has overwritten the others"
        yield "trouble", text, reinstall_command(owners, package)
    if not owners and find_spec("faiss") is None:
        text = "not installed: torch searches (as fast for graphs; SEALS is slower)"
        yield "note", text, pip_command(f"install {package}")
    elif site.torch.error:
        yield "note", f"{owner}: not tried, since torch fails", "repair torch first"
    elif site.faiss.error:
        text = f"{owner}: cannot be used together with torch ({site.faiss.error})"
        yield "trouble", text, reinstall_command(owners or [package], package)
    else:
        facts = site.faiss.facts
        build = f"GPU build, sees {facts['gpus']} GPUs" if facts["gpu_build"] else "CPU build"
        yield "ok", f"{facts['version']} ({owner}), {build}"


def check_gpu(site: ProbeSite) -> FindingLines:
    """What the driver, torch and FAISS see, and where they disagree."""
    driver = "; ".join(site.driver.text.splitlines()) or f"nvidia-smi: {site.driver.error}"
    gpus, faiss = site.torch.facts.get("gpus", []), site.faiss.facts
    text = f"torch sees {len(gpus)}: {', '.join(gpus)} ({driver})"
    if site.torch.error:
        yield "note", f"{driver}; what torch sees is not known, since it fails", "repair torch first"
    elif not gpus:
        yield _no_gpu(site, driver)
    elif faiss and not faiss["gpu_build"]:
        repair = reinstall_command(["faiss-cpu"], "faiss-gpu")
        yield "note", f"{text}; FAISS is the CPU build: torch builds the graphs on the GPU", repair
    elif faiss and not faiss["usable"]:
        repair = "update the driver to one for CUDA 12.6 or newer, or set graph.backend=torch"
        yield "note", f"{text}; FAISS sees none: torch builds the graphs on the GPU", repair
    else:
        yield "ok", f"{text}; FAISS sees {faiss.get('gpus', 0)}"


def _no_gpu(site: ProbeSite, driver: str) -> tuple[str, ...]:
    """torch sees none: is there one, and what hides it?"""
    hidden, cuda = os.environ.get("CUDA_VISIBLE_DEVICES"), site.torch.facts["cuda"]
    if site.driver.text and hidden is not None:
        return "note", f"{driver}: hidden by CUDA_VISIBLE_DEVICES='{hidden}'", "unset CUDA_VISIBLE_DEVICES"
    if site.driver.text:
        repair = "install the torch and torchvision that https://pytorch.org/get-started names for this driver"
        return "trouble", f"{driver}, but torch sees none (it is built for CUDA {cuda or 'none'})", repair
    if site.driver.error != ABSENT:
        return "note", f"none ({driver})", "if this machine has a GPU, load or reinstall its driver"
    return "ok", "none; device=auto uses the CPU"


def check_cores(site: ProbeSite) -> FindingLines:
    from dgal_bench.config.schema import available_cores

    text = f"{available_cores()} available"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        text += f", OMP_NUM_THREADS={threads} (runs go by the setting threads instead)"
    if (meminfo := Path("/proc/meminfo")).exists():
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
        total, free = (kilobytes[key] * 1024 / 1e9 for key in ("MemTotal", "MemAvailable"))
        text += f", {total:.1f} GB of memory of which {free:.1f} GB are available"
    yield "ok", text


def check_data(site: ProbeSite) -> FindingLines:
    from dgal_bench.data.datasets import DATASETS

    for name in DATASETS:
        yield from run_check(partial(_data_set, name, site.data))


def _data_set(name: str, root: Path) -> FindingLines:
    from dgal_bench.data.datasets import DATASETS, describe_files
    from dgal_bench.data.torchvision import missing_files

    source, place, repair = DATASETS[name].source, DATASETS[name].folder, f"dgal-bench data {name}"
    if root != Path(os.environ.get("DGAL_DATA", "data")):
        repair += f" data={quote(str(root))}"
    if source and (missing := missing_files(source, root)):
        text = f"{name}: {len(missing)} of {len(source.files)} files are not there, at {source.at(root).absolute()}"
        yield "note", text, f"{repair}, or set DGAL_DATA (or data=DIR) to the folder that holds {source.landmarks}"
        return
    state = "ok" if place is None or (root / place).is_dir() else "note"
    try:
        yield state, f"{name}: {describe_files(name, root)}"
    except DataError as error:
        yield "trouble", str(error), f"delete the file, then {repair}"


def check_cache(site: ProbeSite) -> FindingLines:
    yield from _folder(site.cache, "cache=DIR or DGAL_CACHE")
    if site.cache.is_dir():
        manifests = [path for path in site.cache.glob("*/manifest.json") if path.parent.suffix != ".part"]
        damaged = sum(not _is_whole(path) for path in manifests)
        megabytes = sum(_bytes(Path(at, name)) for at, _, names in os.walk(site.cache) for name in names) / 1e6
        yield "ok", f"{len(manifests)} entries ({damaged} damaged: made again on use), {megabytes:.1f} MB"


def check_results(site: ProbeSite) -> FindingLines:
    yield from _folder(site.results, "results=DIR")


MIN_FREE_GB = 5


def _folder(folder: Path, knob: str) -> FindingLines:
    """Can it be written, does it lock, is there room? A missing folder is judged by its nearest parent."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if refusal := _refusal(nearest, write=nearest == folder):
        yield "trouble", f"{folder}: {refusal}", f"set {knob} to a folder that can be written"
        return
    text = f"{folder}: {'can be written and locked' if nearest == folder else f'missing, can be made in {nearest}'}"
    free = shutil.disk_usage(nearest).free / 1e9
    yield "ok", f"{text}, {free:.1f} GB of disk free"
    if free < MIN_FREE_GB:
        text = f"{folder}: {free:.1f} GB of disk free, below {MIN_FREE_GB} GB"
        yield "trouble", text, f"make room, or set {knob} to a folder on another disk"


def _refusal(folder: Path, write: bool) -> str | None:
    """Why it takes no files. ``write``: try it with a file that is locked and removed; else look at permissions."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    if not write:
        return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"
    try:
        with NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(bytes(4096))
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"a file there cannot be written and locked ({error.strerror})"
    return None


def _bytes(path: Path) -> int:
    with suppress(OSError):  # a run may have removed it meanwhile
        return path.stat().st_size
    return 0


def _is_whole(manifest: Path) -> bool:
    """Whether every array is there; their hashes are checked on load."""
    try:
        names = json.loads(manifest.read_text())["sha256"]
        return all((manifest.parent / f"{name}.npy").is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_wandb(site: ProbeSite) -> FindingLines:
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    if where := key_place(host):
        yield "ok", f"{version('wandb')}, a key for {host} in {where}"
    else:
        text = f"{version('wandb')}, no key for {host}: runs can be kept offline"
        yield "note", text, f"{quote(sys.executable)} -m wandb login"


CHECKS: tuple[tuple[str, Callable[[ProbeSite], FindingLines]], ...] = (
    ("python", check_python),
    ("dgal-bench", check_package),
    ("packages", check_packages),
    ("torch", check_torch),
    ("faiss", check_faiss),
    ("gpu", check_gpu),
    ("cores", check_cores),
    ("data", check_data),
    ("cache", check_cache),
    ("results", check_results),
    ("wandb", check_wandb),
)


def examine_machine(data: Path, cache: Path, results: Path) -> list[DoctorFinding]:
    """Every check's findings, in order. It leaves no files and raises nothing: a check that fails is a trouble."""
    python = (sys.executable, "-P", "-c")  # -P: a folder torch/ in the working directory is not torch
    with ThreadPoolExecutor() as pool:  # some seconds each
        driver, torch, faiss = pool.map(run_probe, (DRIVER_PROBE, (*python, TORCH_PROBE), (*python, FAISS_PROBE)))
    site = ProbeSite(data, cache, results, driver, torch, faiss)
    return [DoctorFinding(topic, *line) for topic, check in CHECKS for line in run_check(partial(check, site))]


def findings_table(findings: Sequence[DoctorFinding]) -> str:
    """A line for each finding, its repair below, and at the end the number of troubles."""
    width = max((len(finding.topic) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.topic:{width}}  {finding.text}")
        lines += [f"{'':8} {'':{width}}  -> {finding.repair}"] if finding.repair else []
    troubles = sum(finding.state == "trouble" for finding in findings)
    return "\n".join([*lines, f"{troubles or 'no'} trouble{'s' if troubles > 1 else ''} found"])
