"""How a graceful stop reaches those who serve: through Trio's context, so that neither side knows the other.

A server announces a drain to all the tasks below it (a `contextvars.ContextVar`, which Trio hands from parent task to
child). Whoever waits for a next request, however deep below, asks for the `current_drain` and ends its wait when
that begins. Under a server that announces none, it never does.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import trio


class Waiter(Protocol):
    """Who may be waiting for a request when a stop begins."""

    def stop_waiting(self) -> None:
        """End the wait, if there is one."""


class Drain:
    """The stop of one server: requests that are under way are finished, no further ones are waited for.

    Attributes:
        began: whether the stop has begun.
        began_at: when it has, on Trio's clock.
    """

    def __init__(self) -> None:
        self.began = False
        self.began_at = math.inf
        self._waiters: set[Waiter] = set()

    def begin(self) -> None:
        """Begin to stop, and tell everybody who listens."""
        self.began = True
        self.began_at = trio.current_time()
        for waiter in tuple(self._waiters):
            waiter.stop_waiting()

    def listen(self, waiter: Waiter) -> None:
        """Have ``waiter.stop_waiting()`` called when the stop begins, unless it began before."""
        self._waiters.add(waiter)

    def unlisten(self, waiter: Waiter) -> None:
        """Take back `listen`."""
        self._waiters.discard(waiter)


_current: ContextVar[Drain] = ContextVar("trioproto_drain", default=Drain())  # noqa: B039 - nobody begins that one


def current_drain() -> Drain:
    """Return the drain of the server that the current task runs under."""
    return _current.get()


@contextlib.contextmanager
def announced_drain() -> Iterator[Drain]:
    """Announce a drain to all tasks that are started inside the block."""
    drain = Drain()
    token = _current.set(drain)
    try:
        yield drain
    finally:
        _current.reset(token)
