"""`Connection.requests`: where a request begins and ends, and what becomes of one that is not finished."""

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from helpers import Stream, cuts, receive_to_end, send_after, served
from hypothesis import given
from hypothesis import strategies as st

from trioproto import ClientError, Connection, ProtocolError
from trioproto.connection import MAX_OWED, REQUESTS_PER_TURN
from trioproto.testing import converse, fragmentations, fragmented_stream_pair


async def read_line(connection: Connection) -> bytes:
    """Read a line."""
    return await connection.receive_until(b"\n", max_bytes=1000)


async def read_frame(connection: Connection) -> bytes:
    """Read a frame: one byte that says how many follow, and those."""
    [length] = await connection.receive_exactly(1)
    return await connection.receive_exactly(length)


def frame(body: bytes) -> bytes:
    """Write a frame."""
    return bytes([len(body)]) + body


async def shout(stream: Stream) -> None:
    """Serve lines."""
    async with Connection(stream) as connection:
        async for line in connection.requests(read_line):
            connection.push(line.upper() + b"\n")


def connection_pair() -> tuple[Stream, Connection]:
    """Return a client's stream and the server's `Connection` at its other end, in memory."""
    client, theirs = trio.testing.memory_stream_pair()
    return client, Connection(theirs)


# Each turn.


async def test_in_all_pieces() -> None:
    """Every request is read, and every reply arrives, in order, for every way of cutting what is sent."""
    for sizes in fragmentations(9):
        assert await converse(shout, b"one\ntwo\n\n", sizes) == b"ONE\nTWO\n\n"


@given(bodies=st.lists(st.binary(max_size=100), max_size=10), cuts=cuts)
async def test_frames_in_any_pieces(bodies: list[bytes], cuts: int | list[int]) -> None:
    """A request may be read by several receives."""
    client, theirs = fragmented_stream_pair(to_second=cuts)
    await client.send_all(b"".join(map(frame, bodies)))
    await client.send_eof()
    assert [body async for body in Connection(theirs).requests(read_frame)] == bodies


async def test_end_between_requests(autojump_clock: trio.testing.MockClock) -> None:
    """A client that ends its side between two requests ends the iteration, and gets all that was pushed."""
    async with served(shout) as client:
        await client.send_all(b"hello\n")
        await client.send_eof()
        assert await receive_to_end(client) == b"HELLO\n"
    assert trio.current_time() == 0


@pytest.mark.parametrize("read", [read_line, read_frame, lambda connection: connection.receive_exactly(8)])
async def test_end_inside_a_request(
    read: Callable[[Connection], Awaitable[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    """A client that ends its side inside a request ends the block; replies that are owed arrive, and one line says so.

    The error says what the client did.
    """
    errors = []

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            connection.push(b"hello")
            try:
                async for _ in connection.requests(read):
                    pytest.fail("that was no request")
            except ClientError as error:
                errors.append((error.connection is connection, error.how))
                raise

    assert await converse(handler, b"\7unfini") == b"hello"
    assert errors == [(True, "ended")]
    assert caplog.messages == ["StapledStream: end of stream in the middle of a request"]


async def test_receive_some_inside_a_request() -> None:
    """Inside a request, end of stream is an error: ``read`` never sees ``b""``."""
    client, connection = connection_pair()

    async def read(connection: Connection) -> bytes:
        received = b""
        while not received.endswith(b"\n"):
            received += await connection.receive_some(1)
        return received

    await client.send_all(b"one\nhalf")
    await client.send_eof()
    requests = connection.requests(read)
    assert await anext(requests) == b"one\n"
    with pytest.raises(ClientError, match="end of stream in the middle of a request"):
        await anext(requests)


async def test_many_requests_at_once() -> None:
    """``read`` may take all that has arrived, return many requests as one, and give back what is left over."""

    async def read(connection: Connection) -> list[bytes]:
        lines, newline, rest = (await connection.receive_some()).rpartition(b"\n")
        while not newline:
            lines, newline, rest = (rest + await connection.receive_some()).rpartition(b"\n")
        connection.unreceive(rest)
        return lines.split(b"\n")

    for sizes in fragmentations(9):
        client, theirs = fragmented_stream_pair(to_second=sizes)
        await client.send_all(b"one\ntwo\n\n")
        await client.send_eof()
        lines = []
        async for batch in Connection(theirs).requests(read):
            lines += batch
        assert lines == [b"one", b"two", b""]


# Leaving it, and taking it up again.


async def test_break_and_another_read() -> None:
    """After ``break``, another ``read`` goes on with the next byte, such as after a handshake."""
    client, connection = connection_pair()
    await client.send_all(b"frames\n" + frame(b"one") + frame(b"two\n") + b"three\n")
    async for line in connection.requests(read_line):
        assert line == b"frames"
        break
    frames = []
    async for body in connection.requests(read_frame):
        frames.append(body)
        if body.endswith(b"\n"):
            break
    assert frames == [b"one", b"two\n"]
    assert await connection.receive_some() == b"three\n"


async def test_anext() -> None:
    """One request alone is ``anext``."""
    client, connection = connection_pair()
    await client.send_all(b"one\ntwo\n")
    await client.send_eof()
    requests = connection.requests(read_line)
    assert aiter(requests) is requests
    assert await anext(requests) == b"one"
    assert await anext(connection.requests(read_line)) == b"two"
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(requests)
    assert await anext(requests, None) is None


@pytest.mark.parametrize("arrived", range(6))
async def test_cancelled_read(arrived: int, autojump_clock: trio.testing.MockClock) -> None:
    """If ``read`` is cancelled, the next turn, of any iterator, begins with the request's first byte again."""
    client, connection = connection_pair()
    await client.send_all(frame(b"before") + frame(b"hello")[:arrived])
    requests = connection.requests(read_frame)
    assert await anext(requests) == b"before"
    for _ in range(3):
        with trio.move_on_after(1) as scope:
            await anext(requests)
        assert scope.cancelled_caught
    await client.send_all(frame(b"hello")[arrived:] + frame(b"world"))
    assert await anext(connection.requests(read_frame)) == b"hello"
    assert await anext(requests) == b"world"


async def test_cancelled_read_in_a_nursery(autojump_clock: trio.testing.MockClock) -> None:
    """The same holds for a cancellation that comes in a group, out of a nursery in ``read``."""
    client, connection = connection_pair()

    async def read(connection: Connection) -> bytes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            body = await read_frame(connection)
            nursery.cancel_scope.cancel()
        return body

    await client.send_all(frame(b"hello")[:3])
    with trio.move_on_after(1):
        await anext(connection.requests(read))
    await client.send_all(frame(b"hello")[3:])
    assert await anext(connection.requests(read)) == b"hello"


async def test_read_with_a_bug() -> None:
    """What ``read`` had taken when it raised an error is not received again."""
    client, connection = connection_pair()

    async def read(connection: Connection) -> bytes:
        line = await read_line(connection)
        if line == b"bad":
            raise KeyError(line)
        return line

    await client.send_all(b"good\nbad\ngood again\n")
    requests = connection.requests(read)
    assert await anext(requests) == b"good"
    with pytest.raises(KeyError):
        await anext(requests)
    assert await anext(requests) == b"good again"


async def test_request_time_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    """A request whose reading was cancelled, and begins again, still has the time that it had from its first byte."""
    client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs, request_timeout=10)
    await client.send_all(b"hel")
    for _ in range(3):
        with trio.move_on_after(3):
            await anext(connection.requests(read_line))
    with pytest.raises(ClientError, match="timed out waiting for the rest of a request"):
        await anext(connection.requests(read_line))
    assert trio.current_time() == pytest.approx(10)


async def test_request_time_of_another_request(autojump_clock: trio.testing.MockClock) -> None:
    """If the bytes of such a request are received in another way, the next request has time of its own."""
    client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs, request_timeout=10)
    await client.send_all(b"hel")
    with trio.move_on_after(3):
        await anext(connection.requests(read_line))
    assert await connection.receive_some() == b"hel"
    await trio.sleep(30)
    await client.send_all(b"wor")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_after, client, b"ld\n", 9)
        assert await anext(connection.requests(read_line)) == b"world"


async def test_request_time_after_a_bug(autojump_clock: trio.testing.MockClock) -> None:
    """A request that follows one that could not be read has time of its own."""
    client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs, request_timeout=10)

    async def read(connection: Connection) -> bytes:
        line = await read_line(connection)
        if line == b"bad":
            raise KeyError(line)
        return line

    await client.send_all(b"ba")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_after, client, b"d\ngo", 8)
        nursery.start_soon(send_after, client, b"od\n", 16)
        with pytest.raises(KeyError):
            await anext(connection.requests(read))
        assert await anext(connection.requests(read)) == b"good"


async def test_messages_without_replies(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """The request time-out is for each request: messages that have no reply may follow each other for ever."""
    received = []

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=5, request_timeout=5) as connection:
            received.extend([line async for line in connection.requests(read_line)])

    async with served(handler) as client:
        for _ in range(60):
            await client.send_all(b"hel")
            await trio.sleep(1)
            await client.send_all(b"lo\nhel")
            await trio.sleep(1)
            await client.send_all(b"lo\n")
    assert received == [b"hello"] * 120
    assert caplog.messages == []


# Two at once.


async def test_two_that_iterate() -> None:
    """Only one task receives at a time, also between two bytes of a request."""
    client, connection = connection_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(anext, connection.requests(read_line), None)
        for _ in range(2):
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await anext(connection.requests(read_line))
            with pytest.raises(trio.BusyResourceError):
                await connection.receive_some()
            await client.send_all(b"hel")
        await client.send_all(b"lo\n")


async def test_requests_inside_a_request() -> None:
    """A request is not read inside of another one."""
    client, connection = connection_pair()
    await client.send_all(b"one\ntwo\n")
    with pytest.raises(trio.BusyResourceError):
        await anext(connection.requests(lambda connection: anext(connection.requests(read_line))))


# Turns of the others, and back-pressure.


async def test_turns_of_the_others() -> None:
    """Requests that have arrived together are read without a checkpoint, except for one every `REQUESTS_PER_TURN`."""
    client, connection = connection_pair()
    await client.send_all(b"hello\n" * (3 * REQUESTS_PER_TURN))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    requests = connection.requests(read_line)
    with trio.testing.assert_checkpoints():
        await anext(requests)
    with trio.testing.assert_no_checkpoints():
        for _ in range(REQUESTS_PER_TURN - 1):
            await anext(requests)
    with trio.testing.assert_checkpoints():
        await anext(requests)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        for _ in range(2 * REQUESTS_PER_TURN - 2):
            await anext(requests)
        nursery.cancel_scope.cancel()
    assert turns <= 3


async def test_back_pressure(autojump_clock: trio.testing.MockClock) -> None:
    """While `MAX_OWED` bytes are owed, the next request is not read, although it has arrived."""
    read = 0

    async def handler(stream: Stream) -> None:
        nonlocal read
        async with Connection(stream) as connection:
            async for _ in connection.requests(read_line):
                read += 1
                connection.push(bytes(MAX_OWED // 4))

    async with served(handler, trio.testing.lockstep_stream_pair) as client:
        await client.send_all(b"\n" * 20)
        await trio.sleep(1)
        for batch in range(1, 6):
            assert read == 4 * batch
            received = 0
            while received < MAX_OWED:
                received += len(await client.receive_some())
            await trio.sleep(1)


async def test_protocol_error(caplog: pytest.LogCaptureFixture) -> None:
    """What is not in the protocol ends the block: what is owed arrives, and one warning has the error's message."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            async for line in connection.requests(read_line):
                if line == b"body":
                    raise ProtocolError(f"{line!r} is no command")
                connection.push(line.upper())

    assert await converse(handler, b"one\nbody\ntwo\n") == b"ONE"
    assert await converse(handler, b"two\n" + bytes(1001) + b"\n") == b"TWO"
    assert caplog.messages == [
        "StapledStream: protocol error: b'body' is no command",
        "StapledStream: protocol error: more than 1000 bytes before b'\\n'",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_no_scope_is_open_across_a_turn(autojump_clock: trio.testing.MockClock) -> None:
    """The iterator may be used from changing cancel scopes and tasks, and left where it stands."""
    client, connection = connection_pair()
    requests = connection.requests(read_line)
    lines: list[bytes] = []

    async def take() -> None:
        lines.append(await anext(requests))

    await client.send_all(b"one\ntwo\nthree\n")
    with trio.CancelScope():
        await take()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
    with contextlib.suppress(trio.TooSlowError), trio.fail_after(1):
        while True:
            await take()
    assert lines == [b"one", b"two", b"three"]
    await client.send_all(b"four\n")
    await take()
    assert lines[-1] == b"four"
