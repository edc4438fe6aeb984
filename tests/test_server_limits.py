"""What a server has too many or too little of: `max_connections`, and what accept(2) reports."""

import contextlib
import errno
import logging
import os
import socket
from functools import partial

import pytest
import trio
import trio.testing
from helpers import MemoryListener

from trioproto import ServerStats, echo_handler, echo_request, serve_listeners, serve_tcp
from trioproto.server import ACCEPT_BATCH, CAPACITY_WAIT, GIVE_WAY_PAUSES, LOST_IN_A_ROW

Stream = trio.abc.HalfCloseableStream

LIMIT = 20  # seconds, for a test on real sockets that would otherwise hang


class Counting:
    """An echo handler that notes how many of it ran at once, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self, stream: trio.abc.Stream) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await echo_handler(stream)
        finally:
            self.now -= 1


# The limit.


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_limit_on_sockets(limit: int, nursery: trio.Nursery) -> None:
    """At the limit further clients wait in the kernel's queue; each end lets one in, and none is refused."""
    handler = Counting()
    [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1", max_connections=limit))

    async def converse() -> None:
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            for _ in range(3):
                assert await echo_request(client, b"hello") == b"hello"
                await trio.sleep(0.001)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as clients:
            for _ in range(50):
                clients.start_soon(converse)
    assert handler.most == limit


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_limit_on_other_listeners(
    limit: int, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """The same where connections are no sockets."""
    handler = Counting()
    listener = MemoryListener()
    await nursery.start(partial(serve_listeners, handler, [listener], max_connections=limit))
    clients = [listener.connect() for _ in range(10)]
    for client in clients:
        await client.send_all(b"hello")
    await trio.sleep(100)
    assert handler.most == handler.now == limit
    for client in clients:
        assert await client.receive_some() == b"hello"
        await client.aclose()
    assert handler.most == limit


async def test_limit_lets_in_after_a_crash(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """A crash, too, makes room for another connection."""

    async def handler(stream: Stream) -> None:
        if await stream.receive_some() == b"crash":
            raise ValueError("bug")
        await stream.send_all(b"fine")

    listener = MemoryListener()
    await nursery.start(partial(serve_listeners, handler, [listener], max_connections=1))
    first, second = listener.connect(), listener.connect()
    await second.send_all(b"hello")
    await first.send_all(b"crash")
    with trio.fail_after(1):
        assert await second.receive_some() == b"fine"


async def test_ticks_at_the_limit(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """At the limit the ticks keep coming, on schedule."""
    ticks: list[tuple[float, int]] = []

    async def on_tick(stats: ServerStats) -> None:
        await trio.lowlevel.checkpoint()
        ticks.append((trio.current_time(), stats.active))

    listener = MemoryListener()
    for _ in range(3):
        listener.connect()
    await nursery.start(partial(serve_listeners, echo_handler, [listener], max_connections=2, tick=1, on_tick=on_tick))
    await trio.sleep(3.5)
    assert ticks == [(1, 2), (2, 2), (3, 2)]


async def test_place_goes_to_whoever_has_somebody_waiting(nursery: trio.Nursery) -> None:
    """A place that becomes free does not stay with a listener that nobody waits at."""
    listeners = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
    await nursery.start(partial(serve_listeners, echo_handler, listeners, max_connections=1))
    with trio.fail_after(LIMIT / 4):
        first, second = [await trio.testing.open_stream_to_socket_listener(listener) for listener in listeners]
        async with second:
            async with first:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert await echo_request(second, b"hello") == b"hello"


async def test_no_listener_is_starved(nursery: trio.Nursery) -> None:
    """At the limit every listener has its turns, though another one always has somebody waiting."""
    listeners = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(3)]
    busy, quiet, quieter = listeners
    handler = Counting()
    await nursery.start(partial(serve_listeners, handler, listeners, max_connections=1))

    async def converse(listener: trio.SocketListener) -> None:
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            assert await echo_request(client, b"hello") == b"hello"

    async def keep_busy() -> None:
        while True:
            await converse(busy)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as others:
            for _ in range(10):
                others.start_soon(keep_busy)
            for _ in range(10):
                await converse(quiet)
                await converse(quieter)
            others.cancel_scope.cancel()
    assert handler.most == 1


async def test_no_other_listener_is_starved(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """The same where connections are no sockets; there, each listener but one may be served one too many."""
    listeners = [MemoryListener() for _ in range(3)]
    handler = Counting()
    await nursery.start(partial(serve_listeners, handler, listeners, max_connections=1))

    async def converse(listener: MemoryListener) -> None:
        async with listener.connect() as client:
            assert await echo_request(client, b"hello") == b"hello"

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as clients:
            for listener in listeners:
                for _ in range(50):
                    clients.start_soon(converse, listener)
    assert 1 <= handler.most <= 3


@pytest.mark.parametrize("limit", [0, -1])
async def test_impossible_limit(limit: int, autojump_clock: trio.testing.MockClock) -> None:
    """A server serves one connection at once, or more."""
    with trio.fail_after(1), pytest.raises(ValueError, match="max_connections"):
        await serve_listeners(echo_handler, [MemoryListener()], max_connections=limit)


# Accepting.


async def greet(stream: trio.SocketStream) -> None:
    """Send a word, and wait for ever."""
    await stream.send_all(b"hello")
    await trio.sleep_forever()


async def test_burst(nursery: trio.Nursery) -> None:
    """Connections that were queued before the server began are all served, more than one wake-up takes."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(LIMIT), contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(listener.socket.getsockname()))
            for _ in range(2 * ACCEPT_BATCH + 1)
        ]
        await nursery.start(serve_listeners, echo_handler, [listener])
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert await trio.to_thread.run_sync(client.recv, 10) == b"%d" % number


async def test_burst_with_others_who_share_the_socket(nursery: trio.Nursery) -> None:
    """Before each connection the server asks whether others come first. If they take none in time, it takes some."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    asked: list[int] = []

    def give_way(active: int) -> bool:
        asked.append(active)
        return active >= 2

    with trio.fail_after(LIMIT), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(listener.socket.getsockname())) for _ in range(7)]
        await nursery.start(partial(serve_listeners, greet, [listener], give_way=give_way))
        for client in clients:
            assert await trio.to_thread.run_sync(client.recv, 10) == b"hello"
    # Two at once, then four that nobody has taken, and again what is left.
    assert asked == [0, 1, 2, *[2] * len(GIVE_WAY_PAUSES), 6, *[6] * len(GIVE_WAY_PAUSES)]


async def test_default_timeout(nursery: trio.Nursery) -> None:
    """The standard library's default time-out for new sockets does not make the server wait for connections."""
    socket.setdefaulttimeout(LIMIT / 4)
    try:
        [listener] = await nursery.start(partial(serve_tcp, echo_handler, 0, host="127.0.0.1"))
        with trio.fail_after(LIMIT / 8):
            async with await trio.testing.open_stream_to_socket_listener(listener) as client:
                assert await echo_request(client, b"hello") == b"hello"
    finally:
        socket.setdefaulttimeout(None)


# What accept(2) reports.

CONNECTION_ERRORS = [  # accept(2), "Error handling", and those of a firewall and of other systems
    "ECONNABORTED",
    "ECONNRESET",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "ENETDOWN",
    "ENETUNREACH",
    "ENONET",
    "ENOPROTOOPT",
    "EOPNOTSUPP",
    "EPERM",
    "EPROTO",
    "ETIMEDOUT",
]
CAPACITY_ERRORS = ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"]
LISTENER_ERRORS = ["EBADF", "EFAULT", "EINVAL", "ENOTSOCK"]


def os_error(name: str) -> OSError:
    code = getattr(errno, name, errno.EPROTO)  # ENONET is Linux's alone
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize("name", CONNECTION_ERRORS)
async def test_connection_error(
    name: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """An error of one connection passes, without a delay for the next one, and is logged for debugging only."""
    caplog.set_level(logging.DEBUG, "trioproto")
    listener = MemoryListener(*[os_error(name)] * 3)
    await nursery.start(serve_listeners, echo_handler, [listener])
    assert await echo_request(listener.connect(), b"hello") == b"hello"
    assert trio.current_time() == 0
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert len([message for message in caplog.messages if str(os_error(name)) in message]) == 3


@pytest.mark.parametrize("name", CAPACITY_ERRORS)
async def test_capacity_error(
    name: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A lack of descriptors or memory is logged when it begins and when it is over; meanwhile nobody spins."""
    caplog.set_level(logging.INFO, "trioproto")
    times: list[float] = []

    class Listener(MemoryListener):
        async def accept(self) -> Stream:
            times.append(trio.current_time())
            return await super().accept()

    listener = Listener(*[os_error(name)] * 5)
    await nursery.start(serve_listeners, echo_handler, [listener])
    for _ in range(2):
        assert await echo_request(listener.connect(), b"hello") == b"hello"
    assert times[:6] == pytest.approx([number * CAPACITY_WAIT for number in range(6)])
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, f"Listener: cannot accept: {os_error(name).strerror}; new connections wait"),
        (logging.INFO, "Listener: accepting again"),
    ]


@pytest.mark.parametrize("name", ["EPERM", "ECONNABORTED"])
async def test_every_connection_is_refused(
    name: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Where accepting never succeeds, such as in a sandbox that forbids it, nobody spins, and one line says so."""
    caplog.set_level(logging.INFO, "trioproto")
    calls = 0

    class Listener(MemoryListener):
        async def accept(self) -> Stream:
            nonlocal calls
            calls += 1
            await trio.lowlevel.checkpoint()
            raise os_error(name)

    await nursery.start(serve_listeners, echo_handler, [Listener()])
    await trio.sleep(10)
    assert calls == pytest.approx(LOST_IN_A_ROW + 10 / CAPACITY_WAIT, abs=2)
    assert caplog.messages == [f"Listener: cannot accept: {os_error(name).strerror}; new connections wait"]


async def test_no_listeners() -> None:
    """A server without listeners is a mistake, which is said at once."""
    with pytest.raises(ValueError, match="listeners must not be empty"):
        await serve_listeners(echo_handler, [], tick=1)


async def test_capacity_error_again(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Each lack is logged anew; one of another kind before it is over is not."""
    caplog.set_level(logging.INFO, "trioproto")
    outcomes = ["EMFILE", "ECONNABORTED", "ENFILE", None, "EMFILE", None]

    class Listener(MemoryListener):
        async def accept(self) -> Stream:
            name = outcomes.pop(0) if outcomes else None
            if name is not None:
                await trio.lowlevel.checkpoint()
                raise os_error(name)
            return await super().accept()

    listener = Listener()
    await nursery.start(serve_listeners, echo_handler, [listener])
    for _ in range(2):
        assert await echo_request(listener.connect(), b"hello") == b"hello"
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.INFO] * 2


@pytest.mark.parametrize("name", LISTENER_ERRORS)
async def test_listener_error(name: str, autojump_clock: trio.testing.MockClock) -> None:
    """An error of the listener itself is raised, and ends the server."""
    listener = MemoryListener(os_error(name))
    with trio.fail_after(1), pytest.raises(ExceptionGroup) as caught:
        await serve_listeners(echo_handler, [listener])
    assert [str(error) for error in caught.value.exceptions] == [str(os_error(name))]
    assert listener.closed
