"""Two literal registries of parts, and strategies built from their configuration."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, get_type_hints

from dgal_bench.config.schema import StrategyConfig
from dgal_bench.core.errors import ConfigError, choose, did_you_mean, innermost_error
from dgal_bench.core.types import Features
from dgal_bench.graph.graph import Graph
from dgal_bench.strategies.badge import Badge
from dgal_bench.strategies.base import Acquisition, Query, Restriction, Selection, Strategy
from dgal_bench.strategies.coreset import KCenter
from dgal_bench.strategies.restrict import Diffusion, Everything, Uniform
from dgal_bench.strategies.seals import GraphNeighbors, ModelNeighbors, NewIndex
from dgal_bench.strategies.uncertainty import Entropy, LeastConfidence, Margin, Random
from dgal_bench.strategies.vaal import Adversary

__all__ = ["Acquisition", "Query", "Resources", "Restriction", "Selection", "Strategy", "build", "resolve_parts"]

RESTRICTIONS: dict[str, Any] = {
    "everything": Everything,
    "uniform": Uniform,
    "diffusion": Diffusion,
    "model_neighbors": ModelNeighbors,
    "graph_neighbors": GraphNeighbors,
}

ACQUISITIONS: dict[str, Any] = {
    "random": Random,
    "least_confidence": LeastConfidence,
    "margin": Margin,
    "entropy": Entropy,
    "badge": Badge,
    "k_center": KCenter,
    "adversary": Adversary,
}

PLUGIN_ORIGINS: dict[tuple[str, str], str] = {}
"""(role, kind) -> the plugin that added it, with the hash of its code; no entry for the parts of this package."""


@dataclass(frozen=True, eq=False)
class Resources:
    """What set-up makes for parts: handed to the fields of these names, which are not settings."""

    graph: Graph
    features: Features  # (N, d): what the graph was built on
    new_index: NewIndex  # indexes any (N, d) features by the configured backend


RESOURCES = tuple(field.name for field in dataclasses.fields(Resources))


def build(config: StrategyConfig, resources: Resources) -> Strategy:
    """The strategy of a configuration; errors as in ``resolve_parts``."""
    parts = {}
    for role, registry in (("restrict", RESTRICTIONS), ("acquire", ACQUISITIONS)):
        kind, settings = _check_part(getattr(config, role), registry, role)
        resource_fields = {name: getattr(resources, name) for name in RESOURCES if name in _field_names(kind)}
        parts[role] = kind(**settings, **resource_fields)
    return Strategy(config.name, **parts)


def resolve_parts(config: StrategyConfig) -> StrategyConfig:
    """The same with every setting of its parts written out, so that the hash covers the defaults too.

    Raises:
        ConfigError: an unknown kind or setting (with the nearest name), a value of the wrong type or out of range.
    """
    return StrategyConfig(
        config.name,
        restrict=_resolve_part(config.restrict, RESTRICTIONS, "restrict"),
        acquire=_resolve_part(config.acquire, ACQUISITIONS, "acquire"),
    )


def _resolve_part(part: Mapping[str, Any], registry: Mapping[str, Any], role: str) -> dict[str, Any]:
    kind, settings = _check_part(part, registry, role)
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    origin = PLUGIN_ORIGINS.get((role, part["kind"]))
    return {"kind": part["kind"], **({"plugin": origin} if origin else {}), **defaults, **settings}


def _check_part(part: Mapping[str, Any], registry: Mapping[str, Any], role: str) -> tuple[Any, dict[str, Any]]:
    """A part's class and its settings, every name and value checked."""
    where = f"strategy.{role}"
    if "kind" not in part:
        raise ConfigError(f"{where} has no kind{did_you_mean('', registry)}")
    kind = choose(registry, str(part["kind"]), f"{where}.kind")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in RESOURCES}
    origin = PLUGIN_ORIGINS.get((role, part["kind"]))
    if part.get("plugin", origin) != origin:
        raise ConfigError(
            f"{where}.kind '{part['kind']}' is of {part['plugin']}, but {origin or 'no plugin'} is loaded"
        )
    settings = {name: value for name, value in part.items() if name not in ("kind", "plugin")}
    hints = get_type_hints(kind)
    for name, value in settings.items():
        if name not in fields:
            raise ConfigError(f"{where}.{name} is no setting of '{part['kind']}'{did_you_mean(name, fields)}")
        settings[name] = _check_type(f"{where}.{name}", value, hints[name])
    missing = [n for n, f in fields.items() if n not in settings and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where} of kind '{part['kind']}' needs {', '.join(missing)}")
    if origin and _field_names(kind) & set(RESOURCES):
        return kind, settings  # a plugin's part may use its graph when it is made: ``build`` passes one
    try:
        kind(**settings, **{name: None for name in RESOURCES if name in _field_names(kind)})
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    except Exception as error:
        raise ConfigError(f"{where} of kind '{part['kind']}' refuses its settings: {innermost_error(error)}") from error
    return kind, settings


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _check_type(key: str, value: Any, annotation: Any) -> Any:
    """The value; a whole number becomes a float for a float setting, so that equal settings have equal hashes."""
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        name = getattr(annotation, "__name__", None) or str(annotation)
        raise ConfigError(f"{key}={value!r} is not of type {name}")
    if isinstance(value, float) and not isfinite(value):
        raise ConfigError(f"{key}={value!r}: use a finite number")  # a results file cannot hold others
    return value
