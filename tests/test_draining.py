"""A server's graceful stop, seen by its clients: what is under way is finished, and nothing else is waited for."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Handler,
    MemoryListener,
    client_tls,
    int32_bytes,
    request_bytes,
    send_after,
    serving,
    tls_contexts,
)

from trioproto import echo_handler, echo_request, op_handler, op_request, receive_exactly, serve_listeners
from trioproto.connection import FIRST_REQUEST_GRACE, LAST_REQUESTS_SECONDS

ONE = request_bytes([1], "+")
SOON = 0.1  # seconds: more than a stop takes that waits for nobody


@attrs.frozen
class Place:
    """Where a server listens, and how to connect to it."""

    listener: trio.abc.Listener[Any]
    connect: Callable[[], Awaitable[trio.abc.Stream]]
    is_closed: Callable[[], bool]


@contextlib.asynccontextmanager
async def memory_place() -> AsyncIterator[Place]:
    listener = MemoryListener()

    async def connect() -> trio.abc.Stream:
        return listener.connect()

    yield Place(listener, connect, lambda: listener.closed)


@contextlib.asynccontextmanager
async def socket_place() -> AsyncIterator[Place]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    connect = partial(trio.testing.open_stream_to_socket_listener, listener)
    yield Place(listener, connect, lambda: listener.socket.fileno() == -1)


@contextlib.asynccontextmanager
async def tls_place() -> AsyncIterator[Place]:
    listener = MemoryListener()

    async def connect() -> trio.abc.Stream:
        return client_tls(listener.connect())

    yield Place(trio.SSLListener(listener, tls_contexts()[1]), connect, lambda: listener.closed)


@pytest.fixture(params=[memory_place, socket_place, tls_place], ids=["memory", "socket", "TLS"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each kind of listener."""
    async with request.param() as place:
        yield place


@contextlib.contextmanager
def taking(seconds: float) -> Iterator[None]:
    """Check how long the block takes, on Trio's clock."""
    began = trio.current_time()
    yield
    assert trio.current_time() - began == pytest.approx(seconds, abs=SOON)


@pytest.fixture(autouse=True)
def _no_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No handler crashes in these tests, and no client is at fault."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


# The same for sockets, memory streams and TLS, on the real clock.


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_idle_connections_end(handler: Handler, place: Place) -> None:
    """A client that is between two requests is shown the end of the stream at once."""
    async with serving(handler, place.listener) as shutdown:
        clients = [await place.connect() for _ in range(3)]
        for client in clients:
            await client.send_all(ONE)
            assert await client.receive_some() != b""
        shutdown.set()
        for client in clients:
            assert await client.receive_some() == b""
            await client.aclose()


async def test_half_a_request_is_finished(place: Place) -> None:
    """A client that is in the middle of a request may finish it, and gets the reply, then end of stream."""
    async with serving(op_handler, place.listener) as shutdown, await place.connect() as client:
        await client.send_all(ONE + ONE[:3])
        assert await client.receive_some() == int32_bytes(1)
        shutdown.set()
        await trio.sleep(0.2)
        await client.send_all(ONE[3:])
        assert await receive_exactly(client, 4) == int32_bytes(1)
        assert await client.receive_some() == b""


@pytest.mark.parametrize("count", [1, 1000])
async def test_requests_that_have_arrived(count: int, place: Place) -> None:
    """Requests whose bytes have arrived when the stop begins are answered, however many in a row."""
    async with serving(op_handler, place.listener) as shutdown, await place.connect() as client:
        assert await op_request(client, [1], "+") == 1
        await client.send_all(ONE * count)
        shutdown.set()
        assert await receive_exactly(client, 4 * count) == int32_bytes(1) * count
        assert await client.receive_some() == b""


async def test_fresh_connection(place: Place) -> None:
    """A client that has only just connected has time for its first request."""
    async with serving(echo_handler, place.listener) as shutdown, await place.connect() as client:
        await trio.testing.wait_all_tasks_blocked(0.01)
        shutdown.set()
        await trio.sleep(FIRST_REQUEST_GRACE / 4)
        assert await echo_request(client, b"hello") == b"hello"
        assert await client.receive_some() == b""


async def test_queued_connections(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that wait to be accepted when the stop begins are served; then the listener is closed."""
    monkeypatch.setattr("trioproto.server.EMPTYING_SECONDS", LIMIT)  # however slow the machine is
    clients = [await place.connect() for _ in range(20)]
    shutdown = trio.Event()
    shutdown.set()

    async def ask(client: trio.abc.Stream) -> None:
        async with client:
            assert await op_request(client, [1], "+") == 1
            assert await client.receive_some() == b""

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(ask, client)
            stats = await serve_listeners(op_handler, [place.listener], shutdown=shutdown, max_connections=3)
    assert (stats.accepted, stats.active, stats.crashed) == (20, 0, 0)
    assert place.is_closed()


async def test_reply_that_is_being_sent() -> None:
    """A reply that its client takes slowly is finished, on a socket whose buffers hold only part of it."""
    async with (
        socket_place() as place,
        serving(op_handler, place.listener) as shutdown,
        await place.connect() as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client.send_all, ONE * 200_000)
        received = await receive_exactly(client, 4)
        shutdown.set()
        while chunk := await client.receive_some(50_000):
            received += chunk
            await trio.sleep(0.001)
        # A stop ends between two requests; those that were not answered need not be sent.
        nursery.cancel_scope.cancel()
    assert received == int32_bytes(1) * (len(received) // 4)


# How long it all takes, on a clock that jumps.


async def serve(handler: Handler, listener: trio.abc.Listener[Any], shutdown_after: float) -> None:
    """Run a server for so many seconds, then have it stop."""
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_listeners, handler, [listener], shutdown=shutdown))
        await trio.sleep(shutdown_after)
        shutdown.set()


async def test_idle_takes_no_time(autojump_clock: trio.testing.MockClock) -> None:
    """Idle clients that end their side, too, do not make the stop wait."""
    with taking(10):
        async with memory_place() as place, serving(echo_handler, place.listener) as shutdown:
            clients = [await place.connect() for _ in range(3)]
            for client in clients:
                assert await echo_request(client, b"hello") == b"hello"
            await trio.sleep(10)
            shutdown.set()
            for client in clients:
                assert await client.receive_some() == b""
                await client.aclose()


@pytest.mark.parametrize("sent_at", [0.9, 1.1])
async def test_first_request_grace(sent_at: float, autojump_clock: trio.testing.MockClock) -> None:
    """A client's first request must be there `FIRST_REQUEST_GRACE` seconds after it was accepted, and no later."""
    async with memory_place() as place, trio.open_nursery() as nursery:
        client = await place.connect()
        nursery.start_soon(serve, echo_handler, place.listener, 0.5)
        nursery.start_soon(send_after, client, b"hello", sent_at * FIRST_REQUEST_GRACE)
        with taking(min(sent_at, 1) * FIRST_REQUEST_GRACE):
            assert await client.receive_some() == (b"hello" if sent_at < 1 else b"")
        with taking(0):
            assert await client.receive_some() == b""


async def test_first_request_grace_is_over(autojump_clock: trio.testing.MockClock) -> None:
    """A client that has been connected for longer than that, and has not sent anything, is idle."""
    async with memory_place() as place, trio.open_nursery() as nursery:
        client = await place.connect()
        nursery.start_soon(serve, echo_handler, place.listener, 5)
        with taking(5):
            assert await client.receive_some() == b""


@pytest.mark.parametrize("shutdown_after", [0, 0.1], ids=["before it is accepted", "while it is waited for"])
async def test_handshake_grace(
    shutdown_after: float, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """In a stop, a fresh client's TLS handshake and first request have `FIRST_REQUEST_GRACE` seconds together."""
    async with tls_place() as place:
        in_time, silent = [await place.connect() for _ in range(2)]
        assert isinstance(silent, trio.SSLStream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, partial(echo_handler, request_timeout=10), place.listener, shutdown_after)
            await trio.sleep(0.8 * FIRST_REQUEST_GRACE)
            assert await echo_request(in_time, b"hello") == b"hello"
            assert await in_time.receive_some() == b""
            await in_time.aclose()
            with taking(0.2 * FIRST_REQUEST_GRACE):
                assert await silent.transport_stream.receive_some() == b""
    assert caplog.messages == ["SSLStream to MemoryListener: timed out waiting for a TLS handshake"]
    caplog.clear()


async def test_half_a_request_is_not_finished(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that never finishes its request holds up the stop for ``request_timeout``."""
    async with memory_place() as place, trio.open_nursery() as nursery:
        client = await place.connect()
        await client.send_all(ONE[:3])
        nursery.start_soon(serve, partial(op_handler, request_timeout=10), place.listener, 1)
        with taking(10):
            assert await client.receive_some() == b""
        assert caplog.messages == ["StapledStream to MemoryListener: timed out waiting for the rest of a request"]
        caplog.clear()


@pytest.mark.parametrize("ahead", [ONE, ONE + ONE[:3]], ids=["a request", "a request and a half"])
async def test_client_that_never_pauses(ahead: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A client that always has its next request on its way is ended between two, `LAST_REQUESTS_SECONDS` later."""
    replies = 0
    async with memory_place() as place, trio.open_nursery() as nursery:
        client = await place.connect()
        nursery.start_soon(serve, op_handler, place.listener, 5)
        await client.send_all(ahead)
        with taking(5 + LAST_REQUESTS_SECONDS):
            while reply := await client.receive_some():
                assert reply == int32_bytes(1)
                replies += 1
                await trio.sleep(0.005)
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.send_all(ONE[len(ahead) - 6 :] + ahead[6:])
        await client.aclose()
    assert replies > 5 / 0.005


# Who takes part.


async def test_other_servers_go_on(autojump_clock: trio.testing.MockClock) -> None:
    """Only the server that stops drains: not another one, nor `trio.serve_listeners`, where nothing ever does."""
    shutdown = trio.Event()
    stopping, other, trios = MemoryListener(), MemoryListener(), MemoryListener()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_listeners, echo_handler, [stopping], shutdown=shutdown))
        nursery.start_soon(serve_listeners, echo_handler, [other])
        nursery.start_soon(trio.serve_listeners, echo_handler, [trios])
        clients = [listener.connect() for listener in (stopping, other, trios)]
        for client in clients:
            assert await echo_request(client, b"hello") == b"hello"
        await trio.sleep(10)
        shutdown.set()
        assert await clients[0].receive_some() == b""
        for client in clients[1:]:
            await trio.sleep(100)
            assert await echo_request(client, b"hello") == b"hello"
        nursery.cancel_scope.cancel()


async def test_deep_below(autojump_clock: trio.testing.MockClock) -> None:
    """A conversation takes part however deep below the server it is, in whatever task."""

    async def handler(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo_handler, stream)

    async with memory_place() as place, trio.open_nursery() as nursery:
        client = await place.connect()
        nursery.start_soon(serve, handler, place.listener, 5)
        assert await echo_request(client, b"hello") == b"hello"
        with taking(5):
            assert await client.receive_some() == b""
