"""Time-outs: for a client's next request, for the rest of one, and for a client to take what it is sent."""

import contextlib
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Handler,
    Stream,
    connected,
    fill,
    int32_bytes,
    receive_to_end,
    request_bytes,
    send_after,
    served,
    socket_streams,
)

from trioproto import ClientError, Connection, echo_handler, op_handler
from trioproto.transport import SocketTransport

ONE = request_bytes([1], "+")  # 6 bytes
MALFORMED = b"\x00"


async def dribble(stream: trio.abc.SendStream, data: bytes, interval: float) -> None:
    """Send ``data``, a byte after each ``interval`` seconds; the peer may have gone."""
    with contextlib.suppress(trio.BrokenResourceError):
        for byte in data:
            await trio.sleep(interval)
            await stream.send_all(bytes([byte]))


# Idle clients.


@pytest.mark.parametrize("timeout", [0.1, 1, 300])
@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_idle_from_the_start(
    handler: Handler,
    timeout: float,  # noqa: ASYNC109 - the handler's
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client that sends nothing is shown the end of stream after ``idle_timeout``, not earlier, and not logged."""
    caplog.set_level(logging.INFO, "trioproto")
    async with served(partial(handler, idle_timeout=timeout)) as client:
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(timeout)
    assert caplog.messages == []


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_idle_between_requests(handler: Handler, autojump_clock: trio.testing.MockClock) -> None:
    """Each reply starts ``idle_timeout`` anew, so a client that asks often enough may stay."""
    async with served(partial(handler, idle_timeout=10)) as client:
        for _ in range(5):
            await trio.sleep(9.5)
            await client.send_all(ONE)
            assert await client.receive_some() != b""
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(5 * 9.5 + 10)


async def test_idle_in_the_log(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """For debugging, the log tells that an idle client had its time, in one line."""
    caplog.set_level(logging.DEBUG, "trioproto")
    async with served(partial(echo_handler, idle_timeout=10)) as client:
        assert await client.receive_some() == b""
    [record] = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.getMessage() == "StapledStream: timed out waiting for a request"


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_takes_no_reply(
    handler: Handler,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client that takes no byte of its reply has ``idle_timeout``; the log says so in one line."""
    async with served(partial(handler, idle_timeout=10), trio.testing.lockstep_stream_pair) as client:
        await trio.sleep(5)
        await client.send_all(ONE)
        await trio.sleep(10 - 0.1)
        assert caplog.messages == []
        await trio.sleep(0.2)
        assert caplog.messages == ["StapledStream: timed out waiting for room for a reply"]
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].exc_info is None


@pytest.mark.parametrize("wait", [Connection.send_eof, Connection.wait_send_all_might_not_block])
async def test_takes_nothing_of_what_was_pushed(
    wait: Callable[[Connection], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    """Whatever sends what was pushed before it gives a client the idle time-out to take it."""
    _client, theirs = trio.testing.lockstep_stream_pair()
    connection = Connection(theirs, idle_timeout=10)
    connection.push(b"hello")
    with pytest.raises(ClientError) as caught:
        await wait(connection)
    assert (caught.value.connection, caught.value.how) == (connection, "late")
    assert trio.current_time() == pytest.approx(10)
    await connection.aclose()


async def test_takes_no_last_reply(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """The same holds for a bulk echo, and for the replies before a malformed request, which has its line already."""
    for handler, sent, line in (
        (op_handler, ONE + MALFORMED, "StapledStream: protocol error: operand count is 0"),
        (echo_handler, bytes(65536), "StapledStream: timed out waiting for room for a reply"),
    ):
        caplog.clear()
        async with served(partial(handler, idle_timeout=10), trio.testing.lockstep_stream_pair) as client:
            await client.send_all(sent)
            await trio.sleep(10.1)
            with trio.fail_after(0.1):
                await receive_to_end(client)
            assert caplog.messages == [line]


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_takes_no_reply_on_a_socket(handler: Handler, *, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """On sockets, too, a client that sends on but never reads is ended after ``idle_timeout``."""
    async with connected(partial(handler, idle_timeout=0.2), tls=tls) as client:
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(ONE * 10_000_000)
    [message] = caplog.messages
    assert re.fullmatch(r"127.0.0.1:\d+ to 127.0.0.1:\d+: timed out waiting for room for a reply", message)


async def test_takes_the_reply_slowly(*, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A client that takes its reply slowly is none that takes nothing, however long all of it lasts."""
    size = 12 * 2**20
    async with connected(partial(echo_handler, idle_timeout=0.5), tls=tls) as client, trio.open_nursery() as sending:
        sending.start_soon(client.send_all, bytes(size))
        received = 0
        while received < size:
            received += len(await client.receive_some(100_000))
            await trio.sleep(0.01)
    assert caplog.messages == []


# Requests that take long.


@pytest.mark.parametrize("interval", [0.3, 0.75, 1.9, 30])
async def test_request_that_dribbles(
    interval: float, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """From its first byte to its last a request may take ``request_timeout``, in however many pieces it comes.

    The log says so in one line.
    """
    handler = partial(op_handler, idle_timeout=100, request_timeout=2)
    async with served(handler) as client, trio.open_nursery() as nursery:
        nursery.start_soon(dribble, client, request_bytes([1] * 100, "+"), interval)
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(interval + 2)
        nursery.cancel_scope.cancel()
    assert caplog.messages == ["StapledStream: timed out waiting for the rest of a request"]
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].exc_info is None


async def test_request_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """A request that takes a little less than ``request_timeout`` is answered; ``idle_timeout`` is none of it."""
    async with served(partial(op_handler, idle_timeout=1, request_timeout=2)) as client:
        for _ in range(3):
            await client.send_all(ONE[:3])
            await trio.sleep(1.9)
            await client.send_all(ONE[3:])
            assert await client.receive_some() == int32_bytes(1)


async def test_request_timeout_with_pipelining(autojump_clock: trio.testing.MockClock) -> None:
    """The time begins anew with each request, also for one that begins in the same piece as the last one ends."""
    async with served(partial(op_handler, idle_timeout=1, request_timeout=2)) as client:
        await client.send_all(ONE[:3])
        for _ in range(5):
            await trio.sleep(1.5)
            await client.send_all(ONE[3:] + ONE[:3])
            assert await client.receive_some() == int32_bytes(1)
        # Bytes that complete no request begin nothing anew.
        await trio.sleep(1.5)
        await client.send_all(ONE[3:4])
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(5 * 1.5 + 2)


async def test_idle_after_a_late_request(autojump_clock: trio.testing.MockClock) -> None:
    """What a request took is not taken from the time after it, nor from the next one's."""
    async with served(partial(op_handler, idle_timeout=10, request_timeout=2)) as client:
        for _ in range(2):
            await client.send_all(ONE[:3])
            await trio.sleep(1.9)
            await client.send_all(ONE[3:])
            assert await client.receive_some() == int32_bytes(1)
            await trio.sleep(9.5)
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(2 * (1.9 + 9.5) + 0.5)


async def test_request_timeout_after_replies(autojump_clock: trio.testing.MockClock) -> None:
    """A client that never finishes its last request gets the replies to those before it, then end of stream."""
    async with served(partial(op_handler, request_timeout=2)) as client:
        await client.send_all(ONE * 3 + ONE[:3])
        assert await receive_to_end(client) == int32_bytes(1) * 3
        assert trio.current_time() == pytest.approx(2)


# With a `Connection` of one's own.


async def test_no_timeouts(autojump_clock: trio.testing.MockClock) -> None:
    """Without time-outs a client may take for ever, between requests and inside of one."""

    async def shout(stream: Stream) -> None:
        async with Connection(stream) as connection:
            async for request in connection.requests(lambda connection: connection.receive_exactly(5)):
                await connection.send_all(request.upper())

    async with served(shout) as client:
        for interval in (0, 1, 400):
            await client.send_all(b"hel")
            await trio.sleep(interval)
            await client.send_all(b"lo")
            assert await client.receive_some() == b"HELLO"
            await trio.sleep(interval)
        await client.send_eof()
        assert await client.receive_some() == b""


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_timeouts_out_of_their_range(seconds: float) -> None:
    """A time-out of 0, as if there were none, is a mistake that is said at once."""
    stream, _peer = trio.testing.memory_stream_pair()
    with pytest.raises(ValueError, match=f"above 0 seconds, not {seconds} and inf"):
        Connection(stream, idle_timeout=seconds)
    with pytest.raises(ValueError, match=f"above 0 seconds, not inf and {seconds}"):
        Connection(stream, request_timeout=seconds)
    with pytest.raises(ValueError, match="at least 0 bytes, not -1"):
        Connection(stream, max_unsent=-1)


Receive = Callable[[Connection], Awaitable[bytes]]


@pytest.mark.parametrize(
    "receive",
    [
        pytest.param(lambda connection: connection.receive_exactly(5), id="receive_exactly"),
        pytest.param(lambda connection: connection.receive_until(b"o", max_bytes=9), id="receive_until"),
    ],
)
async def test_messages_outside_of_requests(
    receive: Receive, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Outside of `requests`, a message has the idle time-out to its first byte, and the request time-out from then."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=10, request_timeout=3) as connection:
            while True:
                await receive(connection)

    async with served(handler) as client:
        for _ in range(3):
            await trio.sleep(9)
            await client.send_all(b"hel")
            await trio.sleep(2)
            await client.send_all(b"lo")
        assert caplog.messages == []
        await trio.sleep(9)
        await client.send_all(b"hel")
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(3 * 11 + 9 + 3)
    assert caplog.messages == ["StapledStream: timed out waiting for the rest of a request"]


async def test_receive_some_has_the_idle_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """Outside of `requests`, each `receive_some` has the idle time-out."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=10, request_timeout=3) as connection:
            async for _ in connection:
                pass

    async with served(handler) as client:
        for _ in range(3):
            await trio.sleep(9)
            await client.send_all(b"x")
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(3 * 9 + 10)


async def test_request_that_never_ends(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """A request that is late is cut off even if bytes of it are always there to be received."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(bytes(2**22))

    async def read(connection: Connection) -> bytes:
        while await connection.receive_some():  # noqa: ASYNC110 - it takes its time
            await trio.sleep(1)
        return b""

    async with Connection(theirs, request_timeout=5) as connection:
        async for _ in connection.requests(read):
            pytest.fail("that was no request")
    assert 5 <= trio.current_time() <= 8  # with the linger
    assert caplog.messages == ["StapledStream: timed out waiting for the rest of a request"]


async def test_request_that_is_already_there(autojump_clock: trio.testing.MockClock) -> None:
    """What a handler takes for its own work is not the client's: a request that has arrived is never late."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(b"helloworld")

    async def read(connection: Connection) -> bytes:
        first = await connection.receive_exactly(1)
        await trio.sleep(100)
        return first + await connection.receive_exactly(4)

    connection = Connection(theirs, idle_timeout=1, request_timeout=1)
    requests = connection.requests(read)
    assert [await anext(requests), await anext(requests)] == [b"hello", b"world"]


async def test_idle_while_it_is_sent_to(autojump_clock: trio.testing.MockClock) -> None:
    """A client that takes what it is sent is not idle, such as one that has subscribed to something."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=10) as connection, trio.open_nursery() as nursery:

            async def send() -> None:
                for number in range(5):
                    await trio.sleep(9)
                    if number % 2:
                        connection.push(b"news")
                    await connection.send_all(b"" if number % 2 else b"news")

            nursery.start_soon(send)
            await connection.receive_some()

    async with served(handler) as client:
        for _ in range(5):
            assert await client.receive_some() == b"news"
        assert await client.receive_some() == b""
        assert trio.current_time() == pytest.approx(5 * 9 + 10)


async def test_idle_while_it_is_sent_to_on_a_socket(*, tls: bool) -> None:
    """The same on a socket, where what is sent is mostly taken at once."""

    async def handler(stream: trio.SocketStream) -> None:
        async with Connection(stream, idle_timeout=0.5) as connection, trio.open_nursery() as nursery:

            async def send() -> None:
                for _ in range(5):
                    await trio.sleep(0.2)
                    await connection.send_all(b"news")

            nursery.start_soon(send)
            await connection.receive_some()

    async with connected(handler, tls=tls) as client:
        assert await receive_to_end(client) == b"news" * 5


async def test_sending_does_not_extend_a_request(autojump_clock: trio.testing.MockClock) -> None:
    """The time for a request that has begun is not extended by what the client takes meanwhile."""

    async def handler(stream: Stream) -> None:
        async with (
            Connection(stream, idle_timeout=10, request_timeout=10) as connection,
            trio.open_nursery() as nursery,
        ):

            async def send() -> None:
                for _ in range(100):
                    await trio.sleep(1)
                    await connection.send_all(b"news")

            nursery.start_soon(send)
            await anext(connection.requests(lambda connection: connection.receive_exactly(5)))

    async with served(handler) as client:
        await client.send_all(b"hel")
        received = await receive_to_end(client)
        assert trio.current_time() == pytest.approx(10)
    assert len(received) in (9 * 4, 10 * 4)


async def test_idle_while_another_task_waits_for_room(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Whether a client is still there is then for the task to say that sends: it alone ends the conversation."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=10) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(connection.receive_some)
            await trio.sleep(5)
            await connection.send_all(b"news")

    async with served(handler, trio.testing.lockstep_stream_pair):
        await trio.sleep(14)
        assert caplog.messages == []
        await trio.sleep(2)
    assert caplog.messages == ["StapledStream: timed out waiting for room for a reply"]


async def test_what_arrives_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives on a socket before the task that waits has noticed the end of its time counts as well."""
    client, theirs = await socket_streams()

    async def wait_for_data(transport: SocketTransport) -> None:
        try:
            await trio.sleep_forever()
        finally:
            os.write(client.socket.fileno(), b"hello")

    monkeypatch.setattr(SocketTransport, "wait_for_data", wait_for_data)
    connection = Connection(theirs, idle_timeout=0.01)
    with trio.fail_after(LIMIT):
        assert await connection.receive_some() == b"hello"
        await connection.aclose()
        await client.aclose()


async def test_what_arrives_in_the_last_moment(autojump_clock: trio.testing.MockClock) -> None:
    """The time-out of the last moment counts what has arrived by then."""
    async with served(partial(op_handler, idle_timeout=10)) as client, trio.open_nursery() as nursery:
        nursery.start_soon(send_after, client, ONE, 9.99)
        assert await client.receive_some() == int32_bytes(1)


async def test_takes_nothing_while_the_server_waits_for_room(autojump_clock: trio.testing.MockClock) -> None:
    """A client that makes no room for the idle time-out is late, also for one who only waits for room."""
    _client, theirs = trio.testing.lockstep_stream_pair()
    connection = Connection(theirs, idle_timeout=10)
    connection.push(b"hello")
    with pytest.raises(ClientError) as late:
        await connection.wait_send_all_might_not_block()
    assert (late.value.how, trio.current_time()) == ("late", 10)


async def test_makes_no_room_on_a_socket() -> None:
    """So it is on a socket, when nothing was pushed."""
    client, theirs = await socket_streams()
    connection = Connection(theirs, idle_timeout=0.05)
    fill(theirs)
    with trio.fail_after(LIMIT):
        with pytest.raises(ClientError) as late:
            await connection.wait_send_all_might_not_block()
        assert late.value.how == "late"
        await connection.aclose()
        await client.aclose()


@pytest.mark.parametrize(("how", "taken"), [("receive", 0), ("receive", 1), ("receive", 2), ("again", 1), ("again", 2)])
async def test_request_that_was_given_up(how: str, taken: int, autojump_clock: trio.testing.MockClock) -> None:
    """The time of a request that was cancelled is over once its bytes are received otherwise."""
    client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs, request_timeout=10)
    requests = connection.requests(lambda connection: connection.receive_exactly(4))
    await client.send_all(b"ab")
    with trio.move_on_after(1):
        await anext(requests)
    if taken:
        assert await connection.receive_some(taken) == b"ab"[:taken]
    await trio.sleep(20)
    await client.send_all(b"wx")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_after, client, b"yz", 1)
        received = await (connection.receive_exactly(4) if how == "receive" else anext(requests))
        assert received == b"abwxyz"[taken : taken + 4]
