"""What stands beside the code says what is true of it: workflow, CONTRIBUTING, CHANGELOG, CITATION."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from dgal_bench import __version__

HERE = Path(__file__).parent.parent
CONTRIBUTING = (HERE / "CONTRIBUTING.md").read_text()
CODE = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", CONTRIBUTING, flags=re.DOTALL))
WORKFLOW_TEXT = (HERE / ".github" / "workflows" / "ci.yml").read_text()
WORKFLOW = yaml.safe_load(WORKFLOW_TEXT)
JOBS = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
RUNS = "\n".join(step["run"] for step in STEPS if "run" in step)


def targets_of(text):
    """The targets that commands in ``text`` make: ``make setup test JOBS=2  # why`` has two."""
    found = re.findall(r"\bmake((?: [a-z][a-z-]*\b(?!=))+)", re.sub(r"#.*", "", text))
    return {target for words in found for target in words.split()}


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("make setup test-all", {"setup", "test-all"}),
        ("make bench dataset=mnist JOBS=2", {"bench"}),
        ("make lint  # make no mistake", {"lint"}),
        ("`make test`\n`make type`", {"test", "type"}),
        ("make", set()),
    ],
)
def test_targets_are_read_from_commands(text, targets):
    assert targets_of(text) == targets


@pytest.mark.parametrize("text", [RUNS, CODE], ids=["workflow", "CONTRIBUTING"])
def test_every_make_target_named_is_one_of_the_makefile(text):
    targets = set(re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets_of(text)
    assert targets_of(text) <= targets


@pytest.mark.parametrize("text", [RUNS, CODE], ids=["workflow", "CONTRIBUTING"])
def test_what_a_merge_must_pass_is_run_and_told(text):
    assert targets_of((HERE / ".ci" / "run").read_text()) <= targets_of(text)


def test_every_path_that_contributing_links_is_there():
    links = re.findall(r"\]\(([^)]+)\)", CONTRIBUTING)
    assert links
    assert [link for link in links if "://" not in link and not (HERE / link.partition("#")[0]).exists()] == []


def test_the_versions_it_explains_are_where_it_says():
    rows = re.findall(r"^\| `(\w+_VERSION)` in \[[\w./]+\]\(([\w./-]+)\)", CONTRIBUTING, flags=re.MULTILINE)
    assert len(rows) == 5
    for name, path in rows:
        assert re.search(rf"^{name} = \d+$", (HERE / path).read_text(), flags=re.MULTILINE), (name, path)


def test_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((HERE / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == __version__
    assert citation["license"] == tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["license"]
    for work in (citation, *citation["references"]):
        assert {"type", "title", "authors"} <= work.keys()
        assert all(author["name"] for author in work["authors"])


def test_the_changelog_begins_with_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", (HERE / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_a_job_ends_and_may_only_read(job):
    assert 0 < job["timeout-minutes"] <= 120  # GitHub's own limit is six hours
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert job.get("permissions", {}).items() <= WORKFLOW["permissions"].items()


def test_the_workflow_takes_no_secret_and_pins_what_it_uses():
    assert "secrets." not in WORKFLOW_TEXT
    assert WORKFLOW[True].keys() == {"push", "pull_request", "schedule", "workflow_dispatch"}  # YAML 1.1: on is true
    uses = [step["uses"] for step in STEPS if "uses" in step]
    assert [name for name in uses if not re.fullmatch(r"actions/[a-z-]+@v\d+", name)] == []


def test_the_oldest_python_that_is_promised_is_checked():
    promised = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["requires-python"]
    assert promised.removeprefix(">=") in JOBS["check"]["strategy"]["matrix"]["python"]


def test_what_is_kept_of_a_smoke_run_is_what_make_smoke_writes():
    (kept,) = [step["with"]["path"] for step in STEPS if "upload-artifact" in step.get("uses", "")]
    (suite,) = re.findall(r"^smoke:.*\n.*suite=(\w+)", (HERE / "Makefile").read_text(), flags=re.MULTILINE)
    assert kept == f"results/runs/{suite}"


def imported_by(path):
    """Top-level names of the modules that a file of the package imports, other than its own and Python's."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"dgal_bench"}


EXTRAS = {"ray": "ray", "submitit": "slurm", "faiss": "cpu", "wandb_workspaces": "dashboard"}
"""Modules that come with an extra."""


def test_every_module_that_the_package_imports_comes_with_what_it_declares():
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    optional = {
        extra: {re.split(r"[^\w-]", line)[0] for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    packages = packages_distributions()
    imported = {name: path.name for path in sorted(HERE.glob("dgal_bench/**/*.py")) for name in imported_by(path)}
    assert {"torch", "faiss", "omegaconf"} <= imported.keys()
    undeclared = []
    for name, file in imported.items():
        providers = {one.lower().replace("_", "-") for one in packages.get(name, [])}
        if not providers & (optional[EXTRAS[name]] if name in EXTRAS else declared):
            undeclared.append(f"{name}, imported by {file}")
    assert undeclared == []
