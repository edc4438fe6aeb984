"""A TCP server in structured concurrency: one nursery, a task for each listener and each connection.

`serve_tcp` and `serve_listeners` take the same arguments as Trio's functions of these names (``handler_nursery``
aside) and more on top. A handler is ``async def handler(stream) -> None``; the server knows nothing of what it
speaks.
"""

import errno
import logging
import math
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import attrs
import trio

from trioproto.addresses import peer_name

_log = logging.getLogger(__name__)

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
ListenerT = TypeVar("ListenerT", bound=trio.abc.Listener[Any])

# The process or the system is short of what a new socket takes (accept(2)). Connections stay queued in the kernel
# until others have ended.
_CAPACITY_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
CAPACITY_WAIT = 0.1

OnTick = Callable[["ServerStats"], Awaitable[object]]


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


class _Connections:
    """Runs a task for each connection in one nursery, and keeps count."""

    def __init__(self, handler: Callable[[Any], Awaitable[object]], nursery: trio.Nursery) -> None:
        self._handler = handler
        self._nursery = nursery
        self._began = trio.current_time()
        self._accepted = 0
        self._active = 0
        self._crashed = 0

    def stats(self) -> ServerStats:
        uptime = trio.current_time() - self._began
        return ServerStats(self._accepted, self._active, self._crashed, uptime)

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
            _log.debug("connection %d ended", number)
            await trio.aclose_forcefully(stream)

    def _log_crash(self, stream: trio.abc.Stream, number: int, crash: Exception) -> None:
        self._crashed += 1
        _log.error("connection %d from %s: the handler crashed", number, peer_name(stream), exc_info=crash)


async def serve_listeners(
    handler: Callable[[StreamT], Awaitable[object]],
    listeners: list[ListenerT],
    *,
    tick: float | None = None,
    on_tick: OnTick | None = None,
    task_status: trio.TaskStatus[list[ListenerT]] = trio.TASK_STATUS_IGNORED,
) -> None:
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
        task_status: for `trio.Nursery.start`, which returns ``listeners``.

    Raises:
        ValueError: for a ``tick`` that is not above 0, or an ``on_tick`` without ``tick``.
        OSError: if accepting fails for other reasons than a lack of descriptors or memory. That is waited out.

    On cancellation, every connection is cancelled and every listener closed.
    """
    if tick is not None and not tick > 0:
        raise ValueError(f"tick is {tick}: not above 0 seconds")
    if on_tick is not None and tick is None:
        raise ValueError("on_tick needs a tick")
    async with trio.open_nursery() as nursery:
        connections = _Connections(handler, nursery)
        for number, listener in enumerate(listeners):
            # One loop ticks, so that the ticks come once however many listeners there are.
            interval = tick if tick is not None and number == 0 else math.inf
            nursery.start_soon(_accept_loop, listener, connections, interval, on_tick)
        task_status.started(listeners)


async def serve_tcp(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    tick: float | None = None,
    on_tick: OnTick | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen for TCP connections, and run ``handler(stream)`` in a task of its own for each.

    Args:
        handler: an async function that serves one connection.
        port: 0 to 65535; 0 lets the kernel pick one.
        host: the name or address to listen on, all that a name stands for; None for all of this machine's.
        backlog: how many connections the kernel queues before they are accepted; None for as many as it allows.
        tick: as for `serve_listeners`.
        on_tick: as for `serve_listeners`.
        task_status: for `trio.Nursery.start`, which returns the listeners.

    Raises:
        OSError: if it cannot listen there; and what `serve_listeners` raises.

    On cancellation, every connection is cancelled and every listener closed.
    """
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    await serve_listeners(handler, listeners, tick=tick, on_tick=on_tick, task_status=task_status)


async def _accept_loop(
    listener: trio.abc.Listener[Any], connections: _Connections, tick: float, on_tick: OnTick | None
) -> None:
    began = trio.current_time()
    number = 1
    async with listener:
        while True:
            # Inside the scope the loop runs undisturbed; only the tick gets out of it.
            with trio.move_on_after(max(0.0, began + number * tick - trio.current_time())):
                while True:
                    connections.start(await _accept(listener))
            if on_tick is not None:
                await on_tick(connections.stats())
            # Counted from the beginning, the schedule cannot drift; a tick whose time has passed is left out.
            number = max(number + 1, math.ceil((trio.current_time() - began) / tick))


async def _accept(listener: trio.abc.Listener[StreamT]) -> StreamT:
    """Accept one connection, waiting out a lack of descriptors or memory."""
    while True:
        try:
            return await listener.accept()
        except OSError as error:
            if error.errno not in _CAPACITY_ERRNOS:
                raise
            _log.error("cannot accept: %s; trying again in %s s", os.strerror(error.errno), CAPACITY_WAIT)
            await trio.sleep(CAPACITY_WAIT)
