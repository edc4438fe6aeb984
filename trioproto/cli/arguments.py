"""What the commands' arguments may be, and how a command says that it failed."""

import argparse
import contextlib
import math
from collections.abc import Callable

PORTS = {"echo": 9190, "op": 9191}


class CommandError(Exception):
    """What ends a command with exit status 1: one line that says what to do."""


def whole(what: str, least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return an argument type: an integer from ``least`` to ``most``, called ``what`` if it is none."""
    span = f"{least} or more" if most == math.inf else f"{least} to {most}"

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (number := int(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}, {span}")

    return convert


def positive(what: str) -> Callable[[str], float]:
    """Return an argument type: a number above 0, called ``what`` if it is none."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < (number := float(text)) < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}, above 0")

    return convert


port = whole("a port", 0, 0xFFFF)
count = whole("a number", 1)
descriptor = whole("a file descriptor", 0)
seconds = positive("a time in seconds")
