"""`Connection.aclose` from another task: a client is let go, and its handler ends quietly."""

import contextlib
import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from helpers import LIMIT, Stream, connected, connected_streams, receive_to_end, served

from trioproto import Connection


async def read_line(connection: Connection) -> bytes:
    """Read a line."""
    return await connection.receive_until(b"\n", max_bytes=1000)


Conversation = Callable[[Connection], Awaitable[object]]


async def receives(connection: Connection) -> None:
    await connection.receive_some()


async def requests(connection: Connection) -> None:
    async for _ in connection.requests(read_line):
        pytest.fail("there was no request")


async def sends(connection: Connection) -> None:
    await connection.send_all(bytes(50_000_000))


async def waits(connection: Connection) -> None:
    connection.push(bytes(50_000_000))
    await connection.wait_send_all_might_not_block()


async def relays(connection: Connection) -> None:
    await connection.relay(connection)


async def does_both(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receives, connection)
        nursery.start_soon(sends, connection)


async def ends(connection: Connection) -> None:
    connection.push(bytes(50_000_000))


async def lingers(connection: Connection) -> None:
    connection.push(b"hello")


@pytest.mark.parametrize("max_unsent", [None, 2**30])
@pytest.mark.parametrize("conversation", [receives, requests, sends, waits, relays, does_both, ends, lingers])
async def test_kick(
    conversation: Conversation,
    max_unsent: int | None,
    *,
    tls: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Closing from another task ends the block quietly whatever it is doing, also while it ends anyway."""
    connections = []
    ended = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        async with Connection(stream, max_unsent=max_unsent) as connection:
            connections.append(connection)
            await conversation(connection)
        ended.set()

    async with connected(handler, tls=tls):
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not ended.is_set()
        with trio.fail_after(0.5):
            await connections[0].aclose()
            await ended.wait()
    assert caplog.messages == []


async def test_kick_a_handler_that_waits_for_something_else(autojump_clock: trio.testing.MockClock) -> None:
    """With ``max_unsent``, the block ends wherever the handler is."""
    async with trio.open_nursery() as nursery:

        async def handler(stream: Stream) -> None:
            async with Connection(stream, max_unsent=100) as connection:
                nursery.start_soon(close_after, connection, 5)
                await trio.sleep(1000)

        async with served(handler) as client:
            assert await client.receive_some() == b""
    assert trio.current_time() == pytest.approx(5)


async def close_after(connection: Connection, seconds: float) -> None:
    """Close the connection later."""
    await trio.sleep(seconds)
    await connection.aclose()


async def sends_something(connection: Connection) -> None:
    await connection.send_all(b"hello")


async def receives_exactly(connection: Connection) -> None:
    await connection.receive_exactly(1)


async def sends_eof(connection: Connection) -> None:
    await connection.send_eof()


async def pushes(connection: Connection) -> None:
    connection.push(b"hello")
    assert connection.unsent == 0


@pytest.mark.parametrize("use", [receives, requests, receives_exactly, sends_something, sends_eof, pushes])
async def test_kick_takes_effect_with_the_next_use(
    use: Conversation, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Without ``max_unsent``, the client is gone at once, and the block ends as soon as the handler uses it."""
    caplog.set_level(logging.DEBUG, "trioproto")
    async with trio.open_nursery() as nursery:

        async def handler(stream: Stream) -> None:
            async with Connection(stream) as connection:
                connection.push(b"dropped")
                nursery.start_soon(close_after, connection, 5)
                await trio.sleep(10)
                await use(connection)
                assert use is pushes

        async with served(handler) as client:
            assert await client.receive_some() == b""
            assert trio.current_time() == pytest.approx(5)
    assert trio.current_time() == pytest.approx(10)
    assert caplog.messages == ["StapledStream: closed by another task"] * (use is not pushes)


class BugError(Exception):
    pass


@pytest.mark.parametrize("strict", [True, False])
async def test_bug_in_a_handler_that_is_kicked(strict: bool) -> None:  # noqa: FBT001
    """A bug that the end of the block brings to light goes on, without the cancellation that it was grouped with."""
    _client, theirs = trio.testing.memory_stream_pair()

    async def crash() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise BugError

    async def handler() -> None:
        async with Connection(theirs, max_unsent=100) as connection:
            with contextlib.nullcontext() if strict else pytest.warns(trio.TrioDeprecationWarning):
                nursery = trio.open_nursery(strict_exception_groups=None if strict else False)
            async with nursery as tasks:
                tasks.start_soon(trio.sleep_forever)
                tasks.start_soon(crash)
                await connection.aclose()

    with pytest.raises(ExceptionGroup if strict else BugError) as caught:
        await handler()
    if isinstance(caught.value, BaseExceptionGroup):
        assert [type(error) for error in caught.value.exceptions] == [BugError]


async def test_closing_drops_what_is_buffered(*, tls: bool) -> None:
    """Nothing that was pushed is sent, and nothing that had arrived is received."""
    client, theirs = await connected_streams(tls=tls)
    connection = Connection(theirs)
    connection.push(b"hello")
    connection.unreceive(b"hello")
    with trio.fail_after(LIMIT):
        async with client:
            await connection.aclose()
            assert await receive_to_end(client) == b""
            with pytest.raises(trio.ClosedResourceError):
                await connection.receive_some()


@pytest.mark.parametrize("max_unsent", [None, 100])
async def test_closing_by_the_handler_itself(max_unsent: int | None, autojump_clock: trio.testing.MockClock) -> None:
    """The handler may close the connection itself: the block ends at once, without lingering."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, max_unsent=max_unsent) as connection:
            connection.push(b"dropped")
            await connection.aclose()
            await connection.aclose()

    async with served(handler) as client:
        assert await client.receive_some() == b""
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == 0


async def test_closing_when_cancelled() -> None:
    """Cancellation does not keep the connection open."""
    client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs)
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.aclose()
    assert scope.cancelled_caught
    assert await client.receive_some() == b""


async def test_closing_is_a_checkpoint() -> None:
    """Closing lets other tasks run, also if the connection is closed already."""
    _client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs)
    for _ in range(2):
        with trio.testing.assert_checkpoints():
            await connection.aclose()


async def test_stream_that_somebody_else_closes(autojump_clock: trio.testing.MockClock) -> None:
    """If it is not the connection that was closed, but its stream behind its back, the error goes on."""
    client, theirs = trio.testing.memory_stream_pair()

    async def handler() -> None:
        async with Connection(theirs) as connection:
            connection.push(b"hello")
            await theirs.aclose()

    with pytest.raises(trio.ClosedResourceError):
        await handler()
    await client.aclose()
