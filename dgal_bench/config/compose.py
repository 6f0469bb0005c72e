"""One run's configuration out of ``conf/`` groups and ``key=value`` overrides, with OmegaConf, in Hydra's surface."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dgal_bench.config.schema import NetConfig, RunConfig, check_values, from_dict
from dgal_bench.core.errors import ConfigError, did_you_mean

GROUPS = ("dataset", "representation", "profile", "strategy")


def conf_dir() -> Path:
    """The folder of the groups: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


_ADDED_CHOICES: dict[tuple[str, str], DictConfig] = {}
"""Choices that come from no file of ours but from a plugin, by group and name."""


def add_choice(group: str, name: str, content: Mapping[str, Any]) -> None:
    """Let ``name`` be a choice of the group, as if there were a file of that content."""
    try:
        _ADDED_CHOICES[group, name] = OmegaConf.create(dict(content))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{group} '{name}': {_one_line(error)}") from error
    _compose_choices.cache_clear()


def group_names(group: str) -> list[str]:
    """The choices of a group: the names of its files, and what plugins added."""
    files = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
    return sorted(files + [name for of, name in _ADDED_CHOICES if of == group])


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
    overrides = list(overrides)
    try:
        chosen = _compose_choices(*(choices[group] for group in GROUPS))
        known = _to_plain(chosen)
        for override in overrides:
            check_key(override.partition("=")[0], known)
        composed = OmegaConf.merge(chosen, *map(_parse_override, overrides))
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
    """The files of these choices merged, which takes as long as all that follows; nobody may write into it."""
    differing = read_group("profile", profile)
    merged = OmegaConf.merge(
        _file("config.yaml"),
        read_group("dataset", dataset),
        read_group("representation", representation),
        OmegaConf.create({"profile": profile}),
        differing.get("all") or {},
        differing.get(dataset) or {},
        read_group("strategy", strategy),
    )
    assert isinstance(merged, DictConfig)
    return merged


def dataset_kinds() -> set[str]:
    """How data sets may be read: what the presets say, their own names where they say nothing."""
    presets = {name: read_group("dataset", name).dataset for name in group_names("dataset")}
    return {str(preset.get("kind", name)) for name, preset in presets.items()}


# For parts to name in their YAML: in the configuration of the strategies that use them, and of no other.
PART_SETTINGS = ("seals_k", "adversary_steps")


def _resolve_choices(composed: DictConfig) -> dict[str, Any]:
    """PART_SETTINGS, checked, put into the parts that name them and taken out beside them; ``ratio`` made a number.

    The optimiser follows the network where nothing is said of it: the paper's App. A has one for pre-trained ones.
    """
    _settle_optimizer(composed)
    ratio = composed.seals_k == "ratio"
    if ratio:
        composed.seals_k = 1  # until the sizes that it depends on are known to be numbers
    _check_count("seals_k", composed.seals_k, "; or ratio: restricted_size / initial_size")
    if composed.adversary_steps is not None:
        _check_count("adversary_steps", composed.adversary_steps, "; or null: 100 epochs")
    settled = _without_part_settings(composed)
    if ratio:
        sizes = from_dict(settled)
        composed.seals_k = max(1, round(sizes.restricted_size / max(1, sizes.initial_size or 1)))
        settled = _without_part_settings(composed)
    return settled


def _settle_optimizer(composed: DictConfig) -> None:
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


def _check_count(key: str, value: Any, otherwise: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value}: use a whole number of 1 or more{otherwise}")


def _parse_override(override: str) -> DictConfig:
    if override.partition("=")[2].strip() == "???":  # OmegaConf's word for a missing value: it would be passed over
        raise ConfigError(f"{override} is no value")
    try:
        return OmegaConf.from_dotlist([override])
    except YAMLError as error:
        raise ConfigError(f"{override}: the value is not valid YAML; is a bracket or quote left open?") from error


def _one_line(error: OmegaConfBaseException) -> str:
    key = error.full_key if isinstance(error.full_key, str) else ""
    message = (error.msg if isinstance(error.msg, str) else str(error)).splitlines()[0]
    return f"{key}: {message}" if key else message


def _to_plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def dotted_keys(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Every dotted key of a nested mapping, inner nodes included."""
    found: set[str] = set()
    for name, value in config.items():
        found.add(prefix + name)
        if isinstance(value, Mapping):
            found |= dotted_keys(value, f"{prefix}{name}.")
    return found


def check_key(key: str, composed: Mapping[str, Any], extra: Iterable[str] = ()) -> None:
    """Refuse a key that the configuration does not have; a part's own settings are checked where it is built.

    ``extra``: names that are known elsewhere, to be suggested too.
    """
    known = dotted_keys(composed) | set(extra)
    if key not in known and not key.startswith(("strategy.restrict.", "strategy.acquire.")):
        raise ConfigError(f"unknown key '{key}'{_nearest_key(key, known)}")


def _nearest_key(key: str, known: set[str]) -> str:
    """The nearest key, also when only its last word was given (``graph_k`` for ``graph.graph_k``)."""
    last = [name for name in sorted(known) if name.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean '{last[0]}'?" if last else did_you_mean(key, known)


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
