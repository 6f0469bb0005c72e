"""What claims are judged by: the runs of each data set, and samples over their seeds.

Runs of all suites are put together, but never of two kinds of machine.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log

from dgal_bench.config.schema import comparable_config as less_paths
from dgal_bench.report.claims.rules import POINTS, TIMES, SeedSample
from dgal_bench.report.costs import NEEDS, setup_seconds
from dgal_bench.report.groups import Group
from dgal_bench.report.times import (
    CountSeconds,
    Times,
    all_phases,
    either_busy,
    from_replay,
    from_rows,
    hardware,
    machine_of_run,
)
from dgal_bench.report.times import comparable as alike
from dgal_bench.results.metrics import area_under_curve
from dgal_bench.results.rows import RoundRecord, RunLog, Timings

PAPER_SETS = ("mnist", "emnist", "svhn", "cifar10", "cifar100", "mini_imagenet")
"""The paper's data sets, in its order."""

ALL, EARLY, LATE = "over all rounds", "early", "late"
"""Early is the first third of the rounds, late the rest."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """One data set under one profile, of one algorithm version, on one kind of machine.

    For claims judged both ways: ``variants`` maps a strategy to the variant used in its place, ``count_seconds`` gives
    the seconds of a query that count, ``share_setup`` adds a share of the one-off cost to each query, and ``seeds``
    limits the seeds.
    """

    name: str
    group: Group
    rows_left_out: str = ""
    """A note on other rows of this data set, which are not judged."""
    slugs: Sequence[str] = ()
    """The starts of the file names of the figures that show these runs."""
    variants: Mapping[str, str] = field(default_factory=dict)
    count_seconds: CountSeconds = all_phases
    share_setup: bool = False
    seeds: frozenset[int] | None = None
    use_replays: bool = True
    """Whether seconds may be a replay's: both ways or neither."""

    @property
    def of_the_paper(self) -> bool:
        return self.group.dataset in PAPER_SETS

    @property
    def n_finished(self) -> int:
        return sum(log.done for log in self.group.logs)

    def both_ways(
        self, variants: Mapping[str, str], count_seconds: CountSeconds = all_phases, share_setup: bool = False
    ) -> tuple["Evidence", "Evidence"]:
        """The evidence as it is, and with ``variants``; both on the seeds that all strategies and variants finished."""
        pairs = [self.runs(name).keys() & self.group.finished(label).keys() for name, label in variants.items()]
        seeds = frozenset.intersection(*map(frozenset, pairs)) if pairs else None
        both = [self.group.replays(label).keys() for pair in variants.items() for label in pair]
        here = replace(self, seeds=seeds, use_replays=all((seeds or frozenset()) <= of for of in both))
        return here, replace(here, variants=variants, count_seconds=count_seconds, share_setup=share_setup)

    def label(self, strategy: str) -> str:
        """The strategy, or its variant."""
        return self.variants.get(strategy, strategy)

    def runs(self, strategy: str) -> dict[int, RunLog]:
        """Finished, by seed."""
        found = self.group.finished(self.label(strategy))
        return {seed: log for seed, log in sorted(found.items()) if self.seeds is None or seed in self.seeds}

    def pairs(self, ours: str, theirs: str) -> dict[int, tuple[RunLog, RunLog]]:
        """By seed the finished runs of both, of one protocol and, where both use one, on the same graph.

        An empty ``theirs`` pairs a strategy with itself.
        """
        mine, others = self.runs(ours), self.runs(theirs or ours)
        both = {seed: (mine[seed], others[seed]) for seed in mine if seed in others}
        return {seed: pair for seed, pair in both.items() if _one_protocol(*pair)}

    def representations(self, seeds: Collection[int], *strategies: str) -> int:
        """How many different representations the runs of these strategies use."""
        logs = [log for one in strategies for seed, log in self.runs(one).items() if seed in seeds]
        return len({log.header["fingerprint"]["latents"] for log in logs if _rests_on(log, "representation")})

    def accuracy(self, ours: str, theirs: str, when: str) -> SeedSample:
        """Our area under the curve minus theirs."""
        values = {}
        for seed, pair in self.pairs(ours, theirs).items():
            mine, other = (records_of_part(log.records, when) for log in pair)
            if len(mine) > 1:  # under three rounds, early has a single evaluation
                values[seed] = area_under_curve(mine) - area_under_curve(other)
        return SeedSample(values, POINTS)

    def speed(self, ours: str, theirs: str) -> SeedSample:
        """How many times as long their queries take as ours."""
        pairs, times = self.pairs(ours, theirs), self.times(ours, theirs, whole_run=self.share_setup)
        shares = {
            seed: [setup_seconds(one) / one.rounds if self.share_setup else 0.0 for one in pair]
            for seed, pair in pairs.items()
        }
        both = {seed: [one.seconds[seed] + shares[seed][side] for side, one in enumerate(times)] for seed in pairs}
        return _ratios(both, times)

    def total(self, ours: str, theirs: str) -> SeedSample:
        """The same ratio of total seconds: the set-up that the queries need, and all queries."""
        pairs, times = self.pairs(ours, theirs), self.times(ours, theirs, whole_run=True)
        both = {
            seed: [setup_seconds(log) + log.rounds * times[side].seconds[seed] for side, log in enumerate(pair)]
            for seed, pair in pairs.items()
        }
        return _ratios(both, times)

    def times(self, ours: str, theirs: str, whole_run: bool = False) -> tuple[Times, Times]:
        """Mean seconds of a query of both: from comparable replays that cover every pair, else from the rows.

        ``whole_run``: only replays that represent the run count, with its first and last round and on its machine.
        """
        pairs = self.pairs(ours, theirs)
        replayed = [self.group.replays(self.label(one)) for one in (ours, theirs)]
        usable = (
            self.use_replays
            and bool(pairs)
            and all(
                seed in replayed[0]
                and seed in replayed[1]
                and alike(replayed[0][seed], replayed[1][seed])
                and (not whole_run or all(_stands_for(replayed[side][seed], log) for side, log in enumerate(pair)))
                for seed, pair in pairs.items()
            )
        )
        found = []
        for side in (0, 1):
            replay = from_replay({seed: replayed[side][seed] for seed in pairs}, self.count_seconds) if usable else None
            found.append(replay or from_rows({seed: pair[side] for seed, pair in pairs.items()}, self.count_seconds))
        return found[0], found[1]

    def growth(self, strategy: str, value: str) -> SeedSample:
        """``n_candidates`` or ``query_seconds`` of the last third of the queries over those of the first third."""
        runs = self.runs(strategy)
        if value == "query_seconds":
            return self._slowing(runs, self.group.replays(self.label(strategy)))
        return SeedSample(_growth({seed: thirds(per_query(of, value), of.rounds) for seed, of in runs.items()}), TIMES)

    def _slowing(self, runs: Mapping[int, RunLog], replayed: Mapping[int, Timings]) -> SeedSample:
        """From replays where every run has one with rounds in both thirds, else from the rows."""
        by_round = {
            seed: {one.round: self.count_seconds(one.median_seconds, one.seconds) for one in replayed[seed].own}
            for seed in runs
            if seed in replayed
        }
        timed = {seed: thirds(seconds, runs[seed].rounds) for seed, seconds in by_round.items()}
        if self.use_replays and runs and all(timed.get(seed) for seed in runs):
            times = from_replay({seed: replayed[seed] for seed in runs})
        else:
            times = from_rows(runs)
            timed = {seed: thirds(_seconds(of, self.count_seconds), of.rounds) for seed, of in runs.items()}
        return SeedSample(_growth(timed), TIMES, *((times.source, times.busy) if times else ()))

    def refinement(self, strategy: str) -> SeedSample:
        """The boundary share of the batches of the last third of the queries less that of the first third."""
        shares = {seed: thirds(per_query(of, "boundary_share"), of.rounds) for seed, of in self.runs(strategy).items()}
        return SeedSample({seed: two[1] - two[0] for seed, two in shares.items() if two is not None}, POINTS)


def _ratios(both: Mapping[int, Sequence[float]], times: Sequence[Times]) -> SeedSample:
    """Theirs over ours, as logarithms."""
    values = {seed: log(theirs / ours) for seed, (ours, theirs) in both.items() if min(ours, theirs) > 0}
    return SeedSample(values, TIMES, times[0].source, either_busy(*(one.busy for one in times)))


def _growth(both: Mapping[int, tuple[float, float] | None]) -> dict[int, float]:
    return {seed: log(two[1] / two[0]) for seed, two in both.items() if two is not None and min(two) > 0}


def _seconds(of: RunLog, count_seconds: CountSeconds) -> dict[int, float]:
    """Of every query, by round."""
    queries = [record for record in of.records if record.query_seconds is not None]
    return {record.round: count_seconds(record.query_seconds or 0.0, record.seconds or {}) for record in queries}


def records_of_part(records: Sequence[RoundRecord], when: str) -> Sequence[RoundRecord]:
    """The evaluations of that part of the run: early ends where late begins."""
    third = (len(records) - 1) // 3
    return {ALL: records, EARLY: records[: third + 1], LATE: records[third:]}[when]


def per_query(of: RunLog, value: str) -> dict[int, float]:
    """A number of every query, by round."""
    found = {record.round: getattr(record, value) for record in of.records}
    return {round_: float(one) for round_, one in found.items() if one is not None}


def thirds(by_round: Mapping[int, float], rounds: int) -> tuple[float, float] | None:
    """The means over the first and over the last third of the rounds; None where one of them has none."""
    early = [value for round_, value in by_round.items() if 3 * round_ < rounds]
    late = [value for round_, value in by_round.items() if 3 * round_ >= 2 * rounds]
    return (sum(early) / len(early), sum(late) / len(late)) if early and late else None


_PROTOCOL = ("rounds", "batch_size", "restricted_size", "deterministic", "dataset", "net", "training")
"""Settings that two compared runs share, as they share their first labels."""


def _one_protocol(one: RunLog, other: RunLog) -> bool:
    """Whether the runs differ only in their strategies, and in parts of the set-up that only one of them uses."""
    configs = [log_.header["config"] for log_ in (one, other)]
    settings = [less_paths({name: config.get(name) for name in _PROTOCOL if name in config}) for config in configs]
    prints = [log_.header["fingerprint"] for log_ in (one, other)]
    same = settings[0] == settings[1] and one.header["initial"] == other.header["initial"]
    return same and all(
        prints[0][name] == prints[1][name]
        for name, need in (("latents", "representation"), ("graph", "graph"))
        if _rests_on(one, need) and _rests_on(other, need)
    )


def _rests_on(of: RunLog, need: str) -> bool:
    return need in NEEDS.get(of.header["config"]["strategy"]["restrict"]["kind"], ("representation", "graph"))


def _stands_for(made: Timings, of: RunLog) -> bool:
    """Whether a replay's mean holds for all rounds of the run: it has the first and the last, on the run's machine."""
    return {0, of.rounds - 1} <= set(made.rounds) and hardware(made.header) == hardware(of.header)


TRIAL_PROFILE = "smoke"
"""The profile that only tests an installation: its rows are no evidence."""

_Key = tuple[str, str, int, str, str]


def gather_evidence(groups: Iterable[Group]) -> list[Evidence]:
    """For each data set and profile the largest set of comparable runs, over all suites.

    Rows of another machine, other data under the same name or another algorithm version are mentioned, not judged:
    differences and ratios need one kind of machine.
    """
    merged: dict[_Key, dict[str, list[RunLog]]] = {}
    slugs: dict[_Key, dict[str, None]] = {}
    timings = {id(one): one for group in groups for one in group.timings}
    for group in groups:
        if group.profile == TRIAL_PROFILE:
            continue
        for label, logs in group.runs.items():
            sets: dict[_Key, list[RunLog]] = {}
            for one in logs:
                sets.setdefault(_key(group, one), []).append(one)
            for key, own in sets.items():
                slugs.setdefault(key, {})[group.slug] = None
                known = merged.setdefault(key, {}).get(label, [])
                merged[key][label] = max(known, own, key=lambda some: sum(log.done for log in some))
    apart: dict[tuple[str, str], list[_Key]] = {}
    for key in merged:
        if _n_done(merged[key]):
            apart.setdefault(key[:2], []).append(key)
    profiles: dict[str, set[str]] = {}
    for dataset, profile in apart:
        profiles.setdefault(dataset, set()).add(profile)
    found = []
    for (dataset, profile), keys in apart.items():
        best = max(keys, key=lambda key: (key[2], _n_done(merged[key])))
        others = sum(_n_done(merged[key]) for key in keys if key != best)
        name = dataset if len(profiles[dataset]) == 1 else f"{dataset} (profile {profile})"
        note = f"{others} finished runs of another machine, data or version are not judged" if others else ""
        group = Group("", dataset, profile, best[2], merged[best], timings=list(timings.values()))
        found.append(Evidence(name, group, note, list(slugs[best])))
    return sorted(found, key=lambda one: (_place(one.group.dataset), one.name))


def one_per_dataset(all_evidence: Sequence[Evidence]) -> list[Evidence]:
    """Of each data set the evidence with most finished runs: a data set run under two profiles counts once."""
    most: dict[str, Evidence] = {}
    for evidence in all_evidence:
        known = most.setdefault(evidence.group.dataset, evidence)
        if evidence.n_finished > known.n_finished:
            most[evidence.group.dataset] = evidence
    return list(most.values())


def _key(group: Group, log: RunLog) -> _Key:
    return (
        group.dataset,
        group.profile,
        group.algorithm_version,
        log.header["fingerprint"]["data"][:8],
        machine_of_run(log),
    )


def _n_done(runs: Mapping[str, Sequence[RunLog]]) -> int:
    return sum(log.done for logs in runs.values() for log in logs)


def _place(dataset: str) -> int:
    """The paper's data sets in its order, then others."""
    return PAPER_SETS.index(dataset) if dataset in PAPER_SETS else len(PAPER_SETS)
