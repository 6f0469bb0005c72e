"""The console script ``dgal-bench VERB key=value ... [--flag]``: its usage text, signals and exit codes."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import dedent
from types import FrameType

from dgal_bench import __version__
from dgal_bench.cli.commands import (
    bench,
    check,
    claims,
    dashboard,
    data,
    doctor,
    push,
    replay,
    report,
    run,
    say,
    status,
    validate,
)
from dgal_bench.cli.options import Command, parse_arguments
from dgal_bench.config.compose import GROUPS, group_names
from dgal_bench.core.errors import UserError, choose

USAGE = """\
    dgal-bench VERB key=value ... [--flag]

    verbs
      bench     execute all runs of a suite, then report; the same command goes on where it was stopped
      run       execute one run: dgal-bench run strategy=dgmg seed=0
      report    tables and figures of a results folder: dgal-bench report RESULTS --out DIR
      claims    the paper's claims, judged by a results folder: dgal-bench claims RESULTS growth=FILE --out DIR
      status    what is done, at work, failed or missing, as a grid: dgal-bench status RESULTS
      validate  check every line of a results folder: dgal-bench validate RESULTS
      push      make the W&B runs of a results folder whole, also without a network: dgal-bench push RESULTS
      replay    time the queries of finished runs again, alone: dgal-bench replay RESULTS seed=0 rounds=0,7,14
      dashboard a W&B workspace, as a file or on the server: dgal-bench dashboard RESULTS --dry-run spec.json
      data      find, download and check data sets: dgal-bench data mnist (none named: say what is there)
      check     put your own strategies to the law tests: dgal-bench check my_strategies.py
      doctor    is this machine fit to run, and if not, what mends it

    groups (one name, or several with commas: they make a grid; strategies: dg* restrict the pool by diffusion, rs* at
    random, mg, lc and ent are margin, least confidence and entropy)
    {groups}
    where and how
      results=DIR     where rows go and are looked for (results/runs)
      data=DIR        where published data sets are ($DGAL_DATA, or ./data); your own: dataset=folder dataset.path=DIR
      cache=DIR       where representations and graphs are kept ($DGAL_CACHE, or ~/.cache/dgal_bench)
      engine=NAME     local (processes here, the default), ray or slurm; their settings: docs/cluster.md
      jobs=N          runs side by side (as many as cores and GPUs have room for)
      gpus=N          GPUs to use (all), gpus_per_cell=0.5 puts two runs on each
      retry=failed    try failed runs again (or retry=skipped)
      resume=anyway   go on with rows begun by another git revision, torch or CPU
      offline=true    never touch the network ($DGAL_OFFLINE)
      report=false    bench: rows only; 'dgal-bench report' makes the tables and figures of them
      tracking=wandb  mirror every round to W&B: wandb.project=dgal_bench wandb.entity= ($WANDB_PROJECT, $WANDB_ENTITY),
                      wandb.mode=online|offline (online where there is a key), wandb.images=0,7 (rounds to show picks)
      past=DIR,...    dry run: folders of earlier rows that its estimate rests on (the results folder)
      plugins=FILE    your own strategies: .py files, or entry points of the group dgal_bench.plugins
      full_supervision=true|false   one training on the whole labeled pool, too (the suite's choice)

    anything else     a setting of the configuration: rounds=5 graph.graph_k=10,20 strategy.restrict.score=margin

    flags
      --print-config  show the resolved configuration of the first run, and stop
      --dry-run       show the runs to do and those already done, and stop
      --out DIR       report, claims: where to write (RESULTS/report)
      --dry-run FILE  dashboard: write the workspace as JSON, offline; --push saves it on the server
      --common RUN    replay: every strategy's query on the states of one run, as in digits/margin/seed-0
      --again         replay: also what has been timed already
      --version, --help

    exit codes: 0 done, 1 runs failed (check: laws broken; doctor: trouble found; validate: problems; replay: a run
    could not be timed, or picked otherwise), 2 a mistake in a command or file, 3 data missing or damaged,
    130 interrupted, 143 terminated
"""


VERBS: dict[str, Callable[[Command], int]] = {
    "bench": bench, "run": run, "report": report, "claims": claims, "status": status, "validate": validate,
    "push": push, "replay": replay, "dashboard": dashboard, "data": data, "check": check, "doctor": doctor,
}  # fmt: skip


def usage() -> str:
    groups = "".join(f"  {group:15} {', '.join(group_names(group))}\n" for group in ("suite", *GROUPS))
    return dedent(USAGE).replace("{groups}\n", groups + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line on stderr and its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is first imported. OpenMP's threads spin while they wait: beside other work a VAE on two of them
    # took 55.7 s, and 2.4 s with threads that sleep, with the same bits. A user's own value stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signals: list[int] = []
    try:
        with _handle_signals(signals, for_good=arguments is None):
            return dispatch(words)
    except UserError as error:
        sys.stderr.write(f"dgal-bench: {error}\n")
        return error.exit_code
    except BrokenPipeError:  # the reader closed the pipe (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("dgal-bench: stopped; what was finished is kept, and the same command goes on from there\n")
        return 143 if signal.SIGTERM in signals else 130


def dispatch(words: Sequence[str]) -> int:
    if not words or words[0] == "help" or {"-h", "--help"} & set(words):
        say(usage())
        return 0 if words else 2
    if "--version" in words:
        say(f"dgal-bench {__version__}")
        return 0
    return choose(VERBS, words[0], "verb")(parse_arguments(words[1:], words[0]))


@contextmanager
def _handle_signals(signals: list[int], for_good: bool) -> Iterator[None]:
    """Raise KeyboardInterrupt once, at Ctrl-C or SIGTERM; restore the previous signal handlers on the way out.

    ``signals`` gets the number. The exception cannot carry it: Ray swallows it and raises one of its own.
    ``for_good``: the process ends after it, and a second Ctrl-C must not change its exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # nothing may cut the clean-up short; it takes a moment
        raise KeyboardInterrupt

    handlers, stopped = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}, False
    try:
        yield
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        if not (stopped and for_good):
            for number, handler in handlers.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
