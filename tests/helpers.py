"""What several test files need: a second opinion on the op protocol, streams of each kind, servers, and clients."""

import contextlib
import ctypes
import functools
import math
import operator
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import trio
import trio.testing
import trustme
from hypothesis import strategies as st

from trioproto import serve_listeners
from trioproto.tls import TLSStream

Stream = trio.abc.HalfCloseableStream
Handler = Callable[..., Awaitable[object]]

LIMIT = 20  # seconds, for a test on real sockets that would otherwise hang

STEPS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

int32 = st.integers(-(2**31), 2**31 - 1)
op_requests = st.tuples(st.lists(int32, min_size=1, max_size=255), st.sampled_from("+-*"))
cuts = st.integers(1, 50) | st.lists(st.integers(1, 50))


def fold_as_c_does(operands: Sequence[int], operator: str) -> int:
    """Compute what the article's C program answers: step by step, each step in an ``int32_t``."""
    result = ctypes.c_int32(operands[0])
    for operand in operands[1:]:
        result = ctypes.c_int32(STEPS[operator](result.value, operand))
    return result.value


def int32_bytes(number: int) -> bytes:
    """Write ``number`` as the protocol does, bit by bit."""
    return bytes((number >> shift) & 0xFF for shift in (0, 8, 16, 24))


def request_bytes(operands: Sequence[int], operator: str) -> bytes:
    """Write an op request by the table in the documentation; it need not be a valid one."""
    return bytes([len(operands)]) + b"".join(map(int32_bytes, operands)) + operator.encode()


def reply_bytes(operands: Sequence[int], operator: str) -> bytes:
    """Write the reply that an op request should have."""
    return int32_bytes(fold_as_c_does(operands, operator))


def decode_by_the_table(data: bytes) -> tuple[bytes, bytes, bool]:
    """Serve everything that an op client sends, by the table in the documentation, one field at a time.

    Returns:
        The replies; what is left of a request that is not complete, or no request; whether it is none.
    """
    replies = b""
    while data:
        count = data[0]
        if count == 0:
            return replies, data, True
        fields, operator, rest = data[1 : 1 + 4 * count], data[1 + 4 * count : 2 + 4 * count], data[2 + 4 * count :]
        if not operator:
            return replies, data, False
        if operator not in (b"+", b"-", b"*"):
            return replies, data, True
        operands = [int.from_bytes(fields[at : at + 4], "little", signed=True) for at in range(0, 4 * count, 4)]
        replies += reply_bytes(operands, operator.decode())
        data = rest
    return replies, b"", False


async def arrival(peer: trio.abc.SendStream, data: bytes) -> None:
    """Send ``data``, and wait until it has arrived."""
    await peer.send_all(data)
    await trio.sleep(0.01)


class MemoryListener(trio.abc.Listener[trio.abc.HalfCloseableStream]):
    """A listener whose connections are memory streams.

    Args:
        errors: what the first calls of `accept` raise, one each.
        pair: makes the two ends of a connection.
    """

    def __init__(
        self, *errors: Exception, pair: Callable[[], tuple[Stream, Stream]] = trio.testing.memory_stream_pair
    ) -> None:
        self._errors = list(errors)
        self._pair = pair
        self._connect, self._queue = trio.open_memory_channel[trio.abc.HalfCloseableStream](math.inf)
        self.closed = False

    def connect(self) -> trio.abc.HalfCloseableStream:
        """Queue a connection, and return the client's side of it."""
        client, served = self._pair()
        self._connect.send_nowait(served)
        return client

    async def accept(self) -> trio.abc.HalfCloseableStream:
        """Return the server's side of the next connection."""
        if self._errors:
            await trio.lowlevel.checkpoint()
            raise self._errors.pop(0)
        return await self._queue.receive()

    async def aclose(self) -> None:
        """Note that the listener is closed."""
        self.closed = True
        await trio.lowlevel.checkpoint()


# Streams.


async def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Return the two ends of a TCP connection: the client's, and the server's."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.testing.open_stream_to_socket_listener(listener)
        return client, await listener.accept()


async def connected_streams(*, tls: bool) -> tuple[Stream, Stream]:
    """Return the two ends of a connection, the client's and the server's, with the TLS handshake made."""
    client, server = await socket_streams()
    if not tls:
        return client, server
    client_end, server_end = own_client_tls(client), own_server_tls(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client_end.handshake)
        await server_end.handshake()
    return client_end, server_end


@functools.cache
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return TLS settings for a client and for the server that it trusts."""
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(client)
    authority.issue_cert("localhost").configure_cert(server)
    return client, server


def client_tls(stream: trio.abc.Stream) -> trio.SSLStream[Any]:
    """Wrap the client's end of a connection in TLS."""
    return trio.SSLStream(stream, tls_contexts()[0], server_hostname="localhost")


def server_tls(stream: trio.abc.Stream) -> trio.SSLStream[Any]:
    """Wrap the server's end of a connection in TLS."""
    return trio.SSLStream(stream, tls_contexts()[1], server_side=True)


def own_client_tls(stream: trio.SocketStream) -> TLSStream:
    """Wrap the client's end of a connection in our TLS."""
    return TLSStream(stream, tls_contexts()[0], server_hostname="localhost")


def own_server_tls(stream: trio.SocketStream) -> TLSStream:
    """Wrap the server's end of a connection in our TLS, as `trioproto.serve_until_signal` does."""
    return TLSStream(stream, tls_contexts()[1], server_side=True)


class Sticky(trio.abc.Stream):
    """A stream that can be closed only by force."""

    forced = False

    async def aclose(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.forced = True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise NotImplementedError


def below(stream: trio.abc.Stream) -> trio.SocketStream:
    """Return the socket that TLS is on, or the socket itself."""
    found = getattr(stream, "transport_stream", stream)
    assert isinstance(found, trio.SocketStream)
    return found


def fill(stream: trio.abc.Stream) -> int:
    """Send until the system takes no more, because the peer does not read, and return how much it took."""
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(below(stream).socket.fileno(), bytes(65536))
    return filled


def reset(stream: trio.abc.Stream) -> None:
    """Break the connection off: closing a socket that must not linger sends a reset (socket(7), SO_LINGER)."""
    below(stream).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    below(stream).socket.close()


async def receive_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """Receive until end of stream."""
    received = bytearray()
    async for chunk in stream:
        received += chunk
    return bytes(received)


async def send_after(stream: trio.abc.SendStream, data: bytes, seconds: float) -> None:
    """Send ``data`` later; the peer may have gone."""
    await trio.sleep(seconds)
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(data)


# Servers.


@contextlib.asynccontextmanager
async def served(
    handler: Handler, pair: Callable[[], tuple[Stream, Stream]] = trio.testing.memory_stream_pair
) -> AsyncIterator[Stream]:
    """Run ``handler`` for one client, and give that one's stream; in the end, see the handler to its end."""
    client, theirs = pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler, theirs)
            async with client:
                yield client


@contextlib.asynccontextmanager
async def serving(handler: Handler, listener: trio.abc.Listener[Any]) -> AsyncIterator[trio.Event]:
    """Run a server, and give the event that stops it; in the end, see it return."""
    shutdown = trio.Event()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(functools.partial(serve_listeners, handler, [listener], shutdown=shutdown))
            yield shutdown


@contextlib.asynccontextmanager
async def connected(handler: Handler, *, tls: bool = False, receive_buffer: int | None = None) -> AsyncIterator[Any]:
    """Serve a TCP connection with ``handler``, and give the client's end; in the end, see the handler to its end.

    With ``tls``, the handshake is made. With ``receive_buffer``, that is about how much the client's system takes
    before the client reads.
    """

    async def handle_over_tls(stream: trio.SocketStream) -> None:
        tls_stream = own_server_tls(stream)
        await tls_stream.handshake()
        await handler(tls_stream)

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with serving(handle_over_tls if tls else handler, listener) as shutdown:
        connecting = trio.socket.socket()
        if receive_buffer is not None:
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await connecting.connect(listener.socket.getsockname())
        stream = trio.SocketStream(connecting)
        client = own_client_tls(stream) if tls else stream
        if isinstance(client, TLSStream):
            await client.handshake()
        async with client:
            yield client
        shutdown.set()
