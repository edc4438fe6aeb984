"""`shutdown` and `grace_period` of `serve_listeners`: when it returns, and what becomes of handlers of any kind."""

import contextlib
import errno
import logging
import math
import socket
from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio
import trio.testing
from helpers import MemoryListener

from trioproto import ServerStats, echo_handler, echo_request, serve_listeners, serve_tcp
from trioproto.server import EMPTYING_SECONDS

Stream = trio.abc.HalfCloseableStream

LIMIT = 20  # seconds, for a test on real sockets that would otherwise hang
SOON = 0.1  # seconds: more than a stop takes that waits for nobody


@contextlib.asynccontextmanager
async def set_after(seconds: float) -> AsyncIterator[trio.Event]:
    """Give an event that is set while the block runs."""
    event = trio.Event()

    async def set_it() -> None:
        await trio.sleep(seconds)
        event.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(set_it)
        yield event


async def sleeper(seconds: float, stream: Stream) -> None:
    """Handle a connection without any regard to a stop."""
    await trio.sleep(seconds)
    await stream.send_all(b"done")


async def test_nothing_to_wait_for(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """A server without connections returns at once, with its statistics; its listeners are closed."""
    listeners = [MemoryListener(), MemoryListener()]
    async with set_after(5) as shutdown:
        stats = await serve_listeners(echo_handler, listeners, shutdown=shutdown, grace_period=10)
    assert (stats.accepted, stats.active, stats.crashed) == (0, 0, 0)
    assert stats.uptime == pytest.approx(5, abs=SOON)
    assert all(listener.closed for listener in listeners)
    assert caplog.messages == []


@pytest.mark.parametrize("grace_period", [math.inf, 60])
async def test_handler_is_waited_for(
    grace_period: float, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A handler that does not take part in the stop is waited for, as long as the grace period lasts."""
    listener = MemoryListener()
    client = listener.connect()
    async with set_after(5) as shutdown:
        stats = await serve_listeners(partial(sleeper, 30), [listener], shutdown=shutdown, grace_period=grace_period)
    assert trio.current_time() == pytest.approx(30)
    assert (stats.accepted, stats.active, stats.crashed) == (1, 0, 0)
    assert await client.receive_some() == b"done"
    assert caplog.messages == []


@pytest.mark.parametrize("grace_period", [0, 0.5, 20])
async def test_grace_period(
    grace_period: float, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """What is left when the grace period is over is cancelled, neither earlier nor later; the log says so."""
    cancelled = []

    async def handler(stream: Stream) -> None:
        try:
            await sleeper(30, stream)
        except trio.Cancelled:
            cancelled.append(trio.current_time())
            raise

    listener = MemoryListener()
    clients = [listener.connect() for _ in range(2)]
    async with set_after(5) as shutdown:
        stats = await serve_listeners(handler, [listener], shutdown=shutdown, grace_period=grace_period)
    assert cancelled == pytest.approx([5 + grace_period] * 2)
    assert trio.current_time() == pytest.approx(5 + grace_period)
    assert (stats.accepted, stats.active, stats.crashed) == (2, 0, 0)
    for client in clients:
        assert await client.receive_some() == b""
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"the grace period of {grace_period} s expired: cancelled the rest"


async def test_grace_period_is_for_all(autojump_clock: trio.testing.MockClock) -> None:
    """It bounds the closing of connections, too, and connections that wait at the limit."""
    listener = MemoryListener()
    idle, queued = listener.connect(), listener.connect()
    async with set_after(5) as shutdown:
        stats = await serve_listeners(echo_handler, [listener], shutdown=shutdown, grace_period=0.25, max_connections=1)
    # The idle client does not end its side, so its connection lingers, and keeps the only place.
    assert trio.current_time() == pytest.approx(5.25)
    assert stats.accepted == 1
    assert await idle.receive_some() == b""
    assert listener.closed
    await queued.aclose()


async def test_cancellation_in_a_stop(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """In a stop, the server can be cancelled as before."""
    listener = MemoryListener()
    listener.connect()
    with trio.move_on_after(10) as scope:
        async with set_after(5) as shutdown:
            await serve_listeners(partial(sleeper, 30), [listener], shutdown=shutdown, grace_period=20)
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(10)
    assert listener.closed
    assert caplog.messages == []


async def test_crash_in_a_stop(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """In a stop, too, a crash ends its own connection and nothing else."""

    async def handler(stream: Stream) -> None:
        await sleeper(30, stream)
        if await stream.receive_some() == b"crash":
            raise ValueError("bug")

    listener = MemoryListener()
    clients = [listener.connect() for _ in range(2)]
    await clients[0].send_all(b"crash")
    await clients[1].send_all(b"fine")
    async with set_after(5) as shutdown:
        stats = await serve_listeners(handler, [listener], shutdown=shutdown)
    assert (stats.accepted, stats.active, stats.crashed) == (2, 0, 1)
    assert [await client.receive_some() for client in clients] == [b"done"] * 2
    assert "ValueError: bug" in caplog.text


async def test_no_ticks_in_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    """With accepting, the ticks end."""
    ticks: list[ServerStats] = []

    async def on_tick(stats: ServerStats) -> None:
        await trio.lowlevel.checkpoint()
        ticks.append(stats)

    listener = MemoryListener()
    listener.connect()
    async with set_after(5.5) as shutdown:
        await serve_listeners(partial(sleeper, 30), [listener], shutdown=shutdown, tick=1, on_tick=on_tick)
    assert len(ticks) == 5


@pytest.mark.parametrize("seconds", [0.3, 10])
async def test_emptying_the_queue_is_bounded(seconds: float, autojump_clock: trio.testing.MockClock) -> None:
    """At the limit, a stop takes in what is queued for `EMPTYING_SECONDS`, and then waits only for those it serves."""
    listener = MemoryListener()
    for _ in range(100):
        listener.connect()
    shutdown = trio.Event()
    shutdown.set()
    stats = await serve_listeners(partial(sleeper, seconds), [listener], shutdown=shutdown, max_connections=1)
    assert stats.accepted == 1 + int(EMPTYING_SECONDS / seconds)
    assert trio.current_time() == pytest.approx(stats.accepted * seconds, abs=SOON)
    assert listener.closed


async def test_listener_that_its_owner_closes_in_a_stop() -> None:
    """Its queue is left alone, and so is the next listener that is given its descriptor."""
    served: list[Stream] = []

    async def handler(stream: Stream) -> None:
        await trio.lowlevel.checkpoint()
        served.append(stream)

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    descriptor = listener.socket.fileno()
    shutdown = trio.Event()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve_listeners, handler, [listener], shutdown=shutdown))
            await trio.testing.wait_all_tasks_blocked()
            shutdown.set()
            listener.socket.close()
            [another] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            assert another.socket.fileno() == descriptor
            client = await trio.testing.open_stream_to_socket_listener(another)
    assert served == []
    await client.aclose()
    await another.aclose()


async def test_long_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stop, taking in a long queue of connections leaves other tasks their turns."""
    monkeypatch.setattr("trioproto.server.ACCEPT_BATCH", 1)
    turn = 0
    began_in: list[int] = []

    async def handler(stream: Stream) -> None:
        began_in.append(turn)
        await trio.lowlevel.checkpoint()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await trio.lowlevel.checkpoint()
            turn += 1

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    shutdown = trio.Event()
    shutdown.set()
    with trio.fail_after(LIMIT), contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection(listener.socket.getsockname()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            await serve_listeners(handler, [listener], shutdown=shutdown)
            nursery.cancel_scope.cancel()
    assert len(began_in) == 50
    assert began_in[-1] - began_in[0] >= 40


async def test_queue_with_a_lost_connection(autojump_clock: trio.testing.MockClock) -> None:
    """In a stop, connections queued behind one that was lost are served, and a lack of descriptors is waited out."""
    lost, short = OSError(errno.ECONNABORTED, "lost"), OSError(errno.EMFILE, "short")
    listener = MemoryListener(lost, short, lost)
    client = listener.connect()
    shutdown = trio.Event()
    shutdown.set()
    await client.send_all(b"hello")
    stats = await serve_listeners(echo_handler, [listener], shutdown=shutdown, grace_period=100)
    assert stats.accepted == 1
    assert await client.receive_some() == b"hello"


async def test_on_sockets() -> None:
    """After a stop nothing listens any more; `serve_tcp` returns the same statistics."""
    results = []
    shutdown = trio.Event()

    async def serve(task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        stats = await serve_tcp(echo_handler, 0, host="127.0.0.1", shutdown=shutdown, task_status=task_status)
        results.append(stats)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(serve)
            address = listener.socket.getsockname()
            async with await trio.open_tcp_stream(*address) as client:
                assert await echo_request(client, b"hello") == b"hello"
                shutdown.set()
                assert await client.receive_some() == b""
    [stats] = results
    assert (stats.accepted, stats.active, stats.crashed) == (1, 0, 0)
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream(*address)


@pytest.mark.parametrize("grace_period", [-1, math.nan])
async def test_impossible_grace_period(grace_period: float, autojump_clock: trio.testing.MockClock) -> None:
    """A grace period is 0 seconds or more."""
    with trio.fail_after(1), pytest.raises(ValueError, match="grace_period"):
        await serve_listeners(echo_handler, [MemoryListener()], grace_period=grace_period)
