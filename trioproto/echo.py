"""The echo protocol (RFC 862): the server sends back each byte that it receives."""

import trio

from trioproto.connection import IDLE_TIMEOUT, REQUEST_TIMEOUT, Connection
from trioproto.streams import RECEIVE_SIZE, IncompleteReadError, receive_exactly

_FAILURES = (IncompleteReadError, trio.BrokenResourceError, trio.ClosedResourceError)


async def echo_handler(
    stream: trio.abc.Stream, *, idle_timeout: float = IDLE_TIMEOUT, request_timeout: float = REQUEST_TIMEOUT
) -> None:
    """Serve one echo connection until the client ends it.

    Runs under `trioproto.serve_tcp` and `trio.serve_tcp`, on any stream. Whatever the client does ends this
    connection and nothing else: a client's faults are never raised. Memory use does not depend on how much a
    client sends, nor on whether it reads.

    Args:
        stream: the client's. It is closed when this returns.
        idle_timeout: seconds, above 0, without a byte from the client, or without it taking one, after which the
            server ends the connection.
        request_timeout: seconds, above 0, for a TLS handshake. An echo has no other request that could be late.

    On cancellation, the connection is closed at once and the cancellation goes on.
    """
    async with Connection(stream, idle_timeout=idle_timeout, request_timeout=request_timeout) as connection:
        while chunk := await connection.receive_some():
            connection.push(chunk)
            if len(chunk) == RECEIVE_SIZE:  # more than one receive takes: relay what follows, unseen
                await connection.relay(connection)


async def echo_request(stream: trio.abc.Stream, message: bytes) -> bytes:
    """Send ``message`` to an echo server and return what comes back: as many bytes.

    Sends and receives at once. If all of a message that is larger than the socket buffers on the way were sent
    first, the server could not send back what it has, would stop receiving, and both sides would wait for ever.

    Args:
        stream: connected to an echo server. It stays open, for the next request.
        message: any bytes, any number of them.

    Raises:
        IncompleteReadError: if the server ends the connection first.
        trio.BrokenResourceError: if the connection breaks first.
        trio.ClosedResourceError: if ``stream`` is closed.

    On cancellation, the stream is left in the middle of a message and of no more use than to be closed.
    """
    failure: Exception | None = None

    async with trio.open_nursery() as nursery:

        async def send() -> None:
            nonlocal failure
            try:
                await stream.send_all(message)
            except _FAILURES as error:
                failure = failure or error
                nursery.cancel_scope.cancel()

        nursery.start_soon(send)
        try:
            received = await receive_exactly(stream, len(message))
        except _FAILURES as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    # Raised here, so that the caller sees the error itself and not a group with one in it.
    if failure is not None:
        raise failure
    return received
