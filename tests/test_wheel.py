"""The built wheel, in an environment of its own, away from the repository."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from dgal_bench import __version__
from dgal_bench.results.reader import read_results

HERE = Path(__file__).parent.parent


def run(*words, cwd, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DGAL_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=cwd,
        check=False,
        env=kept | environment,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.slow
def test_a_wheel_runs_the_main_job_away_from_the_repository(tmp_path):
    """``dgal-bench bench dataset=digits``, of a strategy, a seed and a query, with fewer epochs.

    What it depends on is that of these tests: test_project_files says that all of it is declared.
    """
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, HERE, cwd=tmp_path)
    (wheel,) = tmp_path.glob("dgal_bench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {f"dgal_bench/{path.relative_to(HERE)}" for path in (HERE / "conf").rglob("*.yaml")}
    assert len(inside) > 10
    assert inside | {"dgal_bench/data/mini_imagenet_split.txt"} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]
    assert {"dgal_bench/py.typed", "dgal_bench/__main__.py"} <= names
    (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        page = archive.read(metadata).decode()
    assert "## Adding a strategy" in page
    assert all(link.startswith(("http", "#")) for link in re.findall(r"\]\(([^)]*)\)", page))
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    own = tmp_path / "venv/bin/python"
    run(*pip, "--python", own, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # an editable package there stays unseen

    command = tmp_path / "venv/bin/dgal-bench"
    assert run(command, "--version", cwd=tmp_path).stdout == f"dgal-bench {__version__}\n"
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    check_doctor(run(command, "doctor", cwd=elsewhere, DGAL_CACHE=str(cache)).stdout)
    assert list(elsewhere.iterdir()) == []
    assert list(cache.glob("*")) == []
    few = ("rounds=1", "representation.max_epochs=15", "training.max_epochs=10")
    done = run(
        command,
        "bench",
        "dataset=digits",
        "strategy=dgmg",
        "seed=0",
        *few,
        cwd=elsewhere,
        DGAL_CACHE=str(cache),
    )
    logs = read_results(elsewhere / "results" / "runs")
    assert len(logs) == 2  # and a training on all labels
    assert all(log.done for log in logs)
    assert {log.header["provenance"]["git"]["revision"] for log in logs} == {None}
    assert {log.header["provenance"]["versions"]["dgal-bench"] for log in logs} == {__version__}
    assert "| dgmg " in done.stdout
    last = {log.header["cell"].split("/")[1]: log.records[-1].accuracy for log in logs}
    assert last["full_supervision"] > 0.9
    figures = elsewhere / "results/runs/paper/report/figures"
    assert (figures / "paper-digits-cpu-accuracy-query-time.png").stat().st_size > 10_000


def check_doctor(told):
    """Its real processes: what they report is what this process sees."""
    assert told.endswith("\nno trouble found\n")
    found = {topic: (state, text) for state, topic, text in (line.split(maxsplit=2) for line in told.splitlines())}
    assert found["torch"][0] == "ok"
    assert torch.__version__ in found["torch"][1]
    assert found["faiss"][0] in ("ok", "note")
    assert bool(re.search("torch sees [1-9]", found["gpu"][1])) == torch.cuda.is_available()
    assert re.search(r"^[1-9]\d* available, .* GB of memory", found["cores"][1])
