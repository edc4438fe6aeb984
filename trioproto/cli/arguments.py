"""The types of the commands' arguments, and the error that ends a command."""

import argparse
import math
from collections.abc import Callable

from trioproto.process.proxy_protocol import UNIX, Network, trusted_network
from trioproto.process.service import HOST

PORTS = {"echo": 9190, "op": 9191}


class CommandError(Exception):
    """Ends a command with exit status 1; the message is one line that says what to do."""


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
    """Refuse an empty argument, such as from an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def host(text: str) -> str:
    """Convert a host argument. An IPv6 address may be in brackets, as in URLs and in the servers' output."""
    if text.startswith("[") and text.endswith("]") and ":" in text:
        text = text[1:-1]
    return not_empty(text)


def address(text: str) -> tuple[str, int]:
    """Convert ``[HOST:]PORT``. The default host can be reached from this machine only."""
    name, colon, number = text.rpartition(":")
    if colon and (not name or (":" in name and not name.startswith("["))):
        raise argparse.ArgumentTypeError(f"must be PORT, HOST:PORT or [IPV6]:PORT, not {text!r}")
    return host(name) if colon else HOST, port(number)


def network(text: str) -> Network | str:
    """Convert an address or network of trusted proxies, or ``unix``."""
    try:
        return trusted_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an address, a network, or {UNIX!r}: {error}") from None


port = whole(0, 0xFFFF)
count = whole(1)
descriptor = whole(0, 2**31 - 1)  # up to the maximum of a C int
seconds = positive()
