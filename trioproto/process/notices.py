"""Notifications to systemd: the service is ready, reloads, stops, and is alive (sd_notify(3)).

With ``Type=notify`` in the unit, systemd passes the address of its socket in an environment variable. Without that,
nothing is sent.
"""

import functools
import logging
import math
import os
import socket

from trioproto.addresses import failure_reason

_log = logging.getLogger(__name__)

# The interval, in seconds, of status notifications, unless the watchdog needs them more often.
STATUS_SECONDS = 10.0

# systemd's environment variables. They are for this process only, and not for its children.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1`` to systemd, if it started this service. Never blocks, never raises."""
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


@functools.cache  # log each failure once
def _complain(address: str, reason: str) -> None:
    _log.error("cannot notify systemd at %s: %s", address, reason)


def notify_alive(accepted: int, active: int) -> None:
    """Notify systemd that this service is alive, and how many connections it has accepted and has open."""
    notify("WATCHDOG=1", f"STATUS=accepted {accepted}, active {active}")


def notice_interval() -> float:
    """Return the maximum number of seconds between calls of `notify_alive`; infinity without systemd.

    That is half of the watchdog's time-out (``WatchdogSec``), as sd_watchdog_enabled(3) recommends.
    """
    if not os.environ.get("NOTIFY_SOCKET"):
        return math.inf
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())) or not microseconds.isdecimal():
        return STATUS_SECONDS
    return min(int(microseconds) / 2e6, STATUS_SECONDS) or STATUS_SECONDS
