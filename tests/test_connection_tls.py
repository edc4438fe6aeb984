"""`Connection` behind TLS: its handshake, its time-outs, and its end."""

import logging
from functools import partial

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Stream,
    client_tls,
    receive_to_end,
    served,
    server_tls,
    socket_streams,
)

from trioproto import ClientError, Connection, receive_exactly

PEER = "SSLStream"


async def greet(stream: Stream, *, push: bool = False, max_unsent: int | None = None, **timeouts: float) -> None:
    """Send first."""
    async with Connection(server_tls(stream), max_unsent=max_unsent, **timeouts) as connection:
        if push:
            connection.push(b"hello")
            if max_unsent is None:
                await connection.receive_some()
            await trio.sleep(1000)
        await connection.send_all(b"hello")


# The handshake.


@pytest.mark.parametrize(("push", "max_unsent"), [(False, None), (False, 100), (True, None), (True, 100)])
async def test_client_that_does_not_shake_hands(
    push: bool,  # noqa: FBT001
    max_unsent: int | None,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The handshake has the request time-out also where the server sends first, and wherever the handler then waits."""
    handler = partial(greet, push=push, max_unsent=max_unsent, idle_timeout=300, request_timeout=10)
    async with served(handler) as client:
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(10)
    assert caplog.messages == [f"{PEER}: timed out waiting for a TLS handshake"]
    assert caplog.records[0].levelno == logging.WARNING


async def test_client_that_speaks_no_tls(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that speaks no TLS, or leaves during the handshake, has one line in the log, as a warning."""
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b""):
        caplog.clear()
        async with served(greet) as client:
            await client.send_all(sent)
            await client.send_eof()
            await receive_to_end(client)
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"{PEER}: connection broken while waiting for a TLS handshake: ")


async def test_handshake_before_either_side_speaks(autojump_clock: trio.testing.MockClock) -> None:
    """The handshake is made once, although one task receives and another one sends."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream), max_unsent=100) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(connection.receive_exactly, 5)
            nursery.start_soon(connection.send_all, b"<two>")
            connection.push(b"<one>")

    async with served(handler) as client:
        tls = client_tls(client)
        await tls.send_all(b"hello")
        assert await receive_to_end(tls) == b"<one><two>"


async def test_handshake_that_another_task_makes(autojump_clock: trio.testing.MockClock) -> None:
    """A handshake that was made before is no hindrance; one that is given up is not made by the block's end."""
    client, theirs = trio.testing.memory_stream_pair()
    tls, ours = client_tls(client), server_tls(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.do_handshake)
        await tls.do_handshake()
    connection = Connection(ours)
    await connection.send_all(b"hello")
    assert await receive_exactly(tls, 5) == b"hello"
    await connection.aclose()


# Time-outs.


async def test_slow_reader_of_a_large_reply(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that reads all the time gets the whole of 40 MB, although that takes longer than the idle time-out."""
    size = 40_000_000

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream), idle_timeout=10) as connection:
            await connection.send_all(bytes(size))

    async with served(handler, trio.testing.lockstep_stream_pair) as client:
        tls = client_tls(client)
        received = 0
        while received < size:
            received += len(await receive_exactly(tls, min(size - received, 400_000)))
            await trio.sleep(5)
        assert trio.current_time() > 400
        assert await tls.receive_some() == b""
    assert caplog.messages == []


async def test_reader_that_stops(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """A client that stops reading is cut off after the idle time-out, and does not take what it has for the whole."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream), idle_timeout=10) as connection:
            await connection.send_all(bytes(1_000_000))

    async with served(handler, trio.testing.lockstep_stream_pair) as client:
        tls = client_tls(client)
        await receive_exactly(tls, 100_000)
        stopped_at = trio.current_time()
        await trio.sleep(11)
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(tls)
        assert trio.current_time() == pytest.approx(stopped_at + 11)
    assert caplog.messages == [f"{PEER}: timed out waiting for room for a reply"]


async def test_no_time_from_the_handshake(autojump_clock: trio.testing.MockClock) -> None:
    """What the handshake took is not taken from the time for the first request."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream), idle_timeout=10, request_timeout=10) as connection:
            async for chunk in connection:
                connection.push(chunk)

    async with served(handler) as client:
        tls = client_tls(client)
        await trio.sleep(9)
        await tls.do_handshake()
        await trio.sleep(9)
        await tls.send_all(b"hello")
        assert await receive_exactly(tls, 5) == b"hello"


# Its end.


async def test_goodbye(autojump_clock: trio.testing.MockClock) -> None:
    """At the end of the block, the client gets what is owed, and TLS's end of stream."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream)) as connection:
            connection.push(b"hello")

    async with served(handler) as client:
        assert await receive_to_end(client_tls(client)) == b"hello"


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_cut_on_a_socket(how: str) -> None:
    """In the middle of a message, the connection below TLS is reset."""
    client, theirs = await socket_streams()
    tls = client_tls(client)
    connections = []

    async def handler() -> None:
        async with Connection(server_tls(theirs)) as connection:
            connections.append(connection)
            await connection.send_all(bytes(50_000_000))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler)
            assert await receive_exactly(tls, 5) == bytes(5)
            await trio.testing.wait_all_tasks_blocked(0.05)
            if how == "closed":
                await connections[0].aclose()
            else:
                nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)
    await client.aclose()


async def test_client_that_does_not_say_goodbye(caplog: pytest.LogCaptureFixture) -> None:
    """A client that ends the connection without TLS's end of stream has broken it; that is no news."""
    caplog.set_level(logging.INFO, "trioproto")
    errors = []

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream)) as connection:
            try:
                async for _ in connection:
                    pass
            except ClientError as error:
                errors.append(error.how)
                raise

    async with served(handler) as client:
        tls = client_tls(client)
        await tls.send_all(b"hello")
        await client.aclose()
    assert errors == ["reset"]
    assert caplog.messages == []
