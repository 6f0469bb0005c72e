"""One run's configuration from ``conf/`` groups and ``key=value`` overrides, as in Hydra, with OmegaConf."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dgal_bench.config.schema import NetConfig, RunConfig, check_values, flatten, from_dict
from dgal_bench.core.errors import ConfigError, did_you_mean

GROUPS = ("dataset", "representation", "profile", "strategy")


def conf_dir() -> Path:
    """The folder of the groups: inside the package of a wheel, beside it in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


_ADDED_CHOICES: dict[tuple[str, str], DictConfig] = {}
"""Choices that plugins added, by group and name."""


def add_choice(group: str, name: str, content: Mapping[str, Any]) -> None:
    """Make ``name`` a choice of the group, as a file of that content would."""
    try:
        _ADDED_CHOICES[group, name] = OmegaConf.create(dict(content))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{group} '{name}': {_one_line(error)}") from error
    forget_choices()


def forget_choices() -> None:
    """For when _ADDED_CHOICES has changed."""
    _compose.cache_clear()
    _compose_choices.cache_clear()
    _compose_protocol.cache_clear()
    dataset_kinds.cache_clear()


def group_names(group: str) -> list[str]:
    """The choices of a group: its files and what plugins added."""
    files = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
    return sorted(files + [name for owner, name in _ADDED_CHOICES if owner == group])


@cache
def _file(relative: str) -> DictConfig:
    return OmegaConf.load(conf_dir() / relative)  # type: ignore[return-value]


def read_group(group: str, name: str) -> DictConfig:
    """The content of ``conf/<group>/<name>.yaml``; a miss names the nearest."""
    if name not in group_names(group):
        raise ConfigError(f"unknown {group} '{name}'{did_you_mean(name, group_names(group))}")
    added = _ADDED_CHOICES.get((group, name))
    return _file(f"{group}/{name}.yaml") if added is None else added


def compose(choices: Mapping[str, str], overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of one run.

    Args:
        choices: a name for each of GROUPS.
        overrides: ``a.b=value`` strings, applied last.

    Raises:
        ConfigError: an unknown name, a misspelt key or a value of the wrong type.
    """
    return _compose(tuple(choices[group] for group in GROUPS), tuple(overrides))


@cache
def _compose(choices: tuple[str, ...], overrides: tuple[str, ...]) -> RunConfig:
    try:
        base = _compose_choices(*choices)
        plain: Any = OmegaConf.to_container(base, resolve=False)
        for override in overrides:
            check_key(override.partition("=")[0], plain)
            _check_section(override, base)
        composed = OmegaConf.merge(base, *map(_parse_override, overrides))
        assert isinstance(composed, DictConfig)
        config = from_dict(_resolve_choices(composed))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    kinds = dataset_kinds()
    if config.dataset.kind not in kinds:
        raise ConfigError(f"unknown dataset.kind '{config.dataset.kind}'{did_you_mean(config.dataset.kind, kinds)}")
    check_values(config)
    return config


@cache
def _compose_choices(dataset: str, representation: str, profile: str, strategy: str) -> DictConfig:
    """The files of these choices merged: half of the time of ``compose``. Cached: callers must not write to it."""
    merged = OmegaConf.merge(_compose_protocol(dataset, representation, profile), read_group("strategy", strategy))
    assert isinstance(merged, DictConfig)
    return merged


@cache
def _compose_protocol(dataset: str, representation: str, profile: str) -> DictConfig:
    """The files without the strategy's, merged once for all strategies."""
    profiles = read_group("profile", profile)
    merged = OmegaConf.merge(
        _file("config.yaml"),
        read_group("dataset", dataset),
        read_group("representation", representation),
        OmegaConf.create({"profile": profile}),
        profiles.get("all") or {},
        profiles.get(dataset) or {},
    )
    assert isinstance(merged, DictConfig)
    return merged


@cache
def dataset_kinds() -> frozenset[str]:
    """The ``kind`` of every preset; a preset without one is of its own name."""
    presets = {name: read_group("dataset", name).dataset for name in group_names("dataset")}
    return frozenset(str(preset.get("kind", name)) for name, preset in presets.items())


# Settings that parts name in their YAML: only strategies that use them have them in their configuration.
PART_SETTINGS = ("seals_k", "adversary_steps")


def _resolve_choices(composed: DictConfig) -> dict[str, Any]:
    """Check PART_SETTINGS, move them into the parts that name them, and make a number of ``ratio``.

    ``optimizer=auto`` follows the network: the paper's App. A has one for pre-trained ones.
    """
    _resolve_optimizer(composed)
    ratio = composed.seals_k == "ratio"
    if ratio:
        composed.seals_k = 1  # until the types of the sizes that it depends on are checked
    _check_count("seals_k", composed.seals_k, "; or ratio: restricted_size / initial_size")
    if composed.adversary_steps is not None:
        _check_count("adversary_steps", composed.adversary_steps, "; or null: 100 epochs")
    values = _without_part_settings(composed)
    if ratio:
        sizes = from_dict(values)
        composed.seals_k = max(1, round(sizes.restricted_size / max(1, sizes.initial_size or 1)))
        values = _without_part_settings(composed)
    return values


def _resolve_optimizer(composed: DictConfig) -> None:
    training = composed.training
    if training.optimizer == "auto":
        try:
            net = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(NetConfig), composed.net))  # types converted
        except OmegaConfBaseException as error:
            raise ConfigError(f"net.{_one_line(error)}") from error
        assert isinstance(net, NetConfig)
        training.optimizer = "adam" if net.pretrained or net.checkpoint_path is not None else "sgd"
    sgd = training.optimizer == "sgd"
    if training.momentum is None:
        training.momentum = 0.9 if sgd else 0.0
    if training.weight_decay is None:
        training.weight_decay = 5e-4 if sgd else 0.0


def _without_part_settings(composed: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in PART_SETTINGS}


def _check_count(key: str, value: Any, hint: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value}: use a whole number of 1 or more{hint}")


@cache
def _parse_override(override: str) -> DictConfig:
    """Cached: callers must not write to it."""
    if override.partition("=")[2].strip() == "???":  # OmegaConf's word for a missing value, which merge ignores
        raise ConfigError(f"{override} is no value")
    try:
        return OmegaConf.from_dotlist([override])
    except YAMLError as error:
        raise ConfigError(f"{override}: the value is not valid YAML; is a bracket or quote left open?") from error


def _one_line(error: OmegaConfBaseException) -> str:
    key = error.full_key if isinstance(error.full_key, str) else ""
    message = (error.msg if isinstance(error.msg, str) else str(error)).splitlines()[0]
    return f"{key}: {message}" if key else message


def check_key(key: str, composed: Mapping[str, Any], extra: Iterable[str] = ()) -> None:
    """Refuse a key that the configuration does not have; a part's own settings are checked when it is built.

    ``extra``: further valid keys.
    """
    leaves = flatten(composed)
    keys = {*leaves, *composed, *extra}
    if (
        key not in keys
        and not key.startswith(("strategy.restrict.", "strategy.acquire."))
        and not any(leaf.startswith(f"{key}.") for leaf in leaves)
    ):
        raise ConfigError(f"unknown key '{key}'{_nearest_key(key, keys)}")


def _check_section(override: str, composed: DictConfig) -> None:
    """Refuse one value in place of a section: ``training=3``."""
    key = override.partition("=")[0]
    section: Any = OmegaConf.select(composed, key)
    value = OmegaConf.select(_parse_override(override), key)
    if OmegaConf.is_dict(section) and not OmegaConf.is_dict(value):
        raise ConfigError(
            f"{override}: {key} is a section of settings: give one of them, {key}.{next(iter(section))}=..."
        )


def _nearest_key(key: str, keys: set[str]) -> str:
    """The nearest key; first one with the same last word (``graph.graph_k`` for ``graph_k``)."""
    same_word = [name for name in sorted(keys) if name.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean '{same_word[0]}'?" if same_word else did_you_mean(key, keys)


def split_values(text: str) -> list[str]:
    """``a,b`` -> [a, b]; a comma inside brackets or quotes does not split: ``[1,2]``."""
    values, depth, quote, current = [], 0, "", ""
    for character in text:
        if character == "," and depth == 0 and not quote:
            values.append(current)
            current = ""
            continue
        current += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
    values = [value.strip() for value in [*values, current]]
    return [value for value in values if value]
