"""A TCP server in structured concurrency: one nursery, a task for each listener and each connection.

`serve_tcp` and `serve_listeners` take the same arguments as Trio's functions of these names (``handler_nursery``
aside) and more on top. A handler is ``async def handler(stream) -> None``; the server knows nothing of what it
speaks.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import attrs
import trio

from trioproto.addresses import peer_name
from trioproto.draining import announced_drain

_log = logging.getLogger(__name__)

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
ListenerT = TypeVar("ListenerT", bound=trio.abc.Listener[Any])

OnTick = Callable[["ServerStats"], Awaitable[object]]

# What accept(2) may report, and what is done about it. Everything else means that the listener itself is unusable
# (closed, not listening): that is raised.

# This one connection is gone, or was refused by a firewall, before it could be accepted; Linux passes on errors that
# its network had for it. The next one may be fine.
_CONNECTION_ERRNOS = {
    errno.ECONNABORTED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EPROTO,
    errno.ETIMEDOUT,
    getattr(errno, "ENONET", errno.EPROTO),  # Linux only
}

# The process or the system is short of descriptors or memory. Connections stay in the kernel's queue while we wait for
# others to end.
_CAPACITY_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
CAPACITY_WAIT = 0.1

# How many connections one wake-up accepts before the others get their turn.
ACCEPT_BATCH = 128

# In a stop, how long a listener that is no socket is asked whether a connection waits.
LAST_LOOK = 0.01


@attrs.frozen
class ServerStats:
    """What a server has done so far: a snapshot.

    Attributes:
        accepted: connections since the server began.
        active: connections open now.
        crashed: connections whose handler raised an exception.
        uptime: seconds since the server began, on Trio's clock.
    """

    accepted: int
    active: int
    crashed: int
    uptime: float


async def serve_listeners(
    handler: Callable[[StreamT], Awaitable[object]],
    listeners: list[ListenerT],
    *,
    tick: float | None = None,
    on_tick: OnTick | None = None,
    max_connections: int | None = None,
    shutdown: trio.Event | None = None,
    grace_period: float = math.inf,
    task_status: trio.TaskStatus[list[ListenerT]] = trio.TASK_STATUS_IGNORED,
) -> ServerStats:
    """Accept connections from ``listeners``, and run ``handler(stream)`` in a task of its own for each.

    A handler's crash is logged with its traceback, ends its own connection, and nothing else. A stream that the
    handler leaves open is closed forcefully.

    Args:
        handler: an async function that serves one connection.
        listeners: where connections come from. They are closed in the end.
        tick: seconds, above 0, between two wake-ups of the accept loop, as by the timeout of ``accept()`` in a
            game server's loop. None: the loop just waits.
        on_tick: awaited in the accept loop on each tick, with the `ServerStats` of that moment. The nth tick is
            due ``n * tick`` seconds after the start, whatever the connections and the ticks before it did; those
            that are missed because one took too long are left out. While it runs, the first listener's new
            connections wait in the kernel's queue. An exception that it raises ends the server.
        max_connections: how many connections are served at once, 1 or more; the kernel's queue holds the rest, and
            none is refused. None: as many as come.
        shutdown: stops the server once it is set. Connections that wait in the kernel's queue are still served, and
            the listeners closed. Handlers built on `trioproto.connection.Connection` finish the requests that are
            under way and end; other handlers are waited for.
        grace_period: seconds, 0 or more, from ``shutdown`` until the connections that are left are cancelled.
        task_status: for `trio.Nursery.start`, which returns ``listeners``.

    Returns:
        The last `ServerStats`, when ``shutdown`` was set and every connection has ended.

    Raises:
        ValueError: for a setting out of its range, or an ``on_tick`` without ``tick``.
        OSError: in the nursery's exception group, if accepting fails because of the listener itself (accept(2):
            EBADF, EINVAL, ENOTSOCK). Errors of one connection pass; a lack of descriptors or memory is logged once
            and waited out.

    On cancellation, every connection is cancelled and every listener closed. ``shutdown`` cancels an ``on_tick`` that
    is running.
    """
    _check_settings(tick, on_tick, max_connections, grace_period)
    with announced_drain() as drain:
        async with trio.open_nursery() as nursery:
            connections = _Connections(handler, nursery, math.inf if max_connections is None else max_connections)
            accepting = []
            for number, listener in enumerate(listeners):
                scope = trio.CancelScope()
                accepting.append(scope)
                # One loop ticks, so that the ticks come once however many listeners there are.
                interval = tick if tick is not None and number == 0 else math.inf
                nursery.start_soon(_Acceptor(listener, connections).run, interval, on_tick, scope)
            task_status.started(listeners)
            if shutdown is not None:
                await shutdown.wait()
                nursery.cancel_scope.deadline = trio.current_time() + grace_period
                for scope in accepting:
                    scope.cancel()
                drain.begin()
        if nursery.cancel_scope.cancelled_caught:
            _log.warning("the grace period of %s s is over: cancelled what was left", grace_period)
    return connections.stats()


async def serve_tcp(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    tick: float | None = None,
    on_tick: OnTick | None = None,
    max_connections: int | None = None,
    shutdown: trio.Event | None = None,
    grace_period: float = math.inf,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> ServerStats:
    """Listen for TCP connections, and run ``handler(stream)`` in a task of its own for each.

    Args:
        handler: an async function that serves one connection.
        port: 0 to 65535; 0 lets the kernel pick one.
        host: the name or address to listen on, all that a name stands for; None for all of this machine's.
        backlog: how many connections the kernel queues before they are accepted; None for as many as it allows.
        tick: as for `serve_listeners`, like all that follows.
        on_tick: see there.
        max_connections: see there.
        shutdown: see there.
        grace_period: see there.
        task_status: for `trio.Nursery.start`, which returns the listeners.

    Returns:
        What `serve_listeners` returns.

    Raises:
        OSError: if it cannot listen there; and what `serve_listeners` raises.

    On cancellation, every connection is cancelled and every listener closed.
    """
    _check_settings(tick, on_tick, max_connections, grace_period)  # before anything is open that would be left so
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    return await serve_listeners(
        handler,
        listeners,
        tick=tick,
        on_tick=on_tick,
        max_connections=max_connections,
        shutdown=shutdown,
        grace_period=grace_period,
        task_status=task_status,
    )


def _check_settings(
    tick: float | None, on_tick: OnTick | None, max_connections: int | None, grace_period: float
) -> None:
    if tick is not None and not tick > 0:
        raise ValueError(f"tick is {tick}: not above 0 seconds")
    if on_tick is not None and tick is None:
        raise ValueError("on_tick needs a tick")
    if max_connections is not None and max_connections < 1:
        raise ValueError(f"max_connections is {max_connections}: not 1 or more")
    if not grace_period >= 0:
        raise ValueError(f"grace_period is {grace_period}: not 0 seconds or more")


class _Connections:
    """Runs a task for each connection in one nursery, and keeps count."""

    def __init__(
        self, handler: Callable[[Any], Awaitable[object]], nursery: trio.Nursery, max_connections: float
    ) -> None:
        self._handler = handler
        self._nursery = nursery
        self._max = max_connections
        self._began = trio.current_time()
        self._accepted = 0
        self._active = 0
        self._crashed = 0
        self._waiting_for_room = trio.lowlevel.ParkingLot()

    def stats(self) -> ServerStats:
        uptime = trio.current_time() - self._began
        return ServerStats(self._accepted, self._active, self._crashed, uptime)

    def has_room(self) -> bool:
        return self._active < self._max

    async def room(self) -> None:
        """Wait until another connection may be started."""
        while not self.has_room():
            await self._waiting_for_room.park()

    def start(self, stream: trio.abc.Stream) -> None:
        self._accepted += 1
        self._active += 1
        self._nursery.start_soon(self._run, stream, self._accepted)

    async def _run(self, stream: trio.abc.Stream, number: int) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("connection %d from %s", number, peer_name(stream))
        try:
            await self._handler(stream)
        except Exception as crash:  # noqa: BLE001 - a handler's bug, of whatever type, ends its own connection only
            self._log_crash(stream, number, crash)
        except BaseExceptionGroup as group:
            # A nursery in the handler may group its bug with a cancellation. That one has to go on.
            crashes, rest = group.split(Exception)
            if crashes is not None:
                self._log_crash(stream, number, crashes)
            if rest is not None:
                raise rest from None
        finally:
            self._active -= 1
            if self._waiting_for_room:
                self._waiting_for_room.unpark_all()
            _log.debug("connection %d ended", number)
            if not (isinstance(stream, trio.SocketStream) and stream.socket.fileno() == -1):
                await trio.aclose_forcefully(stream)

    def _log_crash(self, stream: trio.abc.Stream, number: int, crash: Exception) -> None:
        self._crashed += 1
        _log.error("connection %d from %s: the handler crashed", number, peer_name(stream), exc_info=crash)


class _Acceptor:
    """Accepts from one listener."""

    def __init__(self, listener: trio.abc.Listener[Any], connections: _Connections) -> None:
        self._listener = listener
        self._connections = connections
        self._short = False  # of descriptors or memory

    async def run(self, tick: float, on_tick: OnTick | None, until_shutdown: trio.CancelScope) -> None:
        """Accept until ``until_shutdown`` is cancelled, then take in what is still queued, and close the listener."""
        async with self._listener:
            with _borrowed_socket(self._listener) as listening:
                began = trio.current_time()
                number = 1
                with until_shutdown:
                    while True:
                        # Inside the scope the loop runs undisturbed; only the tick gets out of it.
                        with trio.move_on_after(max(0.0, began + number * tick - trio.current_time())):
                            await self._accept(listening, forever=True)
                        if on_tick is not None:
                            await on_tick(self._connections.stats())
                        # Counted from the beginning, the schedule cannot drift; a tick that is past is left out.
                        number = max(number + 1, math.ceil((trio.current_time() - began) / tick))
                await self._accept(listening, forever=False)

    async def _accept(self, listening: socket.socket | None, *, forever: bool) -> None:
        """Accept and start connections: for ever, or as long as some are queued."""
        empty = False
        while forever or not empty:
            await self._connections.room()
            try:
                if listening is not None and isinstance(self._listener, trio.SocketListener):
                    if forever:
                        await trio.lowlevel.wait_readable(self._listener.socket)
                    else:
                        await trio.lowlevel.checkpoint()
                    empty = self._start_queued(listening)
                else:
                    # Two listeners that are no sockets may both wait here for the last place: one is served too many.
                    with trio.move_on_after(math.inf if forever else LAST_LOOK) as look:
                        self._connections.start(await self._listener.accept())
                    empty = look.cancelled_caught
            except OSError as error:
                await self._get_over(error)
            else:
                if self._short:
                    _log.info("accepting again")
                self._short = False

    def _start_queued(self, listening: socket.socket) -> bool:
        """Start the connections that are queued, as far as there is room: a burst in one wake-up.

        Returns:
            Whether the queue is empty now.

        Raises:
            OSError: what accept(2) reports.
        """
        try:
            for _ in range(ACCEPT_BATCH):
                if not self._connections.has_room():
                    break
                accepted, _address = listening.accept()
                self._connections.start(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))
        except BlockingIOError:
            return True
        return False

    async def _get_over(self, error: OSError) -> None:
        if error.errno in _CONNECTION_ERRNOS:
            _log.debug("a connection was lost before it was accepted: %s", error)
        elif error.errno in _CAPACITY_ERRNOS:
            if not self._short:
                _log.error("cannot accept: %s; new connections wait until others have ended", os.strerror(error.errno))
            self._short = True
            await trio.sleep(CAPACITY_WAIT)
        else:
            raise error


class _ListeningSocket(socket.socket):
    """Works out once what `accept` would work out for each connection's socket."""

    @functools.cached_property
    def family(self) -> socket.AddressFamily:
        return super().family

    @functools.cached_property
    def type(self) -> socket.SocketKind:
        return super().type


@contextlib.contextmanager
def _borrowed_socket(listener: trio.abc.Listener[Any]) -> Iterator[socket.socket | None]:
    """Give the standard library's view of a listener's socket; None for a listener that has none.

    Trio's ``accept`` waits when the queue is empty, and goes through the scheduler when it is not. The standard
    library's, on the same descriptor, which Trio has made non-blocking, does neither.
    """
    if not isinstance(listener, trio.SocketListener):
        yield None
        return
    trios = listener.socket
    borrowed = _ListeningSocket(trios.family, trios.type, trios.proto, fileno=trios.fileno())
    borrowed.settimeout(0)  # or else socket.setdefaulttimeout would have `accept` wait
    try:
        yield borrowed
    finally:
        borrowed.detach()
