"""The paper's claims in parts that rows can decide, each with the rule that it is judged by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dgal_bench.report.claims.evidence import ALL, EARLY, LATE, Evidence
from dgal_bench.report.claims.rules import (
    COMPETITIVE,
    EQUAL,
    MORE,
    MORE_TIMES,
    NO_POINT_BELOW,
    TEN_TIMES,
    Rule,
    SeedSample,
    about,
    every,
    most,
    some,
)
from dgal_bench.results.metrics import area_under_curve

BENCHMARKS = ("lc", "margin", "entropy", "badge", "coreset", "seals", "ganvae")
"""Of section 5.1, without random, whose queries cost nothing, and VAE-SEALS, which has a claim of its own."""

Rival = str | Callable[[Evidence], str | None]
"""A strategy, or a function that names it for a data set."""


def best(evidence: Evidence) -> str | None:
    """The benchmark with the largest mean area under the curve."""
    return _most(evidence, lambda name: [area_under_curve(log.records) for log in evidence.runs(name).values()])


def slowest(evidence: Evidence) -> str | None:
    """The benchmark with the longest mean query, by the seconds that count."""
    return _most(evidence, lambda name: list(evidence.times("dgmg", name)[1].seconds.values()))


def _most(evidence: Evidence, values: Callable[[str], Sequence[float]]) -> str | None:
    means = {
        name: sum(found) / len(found) for name in BENCHMARKS if evidence.pairs("dgmg", name) and (found := values(name))
    }
    return max(means, key=lambda name: means[name], default=None)


@dataclass(frozen=True)
class Accuracy:
    """Our area under the curve minus theirs, over all rounds, early or late."""

    ours: str
    theirs: Rival
    when: str = ALL

    def __call__(self, evidence: Evidence, rival: str) -> SeedSample:
        return evidence.accuracy(self.ours, rival, self.when)


@dataclass(frozen=True)
class Speed:
    """How many times as long their queries take as ours."""

    ours: str
    theirs: Rival
    timed: bool = True

    def __call__(self, evidence: Evidence, rival: str) -> SeedSample:
        return evidence.speed(self.ours, rival)


@dataclass(frozen=True)
class Total:
    """The same for a whole run, with the set-up that the queries need."""

    ours: str
    theirs: Rival
    timed: bool = True

    def __call__(self, evidence: Evidence, rival: str) -> SeedSample:
        return evidence.total(self.ours, rival)


@dataclass(frozen=True)
class QueryGrowth:
    """How a value of a strategy's queries grows from the first third of the rounds to the last."""

    ours: str
    value: str
    theirs: Rival = ""

    @property
    def timed(self) -> bool:
        return self.value == "query_seconds"

    def __call__(self, evidence: Evidence, rival: str) -> SeedSample:
        return evidence.growth(self.ours, self.value)


@dataclass(frozen=True)
class Refinement:
    """How the boundary share of a strategy's batches grows from the first third of the queries to the last."""

    ours: str
    theirs: Rival = ""

    def __call__(self, evidence: Evidence, rival: str) -> SeedSample:
        return evidence.refinement(self.ours)


Measure = Accuracy | Speed | Total | QueryGrowth | Refinement


@dataclass(frozen=True)
class ClaimPart:
    """``words`` has {theirs} for the rival; ``over`` combines the verdicts of the data sets into one.

    ``only`` names the data sets that the part is about, or ``but`` those that it is not about; by default all count.
    """

    words: str
    measure: Measure
    rule: Rule
    over: Callable[[Sequence[str]], str] = every
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def concerns(self, evidence: Evidence) -> bool:
        name = evidence.group.dataset
        return name in self.only if self.only else name not in self.but

    @property
    def strategies(self) -> frozenset[str]:
        """All strategies whose rows the part uses."""
        theirs = self.measure.theirs
        rivals = [theirs] if isinstance(theirs, str) else BENCHMARKS
        return frozenset([self.measure.ours, *rivals]) - {""}

    @property
    def timed(self) -> bool:
        return getattr(self.measure, "timed", False)


@dataclass(frozen=True)
class Claim:
    """``words``: what the paper claims, ``where`` it does so, ``reading``: how words became rules.

    ``figure`` of the report shows it. A claim without ``parts`` is judged by its own measurements, not by rows.
    """

    number: int
    title: str
    words: str
    where: str
    figure: str
    parts: tuple[ClaimPart, ...] = ()
    reading: str = ""


def _each(words: str, measure: type[Speed] | type[Total], ours: str, rule: Rule) -> tuple[ClaimPart, ...]:
    return tuple(ClaimPart(words, measure(ours, rival), rule) for rival in BENCHMARKS)


CLAIMS = (
    Claim(
        1, "Ten times faster", "DGMG's mean query time is at least ten times below that of every benchmark but random.",
        "section 5.2, Fig. 7", "query-time",
        _each("a query of {theirs} takes at least 10 times as long as DGMG's", Speed, "dgmg", TEN_TIMES),
        "The benchmarks are those of section 5.1, margin among them; RSMG and VAE-SEALS are not in the figure.",
    ),
    Claim(
        2, "A hundred times faster, and as accurate",
        "DGMG is about 100 times faster than the next best benchmark and about 1,000 times faster than the slowest, at "
        "an accuracy that is the highest or within a point of it, and well above random.",
        "section 5.2, Fig. 5", "accuracy-query-time",
        (
            ClaimPart("a query of the most accurate benchmark ({theirs}) takes about 100 times as long as DGMG's",
                 Speed("dgmg", best), about(100)),
            ClaimPart("a query of the slowest benchmark ({theirs}) takes about 1,000 times as long as DGMG's",
                 Speed("dgmg", slowest), about(1000)),
            ClaimPart("DGMG's accuracy is above that of the most accurate benchmark ({theirs}), or within a point of "
                      "it", Accuracy("dgmg", best), NO_POINT_BELOW),
            ClaimPart("DGMG's accuracy is above random's", Accuracy("dgmg", "random"), MORE),
        ),
        "Most accurate: of the largest mean area under the curve here. About 100 times: the interval meets [30, 300]; "
        "more than 300 refutes the number, too. Well above random: better, by whatever the interval leaves.",
    ),
    Claim(
        3, "As accurate as BADGE and CoreSet",
        "DGMG's accuracy at equal numbers of labels is competitive with that of BADGE and of CoreSet.",
        "section 5.2, Fig. 6", "accuracy-labels",
        tuple(ClaimPart("DGMG's accuracy is competitive with {theirs}'s", Accuracy("dgmg", rival), COMPETITIVE)
              for rival in ("badge", "coreset")),
        "Competitive: within a point either way, or better.",
    ),
    Claim(
        4, "SEALS lags, and slows down",
        "SEALS lags in accuracy early and does not catch up later; its candidates and its time grow with the rounds.",
        "section 5.2, Fig. 6", "accuracy-labels",
        (
            ClaimPart("DGMG's accuracy is above SEALS' early", Accuracy("dgmg", "seals", EARLY), MORE),
            ClaimPart("DGMG's accuracy is above SEALS' later, too", Accuracy("dgmg", "seals", LATE), MORE),
            ClaimPart("SEALS' candidates are more in the last third of the queries than in the first",
                 QueryGrowth("seals", "n_candidates"), MORE_TIMES),
            ClaimPart("SEALS' queries take longer in the last third than in the first",
                 QueryGrowth("seals", "query_seconds"), MORE_TIMES),
        ),
        "Early: the first third of the rounds; later: the rest.",
    ),
    Claim(
        5, "Diffusion beats neighbours in the same latents",
        "VAE-SEALS' query time is similar to DGAL's and its accuracy for that time worse; DGLC is above it early under "
        "the same criterion.",
        "section 5.3, Figs. 8-10", "accuracy-query-time",
        (
            ClaimPart("a query of VAE-SEALS takes about as long as DGMG's", Speed("dgmg", "vae_seals"), about(1)),
            ClaimPart("DGMG's accuracy is above VAE-SEALS'", Accuracy("dgmg", "vae_seals"), MORE),
            ClaimPart("DGLC's accuracy is above VAE-SEALS' early", Accuracy("dglc", "vae_seals", EARLY), MORE),
        ),
        "Similar times: the interval of the ratio meets [0.3, 3], as about 100 times meets [30, 300]; a DGMG query "
        "that is cheaper than that refutes the similarity. Accuracy for that time: at equal numbers of labels, which "
        "is to DGMG's disadvantage where its queries are cheaper.",
    ),
    Claim(
        6, "Margin beats least confidence after diffusion", "DGMG is more accurate than DGLC on most data sets.",
        "section 5.3, Figs. 8 and 9", "accuracy-labels",
        (ClaimPart("DGMG's accuracy is above DGLC's", Accuracy("dgmg", "dglc"), MORE, most),),
    ),
    Claim(
        7, "Diffusion beats a random restriction early",
        "DGMG is more accurate than RSMG and than random early; about equal to RSMG on Mini-ImageNet.",
        "App. E.0.2, Fig. 11", "accuracy-labels",
        (
            ClaimPart("DGMG's accuracy is above RSMG's early", Accuracy("dgmg", "rsmg", EARLY), MORE,
                 but=("mini_imagenet",)),
            ClaimPart("DGMG's accuracy is about RSMG's", Accuracy("dgmg", "rsmg"), EQUAL, only=("mini_imagenet",)),
            ClaimPart("DGMG's accuracy is above random's early", Accuracy("dgmg", "random", EARLY), MORE),
        ),
    ),
    Claim(
        8, "Margin on the whole pool is no better, and slower",
        "Margin on the whole pool is sometimes worse early and equal later; its query time is well above DGMG's and "
        "RSMG's; RSMG is a little cheaper than DGMG.",
        "App. E.0.2, Figs. 11 and 12", "query-time",
        (
            ClaimPart("DGMG's accuracy is above margin's early", Accuracy("dgmg", "margin", EARLY), MORE, some),
            ClaimPart("DGMG's accuracy is about margin's later", Accuracy("dgmg", "margin", LATE), EQUAL),
            ClaimPart("a query of margin takes longer than DGMG's", Speed("dgmg", "margin"), MORE_TIMES),
            ClaimPart("a query of margin takes longer than RSMG's", Speed("rsmg", "margin"), MORE_TIMES),
            ClaimPart("a query of DGMG takes longer than RSMG's", Speed("rsmg", "dgmg"), MORE_TIMES),
            ClaimPart("a query of DGMG takes about as long as RSMG's", Speed("rsmg", "dgmg"), about(1)),
        ),
        "Sometimes: on one data set at least. Well above: longer, by whatever the interval leaves. A little cheaper: "
        "cheaper, and about as long (the ratio meets [0.3, 3]). The text's \"about one eighth\" contradicts Figs. 5 "
        "and 7; the ratio measured here stands beside the verdict.",
    ),
    Claim(
        9, "Other criteria after diffusion cost more",
        "DGBADGE is about as accurate as DGMG but slower, DGCoreSet slower still; each is faster than its criterion on "
        "the whole pool.",
        "App. E.0.3, Fig. 13", "query-time",
        (
            ClaimPart("DGBADGE's accuracy is about DGMG's", Accuracy("dgbadge", "dgmg"), EQUAL),
            ClaimPart("a query of DGBADGE takes longer than DGMG's", Speed("dgmg", "dgbadge"), MORE_TIMES),
            ClaimPart("a query of DGCoreSet takes longer than DGBADGE's", Speed("dgbadge", "dgcoreset"), MORE_TIMES),
            ClaimPart("a query of BADGE takes longer than DGBADGE's", Speed("dgbadge", "badge"), MORE_TIMES),
            ClaimPart("a query of CoreSet takes longer than DGCoreSet's", Speed("dgcoreset", "coreset"), MORE_TIMES),
        ),
    ),
    Claim(
        10, "Cheaper even with the set-up paid",
        "With the VAE and the graph added, DGAL's total is still below that of the others, SEALS' queries alone "
        "included.",
        "section 5.2, Table 2", "total-time",
        _each("{theirs}'s queries together take longer than DGMG's with its VAE and graph", Total, "dgmg", MORE_TIMES),
        "The total of as many queries as the run has; training is the same for all and in no total.",
    ),
    Claim(
        11, "Diffusion is linear in the pool", "A step of the diffusion takes time in proportion to the pool's size.",
        "App. B", "",
        reading="Judged by the growth of the seconds of a step over pools of made-up points, as benchmarks/scaling.py "
        "measures it on one machine, not by the rows: linear is an exponent whose interval lies within 0.1 of 1, and "
        "fewer than five sizes decide nothing.",
    ),
    Claim(
        12, "From exploring to refining",
        "Queries move from exploring clusters to refining boundaries as rounds pass.",
        "section 4.2, Figs. 3 and 4", "exploration",
        (ClaimPart("of the graph neighbours of DGMG's picks more have another label in the last third of the queries "
                   "than in the first", Refinement("dgmg"), MORE),),
        "Refining is measured, as a rising boundary share; of exploring early nothing is tested but that it falls "
        "short of that. The figure has the reach of the labels, too.",
    ),
)  # fmt: skip
