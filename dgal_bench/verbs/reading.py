"""Verbs that read a results folder: ``report``, ``status`` and ``validate``."""

from pathlib import Path

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError
from dgal_bench.verbs.saying import say


def report(command: Command) -> int:
    from dgal_bench.request import only_flags

    if len(command.words) != 1 or command.values:
        raise ConfigError("report takes one results folder: dgal-bench report RESULTS --out DIR")
    only_flags(command, "--out")
    results = Path(command.words[0])
    report_on(results, Path(command.flags.get("--out", results / "report")))
    return 0


def report_on(results: Path, out: Path) -> None:
    from dgal_bench.progress import new_progress
    from dgal_bench.report.write import write_report

    progress = new_progress({})
    try:
        written = write_report(results, out, progress.drawing)
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
