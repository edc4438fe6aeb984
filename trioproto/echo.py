"""The echo protocol (RFC 862): the server sends back each byte that it receives."""

import trio

from trioproto.connection import IDLE_TIMEOUT, REQUEST_TIMEOUT, Connection
from trioproto.streams import RECEIVE_SIZE, IncompleteReadError, receive_exactly

_FAILURES = (IncompleteReadError, trio.BrokenResourceError, trio.ClosedResourceError)


async def echo_handler(
    stream: trio.abc.Stream, *, idle_timeout: float = IDLE_TIMEOUT, request_timeout: float = REQUEST_TIMEOUT
) -> None:
    """Serve one echo connection until the client ends it.

    Runs under `trioproto.serve_tcp` and `trio.serve_tcp`, on any stream. A misbehaving client affects only its own
    connection: client errors are never raised. Memory use does not depend on how much a client sends, nor on whether it
    receives.

    Args:
        stream: the client's. It is closed when this returns.
        idle_timeout: seconds, above 0, in which the client neither sends nor receives a byte, after which the server
            ends the connection.
        request_timeout: seconds, above 0, for a TLS handshake. Echo has no other requests that could time out.

    On cancellation, the connection is closed at once, and the cancellation propagates.
    """
    async with Connection(stream, idle_timeout=idle_timeout, request_timeout=request_timeout) as connection:
        while chunk := await connection.receive_some():
            connection.push(chunk)
            if len(chunk) == RECEIVE_SIZE:  # there may be more: relay it, inside the kernel if possible
                await connection.relay(connection)


async def echo_request(stream: trio.abc.Stream, message: bytes) -> bytes:
    """Send ``message`` to an echo server, and return the reply: the same number of bytes.

    Sends and receives concurrently. If a message larger than the socket buffers were sent completely first, the server
    could not send its reply, would stop receiving, and both sides would deadlock.

    Args:
        stream: connected to an echo server. It stays open, for the next request.
        message: any bytes, any number of them.

    Raises:
        IncompleteReadError: if the server ends the connection first.
        trio.BrokenResourceError: if the connection breaks first.
        trio.ClosedResourceError: if ``stream`` is closed.

    On cancellation, the stream is in the middle of a message, and can only be closed.
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

    # Raised here, so that the caller gets the error itself and not an exception group.
    if failure is not None:
        raise failure
    return received
