"""A data set's evidence: the samples of seeds that claims are judged by."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log

from dgal_bench.config.schema import comparable_config as less_paths
from dgal_bench.report.claims.rules import POINTS, TIMES, SeedSample
from dgal_bench.report.costs import NEEDS, setup_seconds
from dgal_bench.report.groups import Group
from dgal_bench.report.times import (
    Counted,
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
"""The paper's own."""

ALL, EARLY, LATE = "over all rounds", "early", "late"
"""Early is the first third of the rounds, late the rest."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """One data set under one profile, of one algorithm version, on one kind of machine.

    ``stands_for`` puts a strategy's variant in its place, ``counted`` says which seconds of a query count, ``shared``
    whether each query bears its share of the one-off cost, and ``seeds`` which alone are looked at: for claims judged
    both ways.
    """

    name: str
    group: Group
    left_out: str = ""
    """What other rows there are of this data set that are not judged."""
    slugs: Sequence[str] = ()
    """How the files of figures begin that show these runs."""
    stands_for: Mapping[str, str] = field(default_factory=dict)
    counted: Counted = all_phases
    shared: bool = False
    seeds: frozenset[int] | None = None
    replays: bool = True
    """Whether seconds may be a replay's: of both ways or of neither."""

    @property
    def of_the_paper(self) -> bool:
        return self.group.dataset in PAPER_SETS

    @property
    def n_finished(self) -> int:
        return sum(log.done for log in self.group.logs)

    def both_ways(
        self, stands_for: Mapping[str, str], counted: Counted = all_phases, shared: bool = False
    ) -> tuple["Evidence", "Evidence"]:
        """As it is, and with these in the others' places; both of the seeds alone that each pair has."""
        pairs = [self.runs(name).keys() & self.group.finished(label).keys() for name, label in stands_for.items()]
        seeds = frozenset.intersection(*map(frozenset, pairs)) if pairs else None
        both = [self.group.replayed(label).keys() for pair in stands_for.items() for label in pair]
        here = replace(self, seeds=seeds, replays=all((seeds or frozenset()) <= of for of in both))
        return here, replace(here, stands_for=stands_for, counted=counted, shared=shared)

    def label(self, strategy: str) -> str:
        """The strategy, or what stands for it."""
        return self.stands_for.get(strategy, strategy)

    def runs(self, strategy: str) -> dict[int, RunLog]:
        """Finished, by seed."""
        found = self.group.finished(self.label(strategy))
        return {seed: log for seed, log in sorted(found.items()) if self.seeds is None or seed in self.seeds}

    def pairs(self, ours: str, theirs: str) -> dict[int, tuple[RunLog, RunLog]]:
        """Of the seeds that both have finished, under the same protocol and on the same graph where both rest on one.

        With itself a strategy has all.
        """
        mine, others = self.runs(ours), self.runs(theirs or ours)
        both = {seed: (mine[seed], others[seed]) for seed in mine if seed in others}
        return {seed: pair for seed, pair in both.items() if _one_protocol(*pair)}

    def representations(self, seeds: Collection[int], *strategies: str) -> int:
        """How many different ones the runs of the strategies that rest on one were made from."""
        logs = [log for one in strategies for seed, log in self.runs(one).items() if seed in seeds]
        return len({log.header["fingerprint"]["latents"] for log in logs if _rests_on(log, "representation")})

    def accuracy(self, ours: str, theirs: str, when: str) -> SeedSample:
        """The difference of areas under the curve."""
        values = {}
        for seed, pair in self.pairs(ours, theirs).items():
            mine, other = (records_of_part(log.records, when) for log in pair)
            if len(mine) > 1:  # of fewer than three rounds there is no early
                values[seed] = area_under_curve(mine) - area_under_curve(other)
        return SeedSample(values, POINTS)

    def speed(self, ours: str, theirs: str) -> SeedSample:
        """How many times longer their queries take."""
        pairs, times = self.pairs(ours, theirs), self.times(ours, theirs, whole_run=self.shared)
        shares = {
            seed: [setup_seconds(one) / one.rounds if self.shared else 0.0 for one in pair]
            for seed, pair in pairs.items()
        }
        both = {seed: [one.seconds[seed] + shares[seed][side] for side, one in enumerate(times)] for seed in pairs}
        return _ratios(both, times)

    def total(self, ours: str, theirs: str) -> SeedSample:
        """The same of everything that is spent: what the queries rest on, and all of them."""
        pairs, times = self.pairs(ours, theirs), self.times(ours, theirs, whole_run=True)
        both = {
            seed: [setup_seconds(log) + log.rounds * times[side].seconds[seed] for side, log in enumerate(pair)]
            for seed, pair in pairs.items()
        }
        return _ratios(both, times)

    def times(self, ours: str, theirs: str, whole_run: bool = False) -> tuple[Times, Times]:
        """Mean seconds of a query of both: of replays where they are alike and cover every pair, else the rows' own.

        ``whole_run``: only of replays that can stand for the run, with its first and last round and on its machine.
        """
        pairs = self.pairs(ours, theirs)
        replayed = [self.group.replayed(self.label(one)) for one in (ours, theirs)]
        usable = (
            self.replays
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
            replay = from_replay({seed: replayed[side][seed] for seed in pairs}, self.counted) if usable else None
            found.append(replay or from_rows({seed: pair[side] for seed, pair in pairs.items()}, self.counted))
        return found[0], found[1]

    def growth(self, strategy: str, value: str) -> SeedSample:
        """``n_candidates`` or ``query_seconds`` of the last third of the queries over those of the first third."""
        runs = self.runs(strategy)
        if value == "query_seconds":
            return self._slowing(runs, self.group.replayed(self.label(strategy)))
        return SeedSample(_growth({seed: thirds(per_query(of, value), of.rounds) for seed, of in runs.items()}), TIMES)

    def _slowing(self, runs: Mapping[int, RunLog], replayed: Mapping[int, Timings]) -> SeedSample:
        """Of replays where every run has one with rounds in both thirds, else of the rows."""
        by_round = {
            seed: {one.round: self.counted(one.median_seconds, one.seconds) for one in replayed[seed].own}
            for seed in runs
            if seed in replayed
        }
        timed = {seed: thirds(seconds, runs[seed].rounds) for seed, seconds in by_round.items()}
        if self.replays and runs and all(timed.get(seed) for seed in runs):
            times = from_replay({seed: replayed[seed] for seed in runs})
        else:
            times = from_rows(runs)
            timed = {seed: thirds(_seconds(of, self.counted), of.rounds) for seed, of in runs.items()}
        return SeedSample(_growth(timed), TIMES, *((times.source, times.beside) if times else ()))

    def refinement(self, strategy: str) -> SeedSample:
        """The boundary share of the batches of the last third of the queries less that of the first third."""
        shares = {seed: thirds(per_query(of, "boundary_share"), of.rounds) for seed, of in self.runs(strategy).items()}
        return SeedSample({seed: two[1] - two[0] for seed, two in shares.items() if two is not None}, POINTS)


def _ratios(both: Mapping[int, Sequence[float]], times: Sequence[Times]) -> SeedSample:
    """Theirs over ours, as logarithms."""
    values = {seed: log(theirs / ours) for seed, (ours, theirs) in both.items() if min(ours, theirs) > 0}
    return SeedSample(values, TIMES, times[0].source, either_busy(*(one.beside for one in times)))


def _growth(both: Mapping[int, tuple[float, float] | None]) -> dict[int, float]:
    return {seed: log(two[1] / two[0]) for seed, two in both.items() if two is not None and min(two) > 0}


def _seconds(of: RunLog, counted: Counted) -> dict[int, float]:
    """Of every query, by round."""
    asked_of = [record for record in of.records if record.query_seconds is not None]
    return {record.round: counted(record.query_seconds or 0.0, record.seconds or {}) for record in asked_of}


def records_of_part(records: Sequence[RoundRecord], when: str) -> Sequence[RoundRecord]:
    """The evaluations of a time: early ends where late begins."""
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
"""Of the configuration what two runs have in common that are compared, beside their first labels."""


def _one_protocol(one: RunLog, other: RunLog) -> bool:
    """Whether nothing but the strategies, and what only one of them rests on, tells them apart."""
    settings = [[less_paths(log_.header["config"]).get(name) for name in _PROTOCOL] for log_ in (one, other)]
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
    """Whether the mean over a replay's rounds, times their number, is the run's: with both ends, on its machine."""
    return {0, of.rounds - 1} <= set(made.rounds) and hardware(made.header) == hardware(of.header)


# The runs of a results folder, put together by data set: over all suites, never over machines.


NO_EVIDENCE = "smoke"
"""A profile that is there to try a set-up out: nothing is judged by its rows."""

_Key = tuple[str, str, int, str, str]


def gather_evidence(groups: Iterable[Group]) -> list[Evidence]:
    """A bench for each data set and profile: the runs of all suites that may be compared, the most that there are.

    Rows of another machine, of other data under the same name or of another algorithm version are said, and not
    judged: differences and ratios are of one kind of machine alone.
    """
    merged: dict[_Key, dict[str, list[RunLog]]] = {}
    slugs: dict[_Key, dict[str, None]] = {}
    timings = {id(one): one for group in groups for one in group.timings}
    for group in groups:
        if group.profile == NO_EVIDENCE:
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
        said = f"{others} finished runs of another machine, data or version are not judged" if others else ""
        group = Group("", dataset, profile, best[2], merged[best], timings=list(timings.values()))
        found.append(Evidence(name, group, said, list(slugs[best])))
    return sorted(found, key=lambda one: (_place(one.group.dataset), one.name))


def one_per_dataset(benches: Sequence[Evidence]) -> list[Evidence]:
    """Of each data set the bench of most finished runs: run under two profiles it counts once."""
    most: dict[str, Evidence] = {}
    for bench in benches:
        known = most.setdefault(bench.group.dataset, bench)
        if bench.n_finished > known.n_finished:
            most[bench.group.dataset] = bench
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
    """The paper's in its order, then others."""
    return PAPER_SETS.index(dataset) if dataset in PAPER_SETS else len(PAPER_SETS)
