"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dgal_bench"

# A room imports only from rooms above it in this list, and from its own folder.
LAYERS = (
    "core", "config", "data", "graph", "models", "strategies", "representation", "results", "experiment", "loop",
    "conformance", "report", "engines", "cli",
)  # fmt: skip
DOOR = ("__init__", "__main__")
MODULES = {
    ".".join(("dgal_bench", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(body):
    """The modules of the package that these statements import, a package's own ``__init__`` for a name out of it."""
    found = set()
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and name != "dgal_bench"}


@cache
def tree(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def room(name):
    return name.split(".")[1]


def test_every_room_has_its_place():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names == {*LAYERS, *DOOR}
    assert len(names) <= 18


def test_imports_only_from_above():
    assert [
        f"{name} imports {one}"
        for name in MODULES
        if "." in name and room(name) in LAYERS
        for one in imports_of(ast.walk(tree(name)))
        if LAYERS.index(room(one)) > LAYERS.index(room(name))
    ] == []


def test_no_module_waits_for_more_than_seventeen_others():
    """The longest chain of imports that run with a module, its own package's ``__init__`` among them."""

    @cache
    def chain(name):
        parts = name.split(".")
        around = {".".join(parts[:n]) for n in range(2, len(parts) + 1)}
        ahead = {
            ".".join(one.split(".")[:n])
            for one in imports_of(tree(name).body)
            for n in range(2, one.count(".") + 2)
        }  # fmt: skip
        return 1 + max(map(chain, ahead - around), default=0)

    assert max(map(chain, MODULES)) <= 18


def test_no_public_class_name_twice():
    names = Counter(
        node.name
        for name in MODULES
        for node in tree(name).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, n in names.items() if n > 1] == []


def modules_after(code):
    words = [sys.executable, "-c", f"import os, sys; {code}; print(*sys.modules, flush=True); os._exit(0)"]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import dgal_bench", {"torch", "numpy", "pandas", "lightning", "omegaconf"}),
        (
            "from dgal_bench.cli.main import main; main(['status', 'results/reference/all/digits/random'])",
            {"torch", "lightning", "pandas", "wandb"},
        ),
        # imports take a worker ten seconds, and the command line must not pay them twice;
        # an uninstalled Ray is an error in one line, and its variables are set before it is imported
        (
            "import dgal_bench.cli.main, dgal_bench.engines, dgal_bench.engines.progress, dgal_bench.engines.ray",
            {"lightning", "wandb", "ray"},
        ),
    ],
    ids=["the door", "status", "the parent of a sweep and the driver of Ray"],
)
def test_what_is_not_needed_is_not_imported(code, without, monkeypatch):
    monkeypatch.chdir(PACKAGE.parent)
    assert modules_after(code) & without == set()
