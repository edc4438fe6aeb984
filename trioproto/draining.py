"""What a handler can learn from its server through context variables: about its stream, and about a graceful stop.

The server does not know what a handler does with its stream, and passes it nothing but the stream. Everything else that
they share is in a `contextvars.ContextVar`, which Trio's tasks inherit from the task that starts them. So a stop can
end any wait for a client, however deep in the task tree::

    drain = current_drain()
    while True:
        with drain.ends_wait() as scope:  # a stop cancels this wait ...
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
    """The graceful stop of one server: requests in progress are finished, and no new ones are waited for.

    Attributes:
        began: a `trio.Event`, set when the stop begins.
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
        """Call ``callback()`` when the stop begins; never if it has already begun."""
        self._callbacks.add(callback)

    def remove_callback(self, callback: Callable[[], object]) -> None:
        """Undo `add_callback`."""
        self._callbacks.discard(callback)

    @contextlib.contextmanager
    def ends_wait(self, *, earliest: float = -math.inf) -> Iterator[trio.CancelScope]:
        """Cancel the block when the stop begins, or at once if it has already begun.

        Args:
            earliest: do not cancel before this time, on Trio's clock, even if the stop begins earlier.

        Yields:
            The block's cancel scope. After the block, its ``cancelled_caught`` says whether the stop cancelled it.
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

# How a connection ended, for the log and statistics.
Ending = Literal["ended", "reset", "idle", "late", "malformed", "overrun", "crashed", "stopped", "cut"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)


@attrs.define(eq=False)
class Accepted:
    """An accepted stream, and what its server knows about it.

    Attributes:
        stream: the handler's argument.
        address: the client's, as the socket module represents it; None if the stream has none. Behind a proxy, it is
            the proxy's until its PROXY header (`trioproto.process.proxy_protocol`) has been received.
        server: the address at which the server accepted it, for log lines; None if not known.
        drain: the server's stop.
        at: when it was accepted, on Trio's clock.
        refused: whether it was closed unserved, because of its address.
        counted: whether a `trioproto.Connection` sets the attributes below. Without one, they are not known.
        received: bytes from the client, without the overhead of TLS.
        sent: bytes to the client that the kernel has accepted, likewise.
        requests: how many requests were read.
        how: how the conversation ended; None before it has ended, or if not known.
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
    """Set which stream the current task, and all tasks that it starts, serve. Called by servers."""
    _accepted.set(accepted)


def current_drain() -> Drain:
    """Return the stop of the server that the current task runs under. Without a server, it is one that never begins.

    All tasks that a handler starts run under the handler's server, including a nested `trio.serve_tcp`. The handlers of
    a nested `trioproto.serve_tcp` get the stop of that server.
    """
    accepted = _accepted.get()
    return NEVER if accepted is None else accepted.drain


def accepted_as(stream: trio.abc.AsyncResource) -> Accepted:
    """Return what is known about ``stream``: from its server, if it is the one that the current task serves.

    The server's stop and the client's address belong to the stream that the server passed to the handler, and to TLS on
    top of it. A stop does not affect other streams that a handler opens, such as one to an upstream server.
    """
    accepted = _accepted.get()
    if accepted is not None:
        if accepted.stream is stream:
            return accepted
        if getattr(stream, "transport_stream", None) is accepted.stream:  # TLS on top of it
            return accepted
    return Accepted(stream, peer_address(stream), None, NEVER, trio.current_time())
