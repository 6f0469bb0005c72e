"""Full supervision: one training on the whole labeled pool, the reference line of every strategy's curve."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.seeding import isolated
from dgal_bench.data.pool import Pool
from dgal_bench.engines import worker
from dgal_bench.engines.base import job_message
from dgal_bench.engines.sweep import PlannedRun, plan_runs
from dgal_bench.experiment import Run
from dgal_bench.models.task import fit, measure_accuracy, new_trainer
from dgal_bench.report.groups import group
from dgal_bench.report.plots.curves import accuracy_labels, accuracy_query_time
from dgal_bench.report.summary import summarise, summary_csv
from dgal_bench.report.write import summary_md
from dgal_bench.results.reader import read_results, read_run
from tests.test_cli import axes, settings


def planned(tmp_path, **changes):
    return plan_runs(axes(**changes), settings(tmp_path, full_supervision=True))


def practice_job(experiment, tmp_path) -> PlannedRun:
    """The reference of the practice runs."""
    overrides = {"dataset.pool_size": ["200"], "dataset.test_size": ["60"], "representation.threads": ["1"]}
    jobs = plan_runs(
        axes(representation=["pca"], profile=["smoke"]) | overrides,
        settings(tmp_path, full_supervision=True, results=tmp_path),
    )
    return jobs[-1]


def run_reference(job: PlannedRun, data="digits need none", cache="unused"):
    events = []
    where = settings(job.path.parent, data=Path(data), cache=Path(cache))
    worker.handle(job_message("run", job, where), lambda event, **facts: events.append(event), {})
    assert events[-1] == "done"
    return read_run(job.path)


def test_one_for_each_data_set_profile_and_network_after_all_comparisons(tmp_path):
    jobs = planned(tmp_path, strategy=["random", "dgmg"], seed=["3", "1"], profile=["cpu", "smoke"])
    jobs += planned(tmp_path, net__feature_dim=["20", "50"], graph__graph_k=["5", "10"])
    names = [job.name for job in jobs]
    references = [name for name in names if "full_supervision" in name]
    assert references == [
        "digits/full_supervision+profile=cpu/seed-3",
        "digits/full_supervision+profile=smoke/seed-3",
        "digits/full_supervision+net.feature_dim=20/seed-0",
        "digits/full_supervision+net.feature_dim=50/seed-0",
    ]
    assert names[8:10] == references[:2]
    assert all(job.config.full_supervision and job.config.rounds == 0 for job in jobs if job.name in references)
    assert not any("full" in job.name for job in plan_runs(axes(), settings(tmp_path)))


def test_it_is_the_same_result_whatever_the_graph_and_another_with_another_training(tmp_path):
    def reference(**changes):
        return planned(tmp_path, **changes)[-1]

    one = reference()
    same = [reference(graph__graph_k=["7"]), reference(representation=["pca"]), reference(rounds=["3"])]
    same += [reference(strategy=["dgmg"], restricted_size=["77"]), reference(batch_size=["5"])]
    assert {job.config.hash for job in same} == {one.config.hash}
    assert {job.setup_key for job in same} == {one.setup_key}
    others = [reference(training__lr=["0.01"]), reference(net__feature_dim=["9"]), reference(seed=["2"])]
    assert len({job.config.hash for job in [one, *others]}) == 4


def test_its_row_is_a_training_on_every_label_and_needs_no_representation(experiment, tmp_path):
    log = run_reference(practice_job(experiment, tmp_path))
    assert log.done
    (row,) = log.records
    assert (row.n_labeled, row.indices, row.query_seconds) == (200, None, None)
    assert sorted(log.header["initial"]) == list(range(200))
    run = Run.of(replace(example_config("random"), initial_size=None), experiment)
    pool = Pool(200, 10, torch.arange(200), experiment.data.labels)
    data, module = run.datamodule(pool, 0), run.new_module(0)
    with isolated(0, "training", 0):
        trainer = new_trainer(run.config, experiment.device)
        fitted = fit(trainer, module, data)
        accuracy = measure_accuracy(trainer, module, data)
    assert (row.accuracy, row.train_loss) == (accuracy, fitted.train_loss)


def test_the_report_draws_it_as_a_line_and_counts_it_as_no_strategy(experiment, tmp_path):
    job = practice_job(experiment, tmp_path)
    run_reference(job)
    folder = Path(*job.path.parts[:-2])
    run_in_process(experiment, folder / "random" / "seed-0.jsonl", example_config("random"))
    (one,) = group(read_results(tmp_path))
    assert one.strategies == ["random"]
    assert [row.strategy for row in summarise(one)] == ["random"]
    assert "full_supervision" not in summary_csv([one])
    accuracy = read_run(job.path).records[0].accuracy
    assert f"Full supervision: {100 * accuracy:.1f} % with all 200 labels (one training, 3 epochs" in summary_md([one])
    for draw in (accuracy_labels, accuracy_query_time):
        lines = {line.get_label(): line for line in draw(one).axes[0].get_lines()}
        assert set(lines["all 200 labels"].get_ydata()) == {accuracy}


def test_an_unfinished_one_is_on_the_list_of_what_is_missing(experiment, tmp_path):
    job = practice_job(experiment, tmp_path)
    run_reference(job)
    job.path.write_bytes(job.path.read_bytes().splitlines(keepends=True)[0])
    (one,) = group(read_results(tmp_path))
    text = summary_md([one])
    assert "PARTIAL, not counted: full_supervision/seed-0, 0 of 1 rows" in text
    assert "Full supervision:" not in text


def test_no_strategy_can_start_with_every_label():
    with pytest.raises(ConfigError, match="initial_size=null labels the whole pool, and nothing is left to query"):
        example_config("random", "initial_size=null")
