"""Load on a server, and what the server does under it: rate, errors, latencies.

`measure` starts load generators, each a process of its own, so that one core's worth of Python is not the limit::

    python -m trioproto.bench.load LOAD NUMBER

LOAD is a `Load` in JSON, NUMBER says which of its processes this one is. It opens its connections and writes a line
to standard output: its `Measurement` so far, in JSON. A byte on standard input starts the load. From then on it
writes such a line several times a second, and the last one when it is done; the end of standard input ends the load
early. So measured time begins when every connection has been opened, or has failed to open.
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

# How long a connection that failed waits before it opens the next one: a server that is gone is not hammered.
BACK_OFF = 0.1
# How long, after the load has ended, replies that are still due are waited for.
DRAIN = 1.0
# The error that counts replies that are not those to the requests.
WRONG_REPLY = "wrong reply"
# How often a load generator reports.
REPORT_INTERVAL = 0.25

# Latencies are counted in whole nanoseconds, from one to a day, which takes whatever is longer; to three digits.
_LONGEST = 24 * 3600 * 10**9
_DIGITS = 3
# So many different requests are sent in turn: a server that mixes up replies is found out.
_CYCLE = 8
# poll(2) and its kind time out in whole milliseconds, rounded up.
_TIMER = 0.001
# As many bytes fit into the socket buffers on the way even if nobody receives them, so sending them cannot block.
_BUFFERED = 16384
# Requests that nobody got round to sending are recorded in at most about so many steps.
_OVERDUE_STEPS = 1000


def _histogram() -> HdrHistogram:
    return HdrHistogram(1, _LONGEST, _DIGITS)


@attrs.frozen
class Load:
    """What is asked of the server.

    Attributes:
        protocol: ``"echo"`` or ``"op"``.
        host: the server's name or address.
        port: the server's.
        connections: how many are kept open.
        size: bytes in each echo message, or operands in each op request.
        depth: the most requests in flight on each connection.
        duration: seconds.
        rate: requests a second over all connections, sent whether or not the server keeps up (an open loop); None
            for each as soon as it may be: when the reply to another one has arrived (a closed loop).
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
    """What came of a load, or of a part of it.

    Attributes:
        seconds: how long it was measured: for the load's duration, and until the last reply if that came later.
        answered: requests whose reply arrived and was right.
        unanswered: requests that were lost with their connection, or whose reply was still due at the end.
        errors: how often each thing went wrong with a connection: ``"end of stream"`` (before all the replies),
            ``"wrong reply"``, or what the system said: ``"connection refused"``, ``"connection reset by peer"``.
        latencies: in nanoseconds, from when a request was sent, or in an open loop was due, until its reply was
            there. What was still due at the end is in it with the time that it had waited until then.
        busy: the share of the time for which the busiest load generator computed, 0 to 1. Near 1, the load
            generators may be what limits the rate.
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
        # As it is, without HdrHistogram's correction for coordinated omission (`record_corrected_value`). That adds
        # the requests which a stalled client would have sent meanwhile. In an open loop none is missing: each that was
        # due is recorded, with its latency from when it was due, so the correction would count the stall twice. In a
        # closed loop there is no rate from which to tell what is missing.
        self.latencies.record_value(min(max(1, round(latency * 1e9)), _LONGEST), count)

    def percentile(self, percent: float) -> float:
        """Return the latency, in seconds, that ``percent`` % of those recorded did not exceed; 0 if there is none."""
        return float(self.latencies.get_value_at_percentile(percent)) / 1e9

    def add(self, other: "Measurement") -> None:
        """Take in ``other``, measured at the same time."""
        self.seconds = max(self.seconds, other.seconds)
        self.answered += other.answered
        self.unanswered += other.unanswered
        self.errors += other.errors
        self.latencies.add(other.latencies)
        self.busy = max(self.busy, other.busy)

    def to_json(self) -> str:
        """Return it in one line of JSON, as `from_json` takes it."""
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
    """Run ``python -m trioproto PROTOCOL`` on a free port while the block runs; then stop it with SIGTERM.

    Args:
        protocol: ``"echo"`` or ``"op"``.
        connections: how many it serves at once. Those beyond its limit would measure how long they wait in a queue.

    Yields:
        Its host and port.

    Raises:
        BenchError: if it does not start. Why not is on standard error.
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
            raise BenchError("the server did not start; give --host or --port of one that runs")
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
            # A Ctrl-C in the terminal is for us alone: we end the others in order.
            process_group=0,
            task_status=task_status,
        )
    except OSError as error:
        raise BenchError(f"cannot start {sys.executable}: {failure_reason(error)}") from None


async def measure(load: Load, stop: trio.Event, on_progress: Callable[[Measurement], object]) -> Measurement:
    """Put ``load`` on its server, and return what came of it.

    Args:
        load: what to do.
        stop: ends the load early once it is set. What was measured until then counts.
        on_progress: called several times a second with the measurement so far.

    Raises:
        BenchError: if not one connection can be opened, or a load generator fails; in a group.
        KeyboardInterrupt: if ``stop`` is set before the load has begun; in a group.

    On cancellation, the load generators are ended.
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
    """A load generator's process, as seen from here."""

    def __init__(self) -> None:
        self.measurement = Measurement()
        self.ready = trio.Event()

    async def run(self, load: Load, number: int) -> None:
        """Run it, and keep `measurement` up to date, until it is done."""
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
        number: which share, 0 to ``load.processes - 1``.
        connect: opens a connection to the server; None for TCP to where ``load`` says.
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
        """Open the connections. One that cannot be opened is an error in `measurement`, and is tried again later."""
        async with trio.open_nursery() as nursery:
            for connection in self._connections:
                nursery.start_soon(connection.open)

    async def run(self) -> None:
        """Generate the load, for as long as it is to last and until the replies are in, for at most `DRAIN` more."""
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
        """Bring the times in `measurement` up to date."""
        self.measurement.seconds = now - self.began
        self.measurement.busy = min(1.0, (time.process_time() - self._computed_before) / self.measurement.seconds)

    def stop(self) -> None:
        """End the load now rather than later."""
        self.ends = min(self.ends, trio.current_time())
        self._scope.deadline = self.ends + DRAIN


class _Messages:
    """Different requests in an endless cycle, and the replies that are right."""

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
        # As often again as it takes for what one send or one receive may want to lie in one piece.
        self._requests = b"".join(requests) * (1 + math.ceil(load.depth / _CYCLE))
        self._replies = b"".join(replies) * (1 + math.ceil(RECEIVE_SIZE / self.reply_size / _CYCLE))

    def requests(self, first: int, count: int) -> bytes:
        """Return ``count`` requests, beginning with the one of number ``first``."""
        start = first % _CYCLE
        return self._requests[start * self.request_size : (start + count) * self.request_size]

    def right(self, start: int, received: bytes | bytearray) -> bool:
        """Tell whether ``received`` is what is in the replies to all requests from byte ``start`` on."""
        start %= _CYCLE * self.reply_size
        return received == self._replies[start : start + len(received)]


class _UselessError(Exception):
    """The connection is of no more use; the message says why."""


class _Connection:
    """One connection, and the next one after it has failed."""

    def __init__(self, generator: LoadGenerator, number: int) -> None:
        self._generator = generator
        self._number = number
        self._planned = 0  # requests of an open loop's plan that were sent
        self._stream: trio.abc.Stream | None = None
        self._in_flight: deque[float] = deque()  # when each was due
        self._sent = 0  # requests
        self._received = 0  # bytes

    async def open(self) -> None:
        try:
            self._stream = await self._generator.connect()
        except (OSError, UnicodeError) as error:  # UnicodeError: the host is not even a name
            self._fail(error)
        # Connections begin at different places in the cycle: replies to another one's requests are wrong.
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
        """Account for what is still due."""
        measurement, load = self._generator.measurement, self._generator.load
        now = trio.current_time()
        for due in self._in_flight:
            measurement.record(now - due)
        measurement.unanswered += len(self._in_flight)
        if load.rate is not None:
            interval = load.connections / load.rate
            next_due = self._next_due()
            # A hair less, or what floating point adds to a whole number would make it the next one.
            overdue = max(0, math.ceil((self._generator.ends - next_due) / interval - 1e-6))
            measurement.unanswered += overdue
            # They can be millions. A latency here and its neighbour hardly differ then.
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
        """Send requests when they are due and receive their replies, until the load ends and all have come."""
        while True:
            now = trio.current_time()
            if due := self._take_due(now):
                await self._send(stream, due)
            if not self._in_flight and now >= self._generator.ends:
                return
            with trio.move_on_at(self._next_turn()):
                await self._receive(stream)

    def _take_due(self, now: float) -> list[float]:
        """Return, for each request to be sent now, the time from which its latency counts."""
        load, ends = self._generator.load, self._generator.ends
        most = load.depth - len(self._in_flight)
        if load.rate is None:
            return [now] * most if now < ends else []
        taken: list[float] = []
        while len(taken) < most and (due := self._next_due()) < ends and due - _TIMER <= now:
            # The schedule is kept to a millisecond, as well as timers are. But when we are early, the latency
            # counts from the sending, or it would be too short; when we are late, from when it was due.
            taken.append(min(due, now))
            self._planned += 1
        return taken

    def _next_due(self) -> float:
        """When the plan's next request is due: the whole load's are evenly spaced, and dealt to the connections."""
        load = self._generator.load
        if load.rate is None:
            return math.inf
        return self._generator.began + (self._number + self._planned * load.connections) / load.rate

    def _next_turn(self) -> float:
        """When there is something to do even if no reply comes."""
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

        # A server that waits until its replies are taken takes no requests meanwhile: do both at once.
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(requests)
                nursery.cancel_scope.cancel()

            nursery.start_soon(send)
            while True:
                await self._receive(stream)

    async def _receive(self, stream: trio.abc.Stream) -> None:
        """Receive what has come, check it, and record the latency of each reply that it completes."""
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
    """Be the load generator of that number: see the module's docstring."""
    generator = LoadGenerator(load, number)

    def report() -> None:
        os.write(1, generator.measurement.to_json().encode() + b"\n")

    async def report_regularly() -> None:
        while True:
            await trio.sleep(REPORT_INTERVAL)
            generator.update(trio.current_time())
            report()

    # First, because the connections may take all the descriptors that there are.
    async with trio.lowlevel.FdStream(os.dup(0)) as orders:
        await generator.open()
        report()
        if not await orders.receive_some(1):
            return  # whoever started this has gone

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
        sys.exit(1)  # whoever started this has gone
