"""A server as a process: it serves until a signal comes, and then stops without losing a request.

`serve_until_signal` serves in one process, `trioproto.process.workers.supervise_until_signal` in several. Both use
`run_until_signal` for listeners, signals, and the order of steps in a stop.

Task tree::

    the task that awaits serve_until_signal, mostly trio.run's main task
    └── nursery of run_until_signal: cancelled by a second signal, and when the server has returned
        ├── _handle_signals: the first signal sets `stopping`
        ├── _handle_stdin, with `stop_at_eof`: so does the end of standard input
        ├── stop: then stops new connections from beginning, and sets `shutdown`
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

# The wait between stopping new connections and emptying the accept queues, so that TCP handshakes that have begun can
# complete. That takes one round trip, which is shorter than this even around the world.
HANDSHAKE_SECONDS = 0.35

# Signals within this many seconds of the first count as the same one. A server may well get several: a terminal, or
# systemd, signals all processes of a service, and a wrapper among them forwards what it receives.
SAME_SIGNAL_SECONDS = 1.0

# The interval, in seconds, of a worker's heartbeats, and of updates to the metrics.
BEAT_SECONDS = 1.0

_STDIN = 0

# What a supervisor writes to the standard input of each worker, in one write, when it receives SIGHUP.
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

    At the first signal, the server stops accepting new connections. Those in the accept queue are still served,
    requests in progress are finished, idle connections are closed, and the rest is cancelled after ``grace_period``
    seconds. A second signal, at least one second after the first (`SAME_SIGNAL_SECONDS`), cancels everything at once.
    Run only one call at a time in a process, because a signal reaches only one of them. A signal that comes when it is
    about to return, or later, has the same effect as before the call.

    Args:
        handler: an async function that serves one connection, as for `trioproto.serve_listeners`.
        port: the TCP port, 0 to 65535; 0 lets the kernel pick one for each address. None: no TCP, only ``unix`` and
            ``fds``.
        host: the name or address to listen on, or several of them. For a name, all of its addresses are used. The
            default can be reached from this machine only; ``0.0.0.0`` and ``::`` listen on all its addresses.
        unix: the path of a UNIX socket to listen on as well. Only this user may connect to it. A dead server's file is
            replaced, and the file is removed when the stop begins.
        fds: descriptors of inherited listening sockets to serve as well. They are closed when a stop begins: such a
            socket outlives this process, and its next server serves the connections in its queue. For those that
            systemd passes, call `trioproto.process.listeners.activated_fds`.
        proxy_protocol: the proxies that all connections come from: addresses, networks such as ``10.0.0.0/8``, or
            ``unix`` for all UNIX sockets. Each connection must begin with a PROXY header, of version 1 or 2, before
            TLS; its address is then used as the client's. Connections from other addresses are reset, each with a
            warning. Empty: no PROXY headers.
        proxy_timeout: seconds, above 0, that a PROXY header may take.
        ssl_context: for TLS on all of them. None: no TLS.
        max_connections: how many connections are served at once, 1 or more; more wait in the accept queue. None: no
            limit.
        max_connections_per_client: how many connections one client may have at once, 1 or more; more are reset. See
            `trioproto.serve_listeners`. None, the default: no limit, because clients behind a proxy or NAT share an
            address.
        grace_period: seconds, 0 or more, that a stop waits for requests in progress.
        tick: seconds, above 0, between two calls of ``on_tick``; see `trioproto.serve_listeners`.
        on_tick: awaited with the current `ServerStats` on each tick.
        reload: called on SIGHUP, to load files again, such as the TLS files
            (`trioproto.process.tls.ServerContext.reload`). Connections are not affected. An `OSError` from it is logged
            in one line, any other exception with its traceback. None: SIGHUP is logged and has no effect.
        stop_at_eof: whether the end of standard input stops the server, like a first signal. A line ``reload`` on
            standard input then has the effect of SIGHUP.
        announce: called with each listener's address, such as ``127.0.0.1:9000`` or ``unix:PATH``, once all of them
            listen and a signal would stop the server gracefully. None: each address is logged, at level INFO.
        metrics: a host and a port, on which Prometheus can scrape ``/metrics`` until the server has stopped. The values
            are at most one second old (`BEAT_SECONDS`). Requires the extra ``metrics``. There is no access control.
            None: no metrics.

    Returns:
        The last `ServerStats`, or None if a second signal cancelled the server.

    Raises:
        trioproto.process.listeners.ListenError: an `OSError` whose text says where it cannot listen, and why.
        TypeError: if ``handler`` is not a function.
        ValueError: if an argument is out of range, or there is nothing to listen on.
        ImportError: for ``metrics``, if prometheus_client is not installed.
        RuntimeError: outside the main thread, because only it receives signals (`trio.open_signal_receiver`).
        ExceptionGroup: with what `trioproto.serve_listeners` raises while it serves.

    On cancellation, and before any of the above is raised, all connections are cancelled, all listeners closed, and the
    UNIX socket's file removed.
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
        # The client's address is in the header, so connections are counted after that, and not when they are accepted.
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
        notify("READY=1")  # connections from now on wait in the accept queue until the accept loop starts
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
    """Yield this process's row in the supervisor's scoreboard, or without a supervisor, in a new one."""
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
    """Return the interval of this process's heartbeats, and a function that sends one to its supervisor or systemd."""
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
    """Run ``serve(listeners, shutdown)`` until it returns. SIGINT or SIGTERM makes it stop.

    Args:
        serve: serves on the listeners until the event is set, and then for as long as its stop takes.
        listening: yields the listeners. It is exited when the stop begins, and must then stop new connections from
            beginning; the event is set `HANDSHAKE_SECONDS` later, when handshakes that had begun are complete.
        outliving: descriptors of those listeners whose sockets have another server. They are closed once the event is
            set, so that nothing more is accepted from them.
        reload: as for `serve_until_signal`.
        ready: set once systemd has been notified that the service is ready; until then, it is not notified of reloads.
            None: ``serve`` notifies it at once.
        stop_at_eof: as for `serve_until_signal`.
        announce: called with each listener's address before ``serve``, when signals are already handled. None: the
            addresses are logged.

    Returns:
        What ``serve`` returns, or None if a second signal, `SAME_SIGNAL_SECONDS` after the first, cancelled it.

    Raises:
        RuntimeError: outside the main thread.
        ExceptionGroup: with what ``serve`` raises. Exceptions from ``listening`` and ``announce`` are not wrapped.

    On cancellation, ``serve`` is cancelled. In any case, ``listening`` is exited and all listeners are closed.
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

                nursery.start_soon(_handle_signals, signals, stopping, reload, ready, nursery.cancel_scope)
                if stop_at_eof:
                    nursery.start_soon(_handle_stdin, stopping, reload)
                nursery.start_soon(stop)
                result = await serve(listeners, shutdown)
                nursery.cancel_scope.cancel()
    return result


async def _handle_signals(
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
            _log.warning("second signal: cancelled all connections")
            under_way.cancel()


async def _handle_stdin(stopping: trio.Event, reload: Callable[[], object] | None) -> None:
    with contextlib.suppress(OSError):  # if it is closed or cannot be read, it has ended, too
        while data := await trio.to_thread.run_sync(os.read, _STDIN, 1024, abandon_on_cancel=True):
            if RELOAD in data:
                _reload("standard input", reload)
    stopping.set()


def _reload(source: str, reload: Callable[[], object] | None) -> None:
    if reload is None:
        _log.info("%s: nothing to reload", source)
        return
    try:
        reload()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the new files, the old ones stay in use
        bug = None if isinstance(error, OSError) else error
        _log.error("%s: cannot reload: %s; nothing has changed", source, error, exc_info=bug)
    else:
        _log.info("%s: reloaded", source)
