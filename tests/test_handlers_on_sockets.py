"""Both protocols on real sockets, for what a fake cannot show, under our `serve_tcp` and under Trio's."""

import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    below,
    client_tls,
    fold_as_c_does,
    int32_bytes,
    own_client_tls,
    own_server_tls,
    receive_to_end,
    reply_bytes,
    request_bytes,
    reset,
    server_tls,
)

import trioproto
from trioproto import echo_handler, echo_request, op_handler, op_request, receive_exactly

Handler = Callable[[Any], Awaitable[object]]
ServeTcp = Callable[..., Awaitable[object]]

MIN = -(2**31)
MAX = 2**31 - 1


@pytest.fixture(params=[trioproto.serve_tcp, trio.serve_tcp], ids=["trioproto", "trio"])
def serve_tcp(request: pytest.FixtureRequest) -> ServeTcp:
    """Ours and Trio's. Under Trio's, an error that a handler raises fails the test."""
    serve: ServeTcp = request.param
    return serve


@pytest.fixture(autouse=True)
def _no_handler_crashes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Under ours, a handler that raises an error is found in the log."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


async def start(
    nursery: trio.Nursery, serve_tcp: ServeTcp, handler: Handler, *, tls: bool = False
) -> trio.SocketListener:
    """Start a server in ``nursery``."""
    if tls:
        handler = over_tls(handler)
    [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1"))
    assert isinstance(listener, trio.SocketListener)
    return listener


def over_tls(handler: Handler) -> Handler:
    """Serve ``handler`` behind TLS."""

    async def handle(stream: trio.SocketStream) -> None:
        await handler(own_server_tls(stream))

    return handle


@asynccontextmanager
async def connected(
    nursery: trio.Nursery, serve_tcp: ServeTcp, handler: Handler, *, tls: bool = False
) -> AsyncIterator[Any]:
    """Start a server, connect one client to it, and in the end see its handler to the end."""
    ended = trio.Event()
    listener = await start(nursery, serve_tcp, ending(handler, ended), tls=tls)
    async with await connect(listener, tls=tls) as client:
        yield client
    await ended.wait()


def ending(handler: Handler, ended: trio.Event) -> Handler:
    """Wrap ``handler`` such that it sets ``ended`` in the end."""

    async def handle(stream: trio.abc.Stream) -> None:
        try:
            await handler(stream)
        finally:
            ended.set()

    return handle


async def connect(listener: trio.SocketListener, *, tls: bool = False) -> Any:
    """Connect to ``listener``, and make the TLS handshake."""
    stream = await trio.testing.open_stream_to_socket_listener(listener)
    if not tls:
        return stream
    client = own_client_tls(stream)
    await client.handshake()
    return client


# Clients that break the connection.


@pytest.mark.parametrize(
    ("handler", "sent"),
    [
        pytest.param(echo_handler, b"", id="echo, idle"),
        pytest.param(echo_handler, b"hello", id="echo, its reply unread"),
        pytest.param(op_handler, b"", id="op, idle"),
        pytest.param(op_handler, request_bytes([1, 2], "+")[:7], id="op, in the middle of a request"),
        pytest.param(op_handler, request_bytes([1, 2], "+"), id="op, its reply unread"),
    ],
)
async def test_reset(
    handler: Handler,
    sent: bytes,
    serve_tcp: ServeTcp,
    *,
    tls: bool,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that resets the connection ends its handler and nothing else, without a warning."""
    caplog.set_level(logging.INFO, "trioproto")
    ended = trio.Event()
    listener = await start(nursery, serve_tcp, ending(handler, ended), tls=tls)
    with trio.fail_after(LIMIT):
        client = await connect(listener, tls=tls)
        await client.send_all(sent)
        await trio.testing.wait_all_tasks_blocked(0.01)
        reset(client)
        await ended.wait()
        async with await connect(listener, tls=tls) as another:
            await another.send_eof()
            assert await another.receive_some() == b""
    assert caplog.messages == []


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_reset_right_after_connecting(
    handler: Handler, serve_tcp: ServeTcp, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients that are gone before they are accepted do not matter, not even to a log of all there is."""
    caplog.set_level(logging.DEBUG, "trioproto")
    listener = await start(nursery, serve_tcp, handler)
    with trio.fail_after(LIMIT):
        for _ in range(10):
            # In one step, so that the server's task has no turn before both have happened.
            with socket.create_connection(listener.socket.getsockname()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with await connect(listener) as another:
            await another.send_eof()
            assert await another.receive_some() == b""
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


@pytest.mark.parametrize(
    ("handler", "request_"), [(echo_handler, b"hello"), (op_handler, request_bytes([1, 2], "+"))], ids=["echo", "op"]
)
async def test_reset_while_the_server_sends(
    handler: Handler,
    request_: bytes,
    serve_tcp: ServeTcp,
    *,
    tls: bool,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that never reads and then resets frees the handler that was waiting to send to it."""
    caplog.set_level(logging.INFO, "trioproto")
    ended = trio.Event()
    listener = await start(nursery, serve_tcp, ending(handler, ended), tls=tls)
    with trio.fail_after(LIMIT):
        client = await connect(listener, tls=tls)
        below(client).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with trio.open_nursery() as sending:
            sending.start_soon(client.send_all, request_ * 10_000_000)
            # Once the buffers on the way are full, nothing moves any more.
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert sending.child_tasks
            sending.cancel_scope.cancel()
        reset(client)
        await ended.wait()
    assert caplog.messages == []


# Clients that are only a little unusual.


async def test_echo_after_half_close(serve_tcp: ServeTcp, *, tls: bool, nursery: trio.Nursery) -> None:
    """A client that has sent its last still gets its echo, all of it, then end of stream."""
    message = random.Random(1).randbytes(1_000_000)
    async with connected(nursery, serve_tcp, echo_handler, tls=tls) as client:

        async def send() -> None:
            await client.send_all(message)
            await client.send_eof()

        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as sending:
                sending.start_soon(send)
                assert await receive_to_end(client) == message


async def test_op_after_half_close(serve_tcp: ServeTcp, *, tls: bool, nursery: trio.Nursery) -> None:
    """A client that has sent its last still gets its replies, all of them, then end of stream."""
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler, tls=tls) as client:
            await client.send_all(b"".join(request_bytes([number], "+") for number in range(10_000)))
            await client.send_eof()
            assert await receive_to_end(client) == b"".join(map(int32_bytes, range(10_000)))


async def test_echo_byte_by_byte(serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """A client that sends one byte at a time gets its echo whole."""
    message = bytes(range(256))
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, echo_handler) as client:
            for byte in message:
                await client.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            assert await receive_exactly(client, len(message)) == message


async def test_op_byte_by_byte(serve_tcp: ServeTcp, *, tls: bool, nursery: trio.Nursery) -> None:
    """A client that sends one byte at a time, 1,022 for the largest request, gets the right reply."""
    operands = [MIN + 123_457 * number for number in range(255)]
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler, tls=tls) as client:
            for byte in request_bytes(operands, "-"):
                await client.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            assert await receive_exactly(client, 4) == reply_bytes(operands, "-")


async def test_op_many_requests_in_one_write(serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """300 requests in one write have 300 replies, in order."""
    requests = [([number * 9_999_991, -number, 3], "+-*"[number % 3]) for number in range(1, 201)]
    requests += [([number] * number, "*") for number in range(1, 101)]
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler) as client:
            await client.send_all(b"".join(request_bytes(*request) for request in requests))
            replies = await receive_exactly(client, 4 * 300)
    assert replies == b"".join(reply_bytes(*request) for request in requests)


@pytest.mark.parametrize("operator", ["+", "-", "*"])
@pytest.mark.parametrize("fill", [MIN, -1, 0, 1, MAX, 0x12345678])
async def test_op_most_operands(operator: str, fill: int, serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """Requests with 255 operands have the right result, however far beyond int32 it would be."""
    operands = [MAX, *[fill] * 254]
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler) as client:
            assert await op_request(client, operands, operator) == fold_as_c_does(operands, operator)


@pytest.mark.parametrize(
    ("operands", "operator", "result"),
    [
        ([MAX, 1], "+", MIN),
        ([MIN, -1], "+", MAX),
        ([MAX, MAX], "+", -2),
        ([MIN, MIN], "+", 0),
        ([MAX, -1], "-", MIN),
        ([MIN, 1], "-", MAX),
        ([0, MIN], "-", MIN),
        ([-2, MAX], "-", MAX),
        ([MIN, -1], "*", MIN),
        ([MAX, 2], "*", -2),
        ([MAX, MAX], "*", 1),
        ([MIN, MIN], "*", 0),
        ([46341, 46341], "*", -2147479015),
    ],
)
async def test_op_overflow(
    operands: list[int], operator: str, result: int, serve_tcp: ServeTcp, nursery: trio.Nursery
) -> None:
    """Every way in which int32 can overflow wraps around."""
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler) as client:
            assert await op_request(client, operands, operator) == result


# Many clients, and much data.


async def test_echo_of_200_clients(serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """200 clients are served at once: none of them waits for another, and each gets its own bytes."""
    listener = await start(nursery, serve_tcp, echo_handler)
    with trio.fail_after(LIMIT):
        clients = [await connect(listener) for _ in range(200)]

        async def converse(number: int, client: trio.SocketStream) -> None:
            for turn in range(5):
                message = b"%d of client %d" % (turn, number) * 100
                assert await echo_request(client, message) == message

        # The last to connect are served while the first are still connected, and have not asked for anything.
        for number in (199, 0):
            await converse(number, clients[number])
        async with trio.open_nursery() as talking:
            for number, client in enumerate(clients):
                talking.start_soon(converse, number, client)
        for client in clients:
            await client.aclose()


async def test_op_of_200_clients(serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """200 clients, each in the middle of a request, all get their own replies."""
    listener = await start(nursery, serve_tcp, op_handler)
    with trio.fail_after(LIMIT):
        clients = [await connect(listener) for _ in range(200)]
        for number, client in enumerate(clients):
            await client.send_all(request_bytes([number, number], "*")[:5])
        for number, client in enumerate(clients):
            await client.send_all(request_bytes([number, number], "*")[5:])
        for number, client in enumerate(clients):
            assert await receive_exactly(client, 4) == int32_bytes(number * number)
            await client.aclose()


async def test_echo_of_100_megabytes(serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """A message far larger than the socket buffers on the way is echoed; neither side waits for ever."""
    message = random.Random(1).randbytes(1_000_003) * 100
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, echo_handler) as client:
            echo = await echo_request(client, message)
    if echo != message:  # an assert would write out the difference, for hours
        pytest.fail("the echo differs")


# Malformed requests.


@pytest.mark.parametrize(
    ("malformed", "reason"),
    [(b"\x00", "operand count is 0"), (request_bytes([1, 2], "/"), "operator must be one of + - *, not b'/'")],
    ids=["no operands", "unknown operator"],
)
async def test_op_malformed_request(
    malformed: bytes,
    reason: str,
    serve_tcp: ServeTcp,
    *,
    tls: bool,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Replies owed before a malformed request all arrive, then end of stream and no reset, whatever follows it.

    The log names the client and the reason, in one line.
    """
    good = b"".join(request_bytes([number, 1], "+") for number in range(50))
    replies = b"".join(int32_bytes(number + 1) for number in range(50))
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler, tls=tls) as client:
            address = "{}:{}".format(*below(client).socket.getsockname())
            await client.send_all(good + malformed + bytes(100_000))
            await trio.testing.wait_all_tasks_blocked(0.01)
            # The server has answered by now. What it is sent in addition must not make it break the connection.
            await client.send_all(bytes(100_000))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert await receive_to_end(client) == replies
    [message] = caplog.messages
    assert address in message
    assert reason in message


async def test_op_unfinished_request(
    serve_tcp: ServeTcp, *, tls: bool, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that half-closes in the middle of a request gets its replies; the log names it in one line."""
    with trio.fail_after(LIMIT):
        async with connected(nursery, serve_tcp, op_handler, tls=tls) as client:
            address = "{}:{}".format(*below(client).socket.getsockname())
            await client.send_all(request_bytes([1, 2], "+") + request_bytes([3, 4], "+")[:6])
            await client.send_eof()
            assert await receive_to_end(client) == int32_bytes(3)
    [message] = caplog.messages
    assert address in message
    assert "middle of a request" in message


# Other kinds of streams.


async def test_unix_socket() -> None:
    """Both handlers serve UNIX sockets."""
    for handler, sent, expected in (
        (echo_handler, b"hello", b"hello"),
        (op_handler, request_bytes([1, 2], "+"), int32_bytes(3)),
    ):
        ours, theirs = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(handler, theirs)
                async with ours as client:
                    await client.send_all(sent)
                    await client.send_eof()
                    assert await receive_to_end(client) == expected


@asynccontextmanager
async def connected_with_tls(
    nursery: trio.Nursery, serve_tcp: ServeTcp, handler: Handler
) -> AsyncIterator[trio.SSLStream[trio.SocketStream]]:
    """Start a server behind TLS and connect one client to it."""

    async def handle(stream: trio.SocketStream) -> None:
        await handler(server_tls(stream))

    async with connected(nursery, serve_tcp, handle) as transport:
        yield client_tls(transport)


async def test_tls(serve_tcp: ServeTcp, nursery: trio.Nursery) -> None:
    """Both handlers serve TLS streams."""
    with trio.fail_after(LIMIT):
        async with connected_with_tls(nursery, serve_tcp, echo_handler) as client:
            assert await echo_request(client, bytes(1_000_000)) == bytes(1_000_000)
            await client.aclose()
        async with connected_with_tls(nursery, serve_tcp, op_handler) as client:
            assert await op_request(client, [1, 2], "+") == 3
            await client.aclose()


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_tls_that_is_none(
    handler: Handler,
    serve_tcp: ServeTcp,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that speaks no TLS ends its handler, with one line in the log; one that just leaves, with none."""
    with trio.fail_after(LIMIT):
        async with connected_with_tls(nursery, serve_tcp, handler) as client:
            await client.transport_stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
            await receive_to_end(client.transport_stream)
        async with connected_with_tls(nursery, serve_tcp, handler) as client:
            await client.do_handshake()
            await client.transport_stream.aclose()
    [message] = caplog.messages
    assert "connection broken while waiting for a TLS handshake" in message
