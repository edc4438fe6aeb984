"""What reaches a handler from its server, through Trio's context: whose stream it serves, and a graceful stop.

The server knows nothing of what a handler does with its stream, and the handler is passed nothing but the stream. What
else they have to tell each other lies in a `contextvars.ContextVar`, which Trio hands from parent task to child. So a
stop reaches whatever waits for a client, however deep below the server::

    drain = current_drain()
    while True:
        with drain.ends_wait() as scope:  # a stop ends this wait ...
            job = await next_job()
        if scope.cancelled_caught:
            break
        await work_on(job)  # ... but nothing else

`trioproto.Connection` does this for its handler.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import attrs
import trio

from trioproto.addresses import format_address, peer_address, peer_name


class Drain:
    """The graceful stop of one server: what is under way is finished, and nothing further is waited for.

    Attributes:
        began: a `trio.Event`, set when the stop begins. Await it, or ask it.
        began_at: when it began, on Trio's clock; None before.
    """

    def __init__(self) -> None:
        self.began: trio.Event = trio.Event()
        self.began_at: float | None = None
        self._callbacks: set[Callable[[], object]] = set()

    def begin(self) -> None:
        """Begin the stop."""
        self.began_at = trio.current_time()
        self.began.set()
        for callback in tuple(self._callbacks):
            callback()

    def add_callback(self, callback: Callable[[], object]) -> None:
        """Have ``callback()`` called when the stop begins; not at all if it has begun already."""
        self._callbacks.add(callback)

    def remove_callback(self, callback: Callable[[], object]) -> None:
        """Take back `add_callback`."""
        self._callbacks.discard(callback)

    @contextlib.contextmanager
    def ends_wait(self, *, earliest: float = -math.inf) -> Iterator[trio.CancelScope]:
        """Cancel what waits inside the block when the stop begins, or at once if it has begun already.

        Args:
            earliest: when the stop may end the wait at the earliest, on Trio's clock, if it begins before.

        Yields:
            The block's cancel scope, whose ``cancelled_caught`` tells afterwards whether the stop ended the wait.
        """

        def hurry() -> None:
            began_at = math.inf if self.began_at is None else self.began_at
            scope.deadline = min(scope.deadline, max(began_at, earliest))

        with trio.CancelScope() as scope:
            hurry()
            self.add_callback(hurry)
            try:
                yield scope
            finally:
                self.remove_callback(hurry)


NEVER = Drain()

# How a connection ended, in the log and in statistics.
Ending = Literal["ended", "reset", "idle", "late", "malformed", "overrun", "crashed", "stopped", "cut"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)


@attrs.define(eq=False)
class Accepted:
    """A stream as a server accepted it, and what the server knows of it.

    Attributes:
        stream: what the handler is called with.
        address: the client's, as the system gives it; None if the stream has none. Behind a proxy, that of the proxy,
            until its PROXY header (`trioproto.process.proxy_protocol`) has told the client's own.
        server: the address at which the server accepted it, for log lines; None if nobody has told.
        drain: the server's stop.
        at: when it was accepted, on Trio's clock.
        refused: whether it was ended before it was served, because of its address.
        counted: whether a `trioproto.Connection` fills in the rest. A handler on the bare stream tells nobody.
        received: bytes that the client sent, as the handler's protocol sees them: without those of TLS.
        sent: bytes that the system took to be sent to it.
        requests: how many requests of it were read.
        how: how its conversation ended; None before, and if that was not seen.
    """

    stream: trio.abc.AsyncResource
    address: object
    server: str | None
    drain: Drain
    at: float
    refused: bool = False
    counted: bool = False
    received: int = 0
    sent: int = 0
    requests: int = 0
    how: Ending | None = None

    @property
    def peer(self) -> str:
        """The client's address, for log lines."""
        return peer_name(self.stream) if self.address is None else format_address(self.address)


_accepted: ContextVar[Accepted | None] = ContextVar("trioproto_accepted", default=None)


def announce(accepted: Accepted) -> None:
    """Tell the current task, and those that it starts, what stream it serves. A server calls this."""
    _accepted.set(accepted)


def current_drain() -> Drain:
    """Return the stop of the server that the current task runs under; one that never begins, if there is none.

    A task that a handler starts runs under the handler's server, and so does all that it starts in turn, such as a
    `trio.serve_tcp` of its own. A `trioproto.serve_tcp` announces its own stop to its own handlers.
    """
    accepted = _accepted.get()
    return NEVER if accepted is None else accepted.drain


def accepted_as(stream: trio.abc.AsyncResource) -> Accepted:
    """Return what is known of ``stream``: by its server, if it is the one that the current task serves.

    A stop, and a client's address, belong to the stream that the server handed out, and to TLS on it. Another one that
    a handler opens, such as one to a server behind it, is the handler's own affair: no stop concerns it.
    """
    accepted = _accepted.get()
    if accepted is not None:
        if accepted.stream is stream:
            return accepted
        if getattr(stream, "transport_stream", None) is accepted.stream:  # TLS is on another one
            return accepted
    return Accepted(stream, peer_address(stream), None, NEVER, trio.current_time())
