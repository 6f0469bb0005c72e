"""One table of how large a checkout is and how it hangs together: ``python tests/measure_house.py [ROOT]``.

Works on the flat modules of revision 45da357 and on the rooms that they became; nothing is imported.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

PACKAGE = "dgal_bench"
# By how a module's path begins, in the flat package and in the rooms; the longest beginning decides.
CATEGORIES = {
    "algorithms": "strategies graph data/pool seeding clock loop arrays selector core/types core/seeding core/clock",
    "data and models": "data models features representation lab experiment",
    "running": "engines sweep worker process replay retiming progress past estimate",
    "storing": "record recorder schema timings identity cache validate status disk lease results core/cache core/files",
    "reporting": "report tracking projection results/wandb results/wandb_follow results/wandb_process "
    "results/dashboard results/metrics",
    "command line": "cli request verbs arguments doctor",
    "settings, plugins, the rest": "config compose checks core errors beside threads provenance plugins "
    "__init__ __main__ strategies/plugins laws judge conformance",
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
NAMED = (ast.Name, ast.Attribute)


def category(module: str) -> str:
    """``data/pool`` is an algorithm, the rest of ``data`` is not."""
    found = [
        (len(start), name)
        for name, starts in CATEGORIES.items()
        for start in starts.split()
        if module == start or module.startswith(f"{start}/")
    ]
    return max(found)[1] if found else "in no category"


def eager(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that importing the module runs: not those in functions, nor under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from eager(node.orelse)
        elif not isinstance(node, FUNCTION):
            for part in ("body", "orelse", "finalbody"):
                yield from eager(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from eager(handler.body)


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """What it may name: modules, and names in them."""
    names = [one.name for one in node.names]
    return names if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in names]


def longest_chain(trees: dict[str, ast.Module]) -> list[str]:
    """Modules each of which imports the next by name; a package counts where a name of its ``__init__`` is taken."""
    edges = {
        module: {
            name if name in trees else name.rpartition(".")[0] for node in eager(tree.body) for name in imported(node)
        }
        & trees.keys() - {module}
        for module, tree in trees.items()
    }
    known: dict[str, list[str]] = {}

    def longest(module: str) -> list[str]:
        if module not in known:
            known[module] = []  # where imports go in a circle, the way back counts for nothing
            known[module] = [module, *max((longest(one) for one in sorted(edges[module])), key=len, default=[])]
        return known[module]

    return max((longest(module) for module in sorted(trees)), key=len)


def called_once(tree: ast.Module) -> Iterator[str]:
    """Private functions and methods that their module names in one place only."""
    named = Counter(n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(tree) if isinstance(n, NAMED))
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION) and re.match(r"_[^_]", node.name) and named[node.name] == 1:
            yield node.name


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def measure(root: Path) -> list[tuple[str, object]]:
    paths = {p.relative_to(root / PACKAGE).with_suffix("").as_posix(): p for p in (root / PACKAGE).rglob("*.py")}
    texts = {name: path.read_text() for name, path in sorted(paths.items())}
    dotted = {name: f"{PACKAGE}/{name}".removesuffix("/__init__").replace("/", ".") for name in texts}
    trees = {dotted[name]: ast.parse(text) for name, text in texts.items()}
    sizes = {name: text.count("\n") for name, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, FUNCTION)]
    lengths = [node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno]
    classes = Counter(n.name for t in trees.values() for n in t.body if isinstance(n, ast.ClassDef))
    chain = longest_chain(trees)
    tests = [path.read_text() for path in sorted((root / "tests").rglob("*.py"))]
    twice = sorted(name for name, count in classes.items() if count > 1 and not name.startswith("_"))
    by_category = Counter[str]()
    for name, size in sizes.items():
        by_category[category(name)] += size
    spent = sum(by_category[name] for name in ("running", "storing", "reporting", "command line"))
    longest = max(functions, key=lambda f: (f.end_lineno or 0) - f.lineno).name
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        ("package files, lines", f"{len(texts)}, {sum(sizes.values())}"),
        ("lines a file: median, max", f"{median(sizes.values()):g}, {sizes[largest]} ({largest})"),
        ("functions; lines: median, max", f"{len(lengths)}; {median(lengths):g}, {max(lengths)} ({longest})"),
        ("longest import chain, modules", len(chain)),
        ("its modules", " > ".join(name.removeprefix(f"{PACKAGE}.") for name in chain)),
        ("public names", sum(not name.startswith("_") for tree in trees.values() for name in public_names(tree))),
        ("private functions named once", sum(1 for tree in trees.values() for _ in called_once(tree))),
        ("public class names in two modules", f"{len(twice)} ({', '.join(twice)})"),
        ("test lines, test functions", f"{sum(t.count(chr(10)) for t in tests)}, "
         f"{sum(len(re.findall(r'^ *def test_', t, re.M)) for t in tests)}"),
        *(("lines: " + name, by_category[name]) for name in [*CATEGORIES, "in no category"] if by_category[name]),
        ("running ... command, per algorithm", f"{spent / by_category['algorithms']:.2f}"),
    ]  # fmt: skip


if __name__ == "__main__":
    for what, value in measure(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)):
        sys.stdout.write(f"{what:35} {value}\n")
