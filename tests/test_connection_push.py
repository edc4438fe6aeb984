"""`Connection.push`: what is pushed goes out in order and together, and holds up nobody."""

import gc
import logging
import os
import re
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Stream,
    client_tls,
    connected,
    fill,
    receive_to_end,
    reset,
    served,
    server_tls,
    socket_streams,
)

from trioproto import Connection, receive_exactly


async def read_line(connection: Connection) -> bytes:
    """Read a line."""
    return await connection.receive_until(b"\n", max_bytes=1000)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is written to sockets by `Connection`, one entry for each system call."""
    written: list[bytes] = []
    write = os.write

    def note(fd: int, data: bytes) -> int:
        written.append(bytes(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", note)
    return written


@asynccontextmanager
async def socket_connection() -> AsyncIterator[tuple[trio.SocketStream, Connection]]:
    """A client's stream and the server's `Connection` at its other end, without a block."""
    client, theirs = await socket_streams()
    connection = Connection(theirs)
    with trio.fail_after(LIMIT):
        async with client:
            yield client, connection
            await connection.aclose()


# By the handler itself, between its waits.


async def receives(connection: Connection) -> None:
    with trio.move_on_after(0.01):
        await connection.receive_some()


async def requests(connection: Connection) -> None:
    with trio.move_on_after(0.01):
        await anext(connection.requests(read_line))


async def sends(connection: Connection) -> None:
    await connection.send_all(b"")


async def sends_eof(connection: Connection) -> None:
    await connection.send_eof()


async def ends(connection: Connection) -> None:
    with trio.move_on_after(0.05):
        async with connection:
            pass


@pytest.mark.parametrize("wait", [receives, requests, sends, sends_eof, ends])
async def test_together_before_any_wait(wait: Callable[[Connection], Awaitable[None]], writes: list[bytes]) -> None:
    """What was pushed goes out in order, and in one system call, before the connection waits for anything."""
    async with socket_connection() as (client, connection):
        for number in range(10):
            connection.push(b"%d" % number)
        assert writes == []
        assert connection.unsent == 10
        await wait(connection)
        assert connection.unsent == 0
        assert writes == [b"0123456789"]
        assert await receive_exactly(client, 10) == b"0123456789"


async def test_replies_to_requests_that_came_together(writes: list[bytes]) -> None:
    """Replies to requests that arrived together go out together."""
    async with socket_connection() as (client, connection):
        await client.send_all(b"a\n" * 100)
        await client.send_eof()
        await trio.sleep(0.01)
        async for line in connection.requests(read_line):
            connection.push(line)
        assert writes == [b"a" * 100]


async def test_push_takes_a_copy() -> None:
    """What is done to a buffer after it was pushed does not matter; nothing pushed is nothing."""
    async with socket_connection() as (client, connection):
        data = bytearray(b"hello")
        connection.push(data)
        connection.push(memoryview(b" world"))
        connection.push(b"")
        data[:] = b"HELLO"
        assert connection.unsent == 11
        await connection.send_all(b"!")
        assert await receive_exactly(client, 12) == b"hello world!"


async def test_unsent() -> None:
    """`unsent` is how many pushed bytes the system has not taken, also while they are being sent."""
    async with socket_connection() as (client, connection):
        filled = fill(connection._transport._stream)  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way
        size = 3_000_000
        connection.push(bytes(size))
        assert connection.unsent == size
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, b"not pushed")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert connection.unsent == size
            seen = set()
            received = 0
            while received < filled + size + len(b"not pushed"):
                received += len(await client.receive_some(100_000))
                seen.add(connection.unsent)
        assert connection.unsent == 0
        assert len(seen) > 5
        assert min(seen) == 0
        connection.push(b"dropped")
        await connection.aclose()
        assert connection.unsent == 0


async def test_push_does_not_wait_for_a_client_that_does_not_read() -> None:
    """Receiving waits until what is owed is sent: a client that takes nothing is not read from either."""
    async with socket_connection() as (client, connection):
        fill(connection._transport._stream)  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way
        connection.push(b"hello")
        await client.send_all(b"hello")
        with trio.move_on_after(0.05) as scope:
            await connection.receive_some()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_to_end, client)
            assert await connection.receive_some() == b"hello"
            nursery.cancel_scope.cancel()


async def test_push_while_another_task_sends() -> None:
    """While another task waits for room, receiving does not: what was pushed goes out behind that task's message."""
    client, theirs = trio.testing.lockstep_stream_pair()
    connection = Connection(theirs)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, b"one ")
            await trio.testing.wait_all_tasks_blocked()
            connection.push(b"two")
            nursery.start_soon(client.send_all, b"hello")
            assert await connection.receive_some() == b"hello"
            nursery.start_soon(connection.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            assert await client.receive_some() == b"one "
            assert await client.receive_some() == b"two"
            nursery.start_soon(client.send_all, b"hello")


async def test_no_wait_with_what_another_task_sends_by_then() -> None:
    """`send_all` waits for what another task is sending, and sends nothing twice."""
    client, theirs = trio.testing.lockstep_stream_pair()
    connection = Connection(theirs)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            connection.push(b"one ")
            nursery.start_soon(connection.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(connection.send_all, b"two")
            await trio.testing.wait_all_tasks_blocked()
            assert await client.receive_some() == b"one "
            assert await client.receive_some() == b"two"
            nursery.start_soon(client.send_all, b"hello")


# From any task, with max_unsent.


@asynccontextmanager
async def pushing(
    max_unsent: int, wrap: Callable[[trio.abc.Stream], trio.abc.Stream] = lambda stream: stream, *, tls: bool = False
) -> AsyncIterator[tuple[trio.SocketStream, Connection, trio.Event]]:
    """Run a handler that pushes nothing itself and waits for something else.

    Gives the client's end, the connection, and an event that is set when its block has ended.
    """
    ended = trio.Event()
    connections: list[Connection] = []

    async def handler(stream: trio.SocketStream) -> None:
        async with Connection(wrap(stream), idle_timeout=0.5, max_unsent=max_unsent) as connection:
            connections.append(connection)
            await trio.sleep_forever()
        ended.set()

    async with connected(handler, tls=tls) as client:
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield client, connections[0], ended
        await connections[0].aclose()
        await ended.wait()


async def test_sent_at_once(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What any task pushes is sent at once, whatever the handler waits for; so is what comes behind it."""
    async with pushing(100, tls=tls) as (client, connection, _ended):
        for message in (b"one", b"two"):
            connection.push(message)
            assert await receive_exactly(client, 3) == message
            await trio.testing.wait_all_tasks_blocked()
            assert connection.unsent == 0
    assert caplog.messages == []


async def test_sent_at_once_behind_tls() -> None:
    """Behind TLS, too, also if the server sends first."""
    async with pushing(100, server_tls) as (client, connection, _ended):
        tls = client_tls(client)
        connection.push(b"one")
        assert await receive_exactly(tls, 3) == b"one"
        connection.push(b"two")
        assert await receive_exactly(tls, 3) == b"two"


async def test_together_from_any_task(writes: list[bytes]) -> None:
    """What is pushed before the task that sends has its turn goes out together."""
    async with pushing(100) as (client, connection, _ended):
        for _ in range(10):
            connection.push(b"hello")
        assert await receive_exactly(client, 50) == b"hello" * 10
        assert writes == [b"hello" * 10]


async def test_more_than_max_unsent_that_the_system_takes(writes: list[bytes]) -> None:
    """Only what the system has not taken counts: a client that reads may be pushed any number of bytes."""
    for max_unsent in (0, 1000):
        writes.clear()
        async with pushing(max_unsent) as (client, connection, ended):
            for number in range(100):
                connection.push(b"%099d\n" % number)
            assert (await receive_exactly(client, 10_000))[::100] == b"0" * 100
            assert connection.unsent == 0
            assert not ended.is_set()


async def test_overrun(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A client that does not take what is pushed is let go, wherever its handler is, and nobody else waits for it."""
    async with (
        pushing(10_000, tls=tls) as (slow, to_slow, slow_ended),
        pushing(10_000, tls=tls) as (fast, to_fast, fast_ended),
    ):
        pushed = 0
        while not slow_ended.is_set():
            for connection in (to_slow, to_fast):
                connection.push(bytes(5000))
            assert await receive_exactly(fast, 5000) == bytes(5000)
            pushed += 5000
            assert pushed < 100_000_000
        assert not fast_ended.is_set()
        with pytest.raises(trio.BrokenResourceError):  # half a message must not look like a whole one
            await receive_to_end(slow)
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert re.fullmatch(
            rf"{to_slow.peer} to 127\.0\.0\.1:\d+: overrun: 1\d{{4}} unsent bytes, more than 10000",
            record.getMessage(),
        )


async def test_push_of_one_large_message(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What the system does not take of one message counts like the rest."""
    async with pushing(10_000, tls=tls) as (_client, connection, ended):
        connection.push(bytes(50_000_000))
        await ended.wait()
    [message] = caplog.messages
    assert "overrun" in message


async def test_slow_client_below_max_unsent(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A client that takes nothing for the idle time-out is let go although it is owed less than ``max_unsent``."""
    async with pushing(2**30, tls=tls) as (client, connection, ended):
        connection.push(bytes(50_000_000))
        await ended.wait()
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)
    [message] = caplog.messages
    assert message.endswith(": timed out waiting for room for a reply")


async def test_pushed_while_the_client_is_slow(*, tls: bool) -> None:
    """Below ``max_unsent``, everything arrives, in order, as the client takes it."""
    expected = b"".join(b"%07d\n" % number for number in range(100_000))
    async with pushing(2**30, tls=tls) as (client, connection, _ended):
        filler = bytes(5_000_000)
        connection.push(filler)
        for start in range(0, len(expected), 80):
            connection.push(expected[start : start + 80])
        assert connection.unsent > 0
        assert (await receive_exactly(client, len(filler) + len(expected)))[len(filler) :] == expected
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert connection.unsent == 0


async def test_reset_while_nobody_uses_the_connection(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A client that has reset the connection is let go with the next push, quietly, wherever its handler is."""
    caplog.set_level(logging.INFO, "trioproto")
    for size in (1, 10_000):  # as much as may be unsent, and more
        async with pushing(100, tls=tls) as (client, connection, ended):
            reset(client)
            await trio.sleep(0.01)
            connection.push(bytes(size))
            await ended.wait()
    assert caplog.messages == []


async def test_memory_of_a_client_that_broke_off() -> None:
    """What was being sent is freed with the block, and does not wait for the garbage collector: many may break off."""
    client, server = await socket_streams()
    gc.disable()
    tracemalloc.start()
    try:
        with trio.fail_after(LIMIT):
            async with Connection(server, max_unsent=2**25) as connection:
                connection.push(bytes(2**24))
                await trio.testing.wait_all_tasks_blocked()
                reset(client)
                await trio.sleep_forever()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < 2**20


async def test_push_to_a_stream_that_somebody_has_closed() -> None:
    """If the stream itself is closed by somebody, pushing is no error; the handler will see it."""
    client, theirs = await socket_streams()

    async def handler() -> None:
        async with Connection(theirs, max_unsent=10) as connection:
            await theirs.aclose()
            for size in (1, 100):
                connection.push(bytes(size))
                await trio.testing.wait_all_tasks_blocked()
            await connection.receive_some()

    with trio.fail_after(LIMIT):
        with pytest.raises(trio.ClosedResourceError):
            await handler()
        await client.aclose()


async def test_chat(autojump_clock: trio.testing.MockClock) -> None:
    """Handlers that wait for their next request push to each other."""
    room: set[Connection] = set()

    async def chat(stream: Stream) -> None:
        async with Connection(stream, max_unsent=1000) as connection:
            room.add(connection)
            try:
                async for line in connection.requests(read_line):
                    for other in room:
                        other.push(line + b"\n")
            finally:
                room.discard(connection)

    async with served(chat) as one, served(chat) as two, served(chat) as three:
        await trio.testing.wait_all_tasks_blocked()
        await three.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert len(room) == 2
        for sender in (one, two):
            await sender.send_all(b"hello\n")
            for client in (one, two):
                assert await client.receive_some() == b"hello\n"


async def test_handler_that_sends_and_is_pushed_to(autojump_clock: trio.testing.MockClock) -> None:
    """Messages of `send_all` and pushed ones do not mix, and each goes out behind those before it."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, max_unsent=1000) as connection, trio.open_nursery() as nursery:
            connection.push(b"<one>")
            nursery.start_soon(connection.send_all, b"<two>")
            await trio.testing.wait_all_tasks_blocked()
            connection.push(b"<three>")

    async with served(handler, trio.testing.lockstep_stream_pair) as client:
        assert await receive_to_end(client) == b"<one><two><three>"


async def test_overrun_at_the_end_of_the_block(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A client is let go, too, if it takes nothing while the block ends, even without an idle time-out."""
    connections = []

    async def handler(stream: Stream) -> None:
        async with Connection(stream, max_unsent=100) as connection:
            connections.append(connection)
            connection.push(bytes(100))

    async with served(handler, trio.testing.lockstep_stream_pair):
        await trio.sleep(1)
        connections[0].push(b"x")
        with trio.fail_after(1):
            await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() < 10
    assert caplog.messages == ["StapledStream: overrun: 101 unsent bytes, more than 100"]


async def test_pipelining_with_max_unsent(autojump_clock: trio.testing.MockClock) -> None:
    """A client that takes its replies may send any number of requests at once, on any stream."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, max_unsent=1000) as connection:
            async for line in connection.requests(read_line):
                connection.push(line * 100)

    async with served(handler) as client:
        await client.send_all(b"hello\n" * 100)
        await client.send_eof()
        assert await receive_to_end(client) == b"hello" * 10_000


async def test_overrun_before_the_block(caplog: pytest.LogCaptureFixture) -> None:
    """A client that was pushed too much before the block began is let go in the first wait of the block."""
    _client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs, max_unsent=100)
    for _ in range(2):
        connection.push(bytes(100))
    async with connection:
        await trio.sleep_forever()
    assert caplog.messages == ["StapledStream: overrun: 200 unsent bytes, more than 100"]


async def test_overrun_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A client that is pushed more before its block has noticed has one line in the log, that of the first overrun."""
    _client, theirs = trio.testing.memory_stream_pair()
    async with Connection(theirs, max_unsent=100) as connection:
        for _ in range(4):
            connection.push(bytes(60))
    assert caplog.messages == ["StapledStream: overrun: 120 unsent bytes, more than 100"]


async def test_push_while_the_connection_lingers() -> None:
    """What is pushed when this side has been ended is ignored, and does not destroy what is still on its way."""
    connections: list[Connection] = []
    filled: list[int] = []

    async def handler(stream: trio.SocketStream) -> None:
        async with Connection(stream, max_unsent=10) as connection:
            connections.append(connection)
            filled.append(fill(stream))

    async with connected(handler, receive_buffer=10_000) as client:
        await trio.testing.wait_all_tasks_blocked(0.05)
        for size in (1, 100):
            connections[0].push(bytes(size))
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(await receive_to_end(client)) == filled[0]


async def test_overrun_before_anything_was_sent(autojump_clock: trio.testing.MockClock) -> None:
    """A client that is let go does not see a clean end, although nothing was cut in the middle."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream), max_unsent=100) as connection:
            await connection.receive_some()
            connection.push(bytes(101))

    async with served(handler) as client:
        tls = client_tls(client)
        await tls.send_all(b"hello")
        with pytest.raises(trio.BrokenResourceError):
            await tls.receive_some()


# Somebody pushes all the time.


@asynccontextmanager
async def pushed_all_the_time() -> AsyncIterator[tuple[trio.SocketStream, Connection, trio.Nursery]]:
    """A connection whose client takes everything, and to which something is always owed."""
    client, theirs = await socket_streams()
    for stream, option in ((client, socket.SO_RCVBUF), (theirs, socket.SO_SNDBUF)):
        stream.setsockopt(socket.SOL_SOCKET, option, 16384)
    connection = Connection(theirs, max_unsent=2_000_000)

    async def publish() -> None:
        while True:
            if connection.unsent < 1_000_000:
                connection.push(bytes(50_000))
            await trio.sleep(0.001)

    with trio.fail_after(LIMIT):
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            yield client, connection, nursery
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["send_all", "requests", "end"])
async def test_pushed_all_the_time(what: str) -> None:
    """What is pushed later does not hold up what comes before it: a message, the next request, or the end."""
    async with pushed_all_the_time() as (client, connection, nursery), connection:
        nursery.start_soon(receive_to_end, client)
        await trio.sleep(0.1)
        if what == "send_all":
            await connection.send_all(b"message")
        elif what == "requests":
            await client.send_all(b"line\n")
            assert await anext(connection.requests(read_line)) == b"line"
        await client.send_eof()


async def test_pushed_before_the_end_of_this_side() -> None:
    """`send_eof` ends this side after what was pushed before it; what is pushed meanwhile is ignored."""
    client, theirs = await socket_streams()
    with trio.fail_after(LIMIT):
        async with Connection(theirs) as connection, trio.open_nursery() as nursery:
            filled = fill(theirs)
            connection.push(b"before")
            nursery.start_soon(connection.send_eof)
            await trio.testing.wait_all_tasks_blocked()
            received = (await receive_to_end(client))[filled:]
            assert received == b"before"
            connection.push(b"after")
            assert connection.unsent == 0
            await client.aclose()


@pytest.mark.parametrize("data", ["text", "", [1, 2], None], ids=repr)
@pytest.mark.parametrize("max_unsent", [None, 10])
async def test_not_bytes(data: Any, max_unsent: int | None) -> None:
    """What is no bytes is a `TypeError` of whoever sends it, which says what it must be; the connection goes on."""
    ours, client = trio.testing.memory_stream_pair()
    complaint = f"data must be bytes, bytearray or memoryview, not {type(data).__name__}"
    with trio.fail_after(LIMIT):
        async with Connection(ours, max_unsent=max_unsent) as connection:
            with pytest.raises(TypeError, match=complaint):
                connection.push(data)
            with pytest.raises(TypeError, match=complaint):
                await connection.send_all(data)
            assert connection.unsent == 0
            await connection.send_all(b"goes on")
            await client.aclose()
            assert await connection.receive_some() == b""


async def test_push_of_views() -> None:
    """A view is pushed and counted by its bytes, not by its items; what is changed after a push is sent as it was."""
    ours, client = trio.testing.memory_stream_pair()
    items = bytearray(b"01234567")
    with trio.fail_after(LIMIT):
        async with Connection(ours) as connection:
            connection.push(memoryview(items).cast("I"))
            connection.push(items)
            items[:] = b"changed!"
            assert connection.unsent == 16
            await connection.send_all(b"")
            assert connection.unsent == 0
            assert await receive_exactly(client, 16) == b"0123456701234567"
            await client.aclose()
