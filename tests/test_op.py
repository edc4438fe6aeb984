"""The op protocol: its arithmetic, its bytes, and both ends of it over fakes."""

import logging
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from helpers import cuts, fold_as_c_does, int32, int32_bytes, op_requests, reply_bytes, request_bytes
from hypothesis import example, given
from hypothesis import strategies as st

from trioproto import IncompleteReadError, ProtocolError, calculate, op_handler, op_request
from trioproto.op import Reply, Request, answer
from trioproto.testing import breaking_stream, converse, fragmentations, fragmented_stream_pair, stalling_stream

MIN = -(2**31)
MAX = 2**31 - 1

# Bytes that are no request, and what the log says of them.
MALFORMED = [
    (b"\x00", "operand count is 0"),
    (b"\x01\x05\x00\x00\x00/", "operator must be one of + - *, not b'/'"),
    (b"\x01\x05\x00\x00\x00\x00", r"operator must be one of + - *, not b'\x00'"),
    (b"\x02\x05\x00\x00\x00\x05\x00\x00\x00\xff", r"operator must be one of + - *, not b'\xff'"),
]
NOT_REQUESTS: list[tuple[Sequence[object], str, str]] = [
    ([], "+", "operands, not 0"),
    ([1] * 256, "+", "operands, not 256"),
    ([1, MAX + 1], "+", "operand 2 must be in int32, -2147483648 to 2147483647, not 2147483648"),
    ([MIN - 1], "+", "operand 1 must be in int32, -2147483648 to 2147483647, not -2147483649"),
    ([1, 2, 0.5], "+", "operand 3 must be an integer, not 0.5"),
    (["1"], "+", "operand 1 must be an integer, not '1'"),
    ([1, 2], "/", "operator must be .*, not '/'"),
    ([1, 2], "", "operator must be .*, not ''"),
    ([1, 2], "+-", "operator must be .*, not '\\+-'"),
]


# Arithmetic.


@given(op_requests)
@example(([MAX, 1], "+"))
@example(([MIN, 1], "-"))
@example(([0, MIN], "-"))
@example(([MIN, -1], "*"))
@example(([MAX] * 255, "*"))
@example(([MIN] * 255, "+"))
def test_calculate(request: tuple[list[int], str]) -> None:
    """The result is that of C on a machine whose int has 32 bits and wraps around."""
    assert calculate(*request) == fold_as_c_does(*request)


@pytest.mark.parametrize(
    ("operands", "operator", "result"),
    [
        ([1, 2, 3], "+", 6),
        ([1, 2, 3], "-", -4),
        ([2, 3, 4], "*", 24),
        ([5], "-", 5),
        ([MAX, 1], "+", MIN),
        ([MIN, 1], "-", MAX),
        ([0, MIN], "-", MIN),
        ([MIN, -1], "*", MIN),
        ([65536, 65536], "*", 0),
        ([65536, 32768], "*", MIN),
    ],
)
def test_calculate_by_hand(operands: list[int], operator: str, result: int) -> None:
    """Operands fold from the left; what does not fit wraps around."""
    assert calculate(operands, operator) == result


@pytest.mark.parametrize(("operands", "operator", "message"), NOT_REQUESTS)
def test_calculate_with_wrong_arguments(operands: list[int], operator: str, message: str) -> None:
    """What cannot be calculated is an error that names what is wrong."""
    with pytest.raises(ValueError, match=message):
        calculate(operands, operator)


# Messages.


def test_request_bytes() -> None:
    """A request is a count, the operands in little-endian two's complement, and the operator in ASCII."""
    request = Request([1, -2], "*")
    assert request.encode() == bytes.fromhex("02 01000000 feffffff 2a")
    assert Request.decode(request.encode()) == request


@given(op_requests)
def test_request_encode_and_decode(request: tuple[list[int], str]) -> None:
    """Every request has its bytes, and they are read back as the same request."""
    assert Request(*request).encode() == request_bytes(*request)
    assert Request.decode(request_bytes(*request)) == Request(*request)


@pytest.mark.parametrize(("operands", "operator", "message"), NOT_REQUESTS)
def test_request_that_cannot_be(operands: list[int], operator: str, message: str) -> None:
    """There is no request that the protocol has no bytes for."""
    with pytest.raises(ValueError, match=message):
        Request(operands, operator)


@pytest.mark.parametrize("data", [b"", *(request_bytes([1, 2], "+")[:end] for end in range(1, 10))])
def test_decode_less_than_a_request(data: bytes) -> None:
    """Part of a request is none."""
    with pytest.raises(ProtocolError, match=f"{len(data)} bytes"):
        Request.decode(data)


@pytest.mark.parametrize("more", [b"\x01", request_bytes([1], "+")])
def test_decode_more_than_a_request(more: bytes) -> None:
    """A request with more bytes behind it is none."""
    with pytest.raises(ProtocolError, match="not one whole request"):
        Request.decode(request_bytes([1, 2], "+") + more)


@pytest.mark.parametrize(("data", "reason"), MALFORMED)
def test_decode_malformed(data: bytes, reason: str) -> None:
    """What is no request is an error that names what is wrong."""
    with pytest.raises(ProtocolError) as caught:
        Request.decode(data)
    assert reason in str(caught.value)


@given(int32)
def test_reply(result: int) -> None:
    """A reply is the result in 4 bytes, little-endian two's complement."""
    assert Reply(result).encode() == int32_bytes(result)
    assert Reply.decode(int32_bytes(result)) == Reply(result)


# The server's side without I/O.


@given(requests=st.lists(op_requests, max_size=5), data=st.data())
def test_answer(requests: list[tuple[list[int], str]], data: st.DataObject) -> None:
    """Each request that is complete has its reply; what is left is the one that is not, wherever the bytes are cut."""
    sent = b"".join(request_bytes(*request) for request in requests)
    end = data.draw(st.integers(0, len(sent)))
    complete = b""
    replies = b""
    for request in requests:
        if len(complete) + len(request_bytes(*request)) > end:
            break
        complete += request_bytes(*request)
        replies += reply_bytes(*request)
    assert answer(sent[:end]) == (replies, sent[len(complete) : end])


@pytest.mark.parametrize(("malformed", "reason"), MALFORMED)
def test_answer_before_a_malformed_request(malformed: bytes, reason: str) -> None:
    """The requests before a malformed one are answered first; then what is left begins with it, which is an error."""
    sent = request_bytes([1, 2], "+") + request_bytes([3, 4], "*") + malformed + request_bytes([5], "+")
    replies, rest = answer(sent)
    assert replies == int32_bytes(3) + int32_bytes(12)
    assert rest == malformed + request_bytes([5], "+")
    with pytest.raises(ProtocolError) as caught:
        answer(rest)
    assert reason in str(caught.value)


# The server's handler.


@given(requests=st.lists(op_requests, max_size=8), cuts=cuts)
async def test_handler_in_any_pieces(requests: list[tuple[list[int], str]], cuts: int | list[int]) -> None:
    """Every request has its reply, in order, however the bytes arrive at the server."""
    sent = b"".join(request_bytes(*request) for request in requests)
    replies = b"".join(reply_bytes(*request) for request in requests)
    assert await converse(op_handler, sent, cuts) == replies


async def test_handler_in_all_pieces() -> None:
    """A request has its reply for every way of cutting it."""
    sent = request_bytes([MAX, -7], "-")
    for sizes in fragmentations(len(sent)):
        assert await converse(op_handler, sent, sizes) == reply_bytes([MAX, -7], "-")


@pytest.mark.parametrize("count", [1, 254, 255])
@pytest.mark.parametrize("operator", ["+", "-", "*"])
async def test_handler_with_most_operands(count: int, operator: str) -> None:
    """A request may have 255 operands, as many as its count can tell."""
    operands = [MIN + 7919 * number for number in range(count)]
    assert await converse(op_handler, request_bytes(operands, operator)) == reply_bytes(operands, operator)


async def test_handler_replies_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """The reply comes with the operator; the server waits neither for more requests nor for end of stream."""
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(op_handler, served)
        with trio.fail_after(1):
            for number in range(3):
                await client.send_all(request_bytes([number, 1], "+"))
                assert await client.receive_some() == int32_bytes(number + 1)
        await client.aclose()


@pytest.mark.parametrize(("malformed", "reason"), MALFORMED)
@pytest.mark.parametrize("cuts", [(), 1, 7])
async def test_handler_with_malformed_request(
    malformed: bytes, reason: str, cuts: int | tuple[()], caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed request ends the connection after the replies before it; one log line says who and why."""
    sent = request_bytes([1, 2], "+") + request_bytes([3, 4], "*") + malformed + request_bytes([5], "+") * 100
    assert await converse(op_handler, sent, cuts) == int32_bytes(3) + int32_bytes(12)
    [message] = caplog.messages
    assert message.startswith("StapledStream: protocol error: ")
    assert reason in message


@pytest.mark.parametrize("end", range(1, 10))
async def test_handler_with_unfinished_request(end: int, caplog: pytest.LogCaptureFixture) -> None:
    """A client that ends in the middle of a request gets the replies before it; one log line says who and why."""
    sent = request_bytes([1, 2], "+") + request_bytes([3, 4], "*")[:end]
    assert await converse(op_handler, sent) == int32_bytes(3)
    [message] = caplog.messages
    assert message == "StapledStream: end of stream in the middle of a request"


async def test_handler_logs_nothing_of_good_clients(caplog: pytest.LogCaptureFixture) -> None:
    """A client that does nothing wrong leaves no trace in the log."""
    await converse(op_handler, request_bytes([1, 2], "+") * 3)
    await converse(op_handler, b"")
    assert caplog.messages == []


async def test_handler_with_malformed_request_and_silence(autojump_clock: trio.testing.MockClock) -> None:
    """After a malformed request the client sees end of stream at once; one that stays is not waited for for ever."""
    client, served = trio.testing.memory_stream_pair()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(op_handler, served)
            with trio.fail_after(1):
                await client.send_all(request_bytes([1, 2], "+") + b"\x00")
                assert await client.receive_some() == int32_bytes(3)
                assert await client.receive_some() == b""


async def test_handler_with_malformed_request_and_flood(autojump_clock: trio.testing.MockClock) -> None:
    """A client that sends for ever after a malformed request is cut off in the end."""
    client, served = trio.testing.memory_stream_pair()

    async def flood() -> None:
        await client.send_all(b"\x00")
        for _ in range(10_000):
            await client.send_all(bytes(65536))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(op_handler, served)
        with pytest.raises(trio.BrokenResourceError):
            await flood()


async def test_handler_with_malformed_request_and_break(caplog: pytest.LogCaptureFixture) -> None:
    """A client that breaks the connection right after its malformed request changes nothing: one log line."""
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(b"\x00")
    await op_handler(breaking_stream(served, 1))
    assert len(caplog.messages) == 1


async def test_handler_with_client_that_never_reads(autojump_clock: trio.testing.MockClock) -> None:
    """No replies pile up for a client that does not read them: it is not read from either."""
    client, served = trio.testing.lockstep_stream_pair()  # buffers nothing
    sent = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(op_handler, served)
        with trio.move_on_after(100) as scope:
            for _ in range(100):
                await client.send_all(request_bytes([1], "+"))
                sent += 1
        nursery.cancel_scope.cancel()
    assert scope.cancelled_caught
    assert sent == 1


@pytest.mark.parametrize("after", range(10))
async def test_handler_with_breaking_client(after: int, caplog: pytest.LogCaptureFixture) -> None:
    """A client that breaks the connection, wherever in a request, ends the handler; that deserves no warning."""
    caplog.set_level(logging.INFO, "trioproto")
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(request_bytes([1, 2], "+"))
    await op_handler(breaking_stream(served, after))
    assert caplog.messages == []


async def test_handler_with_client_that_takes_no_reply(caplog: pytest.LogCaptureFixture) -> None:
    """A client that is gone when its reply is sent ends the handler; that deserves no warning."""
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(request_bytes([1, 2], "+"))
    await client.aclose()
    await op_handler(served)
    assert caplog.messages == []


async def test_handler_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """The handler passes cancellation on, and the client then sees the connection closed."""
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(request_bytes([1, 2], "+"))
    with trio.move_on_after(1) as scope:
        await op_handler(stalling_stream(served, 5))
    assert scope.cancelled_caught
    assert await client.receive_some() == b""


async def test_handler_lets_bugs_pass() -> None:
    """The handler hides no errors but those that a client causes."""
    _, served = trio.testing.memory_stream_pair()
    await served.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await op_handler(served)


# The client.


@given(requests=st.lists(op_requests, max_size=8), to_client=cuts, to_server=cuts)
async def test_request_in_any_pieces(
    requests: list[tuple[list[int], str]], to_client: int | list[int], to_server: int | list[int]
) -> None:
    """One request after the other gets its own result, however the bytes arrive in either direction."""
    client, served = fragmented_stream_pair(to_first=to_client, to_second=to_server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(op_handler, served)
        for request in requests:
            assert await op_request(client, *request) == fold_as_c_does(*request)
        await client.aclose()


@pytest.mark.parametrize(("operands", "operator", "message"), NOT_REQUESTS)
async def test_request_with_wrong_arguments(operands: list[int], operator: str, message: str) -> None:
    """What is no request is an error that names what is wrong, before anything is sent."""
    client, served = trio.testing.memory_stream_pair()
    with pytest.raises(ValueError, match=message):
        await op_request(client, operands, operator)
    await client.send_eof()
    assert await served.receive_some() == b""


@pytest.mark.parametrize("length", range(4))
async def test_request_to_server_that_ends(length: int) -> None:
    """If the server ends the connection before it has replied whole, the error says how much there was."""
    client, served = trio.testing.memory_stream_pair()
    await served.send_all(int32_bytes(3)[:length])
    await served.send_eof()
    with pytest.raises(IncompleteReadError) as caught:
        await op_request(client, [1, 2], "+")
    assert (caught.value.partial, caught.value.expected) == (int32_bytes(3)[:length], 4)


async def test_request_to_server_that_breaks() -> None:
    """If the connection breaks before the reply, the stream's own error says so."""
    client, _ = trio.testing.memory_stream_pair()
    with pytest.raises(trio.BrokenResourceError):
        await op_request(breaking_stream(client, 0), [1, 2], "+")


async def test_request_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """A request to a server that has gone silent can be cancelled."""
    client, _ = trio.testing.memory_stream_pair()
    with trio.move_on_after(1) as scope:
        await op_request(client, [1, 2], "+")
    assert scope.cancelled_caught
