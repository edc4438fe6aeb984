"""`Connection` as a stream: Trio's own checks, and what it adds to receiving and sending."""

import contextlib
import os
import time
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from helpers import LIMIT, Sticky, Stream, client_tls, cuts, fill, receive_to_end, reset, server_tls, socket_streams
from hypothesis import given
from hypothesis import strategies as st

from trioproto import ClientError, Connection, IncompleteReadError, ProtocolError, receive_exactly
from trioproto.buffer import ReceiveBuffer
from trioproto.testing import fragmentations, fragmented_stream_pair

Pair = tuple[Connection, Connection]


def connection_pair() -> tuple[Stream, Connection]:
    """Return a client's stream and the server's `Connection` at its other end, in memory."""
    client, served = trio.testing.memory_stream_pair()
    return client, Connection(served)


# Trio's checks.


async def memory() -> Pair:
    one, other = trio.testing.memory_stream_pair()
    return Connection(one), Connection(other)


async def clogged_memory() -> Pair:
    one, other = trio.testing.lockstep_stream_pair()
    return Connection(one), Connection(other)


async def sockets() -> Pair:
    one, other = await socket_streams()
    return Connection(one), Connection(other)


async def clogged_sockets() -> Pair:
    one, other = await socket_streams()
    fill(one)
    fill(other)
    return Connection(one), Connection(other)


async def tls_in_memory() -> Pair:
    one, other = trio.testing.memory_stream_pair()
    return Connection(client_tls(one)), Connection(server_tls(other))


async def tls_on_sockets() -> Pair:
    one, other = await socket_streams()
    return Connection(client_tls(one)), Connection(server_tls(other))


async def clogged_tls_in_memory() -> Pair:
    client, server = trio.testing.lockstep_stream_pair()
    one, other = client_tls(client), server_tls(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.do_handshake)
        nursery.start_soon(other.do_handshake)
    return Connection(one), Connection(other)


@pytest.mark.parametrize(("maker", "clogged"), [(memory, clogged_memory), (sockets, clogged_sockets)])
async def test_half_closeable_stream(
    maker: Callable[[], Awaitable[Pair]], clogged: Callable[[], Awaitable[Pair]]
) -> None:
    """Over memory streams and sockets, a `Connection` is a half-closeable stream by Trio's own checks."""
    with trio.fail_after(3 * LIMIT):
        await trio.testing.check_half_closeable_stream(maker, clogged)


@pytest.mark.parametrize(("maker", "clogged"), [(tls_in_memory, clogged_tls_in_memory), (tls_on_sockets, None)])
async def test_two_way_stream(maker: Callable[[], Awaitable[Pair]], clogged: Callable[[], Awaitable[Pair]]) -> None:
    """Over TLS, which cannot end one side alone, it is a two-way stream by Trio's own checks."""
    with trio.fail_after(3 * LIMIT):
        await trio.testing.check_two_way_stream(maker, clogged)


# Receiving.


async def test_receive_some() -> None:
    """All that has arrived is returned, or as much of it as is asked for; what is left comes first the next time."""
    client, connection = connection_pair()
    await client.send_all(b"hello world")
    assert await connection.receive_some(5) == b"hello"
    assert await connection.receive_some(1) == b" "
    assert await connection.receive_some() == b"world"
    await client.send_eof()
    for max_bytes in (None, 5):
        assert await connection.receive_some(max_bytes) == b""


@pytest.mark.parametrize("max_bytes", [0, -1])
async def test_receive_some_of_nothing(max_bytes: int) -> None:
    """At least one byte must be asked for."""
    _client, connection = connection_pair()
    with pytest.raises(ValueError, match=f"max_bytes must be at least 1, not {max_bytes}"):
        await connection.receive_some(max_bytes)


async def test_receive_exactly() -> None:
    """Exactly so many bytes are returned, and what follows stays for the next receive."""
    client, connection = connection_pair()
    await client.send_all(b"hello world")
    assert await connection.receive_exactly(0) == b""
    assert await connection.receive_exactly(6) == b"hello "
    assert await connection.receive_exactly(5) == b"world"
    with pytest.raises(ValueError, match="n must be at least 0, not -1"):
        await connection.receive_exactly(-1)


async def test_receive_until() -> None:
    """What is in front of the delimiter is returned, and the delimiter is taken."""
    client, connection = connection_pair()
    await client.send_all(b"GET / HTTP/1.1\r\nHost: me\r\n\r\nbody")
    lines = [await connection.receive_until(b"\r\n", max_bytes=100) for _ in range(3)]
    assert lines == [b"GET / HTTP/1.1", b"Host: me", b""]
    assert await connection.receive_some() == b"body"


async def test_receive_until_without_a_delimiter() -> None:
    """The delimiter has one byte or more."""
    _client, connection = connection_pair()
    with pytest.raises(ValueError, match="the delimiter must not be empty"):
        await connection.receive_until(b"", max_bytes=100)


async def read_until(sent: bytes, cuts: int | tuple[int, ...], delimiter: bytes, max_bytes: int) -> bytes | None:
    """Return what `Connection.receive_until` returns; None if it finds too much."""
    client, served = fragmented_stream_pair(to_second=cuts)
    await client.send_all(sent)
    await client.send_eof()
    connection = Connection(served)
    try:
        line = await connection.receive_until(delimiter, max_bytes=max_bytes)
    except ProtocolError:
        return None
    assert await receive_to_end(connection) == sent[len(line) + len(delimiter) :]
    return line


@pytest.mark.parametrize("length", range(6))
@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n"])
async def test_receive_until_is_bounded(delimiter: bytes, length: int) -> None:
    """More than ``max_bytes`` in front of the delimiter is a protocol error, however the bytes arrive."""
    sent = b"\r" * length + delimiter + b"x"
    for sizes in fragmentations(len(sent)):
        for max_bytes in (length - 1, length, length + 1):
            expected = b"\r" * length if max_bytes >= length else None
            assert await read_until(sent, sizes, delimiter, max_bytes) == expected


@pytest.mark.parametrize("cuts", [(), 1, 3])
@pytest.mark.parametrize("max_bytes", [0, 1, 5])
async def test_receive_until_does_not_wait_for_the_delimiter(max_bytes: int, cuts: int | tuple[()]) -> None:
    """As soon as the delimiter can no longer come in time, the error is raised, with the client still connected."""
    client, served = fragmented_stream_pair(to_second=cuts)
    await client.send_all(b"x" * (max_bytes + 2))
    with trio.fail_after(LIMIT), pytest.raises(ProtocolError) as caught:
        await Connection(served).receive_until(b"\r\n", max_bytes=max_bytes)
    assert str(caught.value) == f"more than {max_bytes} bytes before " + repr(b"\r\n")


@given(lines=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=10), cuts=cuts)
async def test_lines_in_any_pieces(lines: list[bytes], cuts: int | list[int]) -> None:
    """Lines come out as they were sent, however they arrive."""
    client, served = fragmented_stream_pair(to_second=cuts)
    await client.send_all(b"".join(line + b"\n" for line in lines))
    connection = Connection(served)
    assert [await connection.receive_until(b"\n", max_bytes=20) for _ in lines] == lines


async def test_receive_until_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that arrives in many pieces is searched once, and not again from its beginning for each of them."""
    searched = 0
    find = ReceiveBuffer.find

    def count(buffer: ReceiveBuffer, delimiter: bytes, start: int) -> int:
        nonlocal searched
        searched += buffer.size - start
        return find(buffer, delimiter, start)

    monkeypatch.setattr(ReceiveBuffer, "find", count)
    client, served = fragmented_stream_pair(to_second=100)
    await client.send_all(bytes(100_000) + b"\r\n")
    assert len(await Connection(served).receive_until(b"\r\n", max_bytes=100_000)) == 100_000
    assert 100_000 <= searched <= 110_000


async def test_unreceive() -> None:
    """What is given back is received again, first, by whatever receives next."""
    client, connection = connection_pair()
    await client.send_all(b"hello world")
    connection.unreceive((await connection.receive_some())[2:])
    assert await connection.receive_exactly(4) == b"llo "
    connection.unreceive(b"o ")
    assert await connection.receive_until(b"r", max_bytes=10) == b"o wo"
    connection.unreceive(b"")
    assert await connection.receive_some() == b"ld"


Receive = Callable[[Connection], Awaitable[bytes]]
RECEIVES: dict[str, Receive] = {
    "receive_some": lambda connection: connection.receive_some(),
    "receive_some of 1": lambda connection: connection.receive_some(1),
    "receive_exactly": lambda connection: connection.receive_exactly(5),
    "receive_exactly 0": lambda connection: connection.receive_exactly(0),
    "receive_until": lambda connection: connection.receive_until(b"o", max_bytes=10),
}


@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES.keys())
async def test_receiving_is_a_checkpoint(receive: Receive) -> None:
    """Outside of a request, every receive lets other tasks run, although what it asks for is there."""
    client, connection = connection_pair()
    await client.send_all(b"hello")
    for give_back in (False, True):
        if give_back:
            connection.unreceive(b"hello")
        with trio.testing.assert_checkpoints():
            await receive(connection)
        connection._buffer.clear()  # noqa: SLF001 - the next turn begins with nothing


@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES.keys())
async def test_cancelled_receive_loses_nothing(receive: Receive, autojump_clock: trio.testing.MockClock) -> None:
    """What had arrived when a receive was cancelled is received by the next one."""
    client, connection = connection_pair()
    await client.send_all(b"hell")
    for _ in range(2):
        with trio.move_on_after(1) as scope:
            await connection.receive_exactly(5)
        assert scope.cancelled_caught
    await client.send_all(b"o")
    with trio.CancelScope() as scope:
        scope.cancel()
        await receive(connection)
    assert scope.cancelled_caught
    assert await connection.receive_exactly(5) == b"hello"


@pytest.mark.parametrize("arrived", [b"", b"hell"])
@pytest.mark.parametrize("first", [RECEIVES["receive_exactly"], RECEIVES["receive_until"]])
@pytest.mark.parametrize(
    "second",
    [
        *(receive for name, receive in RECEIVES.items() if name[-1] != "0"),
        lambda connection: connection.receive_exactly(1),
        lambda connection: connection.receive_until(b"h", max_bytes=1),
    ],
)
async def test_two_that_receive(arrived: bytes, first: Receive, second: Receive) -> None:
    """While one task receives, another cannot; it would take bytes from the middle of what the first waits for."""
    client, connection = connection_pair()
    await client.send_all(arrived)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first, connection)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await second(connection)
        await client.send_all(b"hello")


@pytest.mark.parametrize("sent", [b"", b"hel"])
@pytest.mark.parametrize("receive", [RECEIVES["receive_exactly"], RECEIVES["receive_until"]])
async def test_end_of_stream(sent: bytes, receive: Receive) -> None:
    """A client that ends its side before all is there has made a mistake, unless it had sent nothing."""
    client, connection = connection_pair()
    await client.send_all(sent)
    await client.send_eof()
    with pytest.raises(ClientError) as caught:
        await receive(connection)
    assert isinstance(caught.value, trio.BrokenResourceError)
    assert (caught.value.connection, caught.value.how) == (connection, "ended")
    assert str(caught.value) == ("end of stream in the middle of a request" if sent else "end of stream")
    assert await connection.receive_some() == sent


async def test_what_is_written_for_streams() -> None:
    """What is written for Trio's streams, such as the function `receive_exactly`, runs on it."""
    client, connection = connection_pair()
    await client.send_all(b"hello wo")
    await client.send_eof()
    assert await receive_exactly(connection, 6) == b"hello "
    with pytest.raises(IncompleteReadError) as caught:
        await receive_exactly(connection, 5)
    assert caught.value.stream is connection


@pytest.mark.parametrize("receive", [receive for name, receive in RECEIVES.items() if name[-1] != "0"])
async def test_receiving_when_closed(receive: Receive) -> None:
    """Closing drops what had arrived."""
    client, connection = connection_pair()
    await client.send_all(b"hello")
    assert await connection.receive_some(1) == b"h"
    await connection.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await receive(connection)


# Sending.


async def test_send_all_after_what_was_pushed() -> None:
    """What was pushed before is sent before; both have been sent when `send_all` returns."""
    client, connection = connection_pair()
    connection.push(b"one ")
    connection.push(b"two ")
    await connection.send_all(b"three")
    assert connection.unsent == 0
    assert await client.receive_some() == b"one two three"


async def test_messages_do_not_mix() -> None:
    """What is pushed while a long message is sent comes behind it, not into it."""
    client, served = await socket_streams()
    connection = Connection(served)
    with trio.fail_after(LIMIT):
        async with client, connection, trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, b"a" * 20_000_000)
            await trio.testing.wait_all_tasks_blocked(0.05)
            connection.push(b"b")
            nursery.start_soon(connection.receive_some)
            assert await receive_exactly(client, 20_000_001) == b"a" * 20_000_000 + b"b"
            await client.send_eof()


Send = Callable[[Connection], Awaitable[object]]
SENDS: dict[str, Send] = {
    "send_all": lambda connection: connection.send_all(b"hello"),
    "send_eof": lambda connection: connection.send_eof(),
    "wait": lambda connection: connection.wait_send_all_might_not_block(),
}


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS.keys())
async def test_two_that_send(send: Send, autojump_clock: trio.testing.MockClock) -> None:
    """While one task sends, another cannot."""
    _client, connection = await clogged_memory()
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, b"hello")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await send(connection)
    assert trio.current_time() == pytest.approx(1)


@pytest.mark.parametrize("maker", [memory, sockets])
@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS.keys())
async def test_sending_is_a_checkpoint(send: Send, maker: Callable[[], Awaitable[Pair]]) -> None:
    """All of these let other tasks run, and so does ending this side a second time."""
    client, connection = await maker()
    with trio.testing.assert_checkpoints():
        await send(connection)
    await connection.send_eof()
    with trio.testing.assert_checkpoints():
        await connection.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await connection.send_all(b"hello")
    await connection.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await send(connection)
    await client.aclose()


async def test_send_eof_after_what_was_pushed() -> None:
    """This side ends after what was pushed; the client may still send. What is pushed later is ignored."""
    client, connection = connection_pair()
    connection.push(b"hello")
    await connection.send_eof()
    connection.push(b"world")
    assert connection.unsent == 0
    assert await receive_to_end(client) == b"hello"
    await client.send_all(b"hello")
    assert await connection.receive_some() == b"hello"


async def test_wait_after_what_was_pushed() -> None:
    """Waiting for room means to send what was pushed, first."""
    client, connection = connection_pair()
    connection.push(b"hello")
    await connection.wait_send_all_might_not_block()
    assert await client.receive_some() == b"hello"


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS.keys())
@pytest.mark.parametrize("pushed", [b"", b"hello"])
async def test_sending_to_a_client_that_is_gone(send: Send, pushed: bytes) -> None:
    """A client that has gone is reported as a `ClientError` by whatever has something to send."""
    client, served = await socket_streams()
    await (connection := Connection(served)).send_all(b"hello")
    reset(client)
    await trio.sleep(0.01)
    connection.push(pushed)
    if not pushed and send is SENDS["wait"]:
        await send(connection)  # a socket that is broken would not block
    else:
        with pytest.raises(ClientError) as caught:
            await send(connection)
        assert (caught.value.connection, caught.value.how) == (connection, "reset")
        assert str(caught.value).startswith("connection broken while waiting for room for a reply: ")
    await connection.aclose()


async def test_waiting_for_room_that_never_comes() -> None:
    """A client that breaks off while room is waited for is reported as a `ClientError`."""

    class Broken(Sticky):
        async def wait_send_all_might_not_block(self) -> None:
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError("broken on purpose")

    with pytest.raises(ClientError, match="connection broken while waiting for room for a reply: broken on purpose"):
        await Connection(Broken()).wait_send_all_might_not_block()


async def test_cancelled_send_on_a_socket() -> None:
    """What is left of a message whose sending was cancelled is sent before anything else, as it was then."""
    client, served = await socket_streams()
    connection = Connection(served)
    message = bytearray(b"a" * 20_000_000)
    with trio.fail_after(LIMIT):
        async with client, connection:
            with trio.move_on_after(0.05) as scope:
                await connection.send_all(message)
            assert scope.cancelled_caught
            message[:] = b"b" * len(message)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.send_all, b"c")
                received = await receive_exactly(client, len(message) + 1)
            await client.send_eof()
    assert received == b"a" * len(message) + b"c"


async def test_cancelled_send_on_another_stream(autojump_clock: trio.testing.MockClock) -> None:
    """Nobody knows how much of it was sent, so nothing more can be sent."""
    client, served = trio.testing.lockstep_stream_pair()
    connection = Connection(served)
    with trio.move_on_after(1):
        await connection.send_all(b"hello")
    with pytest.raises(ClientError) as caught:
        await connection.send_all(b"world")
    assert "an earlier send was cut off" in str(caught.value)
    await connection.aclose()
    await client.aclose()


async def test_large_message_is_linear() -> None:
    """A message of 64 MiB to a slow reader is not copied again for each piece of it that is sent."""
    client, served = await socket_streams()
    connection = Connection(served)
    size = 64 * 2**20
    message = bytes(size)
    moved = 0

    async def read_slowly() -> None:
        nonlocal moved
        while moved < size:
            moved += len(await client.receive_some(65536))

    with trio.fail_after(3 * LIMIT):
        async with client, connection:
            began = time.process_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_slowly)
                connection.push(message)
                await connection.send_all(b"")
            took = time.process_time() - began
            await client.send_eof()
    assert took < 5  # copying what is left for each piece took 18 s


async def test_small_sends_on_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel takes at once is one system call, and no task is held up."""
    client, served = await socket_streams()
    writes: list[int] = []
    write = os.write

    def count(fd: int, data: bytes) -> int:
        writes.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", count)
    connection = Connection(served)
    async with client, contextlib.aclosing(connection):
        connection.push(b"one ")
        connection.push(b"two ")
        await connection.send_all(b"three")
    assert writes == [8, 5]


@pytest.mark.parametrize("slow", [False, True])
async def test_buffer_of_the_caller(slow: bool) -> None:  # noqa: FBT001
    """What was sent belongs to the caller again, who may change its size."""
    client, theirs = await socket_streams() if slow else trio.testing.memory_stream_pair()
    message = bytearray(20_000_000 if slow else 10)
    connection = Connection(theirs)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_exactly, client, len(message))
            await connection.send_all(message)
        message.clear()
        await connection.aclose()
        await client.aclose()


async def test_two_that_receive_what_is_buffered() -> None:
    """One gets it, the other an error, and not the end of the stream."""
    connection = Connection(trio.testing.memory_stream_pair()[0])
    connection.unreceive(b"hello")
    received = []

    async def receive() -> None:
        try:
            received.append(await connection.receive_some())
        except trio.BusyResourceError:
            received.append(b"busy")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(receive)
    assert sorted(received) == [b"busy", b"hello"]


async def test_closed_while_it_receives_what_is_buffered() -> None:
    """What is buffered is dropped by `aclose`; the task that was receiving it learns of that."""
    connection = Connection(trio.testing.memory_stream_pair()[0])

    async def receive_again_and_again() -> None:
        while True:
            connection.unreceive(b"hello")
            await connection.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.aclose)
        with pytest.raises(trio.ClosedResourceError):
            await receive_again_and_again()


@pytest.mark.parametrize("max_unsent", [None, 1000])
async def test_waits_for_room_while_others_push_and_receive(max_unsent: int | None) -> None:
    """Waiting for room takes turns with what else is sent: nobody gets an error."""
    client, theirs = await socket_streams()
    with trio.fail_after(LIMIT):
        async with client, Connection(theirs, max_unsent=max_unsent) as connection, trio.open_nursery() as nursery:
            filled = fill(theirs)
            nursery.start_soon(connection.wait_send_all_might_not_block)
            await trio.testing.wait_all_tasks_blocked()
            connection.push(b"hello")
            nursery.start_soon(connection.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            received = await receive_exactly(client, filled + (5 if max_unsent is not None else 0))
            await client.send_eof()
            assert received[filled:] in (b"hello", b"")
