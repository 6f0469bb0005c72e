"""Verbs that read a results folder: ``report``, ``claims``, ``status`` and ``validate``."""

from pathlib import Path

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError
from dgal_bench.verbs.saying import say


def report(command: Command) -> int:
    report_on(*_report_of(command, "report"))
    return 0


def claims(command: Command) -> int:
    from dgal_bench.report.claims.write import write_survey

    written = write_survey(*_report_of(command, "claims"))
    say(written.overview)
    say(f"Written: {', '.join(map(str, written.files))}")
    return 0


def _report_of(command: Command, verb: str) -> tuple[Path, Path, Path | None]:
    """The results folder, where to write, and the file of benchmarks/scaling.py, if one is named."""
    from dgal_bench.request import only_flags, only_places

    if len(command.words) != 1:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS growth=FILE --out DIR")
    only_flags(command, "--out")
    only_places(command, "growth")
    results, growth = Path(command.words[0]), command.one("growth", "")
    return results, Path(command.flags.get("--out", results / "report")), Path(growth) if growth else None


def report_on(results: Path, out: Path, growth: Path | None = None) -> None:
    from dgal_bench.progress import new_progress
    from dgal_bench.report.write import write_report

    progress = new_progress({})
    try:
        written = write_report(results, out, progress.drawing, growth)
    finally:
        progress.close()
    say(written.summary)
    figures = [path for path in written.files if path.suffix == ".png"]
    say(f"Written: {', '.join(str(path) for path in written.files[:3])} and {len(figures)} figures as PNG and SVG")


def status(command: Command) -> int:
    from dgal_bench.status import any_damaged, survey, table

    standings = survey(_results_folder(command, "status"))
    say(table(standings))
    return 2 if any_damaged(standings) else 0


def validate(command: Command) -> int:
    from dgal_bench.validate import validate as examined

    verdict = examined(_results_folder(command, "validate"))
    say(verdict.text)
    return 1 if verdict.n_problems else 0


def _results_folder(command: Command, verb: str) -> Path:
    from dgal_bench.request import only_flags

    if len(command.words) != 1 or command.values:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS")
    only_flags(command)
    return Path(command.words[0])
