"""A user's files may change under one path, and lie elsewhere with the same content: results know the content."""

import shutil
import sys

import numpy as np
import pytest

from dgal_bench.record import read_cell, read_results
from dgal_bench.report.summary import group
from tests.test_cli import finish


@pytest.fixture
def embeddings(tmp_path):
    """Writes an .npz of three classes, of a content that depends on the seed."""

    def write(name, seed):
        rng = np.random.default_rng(seed)
        labels = np.arange(120) % 3
        np.savez(tmp_path / name, embeddings=rng.normal(size=(3, 6))[labels] + rng.normal(size=(120, 6)), labels=labels)
        return f"dataset.path={tmp_path / name}"

    return write


def bench(tmp_path, *words, seed=0):
    settings = "initial_size=10 batch_size=5 restricted_size=20 graph.graph_k=5 representation.threads=1 jobs=1"
    settings += " training.max_epochs=2 training.min_epochs=1 rounds=1 strategy=random dataset=embeddings"
    places = [f"seed={seed}", f"results={tmp_path}/results", f"cache={tmp_path}/cache"]
    return finish([sys.executable, "-m", "dgal_bench.cli", "bench", *settings.split(), *places, *words])


def test_finished_cells_of_other_content_are_refused_and_of_the_same_found(embeddings, tmp_path):
    one = embeddings("one.npz", seed=0)
    assert bench(tmp_path, one).returncode == 0
    file = tmp_path / "results" / "paper" / "embeddings" / "random" / "seed-0.jsonl"
    rows = file.read_bytes()
    shutil.copy(tmp_path / "one.npz", tmp_path / "moved.npz")
    assert bench(tmp_path, f"dataset.path={tmp_path}/moved.npz").returncode == 0
    assert file.read_bytes() == rows
    for path in (embeddings("another.npz", seed=1), embeddings("one.npz", seed=2)):
        done = bench(tmp_path, path)
        assert done.returncode == 2
        said = done.stderr.splitlines()[-1]
        assert "random/seed-0.jsonl was made from something else (data " in said
        assert said.endswith("use another results=DIR, or file it under another dataset.name=NAME")
    assert bench(tmp_path, embeddings("one.npz", seed=2), "dataset.name=second").returncode == 0
    assert file.read_bytes() == rows
    assert read_cell(tmp_path / "results" / "paper" / "second" / "random" / "seed-0.jsonl").done


def test_seeds_of_different_content_are_never_averaged(embeddings, tmp_path):
    bench(tmp_path, embeddings("one.npz", seed=0), "full_supervision=false")
    bench(tmp_path, embeddings("two.npz", seed=1), "full_supervision=false", "dataset.name=two", seed=1)
    folder = tmp_path / "results" / "paper"
    (folder / "two" / "random" / "seed-1.jsonl").rename(folder / "embeddings" / "random" / "seed-1.jsonl")
    text = (folder / "embeddings" / "random" / "seed-1.jsonl").read_text()
    (folder / "embeddings" / "random" / "seed-1.jsonl").write_text(
        text.replace('"name": "two"', '"name": "embeddings"')
    )
    (one,) = group(read_results(tmp_path / "results"))
    assert len(one.cells) == 2
    assert "random" in one.cells
    (other,) = set(one.cells) - {"random"}
    assert other.startswith("random (content.data: ")
