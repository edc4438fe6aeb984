"""What systemd is told of a service: that it is ready, reloads, stops, and is alive (sd_notify(3)).

A service whose unit has ``Type=notify`` finds the socket for that in its environment. Elsewhere, nobody is told.
"""

import functools
import logging
import math
import os
import socket

from trioproto.addresses import failure_reason

_log = logging.getLogger(__name__)

# How often systemd is told what is served, unless it wants signs of life more often.
STATUS_SECONDS = 10.0

# Its environment variables. They are meant for one process, and not for its children.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def notify(*assignments: str) -> None:
    """Tell systemd, if it has started this service, by assignments such as ``READY=1``. Never waits, never fails."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # noqa: FBT003 - the standard library's
            # An abstract address begins with a zero byte, which an environment variable cannot hold.
            name = f"\0{address[1:]}" if address.startswith("@") else address
            sender.sendto("\n".join(assignments).encode(), name)
    except OSError as error:
        _complain(address, failure_reason(error))


@functools.cache  # once, however often it fails
def _complain(address: str, reason: str) -> None:
    _log.error("cannot notify systemd at %s: %s", address, reason)


def notify_alive(accepted: int, active: int) -> None:
    """Tell systemd that this service is alive, and how many connections it has accepted and has now."""
    notify("WATCHDOG=1", f"STATUS=accepted {accepted}, active {active}")


def notice_interval() -> float:
    """Return after how many seconds, at the latest, `notify_alive` is due again; infinity if nobody listens.

    That is half of what systemd waits (``WatchdogSec``), as it recommends (sd_watchdog_enabled(3)).
    """
    if not os.environ.get("NOTIFY_SOCKET"):
        return math.inf
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())) or not microseconds.isdecimal():
        return STATUS_SECONDS
    return min(int(microseconds) / 2e6, STATUS_SECONDS) or STATUS_SECONDS
