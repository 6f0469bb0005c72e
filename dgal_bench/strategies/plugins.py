"""Strategies from outside the package: a file, or an entry point, with one or more of three literal dictionaries.

``RESTRICTIONS`` and ``ACQUISITIONS``: kind -> frozen dataclass. ``STRATEGIES``: name -> the content of a file in
conf/strategy: ``{"restrict": {"kind": ...}, "acquire": {"kind": ...}}``. The sha256 of the plugin's file (of a package:
of all its files; not of what it imports from elsewhere) stands in the configuration beside the kind of each of its
parts, so that rows of different code are never mixed. A part with a field ``graph`` is given the graph.
"""

import dataclasses
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from dgal_bench.config.compose import add_choice, group_names
from dgal_bench.core.errors import ConfigError, did_you_mean, innermost_error
from dgal_bench.strategies import ACQUISITIONS, PLUGIN_ORIGINS, RESOURCES, RESTRICTIONS

GROUP = "dgal_bench.plugins"
TABLES = ("RESTRICTIONS", "ACQUISITIONS", "STRATEGIES")
_SIMPLE = (int, float, str, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Plugin:
    """What a plugin adds. ``origin``: its file's name and the beginning of its sha256, as configurations name it."""

    origin: str
    restrictions: Mapping[str, Any]
    acquisitions: Mapping[str, Any]
    strategies: Mapping[str, Any]


INSTALLED: dict[str, Plugin] = {}
"""The plugins in the registries of this process, by reference."""


def install(references: Sequence[str]) -> tuple[str, ...]:
    """Add every plugin to the registries of this process, each once.

    Args:
        references: paths of .py files, or names of entry points of the group ``dgal_bench.plugins``.

    Returns:
        The references with absolute paths, for another process.

    Raises:
        ConfigError: no such file or entry point, it fails when run, or its content is invalid.
    """
    absolute = tuple(str(Path(r).resolve()) if _is_file(r) else r for r in references)
    for reference in absolute:
        if reference not in INSTALLED:
            INSTALLED[reference] = _register(load(reference))
    return absolute


def _is_file(reference: str) -> bool:
    return reference.endswith(".py") or "/" in reference


def load(reference: str) -> Plugin:
    """Execute a plugin and check its content; nothing is registered."""
    names, path, sha256 = _run_file(Path(reference)) if _is_file(reference) else _run_entry_point(reference)
    origin = f"{path.name}@{sha256[:16]}"
    tables = [names.get(name, {}) for name in TABLES]
    for name, table in zip(TABLES, tables, strict=True):
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
            raise ConfigError(f"{path.name}: {name} must be a dictionary whose keys are names (text)")
    if not any(tables):
        raise ConfigError(f"{path.name} defines none of {', '.join(TABLES)}: there is nothing to add")
    for role, table in (("restriction", tables[0]), ("acquisition", tables[1])):
        for kind, part in table.items():
            _check_part(f"{path.name}: {role} '{kind}'", part, 1 if role == "restriction" else 3)
    for name, sentence in tables[2].items():
        _check_sentence(f"{path.name}: strategy '{name}'", sentence)
    return Plugin(origin, *tables)


def _run_file(path: Path) -> tuple[dict[str, Any], Path, str]:
    """Execute the same bytes that are hashed, without a cache of compiled code beside the user's file."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"plugins={path} cannot be read: {error.strerror}") from error
    sha256 = hashlib.sha256(source).hexdigest()
    module = types.ModuleType(f"dgal_bench_plugin_{path.stem}_{sha256[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass looks up its annotations
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - the user asked to execute it
    except SyntaxError as error:
        raise ConfigError(f"plugins={path} is not valid Python: {error.msg} (line {error.lineno})") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"plugins={path} fails when it is run: {innermost_error(error, str(path))}") from error
    return module.__dict__, path, sha256


def _run_entry_point(name: str) -> tuple[dict[str, Any], Path, str]:
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise ConfigError(
            f"plugins={name} is neither a .py file nor an entry point of the group {GROUP}{did_you_mean(name, points)}"
        )
    try:
        module = points[name].load()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"plugins={name} fails when it is imported: {innermost_error(error)}") from error
    if not isinstance(module, types.ModuleType) or module.__file__ is None:
        raise ConfigError(f"plugins={name}: the entry point {points[name].value} must name a module with a file")
    path = Path(module.__file__)
    files = sorted(path.parent.rglob("*.py")) if hasattr(module, "__path__") else [path]
    return vars(module), path, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _check_part(what: str, part: Any, n_arguments: int) -> None:
    if not (isinstance(part, type) and dataclasses.is_dataclass(part) and part.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise ConfigError(f"{what} must be a class with @dataclass(frozen=True): its fields are its settings")
    try:
        hints = get_type_hints(part)
    except Exception as error:
        raise ConfigError(f"{what}: the type of a setting cannot be resolved: {error}") from error
    for field in dataclasses.fields(part):
        hint = hints[field.name]
        union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if field.name not in RESOURCES and not all(option in _SIMPLE for option in union):
            raise ConfigError(
                f"{what}: setting '{field.name}' must be an int, float, str or bool (or None), not {hint}"
            )
    arguments = "query" if n_arguments == 1 else "query, candidates, batch_size"
    try:
        own_call = next(vars(cls)["__call__"] for cls in part.__mro__ if "__call__" in vars(cls))
        inspect.signature(own_call).bind(None, *range(n_arguments))
    except (TypeError, StopIteration):
        raise ConfigError(f"{what} must be callable as part({arguments})") from None


def _check_sentence(what: str, sentence: Any) -> None:
    parts = (
        list(sentence.values()) if isinstance(sentence, dict) and set(sentence) == {"restrict", "acquire"} else [None]
    )
    if not all(isinstance(part, dict) and "kind" in part for part in parts):
        raise ConfigError(
            f'{what} must be {{"restrict": {{"kind": ...}}, "acquire": {{"kind": ...}}}} with the settings of each part'
        )


def reload_all() -> None:
    """Execute every plugin again, as a new process would: the state of its module is lost."""
    for reference, plugin in INSTALLED.items():
        fresh = load(reference)
        for kind in plugin.restrictions:
            RESTRICTIONS[kind] = fresh.restrictions[kind]
        for kind in plugin.acquisitions:
            ACQUISITIONS[kind] = fresh.acquisitions[kind]


def _register(plugin: Plugin) -> Plugin:
    for role, registry, added in (
        ("restrict", RESTRICTIONS, plugin.restrictions),
        ("acquire", ACQUISITIONS, plugin.acquisitions),
    ):
        for kind, part in added.items():
            if kind in registry:
                raise ConfigError(
                    f"{plugin.origin}: strategy.{role}.kind '{kind}' is taken already: choose another name"
                )
            registry[kind] = part
            PLUGIN_ORIGINS[role, kind] = plugin.origin
    for name, sentence in plugin.strategies.items():
        if name in group_names("strategy"):
            raise ConfigError(f"{plugin.origin}: there is a strategy '{name}' already: choose another name")
        add_choice("strategy", name, {"strategy": {"name": name, **sentence}})
    return plugin
