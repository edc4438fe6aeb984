"""Worker processes that share listening sockets, supervised by one nursery."""

import logging
import math
import signal
import subprocess
from collections.abc import Callable, Sequence

import trio

from trioproto.process.listeners import open_listeners
from trioproto.process.service import GRACE_PERIOD, HOST, run_until_signal

_log = logging.getLogger(__name__)

# A worker that dies is replaced at once; if it lived for less than a second, after a wait that doubles each time.
SHORT_LIFE = 1.0
FIRST_WAIT = 0.1
LONGEST_WAIT = 30.0

# What a worker may take to stop beyond its grace period, before it is taken to hang.
STOP_SECONDS = 10.0


async def supervise_until_signal(
    command: Callable[[Sequence[int]], Sequence[str]],
    count: int,
    port: int | None,
    *,
    host: str | Sequence[str] = HOST,
    unix: str | None = None,
    fds: Sequence[int] = (),
    grace_period: float = GRACE_PERIOD,
    stop_at_eof: bool = False,
    announce: Callable[[str], object] | None = None,
) -> None:
    """Have ``count`` worker processes serve until SIGTERM or SIGINT comes, then stop them gracefully.

    This is `trioproto.serve_until_signal` for several processes: it opens the listeners, which the workers inherit,
    and supervises the workers instead of serving. At the first signal, no new connections are let in, and each worker
    is sent SIGTERM. A second signal kills them.

    Args:
        command: called with the descriptors of the listeners, returns a worker's command line; see
            `supervise_workers` for what a worker must do.
        count: how many workers, 1 or more.
        port: as for `trioproto.serve_until_signal`, like what is not mentioned here.
        host: see there.
        unix: see there.
        fds: see there.
        grace_period: seconds, 0 or more, that a worker's own stop waits for requests under way. One that has not
            ended `STOP_SECONDS` after that is killed.
        stop_at_eof: see there.
        announce: see there. Called before the first worker is started; connections wait in the accept queue until then.

    Raises:
        trioproto.process.listeners.ListenError: if it cannot listen there.
        ValueError: if there is nothing to listen on, or the port is out of its range.
        RuntimeError: outside Python's main thread.
        ExceptionGroup: with an `OSError`, if ``command`` cannot be started at all.

    On cancellation, the workers are killed and waited for, and every listener is closed.
    """

    async def supervise(listeners: list[trio.SocketListener], shutdown: trio.Event) -> None:
        inherited = [listener.socket.fileno() for listener in listeners]
        patience = grace_period + STOP_SECONDS
        await supervise_workers(
            command(inherited), count, listening_fds=inherited, shutdown=shutdown, patience=patience
        )

    listening = open_listeners(port, host=host, unix=unix, fds=fds)
    await run_until_signal(supervise, listening, stop_at_eof=stop_at_eof, announce=announce)


async def supervise_workers(
    command: Sequence[str],
    count: int,
    *,
    listening_fds: Sequence[int],
    shutdown: trio.Event,
    patience: float = math.inf,
) -> None:
    """Keep ``count`` processes running until ``shutdown`` is set, then have each stop, and wait for them.

    The kernel gives each connection to one of the processes that listen. While this process holds the sockets
    too, a connection that is queued when a worker dies goes to another.

    Args:
        command: a worker's command line; it serves on the descriptors of ``listening_fds``, writes to standard output
            once it does, and from then on stops on SIGTERM. Its standard input is a pipe that ends when this process
            does, however that comes about.
        count: how many, 1 or more.
        listening_fds: descriptors of listening sockets, which the workers inherit under the same numbers.
        shutdown: set to stop.
        patience: seconds, 0 or more, from ``shutdown`` until a worker that has not ended is killed.

    Raises:
        OSError: if ``command`` cannot be started at all. If it could be, but cannot be started again, that is logged,
            and tried again.

    On cancellation, the workers are killed (SIGKILL) and waited for.
    """
    async with trio.open_nursery() as nursery:
        for number in range(1, count + 1):
            nursery.start_soon(_keep_running, number, command, listening_fds, shutdown, patience)


async def _keep_running(
    number: int, command: Sequence[str], listening_fds: Sequence[int], shutdown: trio.Event, patience: float
) -> None:
    wait = FIRST_WAIT
    first = True
    while not shutdown.is_set():
        began = trio.current_time()
        try:
            status = await _run_worker(command, listening_fds, shutdown, patience)
        except OSError as error:
            if first:
                raise
            _log.error("worker %d cannot be started: %s; trying again", number, error.strerror)
        else:
            if shutdown.is_set():
                return
            _log.error("worker %d ended with status %d; starting another", number, status)
        first = False
        if trio.current_time() - began >= SHORT_LIFE:
            wait = FIRST_WAIT
            continue
        with trio.move_on_after(wait):
            await shutdown.wait()
        wait = min(2 * wait, LONGEST_WAIT)


async def _run_worker(
    command: Sequence[str], listening_fds: Sequence[int], shutdown: trio.Event, patience: float
) -> int:
    """Run one worker until it ends, and return its exit status (as `subprocess.Popen.returncode`)."""
    # A process group of its own, so that a terminal's Ctrl-C reaches the supervisor alone, and it stops the workers.
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=listening_fds, process_group=0
    )
    assert process.stdin is not None  # noqa: S101 - for the type checker
    assert process.stdout is not None  # noqa: S101
    try:
        async with process.stdin, process.stdout as stdout, trio.open_nursery() as nursery:

            async def stop() -> None:
                await shutdown.wait()
                with trio.move_on_after(patience):
                    # The first that it writes is that it serves. Before that, SIGTERM would kill it, and connections
                    # that are queued might find nobody else to serve them.
                    await stdout.receive_some(1)
                    process.send_signal(signal.SIGTERM)
                    await trio.sleep_forever()
                process.kill()

            nursery.start_soon(stop)
            status = await process.wait()
            nursery.cancel_scope.cancel()
    finally:
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):  # a killed process ends at once
                await process.wait()
    return status
