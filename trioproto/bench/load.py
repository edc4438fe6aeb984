"""Puts load on a server and measures its rate, errors and latencies.

`measure` starts each load generator as a separate process, so that one core is not the limit::

    python -m trioproto.bench.load LOAD NUMBER

LOAD is a `Load` in JSON, and NUMBER is this process's index. It opens its connections, and writes its `Measurement` so
far to standard output, as a line of JSON. A byte on standard input starts the load. From then on, it writes such a line
several times a second, and the last one when it is done. The end of standard input ends the load early. So the measured
time begins when all connections have been opened, or have failed to open.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Self

import attrs
import trio
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from trioproto.addresses import failure_reason, format_address
from trioproto.bench.errors import BenchError
from trioproto.op import INT32_MAX, INT32_MIN, Reply, Request, calculate
from trioproto.streams import RECEIVE_SIZE

# Seconds between a connection's failure and its reconnect, to spare a server that is down.
BACK_OFF = 0.1
# Seconds to wait for missing replies after the load has ended.
DRAIN = 1.0
# The name of the error that a reply does not match its request.
WRONG_REPLY = "wrong reply"
# Seconds between a load generator's reports.
REPORT_INTERVAL = 0.25

# Latencies are recorded in integer nanoseconds, from 1 to a day (longer ones as a day), with three significant digits.
_LONGEST = 24 * 3600 * 10**9
_DIGITS = 3
# The number of different requests, sent in turn, so that replies to the wrong request are detected.
_CYCLE = 8
# poll(2) and epoll_wait(2) time out in integer milliseconds, rounded up.
_TIMER = 0.001
# This many bytes fit into the socket buffers even if the peer does not receive, so sending them cannot block.
_BUFFERED = 16384
# Requests that were due but not sent are recorded in at most about this many steps.
_OVERDUE_STEPS = 1000


def _histogram() -> HdrHistogram:
    return HdrHistogram(1, _LONGEST, _DIGITS)


@attrs.frozen
class Load:
    """The load on a server.

    Attributes:
        protocol: ``"echo"`` or ``"op"``.
        host: the server's name or address.
        port: the server's port.
        connections: how many are kept open.
        size: bytes in each echo message, or operands in each op request.
        depth: the maximum number of requests in flight on each connection.
        duration: seconds.
        rate: requests a second over all connections, sent even if the server does not keep up (open loop). None: send
            each request as soon as the reply to an earlier one has arrived (closed loop).
        processes: how many generate the load, at most one for each connection.
    """

    protocol: str
    host: str
    port: int
    connections: int = 50
    size: int = 64
    depth: int = 1
    duration: float = 10.0
    rate: float | None = None
    processes: int = 1


@attrs.define
class Measurement:
    """The results of a load, or of a part of it.

    Attributes:
        seconds: the measured time: the load's duration, or longer if the last reply came later.
        answered: requests with a correct reply.
        unanswered: requests that were lost with their connection, or whose reply was still missing at the end.
        errors: counts of connection errors: ``"end of stream"`` (before all replies), ``"wrong reply"``, or that of a
            system call: ``"connection refused"``, ``"connection reset by peer"``.
        latencies: in nanoseconds, from when a request was sent, or in an open loop was due, until its reply arrived.
            Requests without a reply at the end are included, with the time that they had waited.
        busy: the share of the time in which the busiest load generator used the CPU, 0 to 1. Near 1, the load
            generators may limit the rate.
    """

    seconds: float = 0.0
    answered: int = 0
    unanswered: int = 0
    errors: Counter[str] = attrs.Factory(Counter)
    latencies: HdrHistogram = attrs.Factory(_histogram)
    busy: float = 0.0

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return self.answered / self.seconds if self.seconds else 0.0

    def record(self, latency: float, count: int = 1) -> None:
        """Record ``latency``, in seconds, ``count`` times."""
        # HdrHistogram's correction for coordinated omission (`record_corrected_value`) is not used. It adds the
        # requests that a stalled client would have sent meanwhile. In an open loop, none is missing: each request is
        # recorded with its latency from when it was due, so the correction would count the stall twice. In a closed
        # loop, there is no rate from which to compute what is missing.
        self.latencies.record_value(min(max(1, round(latency * 1e9)), _LONGEST), count)

    def percentile(self, percent: float) -> float:
        """Return the latency, in seconds, that ``percent`` % of those recorded did not exceed; 0 without any."""
        return float(self.latencies.get_value_at_percentile(percent)) / 1e9

    def add(self, other: "Measurement") -> None:
        """Add ``other``, measured at the same time."""
        self.seconds = max(self.seconds, other.seconds)
        self.answered += other.answered
        self.unanswered += other.unanswered
        self.errors += other.errors
        self.latencies.add(other.latencies)
        self.busy = max(self.busy, other.busy)

    def to_json(self) -> str:
        """Return it as one line of JSON, for `from_json`."""
        fields = attrs.asdict(self, recurse=False)
        return json.dumps(fields | {"latencies": self.latencies.encode().decode()})

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Return the measurement whose `to_json` gave ``line``."""
        fields = json.loads(line)
        errors, latencies = Counter(fields.pop("errors")), HdrHistogram.decode(fields.pop("latencies"))
        return cls(**fields, errors=errors, latencies=latencies)


@contextlib.asynccontextmanager
async def local_server(protocol: str, connections: int) -> AsyncIterator[tuple[str, int]]:
    """Run ``python -m trioproto PROTOCOL`` on a free port while the block runs, then stop it with SIGTERM.

    Args:
        protocol: ``"echo"`` or ``"op"``.
        connections: its limit of connections. More would wait in the accept queue, which would be measured, too.

    Yields:
        Its host and port.

    Raises:
        BenchError: if it does not start. The reason is on standard error.
    """
    async with trio.open_nursery() as nursery:
        options = ("--port", "0", "--max-connections", str(connections))
        server = await nursery.start(_run_python, "-m", "trioproto", protocol, *options)
        line = b""
        async for chunk in server.stdout:
            line += chunk
            if line.endswith(b"\n"):
                break
        else:
            raise BenchError("the server did not start; use --host or --port to measure a running one")
        host, _, port = line.decode().split()[-1].rpartition(":")
        yield host, int(port)
        nursery.cancel_scope.cancel()


async def _run_python(*arguments: str, task_status: trio.TaskStatus[trio.Process]) -> None:
    """Run this Python with ``arguments``; on cancellation, end it with SIGTERM."""
    try:
        await trio.run_process(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            check=False,
            # A terminal's Ctrl-C reaches only this process, which then stops the others.
            process_group=0,
            task_status=task_status,
        )
    except OSError as error:
        raise BenchError(f"cannot start {sys.executable}: {failure_reason(error)}") from None


async def measure(load: Load, stop: trio.Event, on_progress: Callable[[Measurement], object]) -> Measurement:
    """Put ``load`` on its server, and return the results.

    Args:
        load: the load.
        stop: set to end the load early. The results so far are returned.
        on_progress: called several times a second with the measurement so far.

    Raises:
        BenchError: if no connection can be opened, or a load generator fails; in a group.
        KeyboardInterrupt: if ``stop`` is set before the load has begun; in a group.

    On cancellation, the load generators are stopped.
    """
    generators = [_Process() for _ in range(load.processes)]

    def total() -> Measurement:
        measurement = Measurement()
        for generator in generators:
            measurement.add(generator.measurement)
        return measurement

    async def report() -> None:
        while True:
            await trio.sleep(REPORT_INTERVAL)
            on_progress(total())

    async def stop_early() -> None:
        await stop.wait()
        for generator in generators:
            await generator.stop()

    async with trio.open_nursery() as helpers:
        async with trio.open_nursery() as nursery:
            for number, generator in enumerate(generators):
                nursery.start_soon(generator.run, load, number)
            await _all_ready(generators, stop)
            errors = total().errors
            if errors.total() == load.connections:
                where = format_address((load.host, load.port))
                raise BenchError(
                    f"cannot connect to {where}: {errors.most_common(1)[0][0]}; "
                    f"if no server runs there, start one: python -m trioproto {load.protocol} --port {load.port}"
                )
            for generator in generators:
                await generator.start()
            helpers.start_soon(report)
            helpers.start_soon(stop_early)
        helpers.cancel_scope.cancel()
    return total()


class _Process:
    """A load generator's process, in the process that started it."""

    def __init__(self) -> None:
        self.measurement = Measurement()
        self.ready = trio.Event()

    async def run(self, load: Load, number: int) -> None:
        """Run it until it is done, and update `measurement` meanwhile."""
        async with trio.open_nursery() as nursery:
            arguments = ("-m", "trioproto.bench.load", json.dumps(attrs.asdict(load)), str(number))
            self._process = await nursery.start(_run_python, *arguments)
            line = b""
            async for chunk in self._process.stdout:
                *lines, line = (line + chunk).split(b"\n")
                for complete in lines:
                    self.measurement = Measurement.from_json(complete)
                    self.ready.set()
        if self._process.returncode:
            raise BenchError(f"a load generator failed with status {self._process.returncode}; see its message above")

    async def start(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # `run` reports a process that has died
            await self._process.stdin.send_all(b"\n")

    async def stop(self) -> None:
        await self._process.stdin.aclose()


async def _all_ready(generators: Sequence[_Process], stop: trio.Event) -> None:
    async def interrupt() -> None:
        await stop.wait()
        raise KeyboardInterrupt

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt)
        for generator in generators:
            await generator.ready.wait()
        nursery.cancel_scope.cancel()


class LoadGenerator:
    """One process's share of a load.

    Args:
        load: the whole load.
        number: the index of the share, 0 to ``load.processes - 1``.
        connect: opens a connection to the server; None for TCP to the host and port in ``load``.
    """

    def __init__(
        self, load: Load, number: int = 0, connect: Callable[[], Awaitable[trio.abc.Stream]] | None = None
    ) -> None:
        self.load = load
        self.connect = connect or functools.partial(trio.open_tcp_stream, load.host, load.port)
        self.messages = _Messages(load)
        self.measurement = Measurement()
        self.began = self.ends = self.last_reply = math.inf
        self._scope = trio.CancelScope()
        self._connections = [_Connection(self, which) for which in range(number, load.connections, load.processes)]

    async def open(self) -> None:
        """Open the connections. Failures are counted in `measurement` and retried later."""
        async with trio.open_nursery() as nursery:
            for connection in self._connections:
                nursery.start_soon(connection.open)

    async def run(self) -> None:
        """Generate the load for its duration, then wait up to `DRAIN` seconds for missing replies."""
        self.began = self.last_reply = trio.current_time()
        self._computed_before = time.process_time()
        self.ends = self.began + self.load.duration
        self._scope.deadline = self.ends + DRAIN
        with self._scope:
            async with trio.open_nursery() as nursery:
                for connection in self._connections:
                    nursery.start_soon(connection.run)
        for connection in self._connections:
            connection.finish()
        self.update(max(self.ends, self.last_reply))

    def update(self, now: float) -> None:
        """Update the times in `measurement`."""
        self.measurement.seconds = now - self.began
        self.measurement.busy = min(1.0, (time.process_time() - self._computed_before) / self.measurement.seconds)

    def stop(self) -> None:
        """End the load early."""
        self.ends = min(self.ends, trio.current_time())
        self._scope.deadline = self.ends + DRAIN


class _Messages:
    """An endless cycle of different requests, and the expected replies."""

    def __init__(self, load: Load) -> None:
        chance = random.Random(0)  # noqa: S311 - the same load each time
        if load.protocol == "echo":
            requests = replies = [chance.randbytes(load.size) for _ in range(_CYCLE)]
        else:
            requests, replies = [], []
            for operator in itertools.islice(itertools.cycle("+-*"), _CYCLE):
                operands = [chance.randint(INT32_MIN, INT32_MAX) for _ in range(load.size)]
                requests.append(Request(operands, operator).encode())
                replies.append(Reply(calculate(operands, operator)).encode())
        self.request_size = len(requests[0])
        self.reply_size = len(replies[0])
        # Repeated so often that the data of any send or receive is contiguous.
        self._requests = b"".join(requests) * (1 + math.ceil(load.depth / _CYCLE))
        self._replies = b"".join(replies) * (1 + math.ceil(RECEIVE_SIZE / self.reply_size / _CYCLE))

    def requests(self, first: int, count: int) -> bytes:
        """Return ``count`` requests, from number ``first`` on."""
        start = first % _CYCLE
        return self._requests[start * self.request_size : (start + count) * self.request_size]

    def right(self, start: int, received: bytes | bytearray) -> bool:
        """Return whether ``received`` matches the expected replies from byte ``start`` on."""
        start %= _CYCLE * self.reply_size
        return received == self._replies[start : start + len(received)]


class _UselessError(Exception):
    """The connection cannot be used any more; the message says why."""


class _Connection:
    """One connection, which is opened again after a failure."""

    def __init__(self, generator: LoadGenerator, number: int) -> None:
        self._generator = generator
        self._number = number
        self._planned = 0  # requests of an open loop's schedule that were sent
        self._stream: trio.abc.Stream | None = None
        self._in_flight: deque[float] = deque()  # when each was due
        self._sent = 0  # requests
        self._received = 0  # bytes

    async def open(self) -> None:
        try:
            self._stream = await self._generator.connect()
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
            self._fail(error)
        # Connections begin at different places in the cycle, so that replies on the wrong connection are detected.
        self._sent = self._number
        self._received = self._number * self._generator.messages.reply_size

    async def run(self) -> None:
        while True:
            if self._stream is not None:
                try:
                    async with self._stream:
                        await self._converse(self._stream)
                except* (trio.BrokenResourceError, _UselessError) as failures:
                    self._fail(failures)
                else:
                    return
            await trio.sleep(BACK_OFF)
            if trio.current_time() >= self._generator.ends:
                return
            await self.open()

    def finish(self) -> None:
        """Record all requests without a reply."""
        measurement, load = self._generator.measurement, self._generator.load
        now = trio.current_time()
        for due in self._in_flight:
            measurement.record(now - due)
        measurement.unanswered += len(self._in_flight)
        if load.rate is not None:
            interval = load.connections / load.rate
            next_due = self._next_due()
            # Slightly less, so that a rounding error cannot make it one more.
            overdue = max(0, math.ceil((self._generator.ends - next_due) / interval - 1e-6))
            measurement.unanswered += overdue
            # There can be millions, but then adjacent latencies hardly differ.
            step = max(1, overdue // _OVERDUE_STEPS)
            for first in range(0, overdue, step):
                measurement.record(now - next_due - first * interval, min(step, overdue - first))

    def _fail(self, failure: BaseException) -> None:
        measurement = self._generator.measurement
        measurement.errors[failure_reason(failure).lower()] += 1
        measurement.unanswered += len(self._in_flight)
        self._in_flight.clear()
        self._stream = None

    async def _converse(self, stream: trio.abc.Stream) -> None:
        """Send requests when they are due and receive replies, until the load has ended and all have arrived."""
        while True:
            now = trio.current_time()
            if due := self._take_due(now):
                await self._send(stream, due)
            if not self._in_flight and now >= self._generator.ends:
                return
            with trio.move_on_at(self._next_turn()):
                await self._receive(stream)

    def _take_due(self, now: float) -> list[float]:
        """Return, for each request to send now, the time from which its latency is measured."""
        load, ends = self._generator.load, self._generator.ends
        most = load.depth - len(self._in_flight)
        if load.rate is None:
            return [now] * most if now < ends else []
        taken: list[float] = []
        while len(taken) < most and (due := self._next_due()) < ends and due - _TIMER <= now:
            # The schedule is as exact as timers are, to a millisecond. If we are early, the latency is measured from
            # the send, or it would be too short; if we are late, from when the request was due.
            taken.append(min(due, now))
            self._planned += 1
        return taken

    def _next_due(self) -> float:
        """When this connection's next request is due: requests are evenly spaced, and use the connections in turn."""
        load = self._generator.load
        if load.rate is None:
            return math.inf
        return self._generator.began + (self._number + self._planned * load.connections) / load.rate

    def _next_turn(self) -> float:
        """When there is something to do even without a reply."""
        if len(self._in_flight) == self._generator.load.depth:
            return math.inf
        if (due := self._next_due()) < self._generator.ends:
            return due - _TIMER
        return math.inf if self._in_flight else self._generator.ends

    async def _send(self, stream: trio.abc.Stream, due: list[float]) -> None:
        messages = self._generator.messages
        requests = messages.requests(self._sent, len(due))
        self._sent += len(due)
        self._in_flight += due
        if self._generator.load.depth * messages.request_size <= _BUFFERED:
            await stream.send_all(requests)
            return

        # A server that waits until its replies are received may not receive requests meanwhile, so do both at once.
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(requests)
                nursery.cancel_scope.cancel()

            nursery.start_soon(send)
            while True:
                await self._receive(stream)

    async def _receive(self, stream: trio.abc.Stream) -> None:
        """Receive some data, check it, and record the latency of each reply that it completes."""
        received = await stream.receive_some(RECEIVE_SIZE)
        if not received:
            raise _UselessError("end of stream")
        now = self._generator.last_reply = trio.current_time()
        messages, measurement = self._generator.messages, self._generator.measurement
        start, self._received = self._received, self._received + len(received)
        if self._received > self._sent * messages.reply_size or not messages.right(start, received):
            raise _UselessError(WRONG_REPLY)
        complete = self._received // messages.reply_size - start // messages.reply_size
        measurement.answered += complete
        for _ in range(complete):
            measurement.record(now - self._in_flight.popleft())


async def _generate(load: Load, number: int) -> None:
    """Run as the load generator with that index; see the module's docstring."""
    generator = LoadGenerator(load, number)

    def report() -> None:
        os.write(1, generator.measurement.to_json().encode() + b"\n")

    async def report_regularly() -> None:
        while True:
            await trio.sleep(REPORT_INTERVAL)
            generator.update(trio.current_time())
            report()

    # Before the connections, which may use up all descriptors.
    async with trio.lowlevel.FdStream(os.dup(0)) as orders:
        await generator.open()
        report()
        if not await orders.receive_some(1):
            return  # the parent process has ended

        async def stop_early() -> None:
            await orders.receive_some(1)
            generator.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report_regularly)
            nursery.start_soon(stop_early)
            await generator.run()
            nursery.cancel_scope.cancel()
    report()


if __name__ == "__main__":
    try:
        trio.run(_generate, Load(**json.loads(sys.argv[1])), int(sys.argv[2]))
    except* BrokenPipeError:
        sys.exit(1)  # the parent process has ended
