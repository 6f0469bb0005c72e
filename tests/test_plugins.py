"""Strategies from outside the package: what a plugin adds, how it is checked, and what becomes of one that cheats."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from dgal_bench import conformance as judge
from dgal_bench import conformance as laws
from dgal_bench.cli.main import main
from dgal_bench.config.compose import group_names
from dgal_bench.config.schema import StrategyConfig
from dgal_bench.conformance import EXAMPLE_SETTINGS, example_config, run_in_process
from dgal_bench.core.errors import ConfigError, StrategyError
from dgal_bench.report.notes import rerun_command
from dgal_bench.results.reader import read_results, read_run
from dgal_bench.results.rows import choice
from dgal_bench.strategies import ACQUISITIONS, plugins, resolve_parts
from tests.sweeping import command, here

pytestmark = pytest.mark.usefixtures("registries")

HEAD = """
from dataclasses import dataclass
import random
import numpy as np
import torch
from dgal_bench.strategies import Query

@dataclass(frozen=True)
class Mine:
    factor: float = 1.0
    def __call__(self, query, candidates, batch_size):
{body}

ACQUISITIONS = {{"mine": Mine}}
"""


def acquisition(tmp_path, body, name="mine.py"):
    """A plugin file whose acquisition has this body."""
    path = tmp_path / name
    path.write_text(HEAD.format(body="\n".join(f"        {line}" for line in body.splitlines())))
    return path


def restriction(tmp_path, body):
    path = tmp_path / "mine.py"
    text = HEAD.format(body="\n".join(f"        {line}" for line in body.splitlines()))
    path.write_text(text.replace("query, candidates, batch_size", "query").replace("ACQUISITIONS", "RESTRICTIONS"))
    return path


def broken_laws(path, experiment):
    """Law -> breach, for the one strategy of a plugin."""
    (reference,) = plugins.install([str(path)])
    (name,) = judge.plugin_strategies(plugins.INSTALLED[reference])
    return {verdict.law: verdict.broken for verdict in judge.check_strategy(experiment, name) if verdict.broken}


@pytest.mark.slow
def test_a_cheat_that_writes_does_not_spoil_the_experiment_of_the_next(tmp_path, experiment):
    before = experiment.data.images.clone(), experiment.prepared.graph.weights.clone()
    body = "query.images[:] = 0\nreturn candidates[query.ties(candidates).argsort()[:batch_size]]"
    assert set(broken_laws(acquisition(tmp_path, body), experiment)) == {UNCHANGED}
    assert torch.equal(experiment.data.images, before[0])
    assert torch.equal(experiment.prepared.graph.weights, before[1])


FULL, RESTRICTS, SAME, GLOBALS, UNCHANGED, HIDDEN, PHASES, RESUMES = laws.LAWS


def test_an_honest_one_keeps_every_law(tmp_path, experiment):
    assert (
        broken_laws(
            acquisition(tmp_path, "return candidates[query.ties(candidates).argsort()[:batch_size]]"), experiment
        )
        == {}
    )


# Each cheats in its own way, and one law at least says how: the law, the plugin's body, a part of what is said.
CHEATS = {
    "too few": (FULL, "return candidates[: batch_size - 2]", "picked 3 points where the batch size is 5"),
    "too many": (FULL, "return candidates[: batch_size + 1]", "picked 6 points where the batch size is 5"),
    "twice the same": (FULL, "return candidates[:1].repeat(batch_size)", "picked 4 of 5 points twice"),
    "labeled": (
        FULL,
        "return torch.cat([query.pool.labeled[:1], candidates[: batch_size - 1]])",
        "picked 1 of 5 points that are labeled already",
    ),
    "outside": (FULL, "return candidates[:batch_size] + 1000", "outside the pool of 200 points"),
    "negative": (FULL, "return -1 - torch.arange(batch_size)", "outside the pool of 200 points"),
    "a list": (FULL, "return candidates[:batch_size].tolist()", "picked a list, not a flat int64 tensor of positions"),
    "floats": (FULL, "return candidates[:batch_size].float()", "picked (5,) torch.float32 on cpu, not a flat"),
    "an error": (FULL, "return candidates[[]][0]", "(mine.py, line 12)"),
    "a hidden draw": (SAME, "return candidates[torch.randperm(len(candidates))[:batch_size]]", "draw from query.rng"),
    "python's generator": (GLOBALS, "random.random()\nreturn candidates[:batch_size]", "generator of random has moved"),
    "numpy's generator": (GLOBALS, "np.random.rand()\nreturn candidates[:batch_size]", "generator of numpy has moved"),
    "writes to the pool": (UNCHANGED, "query.pool.labels[:] = 3\nreturn candidates[:batch_size]", "query.pool.labels"),
    "writes to images": (UNCHANGED, "query.images[0] += 1\nreturn candidates[:batch_size]", "query.images"),
    "an unknown phase": (
        PHASES, "with query.clock.phase('think'):\n    return candidates[:batch_size]", "phase 'think' is not one",
    ),
    "a memory of its own": (
        RESUMES,
        "seen = self.__dict__.setdefault('seen', [])\nseen.append(1)\n"
        "return torch.roll(candidates, len(seen))[:batch_size]",
        "stopped after round 0 and resumed, it gives another round 1",
    ),
    "a memory of its module": (  # of the queries in the same process
        RESUMES,
        "memory = globals().setdefault('MEMORY', [])\nmemory.append(len(query.pool.labeled))\n"
        "return torch.roll(candidates, len(memory))[:batch_size]",
        "stopped after round 0 and resumed, it gives another round 1",
    ),
}  # fmt: skip


FAST = ("labeled", "a hidden draw", "python's generator", "writes to the pool", "a memory of its own")


@pytest.mark.parametrize(
    "cheat", [cheat if cheat in FAST else pytest.param(cheat, marks=pytest.mark.slow) for cheat in CHEATS]
)
def test_a_cheat_is_found_by_its_law(cheat, tmp_path, experiment, monkeypatch):
    """Asked alone, after those that would end the check."""
    law, body, said = CHEATS[cheat]
    monkeypatch.setattr(laws, "LAWS", {name: laws.LAWS[name] for name in dict.fromkeys((FULL, RESTRICTS, law))})
    assert said in broken_laws(acquisition(tmp_path, body), experiment)[law]


def test_one_that_has_seen_the_hidden_labels_is_found(tmp_path, experiment, monkeypatch):
    """What no honest plugin can do from a query alone: the labels are smuggled in."""
    path = acquisition(tmp_path, "return candidates[SMUGGLED[candidates].argsort(stable=True)[:batch_size]]")
    plugins.install([str(path)])
    select = laws.ExampleQuery.select

    def smuggle(self):
        sys.modules[ACQUISITIONS["mine"].__module__].SMUGGLED = self.run.experiment.data.labels
        return select(self)

    monkeypatch.setattr(laws.ExampleQuery, "select", smuggle)
    monkeypatch.setattr(laws, "LAWS", {HIDDEN: laws.LAWS[HIDDEN]})
    assert "it has seen these labels" in broken_laws(path, experiment)[HIDDEN]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "return query.pool.unlabeled.tolist()",
            "the restriction of the strategy returned a list, not a flat int64 tensor",
        ),
        ("return query.pool.unlabeled[:1].repeat(3)", "left 2 of 3 points twice"),
        ("return query.pool.labeled[:3]", "left 1 of 1 points that are labeled already"),
        (
            "return torch.cat([query.pool.labeled[-1:], query.pool.unlabeled[:4]])",
            "1 of 5 points that are labeled already",
        ),
        ("return query.pool.unlabeled[:1].repeat(9)", "twice"),
        ("return query.pool.unlabeled + 900", "index 900 is out of bounds"),
    ],
)
def test_a_restriction_that_cheats_is_found_by_the_first_law(tmp_path, experiment, body, said):
    (broken,) = broken_laws(restriction(tmp_path, body), experiment).items()
    assert broken[0] == FULL
    assert said in broken[1]


def test_candidates_that_are_no_batch_of_a_cheat_are_looked_at_too(tmp_path, experiment):
    """The batch is right, yet a candidate is there twice: what the row says of candidates would be wrong."""
    body = "return torch.cat([query.pool.unlabeled, query.pool.unlabeled[-1:]])"
    path = restriction(tmp_path, body)
    path.write_text(
        path.read_text() + "STRATEGIES = {'a': {'restrict': {'kind': 'mine'}, 'acquire': {'kind': 'margin'}}}"
    )
    broken = broken_laws(path, experiment)
    assert "left 1 of " in broken.get(RESTRICTS, "") or "twice" in broken.get(FULL, "")
    config = example_config("a")
    with pytest.raises(StrategyError, match=r"left 1 of 191 points twice"):
        run_in_process(experiment, tmp_path / "seed-0.jsonl", config)


def test_check_says_what_broke_and_exits_1(tmp_path, capsys):
    path = acquisition(tmp_path, "return candidates[: batch_size - 2]")
    assert main(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "(mine)"  # a part in no sentence is put into one
    assert lines[1].startswith("  BROKEN  picks a full batch")
    assert lines[2].strip() == "with 1 labels and seed 0: the strategy picked 3 points where the batch size is 5"
    assert lines[3] == "  -       7 more laws, not checked before this one holds"
    assert lines[-1] == "0 of 1 laws hold, 1 broken"
    assert not (tmp_path / "__pycache__").exists()


def test_a_sentence_of_its_own_is_a_strategy_like_any_other(tmp_path, experiment):
    path = acquisition(tmp_path, "return candidates[query.ties(candidates).argsort()[:batch_size]]")
    sentence = '{"restrict": {"kind": "uniform", "restricted_size": "${restricted_size}"}, "acquire": {"kind": "mine"}}'
    path.write_text(path.read_text() + f'STRATEGIES = {{"rsmine": {sentence}}}\n')
    (reference,) = plugins.install([str(path)])
    assert plugins.install([str(path)]) == (reference,)  # again: no clash with itself
    assert "rsmine" in group_names("strategy")
    config = example_config("rsmine", "strategy.acquire.factor=2")
    origin = plugins.INSTALLED[reference].origin
    assert config.strategy.acquire == {"kind": "mine", "plugin": origin, "factor": 2.0}
    assert config.strategy.restrict == {"kind": "uniform", "restricted_size": 20}
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    assert [row.n_candidates for row in rows] == [20, 20, None]


def test_rows_of_changed_code_are_not_gone_on_with(tmp_path, experiment, capsys):
    """The hash of the plugin's file is part of the configuration of the strategies that use it, and of no other."""
    path = acquisition(tmp_path, "return candidates[:batch_size]")
    words = ["run", f"plugins={path}", "representation=pca", "profile=smoke", f"results={tmp_path}", *EXAMPLE_SETTINGS]
    plugins.install([str(path)])
    config = example_config("margin", "strategy.acquire={kind: mine}")
    file = tmp_path / "single" / "digits" / "margin" / "seed-0.jsonl"
    run_in_process(experiment, file, config)
    ACQUISITIONS.pop("mine")
    plugins.INSTALLED.clear()
    path.write_text(path.read_text() + "# another thought\n")
    assert main([*words, "strategy=margin", "strategy.acquire={kind: mine}", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "holds results of another configuration (strategy.acquire.plugin: 'mine.py@" in err


def test_the_command_in_a_header_makes_the_run_again(tmp_path, cache_root):
    """The report's page shows it: with the plugin, a strategy's own settings, and characters that a shell splits at."""
    path = acquisition(tmp_path, "return candidates[:batch_size]", "my plugin.py")
    words = command(tmp_path / "one", cache_root, f"plugins={path}", "strategy=rsmg+strategy.acquire={kind: mine}")
    assert here([*words, "seed=3"]).returncode == 0
    (log,) = read_results(tmp_path / "one")
    dgal_bench, *again = shlex.split(rerun_command(log))[:-1]
    assert dgal_bench == "dgal-bench"
    again += [f"results={tmp_path / 'two'}", f"cache={cache_root}", "report=false"]
    assert here(["dgal_bench.cli.main", *again]).returncode == 0
    (repeated,) = read_results(tmp_path / "two")
    assert repeated.header["fingerprint"]["config"] == log.header["fingerprint"]["config"]
    assert repeated.header["command"] == log.header["command"]
    assert [choice(record) for record in repeated.records] == [choice(record) for record in log.records]


def test_a_configuration_from_another_plugin_is_refused_by_a_worker(tmp_path):
    path = acquisition(tmp_path, "return candidates[:batch_size]")
    plugins.install([str(path)])
    made_elsewhere = StrategyConfig("margin", {"kind": "everything"}, {"kind": "mine", "plugin": "mine.py@0000"})
    with pytest.raises(ConfigError, match=r"is of mine.py@0000, but mine.py@\w+ is loaded"):
        resolve_parts(made_elsewhere)


PART = "from dataclasses import dataclass\nimport numpy as np\n@dataclass(frozen=True)\nclass A:\n    {}\n"
CALLED = "def __call__(self, q, c, b): pass"
MISTAKES = {
    "x = (": "is not valid Python: '(' was never closed (line 1)",
    "1 / 0": "fails when it is run: ZeroDivisionError: division by zero (wrong.py, line 1)",
    "raise SystemExit(0)": "fails when it is run: SystemExit: 0",
    "import nowhere_at_all": "fails when it is run: ModuleNotFoundError: No module named 'nowhere_at_all'",
    "pass": "defines none of RESTRICTIONS, ACQUISITIONS, STRATEGIES: there is nothing to add",
    "ACQUISITIONS = [1]": "ACQUISITIONS must be a dictionary whose keys are names",
    "ACQUISITIONS = {1: 2}": "ACQUISITIONS must be a dictionary whose keys are names",
    "ACQUISITIONS = {'f': lambda query, candidates, size: 1}": "must be a class with @dataclass(frozen=True)",
    "STRATEGIES = {'a': 5}": "strategy 'a' must be {\"restrict\"",
    "STRATEGIES = {'a': {'restrict': {'kind': 'everything'}}}": "strategy 'a' must be {\"restrict\"",
    "STRATEGIES = {'a': {'restrict': {'kind': 'uniform', 'restricted_size': '${restricted_size'}, "
    "'acquire': {'kind': 'margin'}}}": "strategy 'a': ",
    "import numpy as np\nSTRATEGIES = {'a': {'restrict': {'kind': 'uniform', 'restricted_size': np.int64(20)}, "
    "'acquire': {'kind': 'margin'}}}": "strategy 'a': ",
    "STRATEGIES = {'dgmg': {'restrict': {'kind': 'everything'}, 'acquire': {'kind': 'margin'}}}": (
        "there is a strategy 'dgmg' already"
    ),
    PART.format("pass") + "ACQUISITIONS = {'a': A}": "must be callable as part(query, candidates, batch_size)",
    PART.format("def __call__(self, query): pass") + "ACQUISITIONS = {'a': A}": "must be callable as part(query, cand",
    PART.format(f"x: list[int]\n    {CALLED}") + "ACQUISITIONS = {'a': A}": "setting 'x' must be an int, float, str or",
    PART.format(f"x: 'int |'\n    {CALLED}") + "ACQUISITIONS = {'a': A}": "the type of a setting cannot be resolved",
    PART.format(f"x: 'np.nope'\n    {CALLED}") + "ACQUISITIONS = {'a': A}": "the type of a setting cannot be resolved",
    PART.format(CALLED) + "ACQUISITIONS = {'margin': A}": "kind 'margin' is taken already",
}


@pytest.mark.parametrize("source", MISTAKES)
def test_a_plugin_that_is_none_is_one_line_and_exit_code_2(source, tmp_path, capsys):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    assert main(["bench", f"plugins={path}", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert MISTAKES[source] in err
    assert err.count("\n") == 1


def test_two_files_of_one_name_do_not_get_into_each_others_way(tmp_path):
    for folder, kind in (("a", "one"), ("b", "two")):
        (tmp_path / folder).mkdir()
        path = acquisition(tmp_path / folder, "return candidates[:batch_size]")
        path.write_text(path.read_text().replace('"mine"', f'"{kind}"'))
    plugins.install([str(tmp_path / "a" / "mine.py"), str(tmp_path / "b" / "mine.py")])
    assert {"one", "two"} <= set(ACQUISITIONS)
    assert ACQUISITIONS["one"].__module__ != ACQUISITIONS["two"].__module__


@pytest.mark.slow
def test_a_part_is_given_what_it_names_and_may_look_at_it_when_it_is_made(tmp_path, experiment):
    path = tmp_path / "walk.py"
    path.write_text(
        PART.format(
            "graph: object\n    features: object\n    new_index: object\n    hops: int = 1\n"
            "    def __post_init__(self):\n        assert self.graph.size == len(self.features)\n"
            "        assert self.new_index(self.features)(self.features[:3], 1).shape == (3, 1)\n"
            "    def __call__(self, query):\n        return query.pool.unlabeled[: 5 + self.hops]"
        )
        + "RESTRICTIONS = {'walk': A}\n"
    )
    assert broken_laws(path, experiment) == {}
    config = example_config("(walk)", "strategy.restrict.hops=2")
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    assert rows[0].n_candidates == 7


def test_the_hash_of_a_package_covers_all_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from some_package.parts import ACQUISITIONS\n")
    (folder / "parts.py").write_text(PART.format(CALLED) + "ACQUISITIONS = {'a': A}\n")
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dgal_bench.plugins]\nsome = some_package\nno = some_package:A\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = plugins.load("some").origin
    (folder / "parts.py").write_text((folder / "parts.py").read_text() + "# another thought\n")
    assert plugins.load("some").origin != before
    (folder / "__init__.py").write_text("from some_package.parts import A, ACQUISITIONS\n")
    for name in ("some_package", "some_package.parts"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="the entry point some_package:A must name a module with a file"):
        plugins.load("no")


def test_a_plugin_that_is_not_there(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nowhere.py")]) == 2
    assert "nowhere.py cannot be read: No such file" in capsys.readouterr().err
    assert main(["bench", "plugins=nonesuch", "--dry-run"]) == 2
    assert "neither a .py file nor an entry point of the group dgal_bench.plugins" in capsys.readouterr().err


def test_an_entry_point_is_a_plugin_too(tmp_path, monkeypatch):
    """A distribution as pip leaves it: a module, and metadata that name it."""
    acquisition(tmp_path, "return candidates[:batch_size]", name="mine_package.py")
    info = tmp_path / "mine_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dgal_bench.plugins]\nmine = mine_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.install(["mine"]) == ("mine",)
    assert plugins.INSTALLED["mine"].origin.startswith("mine_package.py@")
    assert "mine" in ACQUISITIONS


@pytest.mark.slow
def test_a_sweep_with_a_cheat_fails_its_runs_only_and_exits_1(tmp_path, cache_root):
    """The plugin reaches the workers, its honest strategy is swept, its cheat is recorded and named."""
    path = acquisition(tmp_path, "return candidates[: batch_size - 2]")
    honest = "query.ties(candidates).argsort()[:batch_size]"
    path.write_text(
        path.read_text().replace("ACQUISITIONS = ", "CHEAT = ")
        + "\n@dataclass(frozen=True)\nclass Honest:\n    def __call__(self, query, candidates, batch_size):\n"
        + f"        return candidates[{honest}]\n\n"
        + 'ACQUISITIONS = {"cheat": Mine, "honest": Honest}\n'
        + 'ALL = {"kind": "everything"}\n'
        + 'STRATEGIES = {n: {"restrict": ALL, "acquire": {"kind": n}} for n in ("cheat", "honest")}\n'
    )
    words = [sys.executable, "-m", "dgal_bench.cli.main", "bench", f"plugins={path}", "strategy=cheat,honest", "seed=0"]
    words.append("full_supervision=false")
    base = ["representation=pca", "profile=smoke", f"results={tmp_path}/r", f"cache={cache_root}", *EXAMPLE_SETTINGS]
    done = here([*words, *base])
    assert done.returncode == 1, done.stderr
    assert "digits/cheat/seed-0: FAILED: the strategy picked 3 points where the batch size is 5" in done.stderr
    assert "1 of 2 runs failed; retry=failed tries them again" in done.stderr
    good, bad = (read_run(Path(tmp_path / "r" / "paper" / "digits" / n / "seed-0.jsonl")) for n in ("honest", "cheat"))
    assert (good.status, bad.status) == ("done", "failed")
    assert good.header["config"]["strategy"]["acquire"]["plugin"].startswith("mine.py@")
    assert "Traceback" not in done.stderr
    assert f"honest ({good.header['config']['strategy']['acquire']['plugin']})" in done.stdout
