"""How a `Connection`'s block ends: what ends it quietly, what goes on, and what the client sees of it."""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Sticky,
    Stream,
    connected,
    connected_streams,
    fill,
    receive_to_end,
    request_bytes,
    reset,
    served,
    socket_streams,
)

from trioproto import (
    ClientError,
    Connection,
    IncompleteReadError,
    ProtocolError,
    op_handler,
    receive_exactly,
)
from trioproto.transport import LINGER_BYTES, LINGER_SECONDS, LINGER_SILENCE

ONE = request_bytes([1], "+")  # 6 bytes
MALFORMED = b"\x00"


async def read_line(connection: Connection) -> bytes:
    """Read a line."""
    return await connection.receive_until(b"\n", max_bytes=1000)


# What goes on.


class BugError(Exception):
    pass


BUGS = [
    BugError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    partial(IncompleteReadError, b"", 5),
    partial(ValueError, "not in the protocol of anybody"),
]


async def push_and_raise(stream: Stream, error: Exception) -> None:
    """Push, and have a bug."""
    async with Connection(stream) as connection:
        connection.push(b"hello")
        raise error


@pytest.mark.parametrize("bug", BUGS, ids=repr)
async def test_bug(
    bug: Callable[[], Exception], caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """An error that is not this client's goes on; the connection is closed at once, and nothing more is delivered."""
    caplog.set_level(logging.DEBUG, "trioproto")
    client, theirs = trio.testing.memory_stream_pair()
    error = bug()
    error.__cause__ = cause = BugError()
    with pytest.raises(type(error)) as caught:
        await push_and_raise(theirs, error)
    assert caught.value is error
    assert error.__cause__ is cause
    assert trio.current_time() == 0
    assert await client.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"hello")
    assert caplog.messages == []


async def test_bug_beside_what_a_client_did(caplog: pytest.LogCaptureFixture) -> None:
    """If a group holds a bug and what the client did, only the bug goes on, and nothing more is delivered."""
    client, theirs = trio.testing.memory_stream_pair()
    both = ExceptionGroup("both", [BugError(), ExceptionGroup("inner", [ProtocolError("not a line")])])
    with pytest.raises(ExceptionGroup) as caught:
        await push_and_raise(theirs, both)
    assert [type(error) for error in caught.value.exceptions] == [BugError]
    assert await client.receive_some() == b""
    assert caplog.messages == ["StapledStream: protocol error: not a line"]


@pytest.mark.parametrize("max_unsent", [None, 100])
@pytest.mark.parametrize("grouped", [False, True])
async def test_error_of_another_connection(max_unsent: int | None, grouped: bool) -> None:  # noqa: FBT001
    """What the client of another connection did, such as a server behind this one, is no end of this one."""
    _client, theirs = trio.testing.memory_stream_pair()
    upstream_end, upstream = trio.testing.memory_stream_pair()
    await upstream_end.aclose()
    other = Connection(upstream)

    async def handler() -> None:
        async with Connection(theirs, max_unsent=max_unsent):
            if not grouped:
                await other.send_all(b"hello")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.send_all, b"hello")

    with pytest.raises(ExceptionGroup if grouped else trio.BrokenResourceError) as caught:
        await handler()
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        [error] = error.exceptions
    assert isinstance(error, ClientError)
    assert error.connection is other


async def test_end_of_another_stream() -> None:
    """So is the end of another stream."""
    _client, theirs = trio.testing.memory_stream_pair()
    other_end, other = trio.testing.memory_stream_pair()
    await other_end.aclose()
    with pytest.raises(IncompleteReadError):
        async with Connection(theirs):
            await receive_exactly(other, 5)


@pytest.mark.parametrize("max_unsent", [None, 100])
@pytest.mark.parametrize("sent", [b"", ONE[:3], ONE + MALFORMED], ids=["idle", "in a request", "closing"])
async def test_cancellation(sent: bytes, max_unsent: int | None, autojump_clock: trio.testing.MockClock) -> None:
    """Cancellation closes the stream without ceremony, and goes on."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(sent)
    with trio.move_on_after(0.5) as scope:
        async with Connection(theirs, max_unsent=max_unsent) as connection:
            async for count in connection.requests(lambda connection: connection.receive_exactly(1)):
                if count == MALFORMED:
                    raise ProtocolError
                await connection.receive_exactly(5)
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(0.5)
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"hello")


async def test_protocol_error_ends_the_innermost_block(caplog: pytest.LogCaptureFixture) -> None:
    """A protocol error ends the innermost block that it comes from: a server behind this one that talks nonsense."""
    client, theirs = trio.testing.memory_stream_pair()
    upstream_end, upstream = trio.testing.memory_stream_pair()
    await upstream_end.send_all(bytes(2000))
    await upstream_end.send_eof()
    await client.send_eof()
    async with Connection(theirs) as connection:
        async with Connection(upstream) as other:
            await read_line(other)
        await connection.send_all(b"502")
    assert await receive_to_end(client) == b"502"
    assert caplog.messages == ["StapledStream: protocol error: more than 1000 bytes before b'\\n'"]


async def test_block_inside_a_nursery_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    """Errors in groups that are not this connection's stay in their group."""
    _client, theirs = trio.testing.memory_stream_pair()

    async def crash() -> None:
        await trio.lowlevel.checkpoint()
        raise BugError

    async def handler() -> None:
        async with Connection(theirs, max_unsent=100), trio.open_nursery() as nursery:
            nursery.start_soon(crash)

    with pytest.raises(ExceptionGroup) as caught:
        await handler()
    assert [type(error) for error in caught.value.exceptions] == [BugError]


# What ends it quietly.


def reads(connection: Connection) -> Awaitable[object]:
    return anext(connection.requests(read_line))


def reads_exactly(connection: Connection) -> Awaitable[object]:
    return receive_exactly(connection, 100)


@pytest.mark.parametrize("max_unsent", [None, 100])
@pytest.mark.parametrize("use", [reads, reads_exactly])
@pytest.mark.parametrize("sent", [b"", b"hel"])
async def test_reset_in_a_nursery(
    sent: bytes,
    use: Callable[[Connection], Awaitable[object]],
    max_unsent: int | None,
    *,
    tls: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that resets the connection ends the block quietly, also out of a nursery inside it."""
    caplog.set_level(logging.INFO, "trioproto")
    ended = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        async with Connection(stream, max_unsent=max_unsent) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(use, connection)
            nursery.start_soon(trio.sleep_forever)
        ended.set()

    async with connected(handler, tls=tls) as client:
        await client.send_all(sent)
        await trio.testing.wait_all_tasks_blocked(0.01)
        reset(client)
        await ended.wait()
    assert caplog.messages == []


@pytest.mark.parametrize("sent", [b"", b"hel"])
async def test_timeout_in_a_nursery(
    sent: bytes, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """So does a time-out, with a line where there is one otherwise, too."""
    caplog.set_level(logging.INFO, "trioproto")

    async def handler(stream: Stream) -> None:
        async with (
            Connection(stream, idle_timeout=10, request_timeout=10) as connection,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(reads, connection)
            nursery.start_soon(trio.sleep_forever)

    async with served(handler) as client:
        await client.send_all(sent)
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(10)
    assert caplog.messages == ["StapledStream: timed out waiting for the rest of a request"] * bool(sent)


@pytest.mark.parametrize("sent", [b"", b"hel"])
async def test_receive_exactly_of_streams(
    sent: bytes, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """The end of this stream ends the block quietly where the function `receive_exactly` reports it, too."""
    async with served(run_to_end) as client:
        await client.send_all(sent)
        await client.send_eof()
        assert await client.receive_some() == b"hello"
        assert await client.receive_some() == b""
    assert caplog.messages == ["StapledStream: end of stream after 3 of 5 bytes"] * bool(sent)


async def run_to_end(stream: Stream) -> None:
    """Push, and receive what does not come."""
    async with Connection(stream) as connection:
        connection.push(b"hello")
        await receive_exactly(connection, 5)


async def test_one_line_is_enough(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """Several tasks that each see what the client did have one line in the log."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=10) as connection:
            raise BaseExceptionGroup("", [connection._too_late("a"), connection._too_late("b")])  # noqa: SLF001

    async with served(handler):
        pass
    assert caplog.messages == ["StapledStream: timed out waiting for a"]


# Leaving it.


@pytest.mark.parametrize("max_unsent", [None, 100])
async def test_what_is_owed_arrives(max_unsent: int | None, autojump_clock: trio.testing.MockClock) -> None:
    """At the end of the block the client gets all that was pushed, then end of stream."""
    async with served(partial(push_and_end, max_unsent)) as client:
        assert await receive_to_end(client) == b"hello world"


async def push_and_end(max_unsent: int | None, stream: Stream) -> None:
    """Push, and leave the block."""
    async with Connection(stream, max_unsent=max_unsent) as connection:
        connection.push(b"hello ")
        connection.push(b"world")
    connection.push(b"ignored")
    assert connection.unsent == 0


async def send_until_broken(stream: trio.abc.SendStream, interval: float, size: int) -> None:
    """Send ``size`` bytes each ``interval`` seconds, until the peer closes the connection."""
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(bytes(size))
            await trio.sleep(interval)


async def test_linger(autojump_clock: trio.testing.MockClock) -> None:
    """While its client still sends, a connection that ends stays open, until the client has ended its side."""
    async with served(op_handler) as client:
        await client.send_all(ONE * 3 + MALFORMED)
        assert await receive_to_end(client) == b"\1\0\0\0" * 3
        for _ in range(8):
            await trio.sleep(0.5)
            await client.send_all(bytes(1000))
    assert trio.current_time() == pytest.approx(8 * 0.5)


@pytest.mark.parametrize(
    ("interval", "size", "limit"),
    [
        pytest.param(1.5 * LINGER_SILENCE, 1, LINGER_SILENCE, id="silence"),
        pytest.param(0.9 * LINGER_SILENCE, 1, LINGER_SECONDS, id="a trickle"),
        pytest.param(0.5, LINGER_BYTES // 4, 2, id="a flood"),
    ],
)
async def test_linger_is_bounded(
    interval: float, size: int, limit: float, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that does not end its side cannot keep the connection from closing, also without time-outs."""
    client, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_until_broken, client, interval, size)
        with trio.fail_after(LINGER_SECONDS + 1):
            async with Connection(theirs):
                await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == pytest.approx(limit, abs=0.6)


async def test_no_linger_for_a_client_that_has_ended(autojump_clock: trio.testing.MockClock) -> None:
    """A client that has ended its side is not waited for any more, though it may not have closed the stream."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(b"hello")
    await client.send_eof()
    async with Connection(theirs) as connection:
        async for chunk in connection:
            connection.push(chunk)
    assert trio.current_time() == 0
    assert await receive_to_end(client) == b"hello"


async def test_linger_on_a_socket(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A malformed request while the client sends on: all replies arrive, then end of stream, and no reset."""
    async with connected(op_handler, tls=tls) as client:
        await client.send_all(ONE * 1000 + MALFORMED)
        for _ in range(100):
            await client.send_all(bytes(100_000))
            await trio.sleep(0.001)
        assert await receive_to_end(client) == b"\1\0\0\0" * 1000
    assert len(caplog.messages) == 1


async def test_linger_on_a_socket_is_bounded(*, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that floods a closing connection is disconnected."""
    monkeypatch.setattr("trioproto.transport.LINGER_BYTES", 10**6)
    async with connected(op_handler, tls=tls) as client:
        await client.send_all(MALFORMED)
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(bytes(100_000_000))


async def test_stream_without_half_close(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that has no half-close is closed at once; there is nothing else to be done."""

    class Plain(Sticky):
        send_all = property(lambda self: stream.send_all)
        aclose = property(lambda self: stream.aclose)

    client, stream = trio.testing.memory_stream_pair()
    async with Connection(Plain()) as connection:
        connection.push(b"hello")
    assert await receive_to_end(client) == b"hello"
    assert trio.current_time() == 0


@pytest.mark.parametrize("max_unsent", [None, 100])
async def test_client_that_takes_no_last_reply(
    max_unsent: int | None, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that does not take what is owed at the end of the block has the idle time-out; one line says so."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=10, max_unsent=max_unsent) as connection:
            connection.push(b"hello")

    client, theirs = trio.testing.lockstep_stream_pair()
    await handler(theirs)
    assert trio.current_time() == pytest.approx(10)
    assert caplog.messages == ["StapledStream: timed out waiting for room for a reply"]
    await client.aclose()


# Cut in the middle of what was being sent.


async def fails(connection: Connection) -> None:
    with contextlib.suppress(trio.TooSlowError), trio.fail_after(0.1):
        await connection.send_all(bytes(50_000_000))
    raise BugError


async def times_out(connection: Connection) -> None:
    await connection.send_all(bytes(50_000_000))


async def is_late_while_sending(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.send_all, bytes(50_000_000))
        await anext(connection.requests(read_line))


async def is_closed_while_sending(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.send_all, bytes(50_000_000))
        await trio.sleep(0.1)
        await connection.aclose()


@pytest.mark.parametrize("conversation", [fails, times_out, is_late_while_sending, is_closed_while_sending])
async def test_cut_in_the_middle(conversation: Callable[[Connection], Awaitable[None]], *, tls: bool) -> None:
    """A connection that is closed in the middle of what it was sending is reset: half must not look like the whole."""

    async def handler(stream: trio.SocketStream) -> None:
        with contextlib.suppress(BugError):
            async with Connection(stream, idle_timeout=0.3, request_timeout=0.3) as connection:
                await conversation(connection)

    async with connected(handler, tls=tls) as client:
        if conversation is is_late_while_sending:
            await client.send_all(b"hel")
        await trio.sleep(1)
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)


async def test_cancelled_in_the_middle(*, tls: bool) -> None:
    """So is one that is cancelled in the middle of a message."""
    client, theirs = await connected_streams(tls=tls)
    with trio.fail_after(LIMIT):
        with trio.move_on_after(0.1):
            async with Connection(theirs) as connection:
                await connection.send_all(bytes(50_000_000))
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)
        await client.aclose()


@pytest.mark.parametrize("sent", [b"", b"hello"])
async def test_cut_between_messages(sent: bytes, *, tls: bool) -> None:
    """A connection that is cut between two messages just ends; nothing that it sent is destroyed."""
    client, theirs = await connected_streams(tls=tls)
    with trio.fail_after(LIMIT):
        async with client:
            with trio.move_on_after(0.05):
                async with Connection(theirs) as connection:
                    await connection.send_all(sent)
                    await trio.sleep_forever()
            assert await receive_to_end(client) == sent


async def test_fin_after_a_whole_reply(*, tls: bool) -> None:
    """A client that is late with its next request, and has taken all that it was sent, sees end of stream."""
    async with connected(partial(op_handler, request_timeout=0.1), tls=tls) as client:
        await client.send_all(ONE * 3 + ONE[:3])
        assert await receive_to_end(client) == b"\1\0\0\0" * 3


@pytest.mark.parametrize("max_unsent", [None, 1000])
async def test_bug_under_cancellation(max_unsent: int | None) -> None:
    """A bug that comes out while the block is cancelled goes on as it is: a cancellation does not hide it."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, max_unsent=max_unsent):
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"), trio.CancelScope() as scope:
        await handler(trio.testing.memory_stream_pair()[0])


@pytest.mark.parametrize("max_unsent", [None, 1000])
async def test_task_outside_of_the_block_receives(max_unsent: int | None, *, tls: bool) -> None:
    """It learns that the block is over, and does not keep the client from getting everything and then end of stream."""
    client, theirs = await connected_streams(tls=tls)

    async def receive(connection: Connection) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await connection.receive_some()

    with trio.fail_after(LIMIT):
        async with client, trio.open_nursery() as nursery:
            async with Connection(theirs, max_unsent=max_unsent) as connection:
                nursery.start_soon(receive, connection)
                await trio.testing.wait_all_tasks_blocked()
                connection.push(b"goodbye")
                nursery.start_soon(client.send_eof)
            assert await receive_to_end(client) == b"goodbye"


async def test_task_outside_of_the_block_is_about_to_wait() -> None:
    """Wherever its receive is just then, the block ends in order."""

    async def receive(connection: Connection) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            await connection.receive_some()

    async with trio.open_nursery() as nursery:
        for _ in range(30):  # the order of tasks is random
            client, theirs = trio.testing.memory_stream_pair()
            await client.send_eof()
            async with Connection(theirs) as connection:
                nursery.start_soon(receive, connection)
                await trio.lowlevel.checkpoint()


async def test_task_outside_of_the_block_waits_for_room() -> None:
    """The block ends when it has waited to its end."""
    client, theirs = await socket_streams()
    with trio.fail_after(LIMIT):
        async with client, trio.open_nursery() as nursery, Connection(theirs) as connection:
            filled = fill(theirs)
            nursery.start_soon(connection.wait_send_all_might_not_block)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(client.send_eof)
            nursery.start_soon(receive_exactly, client, filled)


async def test_use_after_the_block() -> None:
    """Everything but a push says that the connection is closed."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_eof()
    async with Connection(theirs) as connection:
        pass
    connection.push(b"ignored")
    for use in (
        connection.receive_some,
        partial(connection.send_all, b"x"),
        connection.send_eof,
        connection.wait_send_all_might_not_block,
    ):
        with pytest.raises(trio.ClosedResourceError):
            await use()


@pytest.mark.parametrize("closed", ["connection", "channel"])
async def test_closed_resource_of_another(closed: str) -> None:
    """Only that this connection is closed ends its block quietly; that something else is closed is a bug."""
    other = Connection(trio.testing.memory_stream_pair()[0])
    channel, _receive = trio.open_memory_channel[int](1)
    await other.aclose()
    channel.close()

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await connection.aclose()
            await (other.send_all(b"x") if closed == "connection" else channel.send(1))

    with pytest.raises(trio.ClosedResourceError):
        await handler(trio.testing.memory_stream_pair()[0])
