"""A data set's evidence: its cells over all suites, and the samples of seeds that claims are judged by."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

from dgal_bench.record import CellLog, RoundRecord
from dgal_bench.report.areas import area_under_curve
from dgal_bench.report.claims.rules import POINTS, TIMES, Sample
from dgal_bench.report.groups import Group
from dgal_bench.report.spending import NEEDS, set_up
from dgal_bench.report.summary import times_of_both
from dgal_bench.report.times import Counted, disturbed, made_on, whole

PAPER_SETS = ("mnist", "emnist", "svhn", "cifar10", "cifar100", "mini_imagenet")
"""The paper's own."""

ALL, EARLY, LATE = "over all rounds", "early", "late"
"""Early is the first third of the rounds, late the rest."""


@dataclass(frozen=True, eq=False)
class Bench:
    """One data set under one profile, of one algorithm version, on one kind of machine.

    ``stands_for`` puts a strategy's variant in its place, ``counted`` says which seconds of a query count, and
    ``shared`` whether each query bears its share of the one-off cost: for claims judged both ways.
    """

    name: str
    group: Group
    left_out: str = ""
    """What other rows there are of this data set that are not judged."""
    slugs: Sequence[str] = ()
    """How the files of figures begin that show these cells."""
    stands_for: Mapping[str, str] = field(default_factory=dict)
    counted: Counted = whole
    shared: bool = False

    @property
    def of_the_paper(self) -> bool:
        return self.group.dataset in PAPER_SETS

    def both_ways(self, stands_for: Mapping[str, str], counted: Counted = whole, shared: bool = False) -> "Bench":
        return replace(self, stands_for=stands_for, counted=counted, shared=shared)

    def label(self, strategy: str) -> str:
        """The strategy, or what stands for it."""
        return self.stands_for.get(strategy, strategy)

    def cells(self, strategy: str) -> dict[int, CellLog]:
        """Finished, by seed."""
        return self.group.finished(self.label(strategy))

    def pairs(self, ours: str, theirs: str) -> dict[int, tuple[CellLog, CellLog]]:
        """Of the seeds that both have finished, under the same protocol."""
        mine, others = self.cells(ours), self.cells(theirs)
        both = {seed: (mine[seed], others[seed]) for seed in mine.keys() & others.keys()}
        return {seed: pair for seed, pair in sorted(both.items()) if _protocol(pair[0]) == _protocol(pair[1])}

    def representations(self, *strategies: str) -> int:
        """How many different ones the cells of the strategies that rest on one were made from."""
        logs = [log for one in strategies for log in self.cells(one).values() if _rests_on_one(log)]
        return len({log.header["fingerprint"]["latents"] for log in logs})

    def accuracy(self, ours: str, theirs: str, when: str) -> Sample:
        """The difference of areas under the curve."""
        values = {}
        for seed, pair in self.pairs(ours, theirs).items():
            mine, other = (part(log.records, when) for log in pair)
            if len(mine) > 1:  # of fewer than three rounds there is no early
                values[seed] = area_under_curve(mine) - area_under_curve(other)
        return Sample(values, POINTS)

    def speed(self, ours: str, theirs: str) -> Sample:
        """How many times longer their queries take."""
        seconds = self._seconds(ours, theirs)
        return Sample({seed: log(other / mine) for seed, (mine, other) in seconds.items()}, TIMES)

    def total(self, ours: str, theirs: str) -> Sample:
        """The same of everything that is spent: what the queries rest on, and all of them."""
        values = {}
        for seed, (mine, other) in self._seconds(ours, theirs, alone=True).items():
            logs = self.pairs(ours, theirs)[seed]
            spent = [set_up(one) + one.rounds * seconds for one, seconds in zip(logs, (mine, other), strict=True)]
            values[seed] = log(spent[1] / spent[0])
        return Sample(values, TIMES)

    def _seconds(self, ours: str, theirs: str, alone: bool = False) -> dict[int, tuple[float, float]]:
        """Mean seconds of a query of both by seed; ``alone``: without any share of the one-off cost."""
        found = times_of_both(self.group, self.label(ours), self.label(theirs), self.counted)
        pairs = self.pairs(ours, theirs)
        if found is None:
            return {}
        both = {seed: tuple(one.seconds[seed] for one in found) for seed in pairs if seed in found[0].seconds}
        if self.shared and not alone:
            shares = {seed: [set_up(one) / one.rounds for one in pairs[seed]] for seed in both}
            both = {seed: (two[0] + shares[seed][0], two[1] + shares[seed][1]) for seed, two in both.items()}
        return {seed: (mine, other) for seed, (mine, other) in sorted(both.items()) if mine > 0 and other > 0}

    def beside(self, *strategies: str) -> bool:
        """Whether the seconds of any of them were taken beside other work."""
        return any(
            disturbed(self.group.replayed(self.label(one))[seed].timings)
            if seed in self.group.replayed(self.label(one))
            else disturbed(record for record in log.records if record.query_seconds is not None)
            for one in strategies
            for seed, log in self.cells(one).items()
        )

    def growth(self, strategy: str, value: str) -> Sample:
        """``n_candidates`` or ``query_seconds`` of the last third of the queries over those of the first third."""
        sizes = {seed: thirds(asked(log, value)) for seed, log in self.cells(strategy).items()}
        for seed, made in self.group.replayed(self.label(strategy)).items() if value == "query_seconds" else ():
            seconds = {one.round: one.median_seconds for one in made.own}
            sizes[seed] = thirds(seconds, self.cells(strategy)[seed].rounds)
        known = {seed: both for seed, both in sorted(sizes.items()) if both is not None and min(both) > 0}
        return Sample({seed: log(late / early) for seed, (early, late) in known.items()}, TIMES)

    def refinement(self, strategy: str) -> Sample:
        """The boundary share of the batches of the last third of the queries less that of the first third."""
        shares = {seed: thirds(asked(log, "boundary_share")) for seed, log in self.cells(strategy).items()}
        values = {seed: both[1] - both[0] for seed, both in sorted(shares.items()) if both is not None}
        return Sample(values, POINTS)


def part(records: Sequence[RoundRecord], when: str) -> Sequence[RoundRecord]:
    """The evaluations of a time: early ends where late begins."""
    third = (len(records) - 1) // 3
    return {ALL: records, EARLY: records[: third + 1], LATE: records[third:]}[when]


def asked(log: CellLog, value: str) -> dict[int, float]:
    """A number of every query, by round."""
    found = {record.round: getattr(record, value) for record in log.records}
    return {round_: float(one) for round_, one in found.items() if one is not None}


def thirds(by_round: Mapping[int, float], rounds: int | None = None) -> tuple[float, float] | None:
    """The means over the first and over the last third of the rounds; None where one of them has none."""
    n = len(by_round) if rounds is None else rounds
    early = [value for round_, value in by_round.items() if 3 * round_ < n]
    late = [value for round_, value in by_round.items() if 3 * round_ >= 2 * n]
    return (sum(early) / len(early), sum(late) / len(late)) if early and late else None


def _protocol(log: CellLog) -> tuple[Any, ...]:
    config = log.header["config"]
    return config["rounds"], config["batch_size"], tuple(log.header["initial"])


def _rests_on_one(log: CellLog) -> bool:
    kind = log.header["config"]["strategy"]["restrict"]["kind"]
    return "representation" in NEEDS.get(kind, ("representation",))


_Key = tuple[str, str, int, str, str]


def benches(groups: Iterable[Group]) -> list[Bench]:
    """A bench for each data set and profile: the cells of all suites that may be compared, the most that there are.

    Rows of another machine, of other data under the same name or of another algorithm version are said, and not
    judged: differences and ratios are of one kind of machine alone.
    """
    merged: dict[_Key, dict[str, list[CellLog]]] = {}
    slugs: dict[_Key, dict[str, None]] = {}
    timings = {id(one): one for group in groups for one in group.timings}
    for group in groups:
        for label, logs in group.cells.items():
            sets: dict[_Key, list[CellLog]] = {}
            for one in logs:
                sets.setdefault(_key(group, one), []).append(one)
            for key, own in sets.items():
                slugs.setdefault(key, {})[group.slug] = None
                known = merged.setdefault(key, {}).get(label, [])
                merged[key][label] = max(known, own, key=lambda some: sum(log.done for log in some))
    apart: dict[tuple[str, str], list[_Key]] = {}
    for key in merged:
        apart.setdefault(key[:2], []).append(key)
    profiles: dict[str, set[str]] = {}
    for dataset, profile in apart:
        profiles.setdefault(dataset, set()).add(profile)
    found = []
    for (dataset, profile), keys in apart.items():
        best = max(keys, key=lambda key: (key[2], _n_done(merged[key])))
        others = sum(_n_done(merged[key]) for key in keys if key != best)
        name = dataset if len(profiles[dataset]) == 1 else f"{dataset} (profile {profile})"
        said = f"{others} finished cells of another machine, data or version are not judged" if others else ""
        group = Group("", dataset, profile, best[2], merged[best], timings=list(timings.values()))
        found.append(Bench(name, group, said, list(slugs[best])))
    return sorted(found, key=lambda one: (_place(one.group.dataset), one.name))


def _key(group: Group, log: CellLog) -> _Key:
    return group.dataset, group.profile, group.algorithm_version, log.header["fingerprint"]["data"][:8], made_on(log)


def _n_done(cells: Mapping[str, Sequence[CellLog]]) -> int:
    return sum(log.done for logs in cells.values() for log in logs)


def _place(dataset: str) -> int:
    """The paper's in its order, then others."""
    return PAPER_SETS.index(dataset) if dataset in PAPER_SETS else len(PAPER_SETS)
