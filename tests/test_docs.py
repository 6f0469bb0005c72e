"""What the guides under docs show is understood by the command line."""

import re
from pathlib import Path

import pytest

from dgal_bench.cli.main import VERBS, main

HERE = Path(__file__).parent.parent
GUIDE = (HERE / "docs" / "cluster.md").read_text()


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
    lines = [line.partition(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if not line.startswith("export ")]


def words(command):
    """As the command line has them, results in a folder of the test's own."""
    if command.startswith("make bench"):
        return ["bench", *(f"{key.lower()}={value}" for key, value in re.findall(r"([A-Z_]+)=(\S+)", command))]
    program, *rest = command.split()
    assert program == "dgal-bench"
    return [word for word in rest if not word.startswith("results=")]


def test_the_makefile_knows_its_variables():
    makefile, names = (HERE / "Makefile").read_text(), set(re.findall(r"([A-Z_]+)=", " ".join(commands())))
    assert names == {"ENGINE", "JOBS"}
    assert [name for name in names if f"$(if $({name}),{name.lower()}=$({name}))" not in makefile] == []


@pytest.mark.parametrize("command", commands())
def test_its_commands_are_understood(command, tmp_path, capsys, monkeypatch):
    """Each is planned, not run: a renamed key or choice would be refused."""
    monkeypatch.chdir(HERE)
    verb, *rest = words(command)
    assert verb in VERBS
    if verb not in ("bench", "run"):
        assert rest == ["results/runs"]
        return
    assert main([verb, *(word for word in rest if word != "--dry-run"), f"results={tmp_path}", "--dry-run"]) == 0
    assert " to run, " in capsys.readouterr().out


def test_every_slurm_key_of_the_command_line_is_named():
    from dgal_bench.cli.options import EXECUTION_KEYS

    assert set(re.findall(r"(?:slurm|ray)\.[a-z_]+", GUIDE)) == {
        key for key in EXECUTION_KEYS if key.startswith(("slurm.", "ray."))
    }


def test_exit_codes_are_those_of_the_help(capsys):
    main(["--help"])
    told = capsys.readouterr().out.partition("exit codes: ")[2]
    table = GUIDE.partition("| exit code |")[2].partition("\n\n")[0]
    codes = set(re.findall(r"\b\d+\b", "".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert codes == set(re.findall(r"\b(\d+) [a-z]", told))
