"""The bench: what it measures is what a server does, and what it reports is what it measured."""

import contextlib
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from trioproto import echo_handler, receive_exactly
from trioproto.bench import report
from trioproto.bench.errors import BenchError
from trioproto.bench.load import DRAIN, Load, LoadGenerator, Measurement, local_server, measure
from trioproto.cli.main import main
from trioproto.testing import breaking_stream

Handler = Callable[[trio.abc.HalfCloseableStream], Awaitable[object]]

# Nothing listens on port 1 of this machine.
NOWHERE = ("127.0.0.1", 1)


def memory_load(
    nursery: trio.Nursery,
    handler: Handler,
    *,
    size: int = 8,
    depth: int = 1,
    duration: float = 10.0,
    rate: float | None = None,
    connections: int = 1,
) -> LoadGenerator:
    """Create a generator whose connections are memory streams that ``handler`` serves."""

    async def connect() -> trio.abc.Stream:
        client, served = trio.testing.memory_stream_pair()

        async def serve() -> None:
            async with served:
                with contextlib.suppress(trio.BrokenResourceError):
                    await handler(served)

        nursery.start_soon(serve)
        return client

    load = Load("echo", "memory", 0, connections, size, depth, duration, rate)
    return LoadGenerator(load, connect=connect)


async def generate(generator: LoadGenerator) -> Measurement:
    await generator.open()
    await generator.run()
    return generator.measurement


@contextlib.asynccontextmanager
async def tcp_server(handler: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[int]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, handler, 0)
            yield listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()


def delaying(delay: float) -> Handler:
    """Echo each chunk after ``delay`` seconds."""

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        async for chunk in stream:
            await trio.sleep(delay)
            await stream.send_all(chunk)

    return handler


def stalling(since: float, until: float) -> Handler:
    """Echo at once, except from ``since`` to ``until``, in seconds after the connection began."""

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        began = trio.current_time()
        async for chunk in stream:
            if since <= trio.current_time() - began < until:
                await trio.sleep_until(began + until)
            await stream.send_all(chunk)

    return handler


def longer_than(seconds: float, measurement: Measurement) -> int:
    buckets = measurement.latencies.get_recorded_iterator()
    return sum(bucket.count_at_value_iterated_to for bucket in buckets if bucket.value_iterated_to > seconds * 1e9)


async def test_closed_loop(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """A closed loop sends a request when the reply to another one has arrived."""
    measurement = await generate(memory_load(nursery, delaying(0.1), connections=3, depth=2))
    assert measurement.answered == pytest.approx(3 * 2 * 100, rel=0.02)
    assert measurement.rate == pytest.approx(60, rel=0.02)
    assert measurement.percentile(50) == pytest.approx(0.1, rel=0.01)
    assert measurement.unanswered == 0
    assert not measurement.errors


async def test_depth(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """On each connection exactly as many requests are in flight as the depth says, at first and later."""
    most = 0

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        nonlocal most
        received = b""
        async for chunk in stream:
            received += chunk
            most = max(most, len(received))
            await trio.sleep(0.1)
            await stream.send_all(received[:8])
            received = received[8:]

    measurement = await generate(memory_load(nursery, handler, size=8, depth=5))
    assert most == 5 * 8
    assert measurement.percentile(90) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("depth", [1, 16])
async def test_open_loop_reports_a_stall(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, depth: int
) -> None:
    """In an open loop, each request that was due during a stall has a latency from when it was due."""
    measurement = await generate(memory_load(nursery, stalling(4, 6), depth=depth, rate=100))
    assert measurement.answered == 1000
    # 200 were due in the stall of 2 seconds, evenly spaced: half of them waited for more than a second.
    assert longer_than(1, measurement) == pytest.approx(100, abs=2)
    assert measurement.percentile(100) == pytest.approx(2, abs=0.02)
    assert measurement.percentile(79) < 0.01


async def test_closed_loop_omits_a_stall(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """In a closed loop, a stall shows in no more than the requests in flight: that is what the open loop is for."""

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        began = trio.current_time()
        async for chunk in stream:
            await trio.sleep(2 if 4 <= trio.current_time() - began < 5 else 0.01)
            await stream.send_all(chunk)

    measurement = await generate(memory_load(nursery, handler))
    assert longer_than(1, measurement) == 1


async def test_open_loop_rate(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """The rate is that of all connections together, evenly spaced, and for as long as the load lasts."""
    arrivals: list[float] = []

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        async for chunk in stream:
            arrivals.append(trio.current_time())
            await stream.send_all(chunk)

    measurement = await generate(memory_load(nursery, handler, connections=4, rate=20))
    assert measurement.answered == 200
    assert measurement.seconds == 10
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert min(gaps) == pytest.approx(0.05, abs=0.002)
    assert max(gaps) == pytest.approx(0.05, abs=0.002)


async def test_sent_early(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """A request that was sent before it was due has its latency from the sending: it is not too short."""
    measurement = await generate(memory_load(nursery, delaying(0.004), rate=10))
    assert measurement.percentile(1) == pytest.approx(0.004, rel=0.011)


async def test_depth_bounds_an_open_loop(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """In an open loop too, no more requests are in flight than the depth says."""
    received = bytearray()

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        async for chunk in stream:
            received.extend(chunk)

    await generate(memory_load(nursery, handler, size=8, depth=5, rate=100))
    assert len(received) == 5 * 8


@pytest.mark.parametrize("answered", [500, 501])
async def test_a_stall_until_the_end(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, answered: int
) -> None:
    """What was due and never answered is reported, with the time that it had waited by the end."""
    measurement = await generate(memory_load(nursery, stalling(answered / 100 - 0.005, 1000), rate=100))
    assert measurement.answered == answered
    assert measurement.unanswered == 1000 - answered
    assert measurement.latencies.total_count == 1000
    assert measurement.percentile(100) == pytest.approx(5 + DRAIN, abs=0.02)
    assert measurement.percentile(75) == pytest.approx(2.5 + DRAIN, abs=0.05)
    assert measurement.seconds == 10


async def test_many_overdue(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """A plan far beyond the server's means is accounted for request by request."""
    measurement = await generate(memory_load(nursery, stalling(0, 1000), rate=1e6, duration=3))
    assert measurement.unanswered == measurement.latencies.total_count == 3_000_000
    assert measurement.percentile(50) == pytest.approx(1.5 + DRAIN, rel=0.02)


async def test_replies_after_the_end(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """Replies that are on their way when the load ends are waited for, and so is the measured time."""
    measurement = await generate(memory_load(nursery, delaying(0.8), duration=2))
    assert measurement.answered == 3
    assert measurement.unanswered == 0
    assert measurement.seconds == pytest.approx(2.4)


async def test_stop(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """A load that is stopped ends early, and what was measured until then counts."""
    generator = memory_load(nursery, delaying(0.01))
    nursery.start_soon(generate, generator)
    await trio.sleep(2)
    generator.stop()
    await trio.sleep(1)
    assert generator.measurement.seconds == pytest.approx(2, abs=0.02)
    assert generator.measurement.answered == pytest.approx(200, abs=2)


async def test_stop_during_a_stall(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """A load that is stopped waits for replies no longer than one that has come to its end."""
    generator = memory_load(nursery, stalling(0, 1000))
    async with trio.open_nursery() as load:
        load.start_soon(generate, generator)
        await trio.sleep(2)
        generator.stop()
    assert trio.current_time() == pytest.approx(2 + DRAIN)


async def flip_a_bit(stream: trio.abc.HalfCloseableStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk[:-1] + bytes([chunk[-1] ^ 1]))


async def swap(stream: trio.abc.HalfCloseableStream) -> None:
    while True:
        first, second = await receive_exactly(stream, 8), await receive_exactly(stream, 8)
        await stream.send_all(second + first)


async def say_twice(stream: trio.abc.HalfCloseableStream) -> None:
    # The cycle of requests is 8 long: what is sent too much is even right, only nobody has asked yet.
    first = await receive_exactly(stream, 8 * 8)
    await stream.send_all(first + first)
    await trio.sleep_forever()


@pytest.mark.parametrize("handler", [flip_a_bit, swap, say_twice])
async def test_wrong_replies(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, handler: Handler) -> None:
    """A reply that is changed, out of order or not asked for is an error, and its connection is given up."""
    measurement = await generate(memory_load(nursery, handler, depth=8, duration=1.05))
    # One at once, and one after each tenth of a second: a broken server is not hammered.
    assert measurement.errors == Counter({"wrong reply": 11})
    assert measurement.answered == 0
    assert measurement.unanswered == 11 * 8


async def test_another_connections_replies(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """Replies to another connection's requests are wrong."""
    sides: list[trio.abc.HalfCloseableStream] = []

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        sides.append(stream)
        await trio.sleep(0.1)  # until the other one is there
        other = sides[1 - sides.index(stream)]
        await other.send_all(await receive_exactly(stream, 8))
        await trio.sleep_forever()

    measurement = await generate(memory_load(nursery, handler, connections=2, duration=0.15))
    assert measurement.errors == Counter({"wrong reply": 2})


async def test_end_of_stream(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """A connection that ends before its replies is an error and a lost request; the next one goes on."""
    connections = 0

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await stream.send_all(await receive_exactly(stream, 8))
            await receive_exactly(stream, 8)
        else:
            await delaying(0.1)(stream)

    measurement = await generate(memory_load(nursery, handler))
    assert measurement.errors == Counter({"end of stream": 1})
    assert measurement.unanswered == 1
    assert measurement.answered == pytest.approx(1 + 99, abs=1)


async def test_failure_after_the_end(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """After the end of the load no connection is opened any more."""

    async def handler(stream: trio.abc.HalfCloseableStream) -> None:
        await trio.sleep(1.5)

    measurement = await generate(memory_load(nursery, handler, duration=1))
    assert measurement.errors == Counter({"end of stream": 1})
    assert trio.current_time() < 1.5 + DRAIN + 0.2


async def test_broken_without_a_socket(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that breaks is counted under what it says of itself."""

    async def connect() -> trio.abc.Stream:
        client, _ = trio.testing.memory_stream_pair()
        return breaking_stream(client, 0)

    load = Load("echo", "memory", 0, connections=1, duration=0.05)
    measurement = await generate(LoadGenerator(load, connect=connect))
    assert measurement.errors == Counter({"broken on purpose after 0 bytes": 1})


async def test_reset() -> None:
    """A connection that the server resets is an error of its own."""

    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with tcp_server(handler) as port:
        measurement = await generate(LoadGenerator(Load("echo", "127.0.0.1", port, 1, duration=0.05)))
    assert measurement.errors == Counter({"connection reset by peer": 1})


async def test_refused() -> None:
    """Connections that are refused are errors, and tried again only so often."""
    generator = LoadGenerator(Load("echo", *NOWHERE, connections=2, duration=0.25))
    await generator.open()
    assert generator.measurement.errors == Counter({"connection refused": 2})
    await generator.run()
    assert 4 <= generator.measurement.errors["connection refused"] <= 2 * 4


async def test_unknown_name() -> None:
    """A name that stands for no address is an error in the resolver's words."""
    generator = LoadGenerator(Load("echo", "no such name", 1, connections=1))
    with trio.fail_after(10):
        await generator.open()
    (reason,) = generator.measurement.errors
    assert reason == reason.lower()
    assert "name" in reason


async def test_a_server_that_dies(nursery: trio.Nursery) -> None:
    """When the server dies half-way, what it did before counts, and the rest are errors, each of its kind."""
    answered, life = trio.Event(), trio.CancelScope()

    async def handler(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)
            answered.set()

    async def serve(task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        with life:
            await trio.serve_tcp(handler, 0, host="127.0.0.1", task_status=task_status)

    listeners = await nursery.start(serve)
    port = listeners[0].socket.getsockname()[1]
    generator = LoadGenerator(Load("echo", "127.0.0.1", port, connections=3, duration=0.3))
    with trio.fail_after(10):
        await generator.open()
        async with trio.open_nursery() as load:
            load.start_soon(generator.run)
            await answered.wait()
            life.cancel()
    errors = generator.measurement.errors
    refused = errors.pop("connection refused")
    assert refused >= 3
    assert generator.measurement.answered > 0
    assert errors.total() == 3
    assert set(errors) <= {"end of stream", "connection reset by peer", "broken pipe"}


async def test_more_in_flight_than_buffers_hold() -> None:
    """Messages too large for the socket buffers do not block the load, however many are in flight."""
    async with tcp_server(echo_handler) as port:
        load = Load("echo", "127.0.0.1", port, connections=1, size=2**20, depth=16, duration=0.2)
        measurement = await generate(LoadGenerator(load))
    assert measurement.answered >= 16
    assert measurement.unanswered == 0
    assert not measurement.errors


async def test_large_messages_to_a_server_that_leaves() -> None:
    """A connection that breaks while a large message is on its way is one error."""

    async def handler(stream: trio.SocketStream) -> None:
        await receive_exactly(stream, 1)

    async with tcp_server(handler) as port:
        load = Load("echo", "127.0.0.1", port, connections=1, size=2**20, depth=16, duration=0.05)
        measurement = await generate(LoadGenerator(load))
    assert measurement.errors.total() == 1
    assert measurement.unanswered == 16


@pytest.mark.parametrize("protocol", ["echo", "op"])
async def test_measure(protocol: str) -> None:
    """The load generators' processes share the connections, and their measurements are added up."""
    progress: list[Measurement] = []
    with trio.fail_after(20):
        async with local_server(protocol, 3) as (host, port):
            load = Load(protocol, host, port, connections=3, depth=4, duration=0.6, rate=1000, processes=2)
            measurement = await measure(load, trio.Event(), progress.append)
    assert measurement.answered == measurement.latencies.total_count == 600
    assert not measurement.errors
    assert measurement.seconds == pytest.approx(0.6, abs=0.3)
    assert 0 < measurement.busy <= 1
    assert any(0 < before.answered < 600 for before in progress)


async def test_the_local_server_is_stopped() -> None:
    """The server that was started for the purpose is gone afterwards."""
    with trio.fail_after(10):
        async with local_server("echo", 1) as (host, port):
            stream = await trio.open_tcp_stream(host, port)
            await stream.aclose()
        with pytest.raises(OSError, match="failed"):
            await trio.open_tcp_stream(host, port)


async def test_measure_after_stop() -> None:
    """What is stopped before it has begun is an interruption, not a measurement."""
    stop = trio.Event()
    stop.set()
    with trio.fail_after(10), pytest.raises(BaseExceptionGroup) as caught:
        await measure(Load("echo", *NOWHERE), stop, lambda _: None)
    assert caught.group_contains(KeyboardInterrupt)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "a load generator failed with status 3"),
        (f"exec <&-; echo '{Measurement().to_json()}'; sleep 0.2; exit 3", "a load generator failed with status 3"),
    ],
    ids=["at once", "when ready"],
)
async def test_a_load_generator_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    """A load generator that dies makes the measurement fail; it is not left out of it silently."""
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
    with trio.fail_after(10), pytest.raises(BaseExceptionGroup) as caught:
        await measure(Load("echo", *NOWHERE), trio.Event(), lambda _: None)
    assert caught.group_contains(BenchError, match=message)


async def test_a_local_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that does not start is said to be missing, not waited for."""
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "printf something; exit 1"))
    with trio.fail_after(10), pytest.raises(BaseExceptionGroup) as caught:
        async with local_server("echo", 1):
            pass
    assert caught.group_contains(BenchError, match="did not start")


def fake_python(directory: Path, script: str) -> str:
    fake = directory / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    return str(fake)


GENERATOR = [
    sys.executable,
    "-m",
    "trioproto.bench.load",
    json.dumps({"protocol": "op", "host": "127.0.0.1", "port": 1}),
    "0",
]


def test_a_load_generator_that_is_left_alone() -> None:
    """A load generator whose parent is gone before the start ends without a load."""
    done = subprocess.run(GENERATOR, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=10)
    (line,) = done.stdout.splitlines()
    assert Measurement.from_json(line).errors == Counter({"connection refused": 50})


def test_a_load_generator_that_nobody_listens_to() -> None:
    """A load generator whose reports nobody takes ends, and without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        GENERATOR, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=10
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


MEASUREMENT = Measurement(seconds=2.0, answered=1000, unanswered=7, errors=Counter({"wrong reply": 4, "reset": 3}))
MEASUREMENT.record(0.0012, 900)
MEASUREMENT.record(0.034, 99)
MEASUREMENT.record(1.5)
MEASUREMENT.record(0.000045, 7)


def test_measurement_survives_json() -> None:
    """A measurement comes out of a load generator's line as it went in, to the histogram's three digits."""
    read = Measurement.from_json(MEASUREMENT.to_json())
    assert (read.answered, read.unanswered, read.errors) == (1000, 7, MEASUREMENT.errors)
    assert read.latencies.total_count == 1007
    for percent in (1, 50, 99.9, 100):
        assert read.percentile(percent) == MEASUREMENT.percentile(percent)
    assert MEASUREMENT.percentile(50) == pytest.approx(0.0012, rel=0.001)


def test_latencies_beyond_the_histogram() -> None:
    """None at all, and days, are counted as the shortest and the longest that the histogram holds."""
    measurement = Measurement()
    measurement.record(0.0)
    measurement.record(3 * 86400.0)
    assert measurement.latencies.total_count == 2
    assert measurement.percentile(50) == 1e-9
    assert measurement.percentile(100) == pytest.approx(86400, rel=0.001)


def test_table() -> None:
    """The table says rate, errors by kind and percentiles, in 80 columns."""
    text = report.table(Load("op", "::1", 9191, rate=12345.5), MEASUREMENT)
    assert "op at [::1]:9191, open loop of 12,345.5 requests/s" in text
    assert re.search(r"^rate +500 requests/s$", text, re.MULTILINE)
    assert re.search(r"^unanswered +7$", text, re.MULTILINE)
    assert re.search(r"^errors +7\n +4 wrong reply\n +3 reset$", text, re.MULTILINE)
    assert re.search(
        r"^latency +p50 +p90 +p99 +p99.9 +max\n +1\.2\d ms +1\.2\d ms +34\.\d ms +34\.\d ms +1\.50 s$",
        text,
        re.MULTILINE,
    )
    assert "--processes" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_table_of_a_busy_generator() -> None:
    """When it may be the load generator that limits the rate, the table says so and what to do."""
    text = report.table(Load("echo", "127.0.0.1", 9190, processes=2), Measurement(seconds=1.0, busy=0.97))
    assert "busy 97% of the time" in text
    assert "--processes 3" in text
    assert re.search(r"^( +0 µs){5}$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80


def test_terminal_plot() -> None:
    """The plot has a row for each range of latencies, with its count and a bar as long as that says."""
    lines = report.terminal_plot(MEASUREMENT.latencies, 80).splitlines()
    assert max(map(len, lines)) <= 80
    counts = [int(re.search(r"[mµ]?s +([\d,]+)", line)[1].replace(",", "")) for line in lines]  # type: ignore[index]
    bars = [line.count("█") for line in lines]
    assert sum(counts) == 1007
    assert counts[0] == 7
    assert counts[-1] == 1
    assert [bar > 0 for bar in bars] == [count > 0 for count in counts]
    assert bars[counts.index(900)] == max(bars)
    assert bars[counts.index(99)] == pytest.approx(max(bars) * 99 / 900, abs=1.5)


def test_terminal_plot_of_nothing() -> None:
    """Without latencies there is no plot."""
    assert report.terminal_plot(Measurement().latencies, 80) == ""


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress shows the rate since it last did, and the errors; on a terminal."""
    ours, theirs = terminal_pair()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with report.progress(Load("echo", "127.0.0.1", 9190, duration=4.0)) as show:
            show(Measurement(seconds=1.0, answered=1000))
            show(Measurement(seconds=1.0, answered=1000))
            show(Measurement(seconds=3.5, answered=5000, errors=Counter({"wrong reply": 2})))
            wait_for(rb"echo  88% .* 3\.5/4\.0 s, 1,600/s, 2 errors", ours)
            show(Measurement(seconds=5.0, answered=7000))
            wait_for(rb"echo 100% .* 4\.0/4\.0 s, 1,333/s, 0 errors", ours)
    os.close(ours)


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Where standard error is no terminal, there is no progress to be seen."""
    with report.progress(Load("echo", "127.0.0.1", 9190)) as show:
        show(MEASUREMENT)
    assert capsys.readouterr().err == ""


def test_plot_files(tmp_path: Path) -> None:
    """A plot is SVG or PNG by its suffix, and leaves out of its background and colours black and white."""
    from trioproto.bench.plot import write_plot  # noqa: PLC0415 - slow to import, also for workers that run no test here

    load = Load("echo", "127.0.0.1", 9190)
    write_plot(tmp_path / "latency.png", load, MEASUREMENT)
    write_plot(tmp_path / "latency.svg", load, MEASUREMENT)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = (tmp_path / "latency.svg").read_text()
    for label in ("p50 1.2", "p90 1.2", "p99 34", "p99.9 34", "max 1.50 s"):
        assert f"<!--  {label}" in svg
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert colours <= {"#808080", "#3987d6", "#d9730d"}


def test_plot_of_nothing(tmp_path: Path) -> None:
    """Without latencies a plot is an empty one."""
    from trioproto.bench.plot import write_plot  # noqa: PLC0415 - as above

    write_plot(tmp_path / "latency.svg", Load("echo", "127.0.0.1", 9190), Measurement())
    assert "p50" not in (tmp_path / "latency.svg").read_text()


def test_bench(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without an address, bench starts a server, measures it, and reports on the terminal and in files."""
    json_file, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    options = ["--duration", "0.3", "--rate", "500", "--connections", "2", "--operands", "5"]
    assert main(["bench", "op", *options, "--json", str(json_file), "--plot", str(plot)]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^answered +150$", out, re.MULTILINE)
    assert "█" in out
    assert len(err.splitlines()) == 1  # the server's last word
    written = json.loads(json_file.read_text())
    assert written["answered"] == 150
    histogram = HdrHistogram.decode(written["histogram"])
    assert histogram.total_count == 150
    assert written["histogram_unit"] == "nanoseconds"
    assert histogram.get_value_at_percentile(50) == pytest.approx(written["latency"]["p50"] * 1e9)
    assert written["interrupted"] is False
    assert written["load"]["size"] == 5
    assert written["errors"] == {}
    assert 0 < written["latency"]["p50"] <= written["latency"]["p99.9"] <= written["latency"]["max"] < 1
    assert plot.read_text().startswith("<?xml")


def test_bench_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """When nobody listens where bench is to measure, it says so in one line, and how to start a server."""
    assert main(["bench", "echo", "--port", "1", "--connections", "4", "--processes", "2"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "trioproto: cannot connect to 127.0.0.1:1: connection refused; "
        "if no server runs there, start one: python -m trioproto echo --port 1\n"
    )


def test_no_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """When the system does not start another process, bench says so in one line."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for options in ([], ["--port", "1"]):
        assert main(["bench", "echo", *options]) == 1
        assert capsys.readouterr().err == "trioproto: cannot start /no/such/python: No such file or directory\n"


def test_more_connections_than_descriptors() -> None:
    """Connections for which there are no descriptors are errors in the report; the others are measured."""
    words = [*BENCH, "echo", "--connections", "200", "--duration", "0.3"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh", *words], capture_output=True, check=False, timeout=20
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
    assert re.search(rb"^answered +[1-9]", done.stdout, re.MULTILINE)
    assert re.search(rb"^ +[1-9]\d* too many open files$", done.stdout, re.MULTILINE)


def test_the_port_of_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    """A host without a port is asked at the protocol's own port."""
    assert main(["bench", "op", "--host", "127.255.255.254"]) == 1
    assert "cannot connect to 127.255.255.254:9191: " in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "needs_it"), [("plotext", "report"), ("matplotlib", "plot")])
def test_without_the_extra(
    missing: str, needs_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra, bench says how to get it before it measures anything."""
    monkeypatch.delattr(f"trioproto.bench.{needs_it}", raising=False)
    monkeypatch.delitem(sys.modules, f"trioproto.bench.{needs_it}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert main(["bench", "echo", "--plot", str(tmp_path / "latency.svg")]) == 1
    complaint = f"bench needs {missing}, which is not installed; from a clone of trioproto: pip install '.[bench]'"
    assert capsys.readouterr() == ("", f"trioproto: {complaint}\n")


# A program that runs as if only the package itself were installed, without any extra.
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(["hdrh", "matplotlib", "plotext", "prometheus_client", "tqdm"]))
from trioproto.cli.main import main
sys.exit(main())
"""


def test_the_other_commands_need_no_extra() -> None:
    """Servers and clients run where nothing of what bench needs is installed."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS]
    with subprocess.Popen([*command, "op", "--port", "0"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        port = server.stdout.readline().decode().strip().rpartition(":")[2]
        asked, bench = (
            subprocess.run([*command, *words, "--port", port], capture_output=True, check=False, timeout=20)
            for words in (["op-client", "2", "3", "add"], ["bench", "op"])
        )
        server.terminate()
    assert (asked.returncode, asked.stdout) == (0, b"5\n")
    assert (bench.returncode, bench.stdout) == (1, b"")
    assert re.match(rb"trioproto: bench needs hdrh[.\w]*, which is not installed; from a clone .*\n$", bench.stderr)


def test_a_report_that_cannot_be_written(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """When a file cannot be written in the end, the table is there all the same."""
    plot = tmp_path / "latency.svg"
    plot.symlink_to("/dev/full")
    assert main(["bench", "echo", "--duration", "0.1", "--connections", "1", "--plot", str(plot)]) == 1
    out, err = capfd.readouterr()
    assert "answered" in out
    assert err.endswith(f"\ntrioproto: cannot write {plot}: No space left on device\n")


@pytest.mark.parametrize(
    ("server", "protocol", "complaint"),
    [
        ("echo", "op", r"\d[\d,]* replies from 127\.0\.0\.1:\d+ are wrong"),
        ("op", "echo", r"127\.0\.0\.1:\d+ answered no request"),
    ],
)
async def test_another_servers_protocol(server: str, protocol: str, complaint: str) -> None:
    """A server that does not speak the protocol is no server to measure: after the report, bench says so and fails."""
    with trio.fail_after(20):
        async with local_server(server, 2) as (_, port):
            done = await trio.run_process(
                [*BENCH, protocol, "--port", str(port), "--connections", "2", "--duration", "0.3"],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    assert done.returncode == 1
    assert re.fullmatch(rf"trioproto: {complaint}; is an {protocol} server running there\?\n", done.stderr.decode())
    assert re.search(rb"^errors +[1-9]", done.stdout, re.MULTILINE)


BENCH = [sys.executable, "-m", "trioproto", "bench"]

# Runs the command line, and in place of this Python the program that is given first.
WITH_FAKE_PYTHON = """
import sys
from trioproto.cli.main import main
sys.executable = sys.argv.pop(1)
sys.exit(main())
"""


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """A bench whose load generator has measured already: what is tested is what becomes of the report."""
    measured = Measurement(seconds=0.1, answered=100)
    measured.record(0.0002, 100)
    fake = fake_python(tmp_path, f"echo '{Measurement().to_json()}'; read _; echo '{measured.to_json()}'")
    return [sys.executable, "-c", WITH_FAKE_PYTHON, fake, "bench", "echo", "--port", "1"]


@pytest.mark.parametrize(
    "settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_of_ascii(settings: dict[str, str], quick: list[str]) -> None:
    """The report needs no character that is not in ASCII."""
    done = subprocess.run(quick, env=os.environ | settings, capture_output=True, check=True, timeout=20)
    assert done.stdout.isascii()
    assert re.search(rb"\d us|\d ms", done.stdout)
    assert b"#" in done.stdout
    assert b"?" not in done.stdout


@pytest.mark.parametrize(
    ("redirection", "complaint"),
    [
        ("| :", "standard output was closed"),
        (">/dev/full", "cannot write to standard output: No space left on device"),
        (">&-", "cannot write to standard output: Bad file descriptor"),
    ],
)
def test_a_report_that_nobody_gets(redirection: str, complaint: str, quick: list[str]) -> None:
    """A report that cannot be written is a failure, in one line."""
    script = f'{{ "$@" 3>&-; echo "status $?" >&3; }} 3>&2 {redirection}'
    done = subprocess.run(["sh", "-c", script, "sh", *quick], capture_output=True, check=False, timeout=20, text=True)
    assert done.stderr.splitlines() == [f"trioproto: {complaint}", "status 1"]


def test_standard_error_closed(quick: list[str]) -> None:
    """Progress and messages have nowhere to go then; the report has."""
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *quick], stdout=subprocess.PIPE, check=True, timeout=20)
    assert b"answered" in done.stdout


@pytest.mark.parametrize(
    ("host", "complaint"),
    [("a" * 64, "label too long"), ("\udcff", "invalid character"), ("[::1]", "cannot connect to [::1]:1: ")],
)
def test_hosts(host: str, complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A host that cannot be one is a failure like any other; an IPv6 address may stand in brackets."""
    assert main(["bench", "op", "--host", host, "--port", "1", "--connections", "2"]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("trioproto: cannot connect to ")
    assert complaint in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--connections", "0"], "must be between 1 and 10000, not '0'"),
        (["--connections", "2", "--processes", "3"], "--processes 3 is more than --connections 2"),
        (["--size", "1048576", "--depth", "65"], "--depth times --size is more than 67108864 bytes"),
        (["--rate", "0"], "must be above 0, not '0'"),
        (["--rate", "inf"], "must be a number, not 'inf'"),
        (["--rate", "1e300"], "must be at most 1e+09, not '1e300'"),
        (["--plot", "latency.pdf"], "must end in .svg or .png, not 'latency.pdf'"),
        (["--json", "/"], "cannot write to '/'"),
        (["--json", "/no/such/directory/file"], "cannot write to '/no/such/directory/file'"),
        (["--json", "/no/" + 300 * "a"], "cannot write to '/no/aaa"),
        (["--operands", "3"], "unrecognized arguments: --operands 3"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    """What cannot be done is refused before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", "echo", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def terminal_pair() -> tuple[int, int]:
    """Open a terminal of 80 columns; gives the user's end and the program's."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    return ours, theirs


@contextlib.contextmanager
def running_bench(*options: str, python: str = sys.executable) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run bench with a terminal for standard error; gives the process and the terminal's other end."""
    ours, theirs = terminal_pair()
    bench = subprocess.Popen(
        [sys.executable, "-c", WITH_FAKE_PYTHON, python, "bench", *options],
        stdout=subprocess.PIPE,
        stderr=theirs,
        process_group=0,
    )
    os.close(theirs)
    try:
        yield bench, ours
    finally:
        bench.terminate()  # not killed, so that it can end its server
        bench.communicate(timeout=10)
        os.close(ours)


def wait_for(pattern: bytes, terminal: int) -> None:
    seen = b""
    until = time.monotonic() + 10
    while not re.search(pattern, seen):
        assert select.select([terminal], [], [], until - time.monotonic())[0], seen
        seen += os.read(terminal, 10_000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C ends the load early and reports what was measured until then, with status 130; so does SIGTERM."""
    json_file = tmp_path / "bench.json"
    with running_bench("echo", "--duration", "600", "--json", str(json_file)) as (bench, terminal):
        wait_for(rb"[1-9][\d,]*/s, 0 errors", terminal)
        os.killpg(bench.pid, number)  # as a terminal does: to all that run in it
        out, _ = bench.communicate(timeout=10)
    assert bench.returncode == 130
    assert re.search(rb"^answered +[1-9]", out, re.MULTILINE)
    written = json.loads(json_file.read_text())
    assert written["interrupted"] is True
    assert 0 < written["seconds"] < 60


def test_interrupt_twice(tmp_path: Path) -> None:
    """A second Ctrl-C ends what the first one could not."""
    ready, progress = Measurement().to_json(), Measurement(seconds=1.0).to_json()
    fake = fake_python(tmp_path, f"echo '{ready}'; read _; echo '{progress}'; exec sleep 60")
    with running_bench("echo", "--duration", "600", "--port", "1", python=fake) as (bench, terminal):
        wait_for(rb"0/s, 0 errors", terminal)
        os.killpg(bench.pid, signal.SIGINT)
        time.sleep(0.2)  # two signals at once are one
        os.killpg(bench.pid, signal.SIGINT)
        out, _ = bench.communicate(timeout=10)
    assert (bench.returncode, out) == (130, b"")
