"""Every mistake a user can make ends in one clear line on stderr and exit code 2, or 3 for missing data.

What is wrong with a command is found before anything runs; what is wrong with it for these data, by the worker that
has loaded them, before any run. Mistakes that only their room can make are tested there: NaN and identical images in
test_experiment, both FAISS packages there too, damaged data files in test_torchvision, plugins in test_plugins.
"""

import json
import os
import subprocess
import sys

import pytest

from dgal_bench.cli.main import main
from dgal_bench.conformance import EXAMPLE_SETTINGS, example_config, run_in_process
from dgal_bench.graph.knn import faiss_packages
from dgal_bench.results.reader import read_results
from dgal_bench.results.resume import ALGORITHM_VERSION
from tests.sweeping import HERE, command, finish, here

MISTAKES = [
    (["ben"], "unknown verb 'ben'; did you mean 'bench'?"),
    (["bench", "strateg=random"], "unknown key 'strateg'; did you mean 'strategy'?"),
    (["bench", "reslts=x"], "unknown key 'reslts'; did you mean 'results'?"),
    (["bench", "strategy=dgmgg"], "unknown strategy 'dgmgg'; did you mean 'dgmg'?"),
    (["bench", "dataset=mnits"], "unknown dataset 'mnits'; did you mean 'mnist'?"),
    (["bench", "strategy=seals", "seals_k=0"], "seals_k=0: use a whole number of 1 or more; or ratio: restricted_size"),
    (["bench", "strategy=seals", "seals_k=many"], "seals_k=many: use a whole number of 1 or more; or ratio: restr"),
    (
        ["bench", "seals_k=ratio", "restricted_size=many"],
        "restricted_size: Value 'many' of type 'str' could not be conv",
    ),
    (["bench", "adversary_steps=0"], "adversary_steps=0: use a whole number of 1 or more; or null: 100 epochs"),
    (["bench", "propagation=some"], "unknown propagation 'some'; did you mean 'none'? (choices: all, few, none)"),
    (["bench", "strategy=ganvae", "strategy.acquire.vae_lr=-1"], "strategy.acquire.vae_lr=-1.0 is not positive"),
    (["bench", "strategy=ganvae", "strategy.acquire.vae_lr=.nan"], "strategy.acquire.vae_lr=nan: use a finite number"),
    (["bench", "strategy=dgmg", "strategy.restrict.p=.inf"], "strategy.restrict.p=inf: use a finite number"),
    (["bench", "suite=papre"], "unknown suite 'papre'; did you mean 'paper'?"),
    (["bench", "profile=gpu"], "unknown profile 'gpu'; did you mean 'cpu'? (choices: cpu, paper, smoke)"),
    (["bench", "--dryrun"], "unknown flag '--dryrun'; did you mean '--dry-run'?"),
    (["bench", "seed="], "seed= is an empty list"),
    (["bench", "seed=one"], "seed=one: use whole numbers"),
    (["bench", "seed=0,0"], "would be written by two runs"),
    (["bench", "seed=0", "seed=1"], "seed= is given twice"),
    (["bench", "jobs=0"], "jobs=0: use a whole number of 1 or more"),
    (["bench", "results=a,b"], "results takes one value, not 2"),
    (["bench", "resume=yes"], "the only choice is resume=anyway"),
    (["bench", "dgmg"], "'dgmg' is no key=value"),
    (["bench", "strategy=dgmg", "strategy.restrict.scroe=margin"], "did you mean 'score'?"),
    (["bench", "--dry-run=no"], "--dry-run takes no value"),
    (["bench", "--out", "here"], "--out means nothing here: the flags of this verb are --print-config, --dry-run"),
    (["report", "somewhere", "--dry-run"], "--dry-run means nothing here: the flags of this verb are --out"),
    (["bench", "strategy=dgmg", "strategy.restrict.restricted_size=3"], "restricted_size=3 is below batch_size=10"),
    (["bench", "training.optimizer=sdg"], "did you mean 'sgd'?"),
    (["bench", "graph.graph_k=0"], "graph.graph_k=0 is too small: use 1 or more"),
    (
        ["bench", "strategy=dgmg", "strategy.restrict.diffusion_steps=0"],
        "diffusion_steps=0 is too small: use 1 or more",
    ),
    (["bench", "batch_size=0"], "batch_size=0 is too small: use 1 or more"),
    (["bench", "initial_size=0"], "initial_size=0 is too small: use 1 or more"),
    (["bench", "restricted_size=5"], "restricted_size=5 is below batch_size=10: a batch cannot be picked from fewer"),
    (["bench", "rounds=many"], "rounds: Value 'many' of type 'str' could not be converted to Integer"),
    (["bench", "rounds=1.5"], "rounds: Value '1.5' of type 'float' could not be converted to Integer"),
    (["bench", "balanced=perhaps"], "balanced: Value 'perhaps' is not a valid bool"),
    (["bench", "net.channels=[20"], "net.channels=[20: the value is not valid YAML; is a bracket or quote left open?"),
    (["bench", "strategy=dgmg", "strategy.restrict.restricted_size=few"], "restricted_size='few' is not of type int"),
    (["bench", "strategy=dgmg", "strategy.restrict.score=marign"], "unknown score 'marign'; did you mean 'margin'?"),
    (["bench", "strategy.acquire.kind=margim"], "unknown strategy.acquire.kind 'margim'; did you mean 'margin'?"),
    (["bench", "strategy="], "strategy= is an empty list: give at least one value"),
    (["bench", "representation=vea"], "unknown representation 'vea'; did you mean 'vae'?"),
    (["bench", "graph.kernel=gausian_k"], "unknown graph.kernel 'gausian_k'; did you mean 'gaussian_k'?"),
    (["bench", "offline=yes"], "offline=yes: use true or false"),
    (["data", "mnits"], "unknown data set 'mnits'; did you mean 'mnist'?"),
    (["data", "mnist", "--dry-run"], "--dry-run means nothing here: this verb has no flags"),
    (["check"], "check takes plugin files: dgal-bench check my_strategies.py"),
    (["check", "x.py", "seed=1"], "seed= means nothing here: this verb takes none"),
    (["doctor", "digits"], "doctor takes no 'digits', only data=DIR, cache=DIR and results=DIR"),
    (["bench", "plugins="], "plugins= is an empty list: name a .py file or an entry point"),
    (["bench", "threads=???"], "threads=??? is no value"),
    (["bench", "dataset.kind=foldr"], "unknown dataset.kind 'foldr'; did you mean 'folder'?"),
    (
        ["bench", "dataset=folder", "dataset.name=a/b"],
        "dataset.name=a/b: letters, digits, '_', '-' and '.' name a folder of results",
    ),
    (["bench", "full_supervision=maybe"], "full_supervision=maybe: use true or false"),
    (["bench", "net.kind=resnet81"], "unknown net.kind 'resnet81'; did you mean 'resnet18'"),
    (["bench", "net.pretrained=maybe"], "net.pretrained: Value 'maybe' is not a valid bool"),
    (["bench", "representation.path=x.npy"], "representation.path is for representation=npy, this one is vae"),
    (
        ["bench", "representation=pca", "representation.model=resnet18"],
        "representation.model is for representation=timm",
    ),
    (["bench", "net.input_size=0"], "net.input_size=0 is too small: use 1 or more"),
    (["bench", "dataset.image_size=0"], "dataset.image_size=0 is too small: use 1 or more"),
    (["bench", "net.stem=tiny"], "unknown net.stem 'tiny'"),
    (["bench", "trainer.devices=0"], "trainer.devices=0 is too small: use 1 or more"),
    (["bench", "representation=npy"], "representation=npy needs your embeddings: representation.path=FILE.npy"),
    (["bench", "representation=timm"], "representation=timm needs the name of a network: representation.model="),
    (["bench", "representation.lr=-1"], "representation.lr=-1.0: use a number above 0"),
    (["bench", "representation.recon_weight=nan"], "representation.recon_weight=nan: use a number above 0"),
    (["run"], "run needs a strategy"),
    (["run", "strategy=random,margin"], "strategy takes one value, not 2"),
    (["report"], "report takes one results folder"),
    (["report", "nowhere-at-all"], "is not a folder of results"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("dgal-bench: ")
    assert out == ""


SWEEP = ["bench", "representation=pca", "profile=smoke", *EXAMPLE_SETTINGS]


class TestResultsFolder:
    """What lies in the results folder is refused, cut or gone on with; nothing of it is lost."""

    @pytest.fixture
    def words(self, tmp_path):
        return [*SWEEP, f"results={tmp_path}", "strategy=random", "seed=0"]

    @pytest.fixture
    def file(self, experiment, tmp_path):
        path = tmp_path / "paper" / "digits" / "random" / "seed-0.jsonl"
        run_in_process(experiment, path, example_config("random"))
        return path

    def refused(self, words, file, capsys):
        before = file.read_bytes()
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert out == ""
        assert file.read_bytes() == before
        return err

    def dry_run(self, words, capsys):
        assert main([*words, "--dry-run"]) == 0
        return capsys.readouterr().out.splitlines()[0]

    def edit_header(self, file, change):
        header, *rows = file.read_text().splitlines()
        content = json.loads(header)
        change(content)
        file.write_text("\n".join([json.dumps(content), *rows]) + "\n")

    def test_another_configuration(self, words, file, capsys):
        err = self.refused([*words, "graph.graph_k=7"], file, capsys)
        assert f"{file} holds results of another configuration (graph.graph_k: 10 -> 7): use another results=DIR" in err

    def test_another_algorithm(self, words, file, capsys):
        self.edit_header(file, lambda header: header["fingerprint"].update(algorithm_version=0))
        err = self.refused(words, file, capsys)
        assert f"{file} was made from something else (algorithm_version 0 -> {ALGORITHM_VERSION}): use another" in err

    def test_another_schema(self, words, file, capsys):
        self.edit_header(file, lambda header: header.update(schema_version=99))
        err = self.refused(words, file, capsys)
        assert str(file) in err
        assert "99" in err

    def test_a_corrupt_earlier_line(self, words, file, capsys):
        lines = file.read_bytes().splitlines(keepends=True)
        lines[1] = lines[1][:40] + b"\n"
        file.write_bytes(b"".join(lines))
        assert f"{file}, line 2" in self.refused(words, file, capsys)

    def test_a_torn_last_line_is_cut_and_gone_on_from(self, words, file, capsys):
        file.write_bytes(file.read_bytes()[:-20])
        assert self.dry_run(words, capsys) == "partial  digits/random/seed-0 (2 rows)"

    def test_a_file_without_a_whole_header_is_begun_again(self, words, file, capsys):
        file.write_bytes(file.read_bytes()[:100])
        assert self.dry_run(words, capsys) == "to run   digits/random/seed-0"

    @pytest.mark.parametrize("results", ["file", "file/below", "/proc/nowhere"])
    def test_a_folder_that_cannot_be_one(self, results, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        assert main(["run", "strategy=random", f"results={tmp_path / results}"]) == 2
        err = capsys.readouterr().err
        assert f"results={tmp_path / results} " in err
        assert ("file is a file: set another results=DIR" if results != "/proc/nowhere" else ": set results=DIR") in err
        assert err.count("\n") == 1
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_folder(self, words, tmp_path, capsys):
        tmp_path.chmod(0o500)
        try:
            assert main(words) == 2
        finally:
            tmp_path.chmod(0o700)
        assert "cannot be written: set results=DIR" in capsys.readouterr().err


# Sweeps from here on: workers load, and refuse.

FOR_THESE_DATA = {
    "graph.graph_k=200": "graph.graph_k=200, but a point of 200 has only 199 neighbours: use 199 or less",
    "initial_size=200": "initial_size=200 + rounds=2 x batch_size=5 = 210 labels, but the pool has 200 points",
    "batch_size=300 restricted_size=300": "+ rounds=2 x batch_size=300 = 610 labels, but the pool has 200 points",
    "net.kernels=[9,9]": "leave nothing of a 8x8 image: use smaller kernels",
    "dataset.n_classes=9": "dataset.n_classes=9, but digits has 10 classes",
    "device=cuda": "device=cuda, but torch sees no GPU: use device=cpu or device=auto",
    "cache={tmp_path}/file/below": "cannot be used: [Errno 20] Not a directory",
}


def bench(tmp_path, *words):
    given = {word.partition("=")[0] for word in words}
    base = [word for word in SWEEP if word.partition("=")[0] not in given]
    return here([sys.executable, "-m", "dgal_bench.cli.main", *base, f"results={tmp_path}/r", *words])


def message(done):
    """The one line of stderr that is no progress."""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("[set-up]")]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("mistake", FOR_THESE_DATA)
def test_what_does_not_fit_the_data_stops_before_any_run(mistake, tmp_path, cache_root):
    (tmp_path / "file").write_text("")
    words = [word.format(tmp_path=tmp_path) if "tmp_path" in word else word for word in mistake.split()]
    words += [] if "cache=" in mistake else [f"cache={cache_root}"]
    done = bench(tmp_path, "strategy=random", "seed=0", *words)
    assert done.returncode == 2
    assert FOR_THESE_DATA[mistake] in message(done)
    assert message(done).startswith("dgal-bench: ")
    assert list((tmp_path / "r").rglob("*.jsonl")) == []


@pytest.mark.slow
def test_missing_data_is_one_line_and_exit_code_3(tmp_path):
    done = bench(tmp_path, "dataset=mnist", "strategy=random", "seed=0", f"data={tmp_path}", f"cache={tmp_path}/c")
    assert done.returncode == 3
    assert message(done).startswith(
        f"dgal-bench: data set 'mnist' is not there at {tmp_path}/MNIST/raw and offline=true"
    )
    assert "put train-images-idx3-ubyte" in message(done)
    assert list((tmp_path / "r").rglob("*.jsonl")) == []


@pytest.fixture
def installed_anew():
    """What is installed is looked up once in a process."""
    faiss_packages.cache_clear()
    yield
    faiss_packages.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("installed_anew")
def test_two_faiss_packages_stop_a_sweep_and_the_advised_repair_works(tmp_path, monkeypatch):
    """A second one as pip leaves it: its metadata say that the module is its own."""
    info = tmp_path / "faiss_gpu-1.15.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.15.1\n")
    (info / "top_level.txt").write_text("faiss\n")
    words = ["strategy=random", "seed=0", f"cache={tmp_path}/c"]
    monkeypatch.syspath_prepend(tmp_path)
    done = bench(tmp_path, *words)
    assert done.returncode == 2
    assert message(done).startswith(
        "dgal-bench: faiss-cpu and faiss-gpu are both installed and own the same module: pip "
    )
    done = bench(tmp_path, *words, "graph.backend=torch")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_class_and_no_faiss_are_each_said_once_and_the_sweep_is_done(tmp_path):
    """Two workers, two strategies: the same warning of both is told once. FAISS is hidden, by a plugin.

    Real ones: each says it once in its process.
    """
    anything = "STRATEGIES = {'any': {'restrict': {'kind': 'everything'}, 'acquire': {'kind': 'random'}}}\n"
    (tmp_path / "hide.py").write_text("import sys\nsys.modules['faiss'] = None\n" + anything)
    words = command(tmp_path / "r", tmp_path / "c", "strategy=random,dgmg", "seed=0", "initial_size=1", "jobs=2")
    done = finish([*words, f"plugins={tmp_path / 'hide.py'}"])
    assert done.returncode == 0, done.stderr
    warnings = sorted(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: digits, seed 0: the initial set of 1 holds only class ")
    assert warnings[1].startswith("warning: faiss is not installed: the torch backend builds the graph")
    assert {log.header["setup"]["graph"]["search"] for log in read_results(tmp_path / "r")} == {"tiles"}


@pytest.mark.slow
def test_make_prints_the_same_lines():
    """The stamp of this very environment stands for the set-up."""
    make = ["make", "--no-print-directory", "-o", "setup", f"VENV={sys.prefix}", "bench", "DATASET=mnits"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # not make[1]
    done = subprocess.run(make, capture_output=True, text=True, timeout=60, cwd=HERE, check=False, env=outside)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("dgal-bench: unknown dataset 'mnits'; did you mean 'mnist'?")
    assert second.startswith("make: *** [Makefile:")
    assert second.endswith("bench] Error 2")
    assert done.stdout == ""
