"""Is what surrounds the installation fit to run: cores, data sets, folders and the key of W&B."""

import fcntl
import json
import netrc
import os
import shutil
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

from dgal_bench.doctor.base import Lines, Site, guarded
from dgal_bench.errors import DataError

LEAST_FREE_GB = 5


def cores(site: Site) -> Lines:
    from dgal_bench.config import available_cores

    text = f"{available_cores()} available"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        text += f", OMP_NUM_THREADS={threads} (cells go by the setting threads instead)"
    if (meminfo := Path("/proc/meminfo")).exists():
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
        total, free = (kilobytes[key] * 1024 / 1e9 for key in ("MemTotal", "MemAvailable"))
        text += f", {total:.1f} GB of memory of which {free:.1f} GB are available"
    yield "ok", text


def data(site: Site) -> Lines:
    from dgal_bench.data.datasets import DATASETS

    for name in DATASETS:
        yield from guarded(partial(_data_set, name, site.data))


def _data_set(name: str, root: Path) -> Lines:
    from dgal_bench.data.datasets import DATASETS, whereabouts
    from dgal_bench.data.files import missing

    source, place, prepare = DATASETS[name].source, DATASETS[name].place, f"dgal-bench data {name}"
    if root != Path(os.environ.get("DGAL_DATA", "data")):
        prepare += f" data={quote(str(root))}"
    if source and (gone := missing(source, source.at(root))):
        text = f"{name}: {len(gone)} of {len(source.files)} files are not there, at {source.at(root).absolute()}"
        yield "note", text, f"{prepare}, or set DGAL_DATA (or data=DIR) to the folder that holds {source.landmark}"
        return
    state = "ok" if place is None or (root / place).is_dir() else "note"
    try:
        yield state, f"{name}: {whereabouts(name, root)}"
    except DataError as error:
        yield "trouble", str(error), f"delete the file, then {prepare}"


def cache(site: Site) -> Lines:
    yield from _folder(site.cache, "cache=DIR or DGAL_CACHE")
    if site.cache.is_dir():
        manifests = [path for path in site.cache.glob("*/manifest.json") if path.parent.suffix != ".part"]
        damaged = sum(not _whole(path) for path in manifests)
        megabytes = sum(_bytes(Path(at, name)) for at, _, names in os.walk(site.cache) for name in names) / 1e6
        yield "ok", f"{len(manifests)} entries ({damaged} damaged: made again on use), {megabytes:.1f} MB"


def results(site: Site) -> Lines:
    yield from _folder(site.results, "results=DIR")


def _folder(folder: Path, knob: str) -> Lines:
    """Can it be written, does it lock, is there room? Its nearest parent stands for one that is not there yet."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if refusal := _refusal(there, really=there == folder):
        yield "trouble", f"{folder}: {refusal}", f"set {knob} to a folder that can be written"
        return
    text = f"{folder}: {'can be written and locked' if there == folder else f'not there yet, can be made in {there}'}"
    free = shutil.disk_usage(there).free / 1e9
    yield "ok", f"{text}, {free:.1f} GB of disk free"
    if free < LEAST_FREE_GB:
        text = f"{folder}: {free:.1f} GB of disk free, below {LEAST_FREE_GB} GB"
        yield "trouble", text, f"make room, or set {knob} to a folder on another disk"


def _refusal(folder: Path, really: bool) -> str | None:
    """Why nothing can be put there. ``really``: write, lock and remove a file; else by its permissions alone."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    if not really:
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


def _whole(manifest: Path) -> bool:
    """Every array is there; hashes are checked when an entry is loaded."""
    try:
        names = json.loads(manifest.read_text())["sha256"]
        return all((manifest.parent / f"{name}.npy").is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def wandb(site: Site) -> Lines:
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    if where := key_place(host):
        yield "ok", f"{version('wandb')}, a key for {host} in {where}"
    else:
        text = f"{version('wandb')}, no key for {host}: runs can be kept offline"
        yield "note", text, f"{quote(sys.executable)} -m wandb login"


def key_place(host: str) -> str | None:
    """Where a key is, looked for as wandb does but without its import."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with suppress(OSError, netrc.NetrcParseError):
        entry = netrc.netrc(file).authenticators(host)
        return str(file) if entry and entry[2] else None
    return None
