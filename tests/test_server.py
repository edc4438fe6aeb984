"""`serve_tcp` and `serve_listeners`: calls, crashes, cancellation, accept errors, ticks."""

import contextlib
import errno
import logging
import math
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from helpers import MemoryListener

import trioproto
from trioproto import ServerStats, echo_handler, echo_request, serve_listeners, serve_tcp, serve_until_signal

Stream = trio.abc.HalfCloseableStream
LIMIT = 10  # seconds, for what may go wrong on real sockets


@pytest.fixture(params=[trioproto.serve_tcp, trio.serve_tcp], ids=["trioproto", "trio"])
def either_serve_tcp(request: pytest.FixtureRequest) -> Callable[..., Awaitable[object]]:
    """Ours, and Trio's, which tells what a call means."""
    serve: Callable[..., Awaitable[object]] = request.param
    return serve


# Called like Trio's.


async def test_started_with_listeners(
    either_serve_tcp: Callable[..., Awaitable[object]], nursery: trio.Nursery
) -> None:
    """``nursery.start`` returns the listeners; with port 0 their ports are the kernel's choice."""
    listeners = await nursery.start(partial(either_serve_tcp, echo_handler, 0, host="127.0.0.1"))
    assert len(listeners) == 1
    host, port = listeners[0].socket.getsockname()
    assert host == "127.0.0.1"
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream(host, port) as client:
            assert await echo_request(client, b"hello") == b"hello"


async def test_started_with_a_port(either_serve_tcp: Callable[..., Awaitable[object]], nursery: trio.Nursery) -> None:
    """The port that is asked for is the one that is listened on; it need not be waited for with ``start``."""
    [free] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = free.socket.getsockname()[1]
    await free.aclose()
    nursery.start_soon(partial(either_serve_tcp, echo_handler, port, host=b"127.0.0.1"))
    await trio.testing.wait_all_tasks_blocked()
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert await echo_request(client, b"hello") == b"hello"


async def test_every_interface(either_serve_tcp: Callable[..., Awaitable[object]], nursery: trio.Nursery) -> None:
    """Without a host, the server listens on all interfaces of all the protocol families that there are."""
    listeners = await nursery.start(partial(either_serve_tcp, echo_handler, 0))
    expected = await trio.open_tcp_listeners(0)
    hosts = [listener.socket.getsockname()[0] for listener in listeners]
    assert hosts == [listener.socket.getsockname()[0] for listener in expected]
    for listener in expected:
        await listener.aclose()
    with trio.fail_after(LIMIT):
        for listener in listeners:
            async with await trio.testing.open_stream_to_socket_listener(listener) as client:
                assert await echo_request(client, b"hello") == b"hello"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a listening socket's backlog")
async def test_backlog(either_serve_tcp: Callable[..., Awaitable[object]], nursery: trio.Nursery) -> None:
    """The backlog is that of the listening socket."""
    [listener] = await nursery.start(partial(either_serve_tcp, echo_handler, 0, host="127.0.0.1", backlog=7))
    tcp_info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert struct.unpack_from("I", tcp_info, 28) == (7,)  # tcpi_sacked: while listening, the queue's length


async def test_cannot_listen(either_serve_tcp: Callable[..., Awaitable[object]]) -> None:
    """If the port is taken, the error says so."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            await either_serve_tcp(echo_handler, port, host="127.0.0.1")


async def test_no_server_is_left(either_serve_tcp: Callable[..., Awaitable[object]]) -> None:
    """Once the server is cancelled, nothing listens any more, and its connections are closed."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(either_serve_tcp, echo_handler, 0, host="127.0.0.1"))
            address = listener.socket.getsockname()
            client = await trio.open_tcp_stream(*address)
            assert await echo_request(client, b"hello") == b"hello"
            nursery.cancel_scope.cancel()
        async with client:
            assert await client.receive_some() == b""
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream(*address)


@pytest.mark.parametrize("serve", [trioproto.serve_listeners, trio.serve_listeners])
async def test_several_listeners(serve: Callable[..., Awaitable[object]], nursery: trio.Nursery) -> None:
    """Every listener is served; they are what ``nursery.start`` returns."""
    listeners = [MemoryListener(), MemoryListener(), MemoryListener()]
    assert await nursery.start(serve, echo_handler, listeners) == listeners
    clients = [listener.connect() for listener in listeners]
    for number, client in enumerate(clients):
        assert await echo_request(client, b"hello %d" % number) == b"hello %d" % number


@pytest.mark.parametrize("serve", [trioproto.serve_listeners, trio.serve_listeners])
async def test_stream_is_closed(serve: Callable[..., Awaitable[object]], nursery: trio.Nursery) -> None:
    """A stream that the handler leaves open is closed when it returns."""

    async def handler(stream: Stream) -> None:
        await stream.send_all(b"bye")

    listener = MemoryListener()
    await nursery.start(serve, handler, [listener])
    client = listener.connect()
    assert await client.receive_some() == b"bye"
    assert await client.receive_some() == b""


# Crashes.


class BugGroup(BaseExceptionGroup[BaseException]):
    """A group that is no `Exception` even when all that it holds are."""


@pytest.mark.parametrize(
    "crash",
    [
        ValueError("bug"),
        ExceptionGroup("bugs", [ValueError("bug"), KeyError("another")]),
        ExceptionGroup("bugs", [ExceptionGroup("more bugs", [ValueError("bug")])]),
        BugGroup("bugs", [ValueError("bug")]),
        trio.BrokenResourceError("bug"),
        OSError(errno.EMFILE, "bug"),
    ],
    ids=repr,
)
async def test_crash(
    crash: BaseException,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A handler's crash is logged with its traceback, ends its own connection, and nothing else."""

    async def handler(stream: Stream) -> None:
        async for chunk in stream:
            if chunk == b"crash":
                raise crash
            await stream.send_all(chunk)

    stats: list[ServerStats] = []
    listener = MemoryListener()
    await nursery.start(
        partial(serve_listeners, handler, [listener], tick=1, on_tick=partial(note, stats)),
    )
    before, crashing = listener.connect(), listener.connect()
    assert await echo_request(before, b"hello") == b"hello"
    await crashing.send_all(b"crash")
    assert await crashing.receive_some() == b""
    assert await echo_request(before, b"still here") == b"still here"
    assert await echo_request(listener.connect(), b"and me") == b"and me"

    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "connection 2 from StapledStream to MemoryListener: the handler crashed" in record.getMessage()
    assert "handler(" not in record.getMessage()
    assert "raise crash" in caplog.text
    assert "bug" in caplog.text
    await trio.sleep(1.5)
    assert (stats[-1].accepted, stats[-1].active, stats[-1].crashed) == (3, 2, 1)


async def note(seen: list[ServerStats], stats: ServerStats) -> None:
    """Tick: note the statistics."""
    await trio.lowlevel.checkpoint()
    seen.append(stats)


class StopEverythingError(BaseException):
    """Like `KeyboardInterrupt`, which pytest would take for the user's."""


@pytest.mark.parametrize("also", [[], [ValueError("bug")]], ids=repr)
async def test_base_exception(
    also: list[Exception], caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """What is no `Exception` ends the server, as it is meant to; a bug in the same group is logged, and no more."""

    async def handler(stream: Stream) -> None:
        await stream.receive_some()
        raise BaseExceptionGroup("all at once", [*also, StopEverythingError()]) if also else StopEverythingError

    listener = MemoryListener()
    client, bystander = listener.connect(), listener.connect()
    await client.send_all(b"go")
    with trio.fail_after(1), pytest.raises(BaseExceptionGroup) as caught:
        await serve_listeners(handler, [listener])
    assert caught.group_contains(StopEverythingError)
    assert not caught.group_contains(ValueError)
    assert [("bug" in record.exc_text) for record in caplog.records if record.exc_text] == [True] * len(also)
    assert listener.closed
    assert await bystander.receive_some() == b""


async def test_crash_under_cancellation(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A handler that is cancelled and crashes in the same moment: the bug is logged, and cancellation goes on."""
    cancelled = []

    async def crash_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("bug")

    async def handler(stream: Stream) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(crash_at_the_end)
        except BaseExceptionGroup as group:
            cancelled.append(group.subgroup(trio.Cancelled) is not None)
            raise

    listener = MemoryListener()
    client = listener.connect()
    with trio.move_on_after(1) as scope:
        await serve_listeners(handler, [listener])
    assert scope.cancelled_caught
    assert cancelled == [True]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ExceptionGroup)
    assert [repr(error) for error in record.exc_info[1].exceptions] == ["ValueError('bug')"]
    assert await client.receive_some() == b""


async def test_cancellation(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """Cancelling the server cancels every handler and closes every listener and stream; that is no crash."""
    cancelled = []

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.append("child")
            raise

    async def handler(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)

    listeners = [MemoryListener(), MemoryListener()]
    clients = [listener.connect() for listener in listeners]
    with trio.move_on_after(1) as scope:
        await serve_listeners(handler, listeners)
    assert scope.cancelled_caught
    assert cancelled == ["child"] * 4
    assert all(listener.closed for listener in listeners)
    for client in clients:
        assert await client.receive_some() == b""
    assert caplog.messages == []


async def test_cancelling_itself_only(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """A handler may cancel a scope of its own, as for a time-out; that concerns nobody else."""

    async def handler(stream: Stream) -> None:
        with trio.move_on_after(1):
            await stream.receive_some()
        await stream.send_all(b"too late")

    listener = MemoryListener()
    await nursery.start(serve_listeners, handler, [listener])
    for _ in range(2):
        client = listener.connect()
        assert await client.receive_some() == b"too late"
        assert await client.receive_some() == b""


async def test_debug_log(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """The begin and the end of each connection are logged for debugging."""
    caplog.set_level(logging.DEBUG, "trioproto")
    listener = MemoryListener()
    await nursery.start(serve_listeners, echo_handler, [listener])
    client = listener.connect()
    await client.send_eof()
    assert await client.receive_some() == b""
    await trio.testing.wait_all_tasks_blocked()
    assert caplog.messages == [
        "connection 1 from StapledStream to MemoryListener",
        "connection 1 from StapledStream to MemoryListener: ended after 0.000 s, 0 bytes received, 0 sent, 0 requests",
    ]


# Accept errors.


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_lack_of_capacity(
    code: int,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A lack of descriptors or memory is logged and waited out, without a busy loop."""
    listener = MemoryListener(*[OSError(code, os.strerror(code))] * 3)
    await nursery.start(serve_listeners, echo_handler, [listener])
    with trio.fail_after(60):
        assert await echo_request(listener.connect(), b"hello") == b"hello"
    assert trio.current_time() > 0.01
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert os.strerror(code) in caplog.text


async def test_lack_of_capacity_on_one_listener(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """While one listener waits for capacity, connections are served, and ticks keep their schedule."""
    times: list[float] = []
    lacking = MemoryListener(*[OSError(errno.EMFILE, "too many")] * 10_000)
    other = MemoryListener()
    await nursery.start(
        partial(serve_listeners, echo_handler, [lacking, other], tick=0.25, on_tick=partial(note_time, times))
    )
    with trio.fail_after(1):
        assert await echo_request(other.connect(), b"hello") == b"hello"
    await trio.sleep_until(1.1)
    assert times == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    "error", [OSError(errno.EINVAL, "not listening"), trio.ClosedResourceError("closed")], ids=repr
)
async def test_other_accept_error(error: Exception, autojump_clock: trio.testing.MockClock) -> None:
    """An accept error that will not pass ends the server, and closes everything."""
    listeners = [MemoryListener(error), MemoryListener()]
    client = listeners[1].connect()
    with trio.fail_after(1), pytest.raises(ExceptionGroup) as caught:
        await serve_listeners(echo_handler, listeners)
    assert caught.group_contains(type(error), match=str(error).replace("[", r"\["))
    assert all(listener.closed for listener in listeners)
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"hello")


# Ticks. The server begins at time 0 of the clock, which jumps ahead whenever all tasks wait.


async def note_time(times: list[float], _stats: ServerStats) -> None:
    """Tick: note when."""
    await trio.lowlevel.checkpoint()
    times.append(trio.current_time())


async def test_ticks(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Ticks come at the multiples of their interval."""
    times: list[float] = []
    await nursery.start(
        partial(serve_listeners, echo_handler, [MemoryListener()], tick=0.5, on_tick=partial(note_time, times))
    )
    await trio.sleep(2.25)
    assert times == pytest.approx([0.5, 1, 1.5, 2])


async def test_ticks_once_for_all_listeners(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Ticks are the server's: they do not multiply with its listeners."""
    times: list[float] = []
    listeners = [MemoryListener() for _ in range(3)]
    await nursery.start(partial(serve_listeners, echo_handler, listeners, tick=1, on_tick=partial(note_time, times)))
    for _ in range(35):
        for listener in listeners:
            listener.connect()
        await trio.sleep(0.1)
    assert times == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("interval", [0.3, 0.5, 1, 1.7])
async def test_ticks_under_connections(
    interval: float, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Connections, however many and in whatever rhythm, neither delay a tick nor bring one forward."""
    times: list[float] = []
    stats: list[ServerStats] = []

    async def on_tick(seen: ServerStats) -> None:
        await note_time(times, seen)
        await note(stats, seen)

    listener = MemoryListener()
    await nursery.start(partial(serve_listeners, echo_handler, [listener], tick=1, on_tick=on_tick))
    while trio.current_time() < 10:
        for _ in range(3):
            listener.connect()
        await trio.sleep(interval)
    assert times[:9] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert stats[8].accepted >= 3 * math.floor(9 / interval)


async def test_ticks_do_not_drift(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """The time that a tick takes does not delay the ones after it."""
    times: list[float] = []

    async def on_tick(stats: ServerStats) -> None:
        await note_time(times, stats)
        await trio.sleep(0.3)

    await nursery.start(partial(serve_listeners, echo_handler, [MemoryListener()], tick=1, on_tick=on_tick))
    await trio.sleep(100.5)
    assert times == pytest.approx(range(1, 101))


async def test_ticks_that_are_missed(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Ticks missed during one that took too long are left out; the next one is on schedule, and comes once."""
    times: list[float] = []

    async def on_tick(stats: ServerStats) -> None:
        await note_time(times, stats)
        if len(times) == 2:
            await trio.sleep(2.5)

    listener = MemoryListener()
    await nursery.start(partial(serve_listeners, echo_handler, [listener], tick=1, on_tick=on_tick))
    await trio.sleep(8.25)
    assert times == pytest.approx([1, 2, 5, 6, 7, 8])


async def test_ticks_that_are_always_late(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Ticks that each take longer than their interval still leave connections their turn."""
    times: list[float] = []

    async def on_tick(stats: ServerStats) -> None:
        await note_time(times, stats)
        await trio.sleep(1.5)

    listener = MemoryListener()
    await nursery.start(partial(serve_listeners, echo_handler, [listener], tick=1, on_tick=on_tick))
    await trio.sleep(1.25)
    with trio.fail_after(2):
        assert await echo_request(listener.connect(), b"hello") == b"hello"
    await trio.sleep_until(7.25)
    assert times == pytest.approx([1, 3, 5, 7])


async def test_ticks_see_the_server(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Each tick is told how many connections there were, are open and have crashed, and for how long."""
    stats: list[ServerStats] = []
    release = trio.Event()

    async def handler(stream: Stream) -> None:
        if await stream.receive_some() == b"crash":
            raise ValueError
        await release.wait()

    await trio.sleep(100)
    listener = MemoryListener()
    await nursery.start(
        partial(serve_listeners, handler, [listener], tick=1, on_tick=partial(note, stats)),
    )
    await trio.sleep(1.5)
    for _ in range(3):
        await listener.connect().send_all(b"stay")
    await listener.connect().send_all(b"crash")
    await trio.sleep(1)
    release.set()
    await trio.sleep(1)
    assert [(seen.accepted, seen.active, seen.crashed) for seen in stats] == [(0, 0, 0), (4, 3, 1), (4, 0, 1)]
    assert [seen.uptime for seen in stats] == pytest.approx([1, 2, 3])


async def test_tick_without_listening(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """A tick that nobody listens to is no error, and connections are served on."""
    listener = MemoryListener()
    await nursery.start(partial(serve_listeners, echo_handler, [listener], tick=1))
    await trio.sleep(3.5)
    with trio.fail_after(1):
        assert await echo_request(listener.connect(), b"hello") == b"hello"


async def test_tick_that_fails(autojump_clock: trio.testing.MockClock) -> None:
    """An error in ``on_tick`` ends the server, as it is no handler's."""

    async def on_tick(stats: ServerStats) -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("bug")

    listener = MemoryListener()
    with trio.fail_after(2), pytest.raises(ExceptionGroup) as caught:
        await serve_listeners(echo_handler, [listener], tick=1, on_tick=on_tick)
    assert caught.group_contains(ValueError, match="bug")
    assert listener.closed


async def test_tick_of_serve_tcp(nursery: trio.Nursery) -> None:
    """`serve_tcp` takes ticks too."""
    ticked = trio.Event()

    async def on_tick(stats: ServerStats) -> None:
        await trio.lowlevel.checkpoint()
        ticked.set()

    await nursery.start(partial(serve_tcp, echo_handler, 0, host="127.0.0.1", tick=0.001, on_tick=on_tick))
    with trio.fail_after(LIMIT):
        await ticked.wait()


@pytest.mark.parametrize("tick", [0, -1, math.nan, -math.inf])
async def test_impossible_tick(tick: float, autojump_clock: trio.testing.MockClock) -> None:
    """A tick is above 0 seconds."""
    with trio.fail_after(1), pytest.raises(ValueError, match="tick"):
        await serve_listeners(echo_handler, [MemoryListener()], tick=tick)


async def test_on_tick_without_tick(autojump_clock: trio.testing.MockClock) -> None:
    """``on_tick`` would never be called without a tick; that is taken for a mistake."""
    with trio.fail_after(1), pytest.raises(ValueError, match="tick"):
        await serve_listeners(echo_handler, [MemoryListener()], on_tick=partial(note, []))


async def test_wrong_arguments_of_serve_tcp() -> None:
    """Wrong arguments leave no listening socket behind."""
    with trio.fail_after(1), pytest.raises(ValueError, match="tick"):
        await serve_tcp(echo_handler, 0, host="127.0.0.1", tick=0)


async def test_handler_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that was called, where it was to be passed, is a `TypeError` that says so, before anything is open."""
    monkeypatch.delattr(trio, "open_tcp_listeners")
    called: Any = echo_handler(trio.testing.memory_stream_pair()[0])
    with contextlib.closing(called):
        for serve in (
            partial(trioproto.serve_listeners, called, [MemoryListener()]),
            partial(serve_tcp, called, 0, host="127.0.0.1"),
            partial(serve_until_signal, called, 0),
        ):
            with trio.fail_after(1), pytest.raises(TypeError, match=r"handler must be .* not <coroutine .*: pass the"):
                await serve()
