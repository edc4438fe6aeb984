"""A TCP server in structured concurrency: one nursery, a task for each listener and each connection.

`serve_tcp` and `serve_listeners` take the same arguments as Trio's functions of these names (except
``handler_nursery``), and more. A handler is ``async def handler(stream) -> None``; the server does not depend on its
protocol.

Task tree::

    the task that awaits serve_listeners: waits for `shutdown`, then for all below
    └── nursery: cancels the remaining tasks when the grace period expires
        ├── _Acceptor.run, for each listener: accepts connections, and starts their tasks
        ├── _Connections._run, for each connection: awaits the handler; catches and logs its crash
        │   └── nursery of a `trioproto.Connection` with `max_unsent`
        │       └── Connection._send_what_is_pushed
        └── close_as_broken, for each connection that is refused
"""

import bisect
import contextlib
import errno
import functools
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import attrs
import trio

from trioproto.addresses import format_address, peer_address
from trioproto.draining import ENDINGS, Accepted, Drain, Ending, announce
from trioproto.limits import ClientLimit
from trioproto.transport import close_as_broken

_log = logging.getLogger(__name__)

# Logs one record for each connection that has ended, at level DEBUG.
_access_log = logging.getLogger("trioproto.access")

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
ListenerT = TypeVar("ListenerT", bound=trio.abc.Listener[Any])

OnTick = Callable[["ServerStats"], Awaitable[object]]

# How errors of accept(2) are handled. All others mean that the listener itself is unusable (closed, not listening), and
# are raised.

# One connection was lost, or refused by a firewall, before it could be accepted; Linux reports its pending network
# errors here. The next one may be fine.
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

# The process or the system is short of descriptors or memory. New connections stay in the kernel's accept queue while
# the acceptor waits for others to end.
_CAPACITY_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
CAPACITY_WAIT = 0.1

# How many connections are accepted before other tasks run.
ACCEPT_BATCH = 128

# A process that has more connections than others leaves a new one to them. They usually accept it within a few passes
# of the scheduler, or within some milliseconds if they have to wait for a core. If they do not, they are busy or hang:
# then this process accepts this many connections before it gives way again.
GIVE_WAY_PAUSES = [0.0] * 20 + [0.001] * 4
GIVE_WAY_BATCH = 4

# This many lost connections in a row mean that something, such as a sandbox, refuses all of them. The acceptor then
# waits, as in a shortage of descriptors.
LOST_IN_A_ROW = 100

# In a stop, how many seconds to wait for a queued connection of a listener that is not a socket.
LAST_LOOK = 0.01

# In a stop, how many seconds queued connections are still accepted. Without a limit, if more keep arriving, or if
# `max_connections` is reached, the queue might never become empty before the grace period expires and cuts requests.
EMPTYING_SECONDS = 1.0


# The upper bounds, in seconds, of the buckets of `ServerStats.durations`.
DURATIONS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)


@attrs.frozen
class ServerStats:
    """A snapshot of a server's statistics.

    Attributes:
        accepted: connections accepted since the server started.
        active: connections open now.
        crashed: connections whose handler raised an exception.
        uptime: seconds since the server started, on Trio's clock.
        refused: how many of ``accepted`` were closed unserved, because their client had too many connections, or
            because they did not come from a trusted proxy.
        accept_errors: how often accepting has failed: the connection was lost, or descriptors or memory were short.
        received: bytes from clients, including open connections. Counts only what a `trioproto.Connection` received.
        sent: bytes to clients that the kernel has accepted, likewise.
        requests: requests that were read, likewise.
        ended: connections that have ended, by how they ended; without those that were refused.
        durations: histogram of how long these lasted, not cumulative: up to each of `DURATIONS`, and above the last.
        seconds: sum of how many seconds these lasted.
    """

    accepted: int
    active: int
    crashed: int
    uptime: float
    refused: int = 0
    accept_errors: int = 0
    received: int = 0
    sent: int = 0
    requests: int = 0
    ended: Mapping[Ending, int] = attrs.field(factory=lambda: dict.fromkeys(ENDINGS, 0))
    durations: tuple[int, ...] = (0,) * (len(DURATIONS) + 1)
    seconds: float = 0.0


async def serve_listeners(
    handler: Callable[[StreamT], Awaitable[object]],
    listeners: list[ListenerT],
    *,
    tick: float | None = None,
    on_tick: OnTick | None = None,
    max_connections: int | None = None,
    max_connections_per_client: int | None = None,
    shutdown: trio.Event | None = None,
    grace_period: float = math.inf,
    give_way: Callable[[int], bool] | None = None,
    on_start: Callable[[Callable[[], ServerStats]], object] | None = None,
    task_status: trio.TaskStatus[list[ListenerT]] = trio.TASK_STATUS_IGNORED,
) -> ServerStats:
    """Accept connections from ``listeners``, and run ``handler(stream)`` in a new task for each.

    If a handler crashes, the exception is logged with its traceback, and only its own connection ends. If a handler
    leaves its stream open, it is closed forcefully.

    Args:
        handler: an async function that serves one connection.
        listeners: one or more. They are closed at the end.
        tick: seconds, above 0, between wake-ups of the accept loop, like the timeout of ``accept()`` in a game server's
            loop. None: no ticks.
        on_tick: awaited in the accept loop on each tick, with the current `ServerStats`. The nth tick is due
            ``n * tick`` seconds after the start, regardless of connections and earlier ticks; ticks that are missed
            because one took too long are skipped. While it runs, the first listener's new connections wait in the
            kernel's accept queue. An exception from it ends the server.
        max_connections: how many connections are served at once, 1 or more; further ones wait in the kernel's accept
            queue, and none is refused. None: no limit.
        max_connections_per_client: how many connections one client may have at once, 1 or more. A client is an IPv4
            address or an IPv6 /64 network; others, such as on UNIX sockets, are not limited. Further connections are
            reset at once, do not count towards ``max_connections``, and are counted in `ServerStats.refused`; the first
            is logged, and again after the client has had fewer. None: no limit.
        shutdown: stops the server once it is set. Connections in the kernel's accept queue are still served, as far as
            they can be accepted within a second (`EMPTYING_SECONDS`), and the listeners are closed. If the owner of a
            listener closes it at the same time, its queue is left to the next server on the same socket. Handlers with
            a `trioproto.Connection` finish the requests that have begun, and end; other handlers are waited for.
        grace_period: seconds, 0 or more, from ``shutdown`` until the remaining connections are cancelled. The default
            is to wait for all of them.
        give_way: for processes that share listening sockets: called with the number of open connections before each
            accept. While it returns True, because other processes have fewer, they are given some milliseconds to
            accept first. None: accept at once.
        on_start: called once, before anything is accepted, with a function that returns the current `ServerStats`
            whenever it is called: unlike ``on_tick``, also during a stop.
        task_status: for `trio.Nursery.start`, which returns ``listeners``.

    Returns:
        The last `ServerStats`, after ``shutdown`` was set and every connection has ended.

    Raises:
        TypeError: if ``handler`` is not callable.
        ValueError: if a setting is out of range, ``on_tick`` is given without ``tick``, or there are no listeners.
        OSError: in an exception group, if accepting fails because of the listener itself (accept(2): EBADF, EINVAL,
            ENOTSOCK). Errors of one connection are ignored; a shortage of descriptors or memory is logged once, and
            waited out.

    On cancellation, every connection is cancelled and every listener closed. ``shutdown`` cancels an ``on_tick`` that
    is running.
    """
    check_handler(handler)
    check_settings(tick, on_tick, max_connections, max_connections_per_client, grace_period)
    if not listeners:
        raise ValueError("listeners must not be empty")
    drain = Drain()
    async with trio.open_nursery() as nursery:
        most = math.inf if max_connections is None else max_connections
        limit = None if max_connections_per_client is None else ClientLimit(max_connections_per_client)
        connections = _Connections(handler, nursery, most, limit, drain)
        if on_start is not None:
            on_start(connections.stats)
        accepting = []
        for number, listener in enumerate(listeners):
            scope = trio.CancelScope()
            accepting.append(scope)
            # Only one loop ticks, however many listeners there are.
            interval = tick if tick is not None and number == 0 else math.inf
            nursery.start_soon(_Acceptor(listener, connections, shutdown, give_way).run, interval, on_tick, scope)
        task_status.started(listeners)
        if shutdown is not None:
            await shutdown.wait()
            nursery.cancel_scope.deadline = trio.current_time() + grace_period
            for scope in accepting:
                scope.cancel()
            drain.begin()
    if nursery.cancel_scope.cancelled_caught:
        _log.warning("the grace period of %s s expired: cancelled the rest", grace_period)
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
    max_connections_per_client: int | None = None,
    shutdown: trio.Event | None = None,
    grace_period: float = math.inf,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> ServerStats:
    """Listen for TCP connections, and run ``handler(stream)`` in a new task for each.

    Args:
        handler: an async function that serves one connection.
        port: 0 to 65535; 0 lets the kernel pick one.
        host: the name or address to listen on; for a name, all its addresses. None, the default, is every address of
            this machine, as for `trio.serve_tcp`; ``127.0.0.1`` accepts connections from this machine only.
        backlog: how many connections the kernel queues before they are accepted; None for as many as it allows.
        tick: as for `serve_listeners`, like the following.
        on_tick: see there.
        max_connections: see there.
        max_connections_per_client: see there.
        shutdown: see there.
        grace_period: see there.
        task_status: for `trio.Nursery.start`, which returns the listeners.

    Returns:
        What `serve_listeners` returns.

    Raises:
        OSError: if it cannot listen there; and what `serve_listeners` raises.

    On cancellation, every connection is cancelled and every listener closed.
    """
    # Before anything is open.
    check_handler(handler)
    check_settings(tick, on_tick, max_connections, max_connections_per_client, grace_period)
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    return await serve_listeners(
        handler,
        listeners,
        tick=tick,
        on_tick=on_tick,
        max_connections=max_connections,
        max_connections_per_client=max_connections_per_client,
        shutdown=shutdown,
        grace_period=grace_period,
        task_status=task_status,
    )


def check_handler(handler: object) -> None:
    """Raise `TypeError` if ``handler`` is not callable, such as a coroutine instead of an async function."""
    if not callable(handler):
        raise TypeError(f"handler must be an async function, not {handler!r}: pass the function without calling it")


def check_settings(
    tick: float | None,
    on_tick: OnTick | None,
    max_connections: int | None,
    max_connections_per_client: int | None,
    grace_period: float,
) -> None:
    """Raise `ValueError` for a setting of `serve_listeners` that is out of range."""
    if tick is not None and not tick > 0:
        raise ValueError(f"tick must be above 0 seconds, not {tick}")
    if on_tick is not None and tick is None:
        raise ValueError("on_tick requires tick")
    if max_connections is not None and max_connections < 1:
        raise ValueError(f"max_connections must be at least 1, not {max_connections}")
    if max_connections_per_client is not None and max_connections_per_client < 1:
        raise ValueError(f"max_connections_per_client must be at least 1, not {max_connections_per_client}")
    if not grace_period >= 0:
        raise ValueError(f"grace_period must be at least 0 seconds, not {grace_period}")


class _Connections:
    """Runs a task for each connection in one nursery, and counts them."""

    def __init__(
        self,
        handler: Callable[[Any], Awaitable[object]],
        nursery: trio.Nursery,
        max_connections: float,
        client_limit: ClientLimit | None,
        drain: Drain,
    ) -> None:
        self._handler = handler
        self._nursery = nursery
        self._max = max_connections
        self._client_limit = client_limit
        self._drain = drain
        self._began = trio.current_time()
        self._accepted = 0
        self._refused = 0
        self._crashed = 0
        self.accept_errors = 0
        self._open: set[Accepted] = set()
        # Of connections that have ended.
        self._received = self._sent = self._requests = 0
        self._ended: dict[Ending, int] = dict.fromkeys(ENDINGS, 0)
        self._durations = [0] * (len(DURATIONS) + 1)
        self._seconds = 0.0
        self._waiting_for_room = trio.lowlevel.ParkingLot()

    @property
    def active(self) -> int:
        return len(self._open)

    def stats(self) -> ServerStats:
        return ServerStats(
            accepted=self._accepted,
            active=self.active,
            crashed=self._crashed,
            uptime=trio.current_time() - self._began,
            refused=self._refused,
            accept_errors=self.accept_errors,
            received=self._received + sum(accepted.received for accepted in self._open),
            sent=self._sent + sum(accepted.sent for accepted in self._open),
            requests=self._requests + sum(accepted.requests for accepted in self._open),
            ended=self._ended.copy(),
            durations=tuple(self._durations),
            seconds=self._seconds,
        )

    def has_room(self) -> bool:
        return len(self._open) < self._max

    async def room(self) -> None:
        """Wait until another connection may be started."""
        while not self.has_room():
            await self._waiting_for_room.park()

    def start(self, stream: trio.abc.Stream, address: object, server: str) -> None:
        self._accepted += 1
        if self._client_limit is not None and not self._client_limit.enter(address):
            self._refused += 1
            # A reset leaves no state in the kernel, and does not look like a normal end to the client.
            self._nursery.start_soon(close_as_broken, stream)
            return
        accepted = Accepted(stream, address, server, self._drain, trio.current_time())
        self._open.add(accepted)
        self._nursery.start_soon(self._run, accepted, self._accepted, address)

    async def _run(self, accepted: Accepted, number: int, address: object) -> None:
        stream = accepted.stream
        announce(accepted)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("connection %d from %s to %s", number, accepted.peer, accepted.server)
        how: Ending = "cut"
        try:
            await self._handler(stream)
            how = accepted.how or "ended"
        except Exception as crash:  # noqa: BLE001 - a handler's bug, of whatever type, ends its own connection only
            how = "crashed"
            self._log_crash(accepted, number, crash)
        except BaseExceptionGroup as group:
            # A nursery in the handler may group a bug with a cancellation, which must propagate.
            crashes, rest = group.split(Exception)
            if crashes is not None:
                how = "crashed"
                self._log_crash(accepted, number, crashes)
            if rest is not None:
                raise rest from None
        finally:
            self._open.remove(accepted)
            if accepted.refused:
                self._refused += 1
            else:
                self._record(accepted, number, how)
            if self._client_limit is not None:
                self._client_limit.leave(address)
            if self._waiting_for_room:
                self._waiting_for_room.unpark_all()
            if not (isinstance(stream, trio.SocketStream) and stream.socket.fileno() == -1):
                await trio.aclose_forcefully(stream)

    def _record(self, accepted: Accepted, number: int, how: Ending) -> None:
        seconds = trio.current_time() - accepted.at
        self._received += accepted.received
        self._sent += accepted.sent
        self._requests += accepted.requests
        self._ended[how] += 1
        self._durations[bisect.bisect_left(DURATIONS, seconds)] += 1
        self._seconds += seconds
        if _access_log.isEnabledFor(logging.DEBUG):
            _log_end(accepted, number, how, seconds)

    def _log_crash(self, accepted: Accepted, number: int, crash: Exception) -> None:
        self._crashed += 1
        _log.error(
            "connection %d from %s to %s: the handler crashed", number, accepted.peer, accepted.server, exc_info=crash
        )


def _log_end(accepted: Accepted, number: int, how: Ending, seconds: float) -> None:
    record = {
        "connection": number,
        "client": accepted.peer,
        "server": accepted.server,
        "how": how,
        "seconds": seconds,
        "received": accepted.received if accepted.counted else None,
        "sent": accepted.sent if accepted.counted else None,
        "requests": accepted.requests if accepted.counted else None,
    }
    _access_log.debug(
        "connection %d from %s to %s: %s after %.3f s, %s bytes received, %s sent, %s requests",
        *("-" if value is None else value for value in record.values()),
        extra=record,
    )


class _Acceptor:
    """Accepts from one listener."""

    def __init__(
        self,
        listener: trio.abc.Listener[Any],
        connections: _Connections,
        shutdown: trio.Event | None,
        give_way: Callable[[int], bool] | None,
    ) -> None:
        self._listener = listener
        self._connections = connections
        self._shutdown = shutdown
        self._give_way = give_way
        self._server = _listener_name(listener)
        self._short = False  # of descriptors or memory
        self._lost = 0  # connections in a row that were lost, or refused, before they were accepted

    async def run(self, tick: float, on_tick: OnTick | None, until_shutdown: trio.CancelScope) -> None:
        """Accept until ``until_shutdown`` is cancelled, then accept what is still queued, and close the listener."""
        async with self._listener:
            with _borrowed_socket(self._listener) as listening:
                began = trio.current_time()
                number = 1
                with until_shutdown, self._ignore_closing_in_a_stop():
                    while True:
                        # The accept loop keeps running until the next tick.
                        with trio.move_on_after(max(0.0, began + number * tick - trio.current_time())):
                            await self._accept(listening, forever=True)
                        if on_tick is not None:
                            await on_tick(self._connections.stats())
                        # Counted from the start, so that the schedule does not drift; missed ticks are skipped.
                        number = max(number + 1, math.ceil((trio.current_time() - began) / tick))
                with trio.move_on_after(EMPTYING_SECONDS), self._ignore_closing_in_a_stop():
                    await self._accept(listening, forever=False)

    async def _accept(self, listening: socket.socket | None, *, forever: bool) -> None:
        """Accept and start connections: forever, or until the queue is empty."""
        empty = False
        sure = ACCEPT_BATCH
        while forever or not empty:
            await self._connections.room()
            try:
                if listening is not None and isinstance(self._listener, trio.SocketListener):
                    if forever and self._listener.socket.fileno() != -1:
                        await trio.lowlevel.wait_readable(self._listener.socket)
                        sure = await self._let_others_accept()
                    else:
                        await trio.lowlevel.checkpoint()
                    if self._listener.socket.fileno() == -1:  # closed; the descriptor may have been reused
                        raise trio.ClosedResourceError("this listener was closed")
                    empty = self._start_queued(listening, sure)
                else:
                    # Two such listeners may both wait here for the last place, and exceed the maximum by one.
                    with trio.move_on_after(math.inf if forever else LAST_LOOK) as look:
                        stream = await self._listener.accept()
                        self._connections.start(stream, peer_address(stream), self._server)
                    empty = look.cancelled_caught
            except OSError as error:
                await self._get_over(error)
            else:
                self._lost = 0
                if self._short:
                    _log.info("%s: accepting again", self._server)
                self._short = False

    async def _let_others_accept(self) -> int:
        """Give processes with fewer connections some time to accept those that are queued.

        Returns:
            How many connections to accept before giving way again.

        The kernel does not balance connections: epoll wakes all processes that wait for a listening socket, and the
        first to accept gets the connection, usually the same one. With a queue for each process (SO_REUSEPORT), a hash
        of the addresses would distribute them, regardless of load, and the queue of a process that ends would be lost.
        """
        if self._give_way is None:
            return ACCEPT_BATCH
        for pause in GIVE_WAY_PAUSES:
            if not self._give_way(self._connections.active):
                return 1
            await trio.sleep(pause)
        return GIVE_WAY_BATCH

    @contextlib.contextmanager
    def _ignore_closing_in_a_stop(self) -> Iterator[None]:
        try:
            yield
        except trio.ClosedResourceError:
            if self._shutdown is None or not self._shutdown.is_set():
                raise

    def _start_queued(self, listening: socket.socket, sure: int) -> bool:
        """Accept and start queued connections, up to the limits: a burst in one wake-up.

        Args:
            listening: the socket.
            sure: how many are accepted even if other processes have fewer connections.

        Returns:
            Whether the queue is empty now.

        Raises:
            OSError: from accept(2).
        """
        try:
            for number in range(ACCEPT_BATCH):
                if not self._connections.has_room():
                    break
                if number >= sure and self._give_way is not None and self._give_way(self._connections.active):
                    break
                accepted, address = listening.accept()
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
                self._connections.start(stream, address, self._server)
        except BlockingIOError:
            return True
        return False

    async def _get_over(self, error: OSError) -> None:
        self._connections.accept_errors += 1
        if error.errno in _CONNECTION_ERRNOS:
            _log.debug("%s: a connection was lost before it was accepted: %s", self._server, error)
            self._lost += 1
            if self._lost < LOST_IN_A_ROW:
                return
        elif error.errno not in _CAPACITY_ERRNOS:
            raise error
        if not self._short:
            _log.error("%s: cannot accept: %s; new connections wait", self._server, os.strerror(error.errno or 0))
        self._short = True
        await trio.sleep(CAPACITY_WAIT)


def _listener_name(listener: trio.abc.Listener[Any]) -> str:
    """Return a listener's name for log lines: its address, or the name of its class if it has none."""
    if isinstance(listener, trio.SSLListener):
        listener = listener.transport_listener
    if isinstance(listener, trio.SocketListener):
        return format_address(listener.socket.getsockname())
    address = getattr(listener, "address", None)  # listeners of an in-memory network have addresses, too
    return type(listener).__name__ if address is None else format_address(address)


class _ListeningSocket(socket.socket):
    """Caches attributes that `accept` would otherwise compute for each connection."""

    @functools.cached_property
    def family(self) -> socket.AddressFamily:
        return super().family

    @functools.cached_property
    def type(self) -> socket.SocketKind:
        return super().type


@contextlib.contextmanager
def _borrowed_socket(listener: trio.abc.Listener[Any]) -> Iterator[socket.socket | None]:
    """Yield a standard library socket for the descriptor of a listener; None if the listener is not a socket.

    Trio's ``accept`` waits if the queue is empty, and goes through the scheduler if it is not. The standard library's,
    on the same non-blocking descriptor, does neither.
    """
    if not isinstance(listener, trio.SocketListener):
        yield None
        return
    trios = listener.socket
    borrowed = _ListeningSocket(trios.family, trios.type, trios.proto, fileno=trios.fileno())
    borrowed.settimeout(0)  # otherwise, `accept` would wait if socket.setdefaulttimeout was called
    try:
        yield borrowed
    finally:
        borrowed.detach()
