"""Blocks of a graph's search on two nodes of Ray: the bits of one, whatever happens to the other."""

import os
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from dgal_bench.graph.block_search import search_in_blocks
from tests.test_block_search import K, points, quiet
from tests.test_ray import HERE, RAY, free_port, head_node

pytest.importorskip("ray")

SCRIPT = """
    import logging, os, signal, sys, time
    from pathlib import Path
    import numpy as np
    import ray
    from dgal_bench.engines.ray_blocks import run_blocks
    from dgal_bench.graph import block_search
    from tests.test_block_search import K, points, quiet

    root, deaths, out = map(Path, sys.argv[1:4])
    driver, deadline, own = os.getpid(), time.monotonic() + 200, set()

    class Asked(block_search.BlockSearch):
        def __call__(self, block):
            if os.getpid() == driver:
                own.add(block)
                while not others.exists() and time.monotonic() < deadline:  # the other node gets its share
                    time.sleep(0.1)
            elif deaths.is_dir() and len(list(deaths.iterdir())) < 2:
                (deaths / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            answer = super().__call__(block)
            if os.getpid() != driver:
                others.touch()
            return answer

    others = deaths.with_name("answered-" + deaths.name)
    block_search.BlockSearch = Asked
    logging.basicConfig(format="%(name)s: %(message)s")
    ray.init(address=sys.argv[4], log_to_driver=False, logging_level="ERROR")
    neighbors, facts = block_search.search_in_blocks(points(), K, 0.9, root, quiet, run_blocks)
    assert len(own) < facts["blocks"]  # the rest is from the other node
    np.savez(out, ids=neighbors.ids.numpy(), distances=neighbors.distances.numpy())
    while list(out.with_name("other").glob("work-*")) and time.monotonic() < deadline:
        time.sleep(0.1)  # what is to be cleared away, by a process that has to start first
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shared", "apart", "stale", "killed"])
def test_two_nodes_give_the_bits_of_one(tmp_path, monkeypatch, how):
    """``shared``: one cache. ``apart``: the second sees another folder. ``killed``: its first two workers die.

    ``stale``: its other folder has other lists under the same name.
    """
    if how in ("apart", "stale") and (os.geteuid() != 0 or shutil.which("unshare") is None):
        pytest.skip("a second node needs a mount of its own")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    root, other, deaths, port = tmp_path / "cache", tmp_path / "other", tmp_path / "deaths", free_port()
    for folder in (root, other, *([deaths] if how == "killed" else [])):
        folder.mkdir()
    if how == "stale":
        search_in_blocks(points(seed=1), K, 0.9, other / "work", quiet)
    there = sorted(other.rglob("*"))
    mount = f"mount --bind {other} {root} && " if how in ("apart", "stale") else ""
    second = f"{mount}exec {RAY} start --num-cpus=1 --block --address=127.0.0.1:{port}"
    with head_node(port, "--num-cpus=1"):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        node = subprocess.Popen([*(["unshare", "-m"] if mount else []), "sh", "-c", second], **silent)
        try:
            time.sleep(5)
            words = [sys.executable, "-c", textwrap.dedent(SCRIPT), root / "work", deaths, tmp_path / "found.npz"]
            done = subprocess.run([*words, f"127.0.0.1:{port}"], timeout=300, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 0, done.stderr
        finally:
            node.terminate()
            node.wait()
    neighbors, _ = search_in_blocks(points(), K, 0.9, tmp_path / "alone", quiet)
    found = np.load(tmp_path / "found.npz")
    assert np.array_equal(found["ids"], neighbors.ids)
    assert np.array_equal(found["distances"], neighbors.distances)
    assert (tmp_path / "answered-deaths").exists()
    assert len(list(deaths.glob("*"))) == (2 if how == "killed" else 0)
    said = [line for line in done.stderr.splitlines() if line.startswith("dgal_bench")]
    assert len(said) == (1 if how == "killed" else 0)  # once of a node
    assert all("gave no answer to a block of neighbours: WorkerCrashedError" in line for line in said)
    assert sorted(other.rglob("*")) == there  # what it was sent is cleared away, and nothing else
