"""A user's files may change under one path, and lie elsewhere with the same content: results know the content."""

import shutil
import sys

import numpy as np
import pytest

from dgal_bench.config.schema import idle_restriction
from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.errors import ResultsError
from dgal_bench.experiment import content_hashes
from dgal_bench.report.groups import group
from dgal_bench.results.reader import read_results, read_run
from dgal_bench.results.resume import check_same_content
from tests.sweeping import here


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
    settings += " training.max_epochs=2 training.min_epochs=1 rounds=1 strategy=random dataset=embeddings report=false"
    places = [f"seed={seed}", f"results={tmp_path}/results", f"cache={tmp_path}/cache"]
    return here([sys.executable, "-m", "dgal_bench.cli.main", "bench", *settings.split(), *places, *words])


def test_a_finished_run_is_compared_by_what_its_files_hold(experiment, tmp_path):
    config = example_config("random")
    run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    log = read_run(tmp_path / "seed-0.jsonl")
    content = content_hashes(config, experiment.data, None)
    assert content == {"data": experiment.data.sha256, "weights": None, "files": None}
    check_same_content(log, content)
    log.header["fingerprint"].pop("files")  # as in older files there was one
    check_same_content(log, content | {"files": "something"})
    for name in ("data", "weights"):
        with pytest.raises(ResultsError, match=f"was made from something else .{name} .* -> other"):
            check_same_content(log, content | {name: "other"})


def test_a_restriction_that_leaves_the_whole_pool_is_said():
    dgmg = example_config("dgmg")
    assert idle_restriction(dgmg, 200) is None
    assert "restricted_size=20 restricts nothing of a pool of 30: lower it" in idle_restriction(dgmg, 30)
    assert idle_restriction(example_config("margin"), 30) is None


@pytest.mark.slow
def test_finished_runs_of_other_content_are_refused_and_of_the_same_found(embeddings, tmp_path):
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
    assert read_run(tmp_path / "results" / "paper" / "second" / "random" / "seed-0.jsonl").done


@pytest.mark.slow
def test_seeds_of_different_content_are_never_averaged(embeddings, tmp_path):
    bench(tmp_path, embeddings("one.npz", seed=0), "full_supervision=false")
    bench(tmp_path, embeddings("two.npz", seed=1), "full_supervision=false", "dataset.name=two", seed=1)
    folder = tmp_path / "results" / "paper"
    (folder / "two" / "random" / "seed-1.jsonl").rename(folder / "embeddings" / "random" / "seed-1.jsonl")
    text = (folder / "embeddings" / "random" / "seed-1.jsonl").read_text()
    (folder / "embeddings" / "random" / "seed-1.jsonl").write_text(
        text.replace('"name": "two"', '"name": "embeddings"')
    )
    groups = group(read_results(tmp_path / "results"))
    assert [list(one.runs) for one in groups] == [["random"], ["random"]]
    assert {one.name for one in groups} == {f"paper/embeddings (data {one.content})" for one in groups}
    assert len({one.slug for one in groups}) == len({one.content for one in groups}) == 2
