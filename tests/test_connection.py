"""Time-outs, and closing without loss: what `trioproto.connection.Connection` does behind the handlers."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from helpers import int32_bytes, request_bytes

from trioproto import echo_handler, op_handler, serve_tcp
from trioproto.connection import LINGER_BYTES, LINGER_SECONDS, LINGER_SILENCE, Connection

Stream = trio.abc.HalfCloseableStream
Handler = Callable[..., Awaitable[object]]
StreamPair = Callable[[], tuple[Stream, Stream]]

LIMIT = 20  # seconds, for a test on real sockets that would otherwise hang
ONE = request_bytes([1], "+")  # 6 bytes
MALFORMED = b"\x00"


@contextlib.asynccontextmanager
async def served(handler: Handler, pair: StreamPair = trio.testing.memory_stream_pair) -> AsyncIterator[Stream]:
    """Run ``handler`` for one client, and give that one's stream; in the end, see the handler to its end."""
    client, theirs = pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler, theirs)
            async with client:
                yield client


async def receive_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """Receive all there is until end of stream."""
    received = bytearray()
    async for chunk in stream:
        received += chunk
    return bytes(received)


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
    assert record.getMessage() == "StapledStream, awaiting a request, timed out"


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
        assert caplog.messages == ["StapledStream, awaiting room for a reply, timed out"]
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].exc_info is None


async def test_takes_no_last_reply(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """The same holds for the replies before a malformed request, and for a bulk echo."""
    for handler, sent in ((op_handler, ONE + MALFORMED), (echo_handler, bytes(65536))):
        caplog.clear()
        began = trio.current_time()
        async with served(partial(handler, idle_timeout=10), trio.testing.lockstep_stream_pair) as client:
            await client.send_all(sent)
            await trio.sleep(10.1)
            assert caplog.messages[-1] == "StapledStream, awaiting room for a reply, timed out"
            assert trio.current_time() - began == pytest.approx(10.1)


async def test_takes_no_reply_on_a_socket(caplog: pytest.LogCaptureFixture, nursery: trio.Nursery) -> None:
    """On sockets, too, a client that sends on but never reads is ended after ``idle_timeout``."""
    for handler in (echo_handler, op_handler):
        caplog.clear()
        [listener] = await nursery.start(partial(serve_tcp, partial(handler, idle_timeout=0.2), 0, host="127.0.0.1"))
        with trio.fail_after(LIMIT):
            async with await trio.testing.open_stream_to_socket_listener(listener) as client:
                with pytest.raises(trio.BrokenResourceError):
                    await client.send_all(ONE * 10_000_000)
        [message] = caplog.messages
        assert message.endswith(", awaiting room for a reply, timed out")


async def test_takes_the_reply_slowly(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """A client that takes its reply slowly is none that takes nothing, however long all of it lasts."""
    handler = partial(echo_handler, idle_timeout=0.5)
    [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1"))
    size = 12 * 2**20
    with trio.fail_after(LIMIT):
        async with (
            await trio.testing.open_stream_to_socket_listener(listener) as client,
            trio.open_nursery() as sending,
        ):
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
    assert caplog.messages == ["StapledStream, awaiting the rest of a request, timed out"]
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


# A handler of one's own.


async def test_own_handler(autojump_clock: trio.testing.MockClock) -> None:
    """A handler of one's own is a loop over `exchange`; without time-outs a client may take for ever."""

    async def shout(stream: Stream) -> None:
        async with Connection(stream) as connection:
            reply = b""
            while request := await connection.exchange(reply):
                reply = request.upper()

    async with served(shout) as client:
        for interval in (0, 1, 900):
            await trio.sleep(interval)
            await client.send_all(b"hello")
            assert await client.receive_some() == b"HELLO"
        await client.send_eof()
        assert await client.receive_some() == b""


class BugError(Exception):
    pass


@pytest.mark.parametrize(
    "bug",
    [BugError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError],
    ids=lambda bug: bug.__name__,
)
async def test_own_handler_with_a_bug(bug: type[Exception], autojump_clock: trio.testing.MockClock) -> None:
    """An error that is not this client's passes, and the stream is closed at once."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await connection.exchange(b"")
            raise bug

    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(b"hello")
    with pytest.raises(bug):
        await handler(theirs)
    assert trio.current_time() == 0
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"hello")


@pytest.mark.parametrize("sent", [b"", ONE[:3], ONE + MALFORMED], ids=["idle", "in a request", "closing"])
async def test_cancellation(sent: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """Cancellation closes the stream without ceremony, and goes on."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(sent)
    with trio.move_on_after(0.5) as scope:
        await op_handler(theirs)
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(0.5)
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"hello")


@pytest.mark.parametrize("sent", [b"", ONE[:3], ONE])
async def test_client_that_ends(sent: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A client that has ended its side is not waited for any more, though it may not have closed the stream."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(sent)
    await client.send_eof()
    await op_handler(theirs)
    assert trio.current_time() == 0
    assert len(await receive_to_end(client)) == (4 if sent == ONE else 0)


# Closing.


async def send_until_broken(stream: trio.abc.SendStream, interval: float, size: int) -> None:
    """Send ``size`` bytes each ``interval`` seconds, until the peer closes the connection."""
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(bytes(size))
            await trio.sleep(interval)


async def test_closing_behind_replies(autojump_clock: trio.testing.MockClock) -> None:
    """While its client still sends, a closing connection stays open, until the client has ended its side."""
    async with served(op_handler) as client:
        await client.send_all(ONE * 3 + MALFORMED)
        assert await receive_to_end(client) == int32_bytes(1) * 3
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
async def test_closing_is_bounded(
    interval: float, size: int, limit: float, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that does not end its side cannot keep the connection from closing, whether it sends or not."""
    client, theirs = trio.testing.memory_stream_pair()
    await client.send_all(MALFORMED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_until_broken, client, interval, size)
        with trio.fail_after(LINGER_SECONDS + 1):
            await op_handler(theirs)
        assert trio.current_time() == pytest.approx(limit, abs=0.6)


async def test_closing_on_a_socket(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """A malformed request while the client sends on: all replies arrive, then end of stream, and no reset."""
    [listener] = await nursery.start(partial(serve_tcp, op_handler, 0, host="127.0.0.1"))
    with trio.fail_after(LIMIT):
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            await client.send_all(ONE * 1000 + MALFORMED)
            for _ in range(100):
                await client.send_all(bytes(100_000))
                await trio.sleep(0.001)
            assert await receive_to_end(client) == int32_bytes(1) * 1000
    assert len(caplog.messages) == 1


async def test_closing_on_a_socket_is_bounded(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that floods a closing connection is disconnected."""
    monkeypatch.setattr("trioproto.connection.LINGER_BYTES", 10**6)
    [listener] = await nursery.start(partial(serve_tcp, op_handler, 0, host="127.0.0.1"))
    with trio.fail_after(LIMIT):
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            await client.send_all(MALFORMED)
            with pytest.raises(trio.BrokenResourceError):
                await client.send_all(bytes(100_000_000))


async def test_closing_a_stream_without_half_close(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that has no half-close is closed at once; there is nothing else to be done."""

    class Plain(trio.abc.Stream):
        send_all = property(lambda self: stream.send_all)
        receive_some = property(lambda self: stream.receive_some)
        wait_send_all_might_not_block = property(lambda self: stream.wait_send_all_might_not_block)
        aclose = property(lambda self: stream.aclose)

    client, stream = trio.testing.memory_stream_pair()
    await client.send_all(ONE + MALFORMED)
    await op_handler(Plain())
    assert await receive_to_end(client) == int32_bytes(1)
    assert trio.current_time() == 0


async def test_request_that_never_ends(autojump_clock: trio.testing.MockClock) -> None:
    """A request that is late is cut off even if bytes of it are always there to be received."""
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(bytes(2**20))

    async def handler() -> None:
        async with Connection(served, request_timeout=5) as connection:
            while await connection.exchange(b"", mid_request=True):  # noqa: ASYNC110 - it takes its time
                await trio.sleep(1)

    with trio.fail_after(60):
        await handler()
    assert 5 <= trio.current_time() < 16
