"""The house rules that a machine can check."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dgal_bench"

# A room imports only from rooms above it in this list, and from its own folder.
# fmt: off
LAYERS = (
    "errors", "disk", "arrays", "config", "checks", "compose", "seeding", "threads", "clock", "lease", "beside",
    "cache", "data", "graph", "models", "strategies", "plugins", "provenance", "features", "representation",
    "projection", "doctor", "schema", "record", "recorder", "identity", "timings", "lab", "loop", "replay", "laws",
    "judge", "worker", "sweep", "process", "engines", "progress", "past", "estimate", "report", "tracking",
    "retiming", "status", "validate", "arguments", "request", "verbs", "cli",
)
# fmt: on


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}" if node.module == "dgal_bench" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("dgal_bench.")}
    return rooms - {"__version__"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_its_place():
    assert {room(path) for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_above(path):
    below = [name for name in imported_rooms(path) if LAYERS.index(name) > LAYERS.index(room(path))]
    assert below == []


@pytest.mark.slow
def test_the_parent_of_a_sweep_does_not_import_lightning():
    """Imports take the workers ten seconds; the command line must not pay them twice."""
    import subprocess
    import sys

    code = "import sys, dgal_bench.cli, dgal_bench.engines, dgal_bench.progress; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
