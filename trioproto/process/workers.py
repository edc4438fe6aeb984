"""Worker processes that share listening sockets, supervised by one nursery.

Task tree::

    the task that awaits supervise_until_signal, mostly trio.run's main task
    └── nursery of run_until_signal, with its tasks: see service.py
        └── nursery of supervise_until_signal
            ├── _notify_systemd: that the workers are ready, and alive
            └── nursery of supervise_workers
                └── _Supervision.keep_running, for each worker: starts it, and replaces it when it dies
                    └── nursery, while that process runs
                        ├── stop: in a stop, closes its standard input, and kills it if it does not stop in time
                        ├── watch: kills it if it hangs
                        └── the process, whose tasks are those in service.py
"""

import contextlib
import functools
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import attrs
import trio

from trioproto.process.listeners import ENDING_FDS, metrics_listeners, open_listeners
from trioproto.process.notices import VARIABLES, notice_interval, notify, notify_alive
from trioproto.process.scoreboard import VARIABLE, Scoreboard, new_scoreboard
from trioproto.process.service import BEAT_SECONDS, GRACE_PERIOD, HOST, RELOAD, run_until_signal

_log = logging.getLogger(__name__)

# A worker that dies is replaced at once, or if it ran for less than a second, after a wait that doubles each time.
SHORT_LIFE = 1.0
FIRST_WAIT = 0.1
LONGEST_WAIT = 30.0

# How long a worker may take to stop beyond its grace period before it is considered hung.
STOP_SECONDS = 10.0

# A worker without a heartbeat for this many seconds is considered hung; a starting one has to import everything first.
HANG_SECONDS = 10.0
START_SECONDS = 60.0

# The interval, in seconds, of checks whether starting workers serve.
STARTING_LOOK = 0.05

# The interpreter's options in `sys.flags`, where the value is how often each was given.
_INTERPRETER_OPTIONS = {
    "-b": "bytes_warning",
    "-B": "dont_write_bytecode",
    "-d": "debug",
    "-E": "ignore_environment",
    "-I": "isolated",
    "-O": "optimize",
    "-q": "quiet",
    "-s": "no_user_site",
    "-S": "no_site",
    "-v": "verbose",
}


def worker_program() -> list[str]:
    """Return the start of a worker's command line; append the arguments of ``python -m trioproto``.

    It runs this copy of the package, in this interpreter and with its options. It never imports from the current
    directory, even if this process does (``-P``).
    """
    options = [option for option, name in _INTERPRETER_OPTIONS.items() for _ in range(getattr(sys.flags, name))]
    options += [f"-W{action}" for action in sys.warnoptions]
    for name, value in sys._xoptions.items():  # noqa: SLF001 - documented despite its name
        options.append(f"-X{name}" if value is True else f"-X{name}={value}")
    return [sys.executable, *options, "-P", str(Path(__file__).with_name("worker.py"))]


async def supervise_until_signal(
    command: Callable[[Sequence[int]], Sequence[str]],
    count: int,
    port: int | None,
    *,
    host: str | Sequence[str] = HOST,
    unix: str | None = None,
    fds: Sequence[int] = (),
    grace_period: float = GRACE_PERIOD,
    reload: Callable[[], object] | None = None,
    stop_at_eof: bool = False,
    announce: Callable[[str], object] | None = None,
    metrics: tuple[str, int] | None = None,
) -> None:
    """Serve with ``count`` worker processes until SIGTERM or SIGINT comes, then stop them gracefully.

    This is `trioproto.serve_until_signal` for several processes: it opens the listeners, which the workers inherit,
    and supervises the workers instead of serving. The first signal stops new connections from beginning, and each
    worker stops gracefully. A second signal, `SAME_SIGNAL_SECONDS` after the first or later, kills them.

    Args:
        command: called with the descriptors of the listeners, returns a worker's command line; see
            `supervise_workers` for what a worker must do.
        count: how many workers, 1 or more.
        port: as for `trioproto.serve_until_signal`.
        host: see there.
        unix: see there.
        fds: see there.
        grace_period: seconds, 0 or more, that a worker's stop waits for requests in progress. A worker that is still
            running `STOP_SECONDS` later is killed.
        reload: see there. Unless it raises an exception, the workers reload, too. So it should check whether a reload
            will succeed; a failure is then logged once, instead of by each worker.
        stop_at_eof: see there.
        announce: see there. Called before the first worker is started; connections wait in the accept queue until then.
        metrics: see there. This process serves the sums over all workers. If a worker dies, its last `BEAT_SECONDS` are
            not counted.

    Raises:
        trioproto.process.listeners.ListenError: if it cannot listen there.
        ValueError: if there is nothing to listen on, or the port is out of range.
        ImportError: for ``metrics``, if prometheus_client is not installed.
        RuntimeError: outside the main thread.
        ExceptionGroup: with an `OSError`, if ``command`` cannot be started the first time.

    On cancellation, the workers are killed and waited for, and all listeners are closed.
    """
    inputs: set[trio.lowlevel.FdStream] = set()
    ready = trio.Event()
    if metrics is not None:
        from trioproto.process.metrics import serve_metrics  # noqa: PLC0415 - an extra

    def reload_all(check: Callable[[], object]) -> None:
        check()
        for stdin in inputs:
            # Not if it has ended, or has not yet read thousands of these.
            with contextlib.suppress(OSError):
                os.write(stdin.fileno(), RELOAD)

    async def supervise(listeners: list[trio.SocketListener], shutdown: trio.Event) -> None:
        inherited = [listener.socket.fileno() for listener in listeners]
        with new_scoreboard(count) as scoreboard:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_notify_systemd, scoreboard, ready)
                if metrics is not None:
                    nursery.start_soon(serve_metrics, metrics_listening, scoreboard)
                await supervise_workers(
                    command(inherited),
                    count,
                    listening_fds=inherited,
                    ending_fds=[fd for fd in inherited if fd not in fds],
                    shutdown=shutdown,
                    patience=grace_period + STOP_SECONDS,
                    inputs=inputs,
                    scoreboard=scoreboard,
                )
                nursery.cancel_scope.cancel()

    listening = open_listeners(port, host=host, unix=unix, fds=fds)
    async with metrics_listeners(metrics) as metrics_listening:
        await run_until_signal(
            supervise,
            listening,
            reload=None if reload is None else functools.partial(reload_all, reload),
            ready=ready,
            stop_at_eof=stop_at_eof,
            announce=announce,
        )


async def _notify_systemd(scoreboard: Scoreboard, ready: trio.Event) -> None:
    """Notify systemd once every worker serves, and then that the service is alive while any worker is."""
    interval = notice_interval()
    if interval == math.inf:
        return
    while 0 in scoreboard.beats:  # noqa: ASYNC110 - shared memory has no event
        await trio.sleep(STARTING_LOOK)
    notify("READY=1")
    ready.set()
    silence, before = 0.0, [0]
    while True:
        beats = scoreboard.beats.tolist()
        silence = 0.0 if beats != before else silence + interval
        before = beats
        if silence < HANG_SECONDS:
            stats = scoreboard.total()
            notify_alive(stats.accepted, stats.active)
        await trio.sleep(interval)


async def supervise_workers(
    command: Sequence[str],
    count: int,
    *,
    listening_fds: Sequence[int],
    ending_fds: Sequence[int] = (),
    shutdown: trio.Event,
    patience: float = math.inf,
    inputs: set[trio.lowlevel.FdStream] | None = None,
    scoreboard: Scoreboard | None = None,
) -> None:
    """Keep ``count`` processes running until ``shutdown`` is set, then stop them, and wait until they have ended.

    The workers share each socket and its accept queue; with SO_REUSEPORT, each would have its own queue. So queued
    connections are accepted by another worker if one dies or hangs. Those that it has accepted end with it. This
    process holds the sockets, too, so that the queues outlive all workers.

    Args:
        command: a worker's command line. It must serve on ``listening_fds`` until its standard input ends. That is a
            pipe, which this process closes to stop the worker, and which the kernel closes if this process dies.
            SIGTERM, SIGINT and SIGHUP are blocked in it.
        count: how many, 1 or more.
        listening_fds: descriptors of listening sockets, 3 or more, which the workers inherit under the same numbers.
        ending_fds: those of them whose sockets have no other server: in a stop, the workers must serve the connections
            in their queues (`trioproto.process.listeners.ending_fds`).
        shutdown: set to stop.
        patience: seconds, 0 or more, from ``shutdown`` until a worker that is still running is killed.
        inputs: a set that, while this runs, holds our ends of the pipes of all running workers.
        scoreboard: has a row for each worker, in which it counts its heartbeats
            (`trioproto.process.scoreboard.own_row`). A worker without one for `HANG_SECONDS`, or without the first one
            after `START_SECONDS`, is killed and replaced. None: heartbeats are not checked.

    Raises:
        OSError: if ``command`` cannot be started the first time. Later failures are logged and retried.

    On cancellation, the workers are killed (SIGKILL) and waited for.
    """
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}  # systemd's are ours

    async def start(row: int) -> trio.Process:
        board = {} if scoreboard is None else {VARIABLE: f"{scoreboard.fd} {row}"}
        return await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=listening_fds if scoreboard is None else [*listening_fds, scoreboard.fd],
            env=environment | {ENDING_FDS: " ".join(map(str, ending_fds))} | board,
            # A separate process group: a terminal's Ctrl-C reaches only the supervisor, which stops the workers.
            process_group=0,
            # A signal to all processes of a service, as from systemd, could reach a worker before it handles signals,
            # or stop it before the supervisor, so that no worker serves the queue. Only the supervisor handles signals.
            preexec_fn=functools.partial(
                signal.pthread_sigmask, signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            ),
        )

    supervision = _Supervision(start, shutdown, patience, set() if inputs is None else inputs, scoreboard)
    async with trio.open_nursery() as nursery:
        for row in range(count):
            nursery.start_soon(supervision.keep_running, row)


@attrs.frozen
class _Supervision:
    """Starts, watches and stops the workers of `supervise_workers`. In the log, they are numbered from 1."""

    start: Callable[[int], Awaitable[trio.Process]]
    shutdown: trio.Event
    patience: float
    inputs: set[trio.lowlevel.FdStream]
    scoreboard: Scoreboard | None

    async def keep_running(self, row: int) -> None:
        wait = FIRST_WAIT
        first = True
        while not self.shutdown.is_set():
            began = trio.current_time()
            try:
                end = await self._run(row)
            except OSError as error:
                if first:
                    raise
                _log.error("worker %d cannot be started: %s; trying again", row + 1, error.strerror)
            else:
                if self.shutdown.is_set():
                    return
                _log.error("worker %d %s; starting another", row + 1, end)
            first = False
            if trio.current_time() - began >= SHORT_LIFE:
                wait = FIRST_WAIT
                continue
            with trio.move_on_after(wait):
                await self.shutdown.wait()
            wait = min(2 * wait, LONGEST_WAIT)

    async def _run(self, row: int) -> str:
        """Run one worker until it ends, and return how it did."""
        process = await self.start(row)
        stdin = process.stdin
        assert isinstance(stdin, trio.lowlevel.FdStream)  # noqa: S101 - for the type checker
        self.inputs.add(stdin)
        end = ""
        try:
            async with stdin, trio.open_nursery() as nursery:

                async def stop() -> None:
                    await self.shutdown.wait()
                    await stdin.aclose()
                    await trio.sleep(self.patience)
                    _log.warning("worker %d did not stop in time: killed", row + 1)
                    process.kill()

                async def watch(scoreboard: Scoreboard) -> None:
                    nonlocal end
                    end = await self._silence(scoreboard, row)
                    process.kill()

                nursery.start_soon(stop)
                if self.scoreboard is not None:
                    nursery.start_soon(watch, self.scoreboard)
                await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.inputs.discard(stdin)
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):  # a killed process ends at once
                    await process.wait()
            if self.scoreboard is not None:
                self.scoreboard.beats[row] = self.scoreboard.active[row] = 0
        return end or _how_it_ended(process.returncode)

    async def _silence(self, scoreboard: Scoreboard, row: int) -> str:
        """Return once a worker has sent no heartbeat for too long, and say for how long. Never in a stop."""
        # This counts checks instead of setting a deadline, which would have passed after all processes were suspended.
        beats = looks = 0
        while self.shutdown.is_set() or looks * BEAT_SECONDS < (HANG_SECONDS if beats else START_SECONDS):
            await trio.sleep(BEAT_SECONDS)
            looks = looks + 1 if scoreboard.beats[row] == beats else 0
            beats = scoreboard.beats[row]
        return f"sent no heartbeat for {looks * BEAT_SECONDS:g} s: killed"


def _how_it_ended(status: int | None) -> str:
    """Say how a process ended. Signal 9 may come from the kernel's out-of-memory killer."""
    if status is not None and status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"exited with status {status}"
