"""A server as a process: it serves until a signal comes, and then stops without losing a request.

`serve_until_signal` is for a server in one process. `trioproto.process.workers.supervise_until_signal` does the same
for several. `run_until_signal` is what both have in common: listeners, signals, and the order of things in a stop.

Task tree::

    the task that awaits serve_until_signal, mostly trio.run's main task
    └── nursery of run_until_signal: cancelled by a second signal, and when the server has returned
        ├── _heed_signals: the first signal sets `stopping`
        ├── _heed_stdin, with `stop_at_eof`: so does the end of standard input
        ├── stop: then lets in no new connections, and sets `shutdown`
        └── nursery of serve_listeners, which the same task awaits: see trioproto/server.py
"""

import contextlib
import functools
import logging
import math
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import trio

from trioproto.addresses import format_address
from trioproto.connection import REQUEST_TIMEOUT
from trioproto.limits import ClientLimit
from trioproto.process.heartbeat import add_heartbeat
from trioproto.process.listeners import close_listeners, ending_fds, metrics_listeners, open_listeners
from trioproto.process.notices import notice_interval, notify, notify_alive
from trioproto.process.proxy_protocol import Network, behind_proxies, trusted_network
from trioproto.process.scoreboard import Scoreboard, give_way_to_others, new_scoreboard, own_row
from trioproto.server import OnTick, ServerStats, check_handler, check_settings, serve_listeners
from trioproto.tls import TLSStream

_log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

HOST = "127.0.0.1"
MAX_CONNECTIONS = 1000
GRACE_PERIOD = 10.0

# From when no new connections can begin until the accept queues are emptied: time for the last packet of TCP handshakes
# that had begun. It takes a round trip, which is less than this from one end of the world to the other.
HANDSHAKE_SECONDS = 0.35

# Signals that come within so many seconds of the first are part of it. What stops a server may well send several: a
# terminal, or systemd, signals all of a service's processes, and a wrapper among them passes on what it gets.
SAME_SIGNAL_SECONDS = 1.0

# How often a worker gives its supervisor a sign of life, and the metrics are brought up to date.
BEAT_SECONDS = 1.0

_STDIN = 0

# What a supervisor writes to the standard input of a worker, in one piece, when it has received SIGHUP itself.
RELOAD = b"reload\n"

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS: list[signal.Signals] = (
    [signal.SIGINT, signal.SIGTERM] if _HANGUP is None else [signal.SIGINT, signal.SIGTERM, _HANGUP]
)


async def serve_until_signal(
    handler: Callable[[Any], Awaitable[object]],
    port: int | None,
    *,
    host: str | Sequence[str] = HOST,
    unix: str | None = None,
    fds: Sequence[int] = (),
    proxy_protocol: Sequence[str | Network] = (),
    proxy_timeout: float = REQUEST_TIMEOUT,
    ssl_context: ssl.SSLContext | None = None,
    max_connections: int | None = MAX_CONNECTIONS,
    max_connections_per_client: int | None = None,
    grace_period: float = GRACE_PERIOD,
    tick: float | None = None,
    on_tick: OnTick | None = None,
    reload: Callable[[], object] | None = None,
    stop_at_eof: bool = False,
    announce: Callable[[str], object] | None = None,
    metrics: tuple[str, int] | None = None,
) -> ServerStats | None:
    """Serve until SIGTERM or SIGINT comes, then stop gracefully.

    This can be all that a program does::

        trio.run(serve_until_signal, handler, 9000)

    At the first signal, no new connections are let in. Those that wait in the accept queue are still served, requests
    that are under way are finished, idle connections are ended, and whatever is left after ``grace_period`` seconds is
    cancelled. A second signal, at least one second after the first (`SAME_SIGNAL_SECONDS`), cancels everything at
    once. Only one call at a time may run in a process, because a signal reaches only one of them.
    A signal that comes when it is about to return, or later, does what it did before the call.

    Args:
        handler: an async function that serves one connection, as for `trioproto.serve_listeners`.
        port: the TCP port, 0 to 65535; 0 lets the kernel pick one for each address. None: no TCP, only ``unix`` and
            ``fds``.
        host: the name or address to listen on, or several of them; all addresses that a name stands for. The default is
            for this machine alone; ``0.0.0.0`` and ``::`` are every address of it.
        unix: the path of a UNIX socket to listen on as well. Only this user may connect to it. A file that a dead
            server left is replaced, and the file is removed when the stop begins.
        fds: descriptors of listening sockets that this process inherited, to serve as well. They are closed when a stop
            begins: such a socket outlives this process, and whoever waits in its queue is left to its next server. For
            those that systemd passes, call `trioproto.process.listeners.activated_fds`.
        proxy_protocol: the proxies that every connection comes from: addresses, networks such as ``10.0.0.0/8``, or
            ``unix`` for whoever may connect to the UNIX sockets. Each connection begins with a PROXY header, of version
            1 or 2, before TLS, and the address that it names is the client's from there on. Connections from other
            addresses are reset, each with a warning. Empty: there are no PROXY headers.
        proxy_timeout: seconds, above 0, that a PROXY header may take.
        ssl_context: for TLS on all of them. None: plain connections.
        max_connections: how many connections are served at once, 1 or more; more wait in the kernel's queue. None: as
            many as come.
        max_connections_per_client: how many connections one client may have at once, 1 or more; more are reset. See
            `trioproto.serve_listeners`. None, the default: as many as come, because behind a proxy, or in a network
            with one address for all, many clients look like one.
        grace_period: seconds, 0 or more, that a stop waits for requests under way.
        tick: seconds, above 0, between two calls of ``on_tick``; see `trioproto.serve_listeners`.
        on_tick: awaited with the current `ServerStats` on each tick.
        reload: called when SIGHUP comes, which never disturbs a connection: for what can be read again, such as the
            TLS files (`trioproto.process.tls.ServerContext.reload`). An `OSError` that it raises is one line in the
            log, and any other exception is logged with its traceback. None: SIGHUP is logged and does nothing.
        stop_at_eof: whether the end of standard input stops the server like a first signal. Meanwhile, a line with
            ``reload`` on standard input is like SIGHUP.
        announce: called with each listener's address, such as ``127.0.0.1:9000`` or ``unix:PATH``, once all of them
            listen and a signal would stop the server gracefully. None: each address is logged, at level INFO.
        metrics: a host and a port, on which Prometheus may scrape ``/metrics``, until the server has stopped. The
            numbers are at most a second old (`BEAT_SECONDS`). Needs the extra ``metrics``. Whoever can connect there
            can read them. None: nothing is served there.

    Returns:
        The last `ServerStats`, or None if a second signal cancelled the server.

    Raises:
        trioproto.process.listeners.ListenError: an `OSError` whose text says where it cannot listen, and why.
        TypeError: for a ``handler`` that is no function.
        ValueError: for a setting out of its range, or if there is nothing to listen on.
        ImportError: for ``metrics``, if prometheus_client is not installed.
        RuntimeError: outside Python's main thread, which alone receives signals (`trio.open_signal_receiver`).
        ExceptionGroup: with what `trioproto.serve_listeners` raises later on.

    On cancellation, every connection is cancelled, every listener closed, and the UNIX socket's file removed. That is
    also done before any of the above is raised.
    """
    trusted = [trusted_network(network) for network in proxy_protocol]
    if not proxy_timeout > 0:
        raise ValueError(f"proxy_timeout must be above 0 seconds, not {proxy_timeout}")
    # Before anything is open.
    check_handler(handler)
    check_settings(tick, on_tick, max_connections, max_connections_per_client, grace_period)
    if ssl_context is not None:
        handler = _over_tls(handler, ssl_context)
    if trusted:
        # Only the header tells whose connection it is, so it is counted there, and not when it is accepted.
        limit = None if max_connections_per_client is None else ClientLimit(max_connections_per_client)
        max_connections_per_client = None
        handler = behind_proxies(handler, trusted, proxy_timeout, limit)
    outliving = set(fds).difference(ending_fds())
    inherited = own_row()
    interval, beat = _heartbeat(inherited)
    tick, on_tick = add_heartbeat(tick, on_tick, interval, beat)
    if metrics is not None:
        from trioproto.process.metrics import serve_metrics  # noqa: PLC0415 - an extra

    async def serve(listeners: list[trio.SocketListener], shutdown: trio.Event) -> ServerStats:
        beat(ServerStats(0, 0, 0, 0.0))
        notify("READY=1")  # whoever connects waits for the accept loop now, if at all
        serve_it = functools.partial(
            serve_listeners,
            handler,
            listeners,
            tick=tick,
            on_tick=on_tick,
            max_connections=max_connections,
            max_connections_per_client=max_connections_per_client,
            shutdown=shutdown,
            grace_period=grace_period,
            give_way=None if inherited is None else give_way_to_others(*inherited),
        )
        if inherited is None and metrics is None:
            return await serve_it()
        with _row(inherited) as (scoreboard, row):
            scoreboard.most[row] = max_connections or 0
            async with trio.open_nursery() as nursery:
                if metrics is not None:
                    nursery.start_soon(serve_metrics, metrics_listening, scoreboard)
                write = scoreboard.writer(row)
                result = await serve_it(on_start=lambda stats: nursery.start_soon(_report, stats, write))
                nursery.cancel_scope.cancel()
        return result

    listening = open_listeners(port, host=host, unix=unix, fds=fds)
    async with metrics_listeners(metrics) as metrics_listening:
        return await run_until_signal(
            serve, listening, outliving=outliving, reload=reload, stop_at_eof=stop_at_eof, announce=announce
        )


@contextlib.contextmanager
def _row(inherited: tuple[Scoreboard, int] | None) -> Iterator[tuple[Scoreboard, int]]:
    """Give this process's row in a scoreboard; without one from a supervisor, in one of its own."""
    if inherited is not None:
        yield inherited
        return
    with new_scoreboard(1) as scoreboard:
        yield scoreboard, 0


async def _report(stats: Callable[[], ServerStats], write: Callable[[ServerStats], None]) -> None:
    while True:
        write(stats())
        await trio.sleep(BEAT_SECONDS)


def _heartbeat(inherited: tuple[Scoreboard, int] | None) -> tuple[float, Callable[[ServerStats], object]]:
    """Return how often this process has to give a sign of life, and how: to its supervisor, or else to systemd."""
    if inherited is None:
        return notice_interval(), lambda stats: notify_alive(stats.accepted, stats.active)
    scoreboard, row = inherited

    def beat(_stats: ServerStats) -> None:
        scoreboard.beats[row] += 1

    return BEAT_SECONDS, beat


def _over_tls(
    handler: Callable[[Any], Awaitable[object]], context: ssl.SSLContext
) -> Callable[[trio.SocketStream], Awaitable[object]]:
    async def handle(stream: trio.SocketStream) -> None:
        await handler(TLSStream(stream, context, server_side=True))

    return handle


async def run_until_signal(
    serve: Callable[[list[trio.SocketListener], trio.Event], Awaitable[ResultT]],
    listening: contextlib.AbstractAsyncContextManager[list[trio.SocketListener]],
    *,
    outliving: Collection[int] = (),
    reload: Callable[[], object] | None = None,
    ready: trio.Event | None = None,
    stop_at_eof: bool = False,
    announce: Callable[[str], object] | None = None,
) -> ResultT | None:
    """Run ``serve(listeners, shutdown)`` until it returns: when SIGINT or SIGTERM comes, it is told to stop.

    Args:
        serve: serves on the listeners until the event is set, and then for as long as its stop takes.
        listening: gives the listeners. It is left when the stop begins, and then lets in no new connections;
            `HANDSHAKE_SECONDS` later, those whose handshakes had begun are queued, and the event is set.
        outliving: descriptors of those listeners whose sockets have another server. They are closed once the event is
            set, so that nothing more is accepted from them.
        reload: as for `serve_until_signal`.
        ready: set when systemd has been told that the service is ready. A reload before that says nothing of it. None:
            ``serve`` tells it at once.
        stop_at_eof: whether the end of standard input stops it, too, and a line ``reload`` there calls ``reload``.
        announce: called with each listener's address before ``serve``, when signals are already waited for. None: the
            addresses are logged.

    Returns:
        What ``serve`` returns, or None if a second signal, `SAME_SIGNAL_SECONDS` after the first, cancelled it.

    Raises:
        RuntimeError: outside the main thread.
        ExceptionGroup: with what ``serve`` raises. What ``listening`` and ``announce`` raise comes as it is.

    On cancellation, ``serve`` is cancelled. In the end, however that comes about, ``listening`` is left and every
    listener closed.
    """
    if announce is None:
        announce = functools.partial(_log.info, "listening on %s")
    result: ResultT | None = None
    stopping = trio.Event()
    shutdown = trio.Event()
    async with contextlib.AsyncExitStack() as accepting:
        listeners = await accepting.enter_async_context(listening)
        with contextlib.ExitStack() as closing:
            closing.callback(close_listeners, listeners)
            signals = closing.enter_context(trio.open_signal_receiver(*SIGNALS))
            for listener in listeners:
                announce(format_address(listener.socket.getsockname()))
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    await stopping.wait()
                    notify("STOPPING=1")
                    await accepting.aclose()
                    await trio.sleep(HANDSHAKE_SECONDS)
                    shutdown.set()
                    close_listeners([listener for listener in listeners if listener.socket.fileno() in outliving])

                nursery.start_soon(_heed_signals, signals, stopping, reload, ready, nursery.cancel_scope)
                if stop_at_eof:
                    nursery.start_soon(_heed_stdin, stopping, reload)
                nursery.start_soon(stop)
                result = await serve(listeners, shutdown)
                nursery.cancel_scope.cancel()
    return result


async def _heed_signals(
    signals: AsyncIterator[int],
    stopping: trio.Event,
    reload: Callable[[], object] | None,
    ready: trio.Event | None,
    under_way: trio.CancelScope,
) -> None:
    began = math.inf
    async for number in signals:
        if number == _HANGUP and ready is not None and not ready.is_set():
            _reload("SIGHUP", reload)
        elif number == _HANGUP:
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            _reload("SIGHUP", reload)
            notify("READY=1")
        elif began == math.inf:
            began = trio.current_time()
            stopping.set()
        elif trio.current_time() - began >= SAME_SIGNAL_SECONDS:
            _log.warning("a second signal: cancelled what was under way")
            under_way.cancel()


async def _heed_stdin(stopping: trio.Event, reload: Callable[[], object] | None) -> None:
    with contextlib.suppress(OSError):  # one that cannot be read, or is closed, has ended, too
        while data := await trio.to_thread.run_sync(os.read, _STDIN, 1024, abandon_on_cancel=True):
            if RELOAD in data:
                _reload("standard input", reload)
    stopping.set()


def _reload(source: str, reload: Callable[[], object] | None) -> None:
    if reload is None:
        _log.info("%s: there is nothing to reload", source)
        return
    try:
        reload()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with what is new, the service goes on with the old
        bug = None if isinstance(error, OSError) else error
        _log.error("%s: cannot reload: %s; nothing has changed", source, error, exc_info=bug)
    else:
        _log.info("%s: reloaded", source)
