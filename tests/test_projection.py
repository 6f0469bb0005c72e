"""The projection of the latents: made for any latents, the same each time, carried whole, and read or refused."""

import io
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dgal_bench.conformance import example_config, example_experiment, run_in_process
from dgal_bench.core.errors import ResultsError
from dgal_bench.engines.base import job_message
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.engines.worker import handle
from dgal_bench.graph.knn import build_index
from dgal_bench.report import projection
from dgal_bench.report.plots.maps import read_projection
from dgal_bench.report.projection import get_projection, pack_file, place_among, principal_plane, project
from dgal_bench.representation import principal_components
from dgal_bench.results.projection_file import LEVELS, file_name, read_file, write_projection
from dgal_bench.results.reader import read_run
from dgal_bench.results.validate import validate
from tests.sweeping import command, finish
from tests.test_cli import settings

SHA = "0123456789abcdef" * 4


@pytest.fixture
def soon(monkeypatch):
    """t-SNE from 100 points on, of 150 at most, in as few steps as scikit-learn takes."""
    for name, value in {"_FEW": 99, "_SAMPLE": 150, "_STEPS": 250}.items():
        monkeypatch.setattr(projection, name, value)


def cloud(size, width=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32))


def outlier(size):
    points = torch.ones(size, 4)
    points[size // 2] = 7
    return points


KINDS = {
    "a cloud": cloud,
    "one dimension": partial(cloud, width=1),
    "two dimensions": partial(cloud, width=2),
    "more dimensions than points": partial(cloud, width=500),
    "constant": lambda size: torch.full((size, 4), 3.5),
    "on a line": lambda size: cloud(size, 1) * torch.arange(5),
    "three places": lambda size: cloud(3)[torch.arange(size) % 3],
    "one outlier": outlier,
    "huge": lambda size: 1e30 * cloud(size),
    "tiny": lambda size: 1e-30 * cloud(size),
    "far from 0": lambda size: 1000 + cloud(size),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 40, *(pytest.param(size, marks=pytest.mark.slow) for size in (120, 300))])
def test_any_latents_have_finite_positions(soon, size, kind):
    """By components, by t-SNE, and by t-SNE of a sample; a warning is an error here."""
    points = KINDS[kind](size)
    positions = project(points, seed=0)
    assert (positions.shape, positions.dtype) == ((size, 2), torch.float32)
    assert torch.isfinite(positions).all()


@pytest.mark.parametrize("width", [1, 2])
def test_latents_that_a_sheet_can_hold_are_their_own_projection(width):
    points = cloud(2000, width)
    assert torch.equal(project(points, seed=0)[:, :width], points)
    assert not project(points, seed=0)[:, width:].any()


def test_the_same_bits_on_any_number_of_threads_and_others_with_another_seed(soon):
    points, before = cloud(400), np.random.get_state()[1].copy()
    torch.set_num_threads(2)
    two = project(points, seed=0)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(project(points, seed=0), two)
    assert not torch.equal(project(points, seed=1), two)
    assert (np.random.get_state()[1] == before).all()


def test_components_are_those_of_the_representation():
    points = cloud(80, 7) * torch.arange(1, 8)
    expected = principal_components(points, 2)(points)
    torch.testing.assert_close(principal_plane(points).abs(), expected.abs(), rtol=1e-3, atol=1e-3)


def test_neighbours_in_the_latent_space_are_neighbours_in_the_picture(experiment):
    """Six of a point's ten nearest, of 180 points; by chance it would be one in two."""
    points = experiment.prepared.features[:180]
    projection_of = projection.tsne(points, seed=0)
    apart, seen = torch.cdist(points, points), torch.cdist(projection_of, projection_of)
    near, near_seen = (distances.argsort(dim=1)[:, 1:11] for distances in (apart, seen))
    shared = [len(set(a) & set(b)) for a, b in zip(near.tolist(), near_seen.tolist(), strict=True)]
    assert sum(shared) / len(shared) > 6


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_a_point_beside_the_sample_is_between_its_nearest_and_two_of_its_five_nearest(backend):
    base, positions, points = cloud(60), cloud(60, 2, seed=1), cloud(25, seed=2)
    found = place_among(base, positions, points, build_index(base, backend))
    for point, place in zip(points.double().numpy(), found.numpy(), strict=True):
        distances = np.sqrt(((base.double().numpy() - point) ** 2).sum(1))
        five = np.argsort(distances)[:5]
        seen = positions.double().numpy()[five]
        three = np.argsort(((seen - seen[0]) ** 2).sum(1))[:3]
        expected = np.average(seen[three], axis=0, weights=distances[five][three] ** -2)
        np.testing.assert_allclose(place, expected, rtol=1e-3, atol=1e-4)


def test_twins_of_the_sample_are_where_it_is():
    base, positions = cloud(60), cloud(60, 2, seed=1)
    twins = torch.tensor([3, 59, 3, 0])
    torch.testing.assert_close(place_among(base, positions, base[twins], build_index(base)), positions[twins])


def test_blocks_are_no_part_of_the_picture(soon, monkeypatch):
    points = cloud(400)
    whole = project(points, seed=0)
    monkeypatch.setattr(projection, "_BLOCK", 14 * 5 * 7)  # seven points at a time
    torch.testing.assert_close(project(points, seed=0), whole)
    some = torch.arange(0, 400, 3)
    assert project(points, seed=0, points=some).shape == (134, 2)


def arrays_of(experiment, ids=None):
    size = experiment.data.size if ids is None else len(ids)
    arrays = {"positions": cloud(size, 2).numpy() * [3, 1]}
    return arrays if ids is None else arrays | {"ids": np.array(ids)}


def written(folder, experiment, ids=None):
    content = pack_file(arrays_of(experiment, ids), experiment.data, SHA)
    (folder / file_name(SHA)).write_bytes(content)
    return folder / file_name(SHA)


@pytest.mark.parametrize("ids", [None, [0, 7, 9, 199]])
def test_what_is_packed_is_read_back(tmp_path, experiment, ids):
    written(tmp_path, experiment, ids)
    found, positions = read_projection(tmp_path, SHA), arrays_of(experiment, ids)["positions"]
    kept = range(experiment.data.size) if ids is None else ids
    assert found.labels.tolist() == [int(experiment.data.labels[i]) for i in kept]
    assert found.classes == [str(number) for number in range(10)]
    side = (positions.max(0) - positions.min(0)).max()
    middle = (positions.max(0) + positions.min(0)) / 2
    np.testing.assert_allclose(found.positions, 2 * (positions - middle) / side, atol=2 / LEVELS)
    assert (found.positions.dtype, float(np.abs(found.positions).max())) == (np.float32, 1)


def test_points_are_found_by_their_place_in_the_pool(tmp_path, experiment):
    written(tmp_path, experiment, [2, 7, 9, 199])
    some = read_projection(tmp_path, SHA)
    positions, found = some.of([199, 8, 2, 2, 1000, 0])
    assert found.tolist() == [True, False, True, True, False, False]
    assert np.array_equal(positions, some.positions[[3, 0, 0]])
    written(tmp_path, experiment)
    whole = read_projection(tmp_path, SHA)
    positions, found = whole.of([199, 200, 5])
    assert (found.tolist(), len(positions)) == ([True, False, True], 2)
    assert np.array_equal(positions, whole.positions[[199, 5]])
    assert whole.of([])[0].shape == (0, 2)


def test_no_file_is_no_projection(tmp_path):
    assert read_projection(tmp_path, SHA) is None


def changed(content, **arrays):
    with np.load(io.BytesIO(content)) as file:
        kept = {name: file[name] for name in file.files} | arrays
    made = io.BytesIO()
    np.savez(made, **{name: array for name, array in kept.items() if array is not None})
    return made.getvalue()


DAMAGED = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-30],
    "half": lambda content: content[: len(content) // 2],
    "no archive": lambda content: b"a note to myself",
    "one array": lambda content: content[:2] + bytes(len(content) - 2),
    "bits turned": lambda content: content[:200] + bytes(b ^ 255 for b in content[200:260]) + content[260:],
    "objects": partial(changed, classes=np.array([{"a": 1}], dtype=object)),
    "no version": partial(changed, version=None),
    "another version": partial(changed, version=np.array(99)),
    "no labels": partial(changed, labels=None),
    "fewer labels": partial(changed, labels=np.zeros(3, np.uint8)),
    "other labels": partial(changed, n_classes=np.array(2)),
    "floats": partial(changed, positions=np.zeros((200, 2))),
    "fewer ids": partial(changed, ids=np.arange(3)),
    "ids twice": partial(changed, ids=np.zeros(200)),
    "other latents": partial(changed, latents=np.array("f" * 64)),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_refused_in_a_line_that_names_it(tmp_path, experiment, how):
    path = written(tmp_path, experiment)
    path.write_bytes(DAMAGED[how](path.read_bytes()))
    with pytest.raises(ResultsError) as refused:
        read_projection(tmp_path, SHA)
    assert str(refused.value).startswith(f"{path} is ")
    assert "remove it" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_is_written_whole_once_and_again_where_it_differs(tmp_path):
    folder = tmp_path / "suite" / "digits"
    path = folder / "projection-01234567.npz"
    write_projection(folder, SHA, b"one")
    first = path.stat()
    write_projection(folder, SHA, b"one")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    write_projection(folder, SHA, b"two")
    assert path.read_bytes() == b"two"
    assert [found.name for found in folder.iterdir()] == [path.name]


def test_a_folder_that_takes_no_file_is_said_in_a_line_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"file/digits/projection-01234567.npz cannot be written: .*results=DIR"):
        write_projection(tmp_path / "file" / "digits", SHA, b"one")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ResultsError, match="No space left on device: make room"):
        write_projection(tmp_path / "digits", SHA, b"one")
    assert list((tmp_path / "digits").iterdir()) == []


def job_of(tmp_path, strategy="dgmg"):
    config = example_config(strategy)
    return PlannedRun(config, tmp_path / "r" / "suite" / "digits" / strategy / "seed-0.jsonl")


def events_of(job, where):
    events = []
    handle(job_message("setup", job, where), lambda event, **facts: events.append({"event": event, **facts}), {})
    return events


def test_a_set_up_makes_the_projection_once_and_files_it_in_the_folder_of_the_data_set(tmp_path):
    job, where = job_of(tmp_path), settings(tmp_path)
    first = events_of(job, where)
    assert [event["what"] for event in first if event["event"] == "progress"].count("projection") == 1
    (path,) = job.path.parents[1].glob("projection-*.npz")
    content = path.read_bytes()
    path.unlink()
    again = events_of(job, where)
    assert "projection" not in [event.get("what") for event in again if event["event"] == "progress"]
    assert path.read_bytes() == content
    experiment = example_experiment(tmp_path)
    found = read_projection(path.parent, experiment.prepared.features_sha256)
    assert found.labels.tolist() == experiment.data.labels.tolist()
    assert found.features_sha256 == experiment.prepared.features_sha256


def test_full_supervision_has_no_latents_to_project(tmp_path):
    job = job_of(tmp_path, "random")
    whole = replace(job.config, rounds=0, initial_size=None, propagation="none")
    *_, ready = events_of(PlannedRun(whole, job.path), settings(tmp_path))
    assert ready == {"event": "ready", "points": 200}
    assert not job.path.parents[1].exists()


def test_of_very_many_points_a_sample_has_positions(tmp_path, experiment, monkeypatch):
    monkeypatch.setattr(projection, "_ALL_UP_TO", 199)
    monkeypatch.setattr(projection, "_SUBSET", 50)
    arrays = get_projection(example_config("dgmg"), experiment.prepared, tmp_path, lambda what, done, of: None)
    write_projection(tmp_path, SHA, pack_file(arrays, experiment.data, SHA))
    found = read_projection(tmp_path, SHA)
    assert (len(found.ids), len(found.positions), len(set(found.ids))) == (50, 50, 50)
    assert found.labels.tolist() == experiment.data.labels[found.ids].tolist()
    assert found.of(list(range(200)))[1].sum() == 50


def test_a_header_says_the_classes_of_the_first_labels(tmp_path, experiment):
    path = job_of(tmp_path).path
    run_in_process(experiment, path, example_config("dgmg"))
    header = read_run(path).header
    assert header["initial_classes"] == experiment.data.labels[header["initial"]].tolist()


def test_validate_reads_projections_and_first_classes(tmp_path, experiment):
    path = job_of(tmp_path).path
    run_in_process(experiment, path, example_config("dgmg"))
    sha = experiment.prepared.features_sha256
    write_projection(path.parents[1], sha, pack_file(arrays_of(experiment), experiment.data, sha))
    verdict = validate(tmp_path)
    assert (verdict.problems, verdict.notes, verdict.n_files) == ([], [], 2)
    foreign = written(path.parents[1], experiment)
    assert [note.partition(": ")[0] for note in validate(tmp_path).notes] == [str(foreign)]
    foreign.write_bytes(b"")
    assert [line.startswith(f"{foreign}: is damaged") for line in validate(tmp_path).problems] == [True]
    foreign.rename(foreign.with_name(f".{foreign.name}.{os.getpid()}"))
    assert "killed" in validate(tmp_path).notes[0]


@pytest.mark.parametrize(
    ("classes", "said"),
    [([1] * 9, "9 initial_classes of 10"), ([1] * 9 + [10], "10 in initial_classes"), (None, "where a list should be")],
)
def test_validate_finds_wrong_first_classes(tmp_path, experiment, classes, said):
    path = job_of(tmp_path).path
    run_in_process(experiment, path, example_config("dgmg"))
    header, *rows = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(header) | {"initial_classes": classes}) + "\n" + "".join(rows))
    (problem,) = validate(tmp_path).problems
    assert said in problem
    assert problem.startswith(f"{path}, line 1: ")


@pytest.mark.slow
def test_a_sweep_leaves_a_large_one_beside_its_results(tmp_path):
    """t-SNE of 500 digits."""
    words = command(tmp_path / "r", tmp_path / "cache", "strategy=rsmg", "seed=0", "jobs=1")
    done = finish([word.replace("pool_size=200", "pool_size=500") for word in words])
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "r").rglob("projection-*.npz")
    found, (log,) = read_file(path), [read_run(run) for run in (tmp_path / "r").rglob("seed-*.jsonl")]
    assert found.features_sha256 == log.header["fingerprint"]["latents"]
    assert len(found.positions) == 500
    assert found.of(log.header["initial"])[1].all()
    assert found.labels[log.header["initial"]].tolist() == log.header["initial_classes"]
