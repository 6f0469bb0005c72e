"""The command line: what it plans, what it refuses and how, and real sweeps of worker processes."""

import io
import json
import signal
import sys
from contextlib import suppress

import pytest

from dgal_bench.cli import main as cli
from dgal_bench.cli.main import main
from dgal_bench.cli.options import parse_arguments
from dgal_bench.config.compose import group_names, read_group, split_values
from dgal_bench.conformance import EXAMPLE_SETTINGS, example_config, run_in_process
from dgal_bench.core.errors import ConfigError
from dgal_bench.engines.progress import BarProgress, LineProgress, duration
from dgal_bench.engines.sweep import SweepSettings, plan_runs
from dgal_bench.results.reader import read_results, read_run
from tests.sweeping import HERE, alone, choices_of, command, descendants, finish, here, written  # noqa: F401 - for others


def settings(tmp_path, **changes):
    base = {
        "results": tmp_path,
        "suite": "s",
        "data": tmp_path,
        "cache": tmp_path,
        "jobs": 1,
        "resume_anyway": False,
        "offline": True,
        "plugins": (),
        "full_supervision": False,
    }
    return SweepSettings(**{**base, **changes})


def axes(**changes):
    base = {"dataset": ["digits"], "representation": ["vae"], "profile": ["cpu"], "seed": ["0"], "strategy": ["random"]}
    return {**base, **{key.replace("__", "."): values for key, values in changes.items()}}


def test_values_split_at_commas_outside_brackets():
    assert split_values("a,b, c") == ["a", "b", "c"]
    assert split_values("[1,2],[3,4]") == ["[1,2]", "[3,4]"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    assert split_values("") == []


def test_a_command_line_is_keys_words_and_flags():
    command = parse_arguments(["results", "seed=0,1", "--out", "there", "--dry-run"])
    assert (command.words, command.values, command.flags) == (
        ["results"],
        {"seed": ["0", "1"]},
        {"--out": "there", "--dry-run": ""},
    )


def test_a_plan_is_the_grid_with_seeds_outside_strategies(tmp_path):
    jobs = plan_runs(axes(strategy=["random", "dgmg"], seed=["0", "1"]), settings(tmp_path))
    assert [job.name for job in jobs] == [
        "digits/random/seed-0", "digits/dgmg/seed-0", "digits/random/seed-1", "digits/dgmg/seed-1",
    ]  # fmt: skip
    assert jobs[1].path == tmp_path / "s" / "digits" / "dgmg" / "seed-0.jsonl"
    assert [job.config.seed for job in jobs] == [0, 0, 1, 1]
    assert len({job.setup_key for job in jobs}) == 1


def test_other_grids_become_part_of_the_folder(tmp_path):
    jobs = plan_runs(axes(strategy=["dgmg"], graph__graph_k=["5", "10"]), settings(tmp_path))
    assert [job.path.parent.name for job in jobs] == ["dgmg+graph.graph_k=5", "dgmg+graph.graph_k=10"]
    assert [job.config.graph.graph_k for job in jobs] == [5, 10]
    assert len({job.setup_key for job in jobs}) == 2


def test_a_strategy_may_bring_settings_of_its_own(tmp_path):
    names = ["dgmg", "dgmg+strategy.restrict.score=ova_norm+strategy.restrict.p=1e+1", "margin"]
    jobs = plan_runs(axes(strategy=names), settings(tmp_path))
    assert [job.path.parent.name for job in jobs] == names
    assert [job.config.strategy.name for job in jobs] == ["dgmg", "dgmg", "margin"]
    assert jobs[0].config.strategy.restrict["score"] == "ova_min"
    assert (jobs[1].config.strategy.restrict["score"], jobs[1].config.strategy.restrict["p"]) == ("ova_norm", 10.0)
    with pytest.raises(ConfigError, match=r"strategy=...\+seed=3: that is an axis of its own, write seed=3 beside it"):
        plan_runs(axes(strategy=["dgmg+seed=3"]), settings(tmp_path))
    with pytest.raises(
        ConfigError, match=r"strategy.restrict.scroe is no setting of 'diffusion'; did you mean 'score'"
    ):
        plan_runs(axes(strategy=["dgmg+strategy.restrict.scroe=margin"]), settings(tmp_path))


def test_suites_are_what_they_say():
    """paper and ablation share no run, together they are all, and smoke and all leave no strategy of conf/ out."""
    suites = {name: list(read_group("suite", name).strategy) for name in ("paper", "ablation", "all", "smoke")}
    assert suites["all"] == suites["paper"] + suites["ablation"]
    assert len(set(suites["all"])) == len(suites["all"]) == 28
    assert suites["smoke"] == sorted(group_names("strategy"))
    assert {name.partition("+")[0] for name in suites["all"]} == set(suites["smoke"])
    scores = {name.partition("score=")[2] for name in suites["ablation"] if "score=" in name}
    assert scores == {"ova_norm", "confidence", "margin", "negentropy", "normalised"}


def test_help_names_every_verb_group_and_choice(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in [*cli.VERBS, "dgmg", "mnist", "smoke", "--dry-run", "DGAL_DATA"])


def test_version_and_short_help(capsys):
    assert main(["bench", "--version"]) == 0
    assert capsys.readouterr().out.startswith("dgal-bench 0.")
    assert main(["bench", "-h"]) == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_tells_which_signal_came_though_a_library_raises_its_own(monkeypatch, capsys, sent, code):
    """As Ray does while it waits: what the handler has raised is swallowed, and a plain KeyboardInterrupt raised."""

    def wait(_):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(sent)
        raise KeyboardInterrupt

    before = signal.getsignal(sent)
    monkeypatch.setitem(cli.VERBS, "doctor", wait)
    assert main(["doctor"]) == code
    assert "stopped; what was finished is kept" in capsys.readouterr().err
    assert signal.getsignal(sent) == before


def test_print_config_is_the_resolved_yaml(capsys, tmp_path):
    from omegaconf import OmegaConf

    assert main(["run", "strategy=dgmg", "graph.graph_k=7", f"results={tmp_path}/r", "--print-config"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.graph.graph_k == 7
    assert shown.strategy.restrict == {
        "kind": "diffusion", "restricted_size": 50, "diffusion_steps": None, "score": "ova_min", "p": 2.0,
        "tie_break": "hash", "memory_limit": 8 << 30,
    }  # fmt: skip
    assert not (tmp_path / "r").exists()


def test_dry_run_says_what_would_run_and_what_is_done(capsys, experiment, tmp_path):
    folder = tmp_path / "paper" / "digits"
    run_in_process(experiment, folder / "random" / "seed-0.jsonl", example_config("random"))
    run_in_process(experiment, folder / "dgmg" / "seed-0.jsonl", example_config("dgmg"))
    cut = folder / "dgmg" / "seed-0.jsonl"
    cut.write_bytes(b"".join(cut.read_bytes().splitlines(keepends=True)[:2]))
    words = [
        "bench",
        "representation=pca",
        "profile=smoke",
        f"results={tmp_path}",
        "strategy=random,dgmg",
        "seed=0,1",
        *EXAMPLE_SETTINGS,
    ]
    assert main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "done     digits/random/seed-0 (3 rows)"
    assert lines[1] == "partial  digits/dgmg/seed-0 (1 rows)"
    assert lines[2] == "to run   digits/random/seed-1"
    assert lines[4] == "to run   digits/full_supervision/seed-0"
    assert lines[5].startswith("5 runs: 1 done, 4 to run")


def test_progress_lines_tell_place_accuracy_and_time_left(tmp_path):
    jobs = plan_runs(axes(strategy=["random", "dgmg"]), settings(tmp_path))
    stream = io.StringIO()
    lines = LineProgress(dict.fromkeys(jobs, 16), stream)
    lines.begun(jobs[0])
    for _ in range(16):
        lines.round(jobs[0], 0.875)
    lines.done(jobs[0], 7.2)
    lines.failed(jobs[1], "ValueError: diverged")
    lines.warn("a cache entry is damaged")
    first, second, third = stream.getvalue().splitlines()
    assert third == "warning: a cache entry is damaged"
    assert first.startswith("[1/2] digits/random/seed-0: 87.5% in 7 s, about ")
    assert first.endswith(" left")
    assert second.startswith("[2/2] digits/dgmg/seed-0: FAILED: ValueError: diverged")


def test_a_run_that_another_command_has_finished_is_no_error(tmp_path):
    (job,) = plan_runs(axes(), settings(tmp_path))
    stream = io.StringIO()
    lines = LineProgress({job: 16}, stream)
    lines.begun(job)
    lines.done(job, 0.1)
    assert stream.getvalue() == "[1/1] digits/random/seed-0: done already in 0 s\n"


def test_the_bar_counts_rounds(tmp_path):
    (job,) = plan_runs(axes(), settings(tmp_path))
    stream = io.StringIO()
    bar = BarProgress({job: 16}, stream)
    bar.setting_up("digits", "VAE epoch", 3, 150)
    bar.begun(job)
    bar.round(job, 0.5)
    bar.close()
    assert "digits: VAE epoch" in stream.getvalue()
    assert "1/16" in stream.getvalue()


def test_durations():
    assert [duration(s) for s in (7.4, 185, 3765)] == ["7 s", "3:05", "1:02:45"]


# Sweeps from here on.


@pytest.mark.slow
def test_a_failed_run_is_recorded_the_others_go_on_and_a_second_try_runs_only_it(tmp_path, cache_root, capsys):
    root = tmp_path / "results"
    words = command(root, cache_root, "strategy=random", "seed=0", "training.lr=0.001,1e25", "jobs=1")
    done = here(words)
    assert done.returncode == 1
    assert "FAILED: the training loss is nan" in done.stderr
    assert "1 of 2 runs failed" in done.stderr
    folder = root / "paper" / "digits"
    good, bad = (read_run(folder / f"random+training.lr={lr}" / "seed-0.jsonl") for lr in ("0.001", "1e25"))
    assert good.status == "done"
    assert bad.status == "failed"
    assert "lower training.lr" in bad.failure["error"]
    assert "Traceback" in bad.failure["traceback"]
    assert main(["report", str(root)]) == 0
    assert "FAILED, not counted: random+training.lr=1e25/seed-0" in capsys.readouterr().out
    before, bad_before = (log.path.read_bytes() for log in (good, bad))
    assert main([*words[3:], "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("failed ")
    assert main([*words[3:], "retry=failed", "--dry-run"]) == 0
    assert "2 runs: 1 done, 1 to run, 1 side by side" in capsys.readouterr().out
    again = here(words)
    assert (again.returncode, bad.path.read_bytes()) == (1, bad_before)
    assert "1 of 2 runs failed; retry=failed tries them again" in again.stderr
    assert (folder / "random+training.lr=0.001" / "seed-0.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_collapsed_representation_costs_its_own_runs_only(tmp_path, cache_root):
    words = ["representation=pca,vae", "representation.recon_weight=1e-5", "strategy=random", "seed=0"]
    base = [word for word in command(tmp_path, cache_root, report=True) if word != "representation=pca"]
    done = here([*base, *words])
    assert done.returncode == 1
    assert "random+representation=vae/seed-0: FAILED: the VAE says too little of these images" in done.stderr
    assert "1 of 2 runs failed" in done.stderr
    assert [log.status for log in read_results(tmp_path)] == ["done", "failed"]
    assert "| random+representation=pca |" in done.stdout
    assert "FAILED, not counted: random+representation=vae/seed-0" in done.stdout


@pytest.mark.slow
def test_a_row_of_a_run_alone_counts_one_run(tmp_path, tmp_path_factory, cache_root):
    """Counted in a $TMPDIR of its own: runs of other tests may be at work on this machine."""
    base = command(tmp_path, cache_root, "strategy=random", "seed=0", "jobs=2")
    done = finish(base, TMPDIR=str(tmp_path_factory.mktemp("counted")))
    assert done.returncode == 0, done.stderr
    assert {record.jobs for log in read_results(tmp_path) for record in log.records} == {1}


@pytest.mark.slow
def test_the_smoke_suite_runs_every_strategy_with_its_vae(tmp_path):
    words = [
        sys.executable,
        "-m",
        "dgal_bench.cli.main",
        "bench",
        "suite=smoke",
        f"results={tmp_path}",
        f"cache={tmp_path}/cache",
    ]
    done = finish(words)
    assert done.returncode == 0, done.stderr
    logs = read_results(tmp_path)
    names = [log.path.parent.name for log in logs]
    assert sorted(names) == sorted([*cli.group_names("strategy"), "full_supervision"])
    kinds = {log.header["setup"]["representation"]["kind"] for log in logs if log.header["setup"]}
    assert kinds == {"vae"}
    assert [name for name, log in zip(names, logs, strict=True) if not log.header["setup"]] == ["full_supervision"]
    assert (
        json.loads((tmp_path / "smoke" / "digits" / "dgmg" / "seed-0.jsonl").read_text().splitlines()[0])["profile"]
        == "smoke"
    )
