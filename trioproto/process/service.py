"""A server as a process: serving until a signal comes, then stopping without loss."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

# From when no new connections can begin until the accept queues are emptied: time for handshakes that had begun.
HANDSHAKE_SECONDS = 0.1

_STDIN = 0


async def serve_until_signal(
    serve: Callable[[trio.Event], Awaitable[object]],
    accepting: contextlib.AsyncExitStack,
    announce: Callable[[], object],
    *,
    stop_at_eof: bool = False,
) -> None:
    """Run ``serve(shutdown)`` until SIGINT or SIGTERM comes, then stop gracefully; at once, if another one comes.

    Args:
        serve: serves until the event that it is given is set, and then for as long as its stop takes.
        accepting: what lets new connections in. Closed when the stop begins.
        announce: says where the service is to be had; called when it is, and signals are waited for.
        stop_at_eof: whether to stop, too, when standard input ends.

    On cancellation, ``serve`` is cancelled.
    """
    stopping = trio.Event()
    shutdown = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def heed_signals(signals: AsyncIterator[int]) -> None:
                await anext(signals)
                stopping.set()
                await anext(signals)
                nursery.cancel_scope.cancel()

            async def heed_stdin() -> None:
                while await trio.to_thread.run_sync(os.read, _STDIN, 1024, abandon_on_cancel=True):
                    pass
                stopping.set()

            async def stop() -> None:
                await stopping.wait()
                await accepting.aclose()
                await trio.sleep(HANDSHAKE_SECONDS)
                shutdown.set()

            nursery.start_soon(heed_signals, signals)
            if stop_at_eof:
                nursery.start_soon(heed_stdin)
            nursery.start_soon(stop)
            announce()
            await serve(shutdown)
            nursery.cancel_scope.cancel()
