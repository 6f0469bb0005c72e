"""``dgal-bench check``: strategies before the laws, and what is found said in a table."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dgal_bench import plugins
from dgal_bench.compose import add_choice, group_names
from dgal_bench.errors import ConfigError, UserError, innermost
from dgal_bench.lab import Lab
from dgal_bench.laws import FIRST, LAWS, LawError, practice, practice_lab
from dgal_bench.models.trainer import silence_lightning


@dataclass(frozen=True)
class Verdict:
    """How a strategy stands to a law; ``broken`` says how it broke it, None where it holds."""

    strategy: str
    law: str
    broken: str | None


def judge(lab: Lab, strategy: str) -> Iterator[Verdict]:
    """A strategy before every law; an error of its own counts as a breach.

    One that does not even pick and restrict as it must is not asked further: it would break everything.
    """
    for law, holds in LAWS.items():
        broken = None
        try:
            holds(copied(lab), strategy)  # what a cheat writes into must not reach the next law
        except (LawError, UserError) as error:
            broken = " ".join(str(error).split())
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises is a finding
            broken = innermost(error)
        yield Verdict(strategy, law, broken)
        if broken and holds in FIRST:
            return


def copied(lab: Lab) -> Lab:
    """A lab that shares no tensor of images, labels, latents or graph with this one."""
    data = {name: getattr(lab.data, name).clone() for name in ("images", "labels", "test_images", "test_labels")}
    graph = lab.setup.graph
    parts = {name: getattr(graph, name).clone() for name in ("indptr", "indices", "weights", "degrees")}
    setup = replace(lab.setup, graph=replace(graph, **parts), latents=lab.setup.latents.clone())
    return replace(lab, data=replace(lab.data, **data), setup=setup)


def check_plugins(references: Sequence[str]) -> list[Verdict]:
    """Every strategy of the plugins before every law; parts in no sentence of theirs are put into one.

    Raises:
        ConfigError: a plugin cannot be loaded, or a part needs settings and is in no sentence.
    """
    silence_lightning()
    names = [name for path in plugins.install(references) for name in sentences(plugins.INSTALLED[path])]
    for name in names:
        practice(name)  # a sentence that makes no sense is a mistake, not a broken law
    with tempfile.TemporaryDirectory() as folder:
        lab = practice_lab(Path(folder))
        return [verdict for name in names for verdict in judge(lab, name)]


def sentences(plugin: plugins.Plugin) -> list[str]:
    """The strategies of a plugin, and one for each part that is in none of them: with margin, or on everything."""
    names = list(plugin.strategies)
    spoken = {role: {s[role]["kind"] for s in plugin.strategies.values()} for role in ("restrict", "acquire")}
    for kind in sorted(plugin.restrictions.keys() - spoken["restrict"]):
        names.append(_alone(kind, {"restrict": {"kind": kind}, "acquire": {"kind": "margin"}}))
    for kind in sorted(plugin.acquisitions.keys() - spoken["acquire"]):
        names.append(_alone(kind, {"restrict": {"kind": "everything"}, "acquire": {"kind": kind}}))
    return names


def _alone(kind: str, sentence: dict[str, dict[str, str]]) -> str:
    name = f"({kind})"
    if name not in group_names("strategy"):
        add_choice("strategy", name, {"strategy": {"name": name, **sentence}})
    try:
        practice(name)
    except ConfigError as error:
        raise ConfigError(f"'{kind}' is in no strategy of its file and cannot stand alone: {error}") from error
    return name


def table(verdicts: Sequence[Verdict]) -> str:
    """A line for each strategy and law, the breach below it, and a count."""
    lines = []
    for strategy in dict.fromkeys(verdict.strategy for verdict in verdicts):
        lines.append(strategy)
        for verdict in verdicts:
            if verdict.strategy == strategy:
                lines.append(f"  {'BROKEN' if verdict.broken else 'ok':7} {verdict.law}")
                lines += [f"          {verdict.broken}"] if verdict.broken else []
        untried = len(LAWS) - sum(verdict.strategy == strategy for verdict in verdicts)
        lines += [f"  -       {untried} more laws, not tried before this is mended"] if untried else []
    n_broken = sum(verdict.broken is not None for verdict in verdicts)
    return "\n".join([*lines, f"{len(verdicts) - n_broken} of {len(verdicts)} laws hold, {n_broken} broken"])
