"""What the commands' arguments may be, and how a command says that it failed."""

import argparse
import math
from collections.abc import Callable

from trioproto.process.proxy_protocol import UNIX, Network, trusted_network
from trioproto.process.service import HOST

PORTS = {"echo": 9190, "op": 9191}


class CommandError(Exception):
    """What ends a command with exit status 1: one line that says what to do."""


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return an argument type: an integer from ``least`` to ``most``."""
    span = f"at least {least}" if most == math.inf else f"between {least} and {most}"

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, not {text!r}") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be {span}, not {text!r}")
        return number

    return convert


def positive(most: float = math.inf) -> Callable[[str], float]:
    """Return an argument type: a finite number above 0, up to ``most``."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
        if number <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text!r}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:g}, not {text!r}")
        return number

    return convert


def not_empty(text: str) -> str:
    """Refuse an empty argument, such as that of a shell's variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def host(text: str) -> str:
    """Convert a host argument: an IPv6 address may stand in brackets, as servers print it and as URLs have it."""
    if text.startswith("[") and text.endswith("]") and ":" in text:
        text = text[1:-1]
    return not_empty(text)


def address(text: str) -> tuple[str, int]:
    """Convert ``[HOST:]PORT``; without a host, it is this one's alone."""
    name, colon, number = text.rpartition(":")
    if colon and (not name or (":" in name and not name.startswith("["))):
        raise argparse.ArgumentTypeError(f"must be PORT, HOST:PORT or [IPV6]:PORT, not {text!r}")
    return host(name) if colon else HOST, port(number)


def network(text: str) -> Network | str:
    """Convert what names trusted proxies."""
    try:
        return trusted_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an address, a network, or {UNIX!r}: {error}") from None


port = whole(0, 0xFFFF)
count = whole(1)
descriptor = whole(0, 2**31 - 1)  # what an int of C holds
seconds = positive()
