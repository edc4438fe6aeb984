"""A TCP server in structured concurrency: one nursery, a task for each listener and each connection.

`serve_tcp` and `serve_listeners` take the same arguments as Trio's functions of these names (``handler_nursery``
aside) and more on top. A handler is ``async def handler(stream) -> None``; the server knows nothing of what it
speaks.

Who supervises whom::

    the task that awaits serve_listeners: waits for `shutdown`, then for all below
    └── nursery: cancels what is left when the grace period is over
        ├── _Acceptor.run, for each listener: accepts, and starts the tasks of connections
        ├── _Connections._run, for each connection: awaits the handler; a crash is logged, and ends here
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

# Has one record for each connection that has ended. An access log is this logger at level DEBUG.
_access_log = logging.getLogger("trioproto.access")

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

# A process that has more connections than others leaves a new one to them. They mostly take it within a few turns of
# the scheduler, or within some milliseconds where they have to wait for a core. If nobody does, they are busy, or hang:
# then it accepts so many itself before it asks again.
GIVE_WAY_PAUSES = [0.0] * 20 + [0.001] * 4
GIVE_WAY_BATCH = 4

# So many such connections in a row are no accident, but something that refuses all of them, such as a sandbox. Then the
# acceptor waits like one that is short of descriptors.
LOST_IN_A_ROW = 100

# In a stop, how long a listener that is no socket is asked whether a connection waits.
LAST_LOOK = 0.01

# In a stop, for how many seconds the connections that are queued are still accepted. Where they go on arriving, or wait
# for places at the limit, the queue would never be seen empty, and the grace period would end in cut requests.
EMPTYING_SECONDS = 1.0


# The bounds, in seconds, of `ServerStats.durations`: from connections for one request to those that last for days.
DURATIONS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)


@attrs.frozen
class ServerStats:
    """What a server has done so far: a snapshot.

    Attributes:
        accepted: connections since the server began.
        active: connections open now.
        crashed: connections whose handler raised an exception.
        uptime: seconds since the server began, on Trio's clock.
        refused: how many of ``accepted`` were ended unserved, because their client had too many, or because they came
            from no trusted proxy.
        accept_errors: how often accepting has failed: a connection was lost before, or descriptors or memory are short.
        received: bytes of all connections, open ones included, as far as a `trioproto.Connection` received them.
        sent: bytes that the system took to be sent to clients, likewise.
        requests: requests that were read, likewise.
        ended: connections that have ended, by how they did; without those that were refused.
        durations: how many of these took up to each of `DURATIONS`, and not up to the one before; and how many longer.
        seconds: how many seconds these took, all together.
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
    """Accept connections from ``listeners``, and run ``handler(stream)`` in a task of its own for each.

    A handler's crash is logged with its traceback, ends its own connection, and nothing else. A stream that the
    handler leaves open is closed forcefully.

    Args:
        handler: an async function that serves one connection.
        listeners: where connections come from, one or more. They are closed in the end.
        tick: seconds, above 0, between two wake-ups of the accept loop, as by the timeout of ``accept()`` in a
            game server's loop. None: the loop just waits.
        on_tick: awaited in the accept loop on each tick, with the `ServerStats` of that moment. The nth tick is
            due ``n * tick`` seconds after the start, whatever the connections and the ticks before it did; those
            that are missed because one took too long are left out. While it runs, the first listener's new
            connections wait in the kernel's queue. An exception that it raises ends the server.
        max_connections: how many connections are served at once, 1 or more; the kernel's queue holds the rest, and
            none is refused. None: as many as come.
        max_connections_per_client: how many connections one client may have at once, 1 or more. A client is an IPv4
            address, or an IPv6 network of 64 bits; those that have neither, as on UNIX sockets, are not limited. What
            is more is reset at once, takes no place of ``max_connections``, and counts as `ServerStats.refused`; the
            first of them is logged, and again after the client has had fewer. None: as many as come.
        shutdown: stops the server once it is set. Connections that wait in the kernel's queue are still served, as
            far as they can be accepted within a second (`EMPTYING_SECONDS`), and the listeners closed. A listener that
            its owner closes at the same time, because its socket has another server to serve its queue, is left alone.
            Handlers with a `trioproto.Connection` finish the requests that are under way and end; other handlers are
            waited for.
        grace_period: seconds, 0 or more, from ``shutdown`` until the connections that are left are cancelled. The
            default is to wait for all of them.
        give_way: for processes that share listening sockets: called with the number of open connections before each is
            accepted. While it returns True, because others have fewer, they are given some milliseconds to accept it
            first. None: whoever is first accepts.
        on_start: called once, before anything is accepted, with a function that returns the `ServerStats` of the moment
            whenever it is called: unlike ``on_tick``, also during a stop.
        task_status: for `trio.Nursery.start`, which returns ``listeners``.

    Returns:
        The last `ServerStats`, when ``shutdown`` was set and every connection has ended.

    Raises:
        TypeError: for a ``handler`` that is no function.
        ValueError: for a setting out of its range, an ``on_tick`` without ``tick``, or no listeners: a server that
            nobody can connect to is a mistake, and without an acceptor nothing would tick.
        OSError: in the nursery's exception group, if accepting fails because of the listener itself (accept(2):
            EBADF, EINVAL, ENOTSOCK). Errors of one connection pass; a lack of descriptors or memory is logged once
            and waited out.

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
            # One loop ticks, so that the ticks come once however many listeners there are.
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
    """Listen for TCP connections, and run ``handler(stream)`` in a task of its own for each.

    Args:
        handler: an async function that serves one connection.
        port: 0 to 65535; 0 lets the kernel pick one.
        host: the name or address to listen on, all that a name stands for. None, the default, is every address of this
            machine, as for `trio.serve_tcp`: give ``127.0.0.1`` to a server for this machine alone.
        backlog: how many connections the kernel queues before they are accepted; None for as many as it allows.
        tick: as for `serve_listeners`, like all that follows.
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
    # Before anything is open that would be left so.
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
    """Raise `TypeError` for what is no function, such as the coroutine that a call of one has returned."""
    if not callable(handler):
        raise TypeError(f"handler must be an async function, not {handler!r}: pass the function without calling it")


def check_settings(
    tick: float | None,
    on_tick: OnTick | None,
    max_connections: int | None,
    max_connections_per_client: int | None,
    grace_period: float,
) -> None:
    """Raise `ValueError` for a setting of `serve_listeners` that is out of its range."""
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
    """Runs a task for each connection in one nursery, and keeps count."""

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
            # A reset leaves nothing behind in the kernel, and tells the client that this is no end in order.
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
            # A nursery in the handler may group its bug with a cancellation. That one has to go on.
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
        self._lost = 0  # connections in a row that were gone, or refused, before they were accepted

    async def run(self, tick: float, on_tick: OnTick | None, until_shutdown: trio.CancelScope) -> None:
        """Accept until ``until_shutdown`` is cancelled, then take in what is still queued, and close the listener."""
        async with self._listener:
            with _borrowed_socket(self._listener) as listening:
                began = trio.current_time()
                number = 1
                with until_shutdown, self._ignore_closing_in_a_stop():
                    while True:
                        # Inside the scope the loop runs undisturbed; only the tick gets out of it.
                        with trio.move_on_after(max(0.0, began + number * tick - trio.current_time())):
                            await self._accept(listening, forever=True)
                        if on_tick is not None:
                            await on_tick(self._connections.stats())
                        # Counted from the beginning, the schedule cannot drift; a tick that is past is left out.
                        number = max(number + 1, math.ceil((trio.current_time() - began) / tick))
                with trio.move_on_after(EMPTYING_SECONDS), self._ignore_closing_in_a_stop():
                    await self._accept(listening, forever=False)

    async def _accept(self, listening: socket.socket | None, *, forever: bool) -> None:
        """Accept and start connections: for ever, or as long as some are queued."""
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
                    if self._listener.socket.fileno() == -1:  # and ``listening`` may be another's by now
                        raise trio.ClosedResourceError("this listener was closed")
                    empty = self._start_queued(listening, sure)
                else:
                    # Two listeners that are no sockets may both wait here for the last place: one is served too many.
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
        """Leave what is queued to processes with fewer connections, for a moment.

        Returns:
            How many may be accepted before they are given way again.

        The kernel does not share connections out: epoll wakes all that wait for a listening socket, the first to ask is
        given the connection, and that is mostly the same one. With a queue for each process (SO_REUSEPORT), a hash of
        the addresses would share them, whatever each process has, and the queue of one that ends would be lost.
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
        """Start the connections that are queued, as far as there is room: a burst in one wake-up.

        Args:
            listening: the socket.
            sure: how many are started, whether or not other processes have fewer connections.

        Returns:
            Whether the queue is empty now.

        Raises:
            OSError: what accept(2) reports.
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
    """Name a listener for log lines: the address on which it listens, or its class if it has none."""
    if isinstance(listener, trio.SSLListener):
        listener = listener.transport_listener
    if isinstance(listener, trio.SocketListener):
        return format_address(listener.socket.getsockname())
    address = getattr(listener, "address", None)  # a network in memory has addresses, too
    return type(listener).__name__ if address is None else format_address(address)


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
