"""What a verb has to say: on stdout what was asked for, on stderr what to beware of."""

import sys


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")
