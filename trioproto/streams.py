"""Bytes off a Trio stream: how many, and when they are all there.

TCP delivers a stream of bytes, not the messages that were sent. What one ``send_all`` sent may arrive in many
pieces, and what many sent may arrive in one: the receiver learns how long a message is from the protocol, and
collects until it has that much. That is `receive_exactly`.
"""

import trio

# The most that one receive asks for. A larger buffer would be allocated anew for each receive, and mostly
# given back unused.
RECEIVE_SIZE = 65536


class IncompleteReadError(EOFError):
    """The stream ended before all the bytes that were expected had arrived.

    Attributes:
        partial: the bytes that did arrive, possibly none.
        expected: how many were expected.
        stream: the one that ended, if it is known.
    """

    def __init__(self, partial: bytes, expected: int, stream: object = None) -> None:
        super().__init__(partial, expected)
        self.partial = partial
        self.expected = expected
        self.stream = stream

    def __str__(self) -> str:
        return f"end of stream after {len(self.partial)} of {self.expected} bytes"


async def receive_exactly(stream: trio.abc.ReceiveStream, n: int) -> bytes:
    """Receive exactly ``n`` bytes, however many pieces they arrive in.

    Never takes a byte beyond ``n`` from the stream: the next message stays there for the next call.

    Args:
        stream: any receive stream: a socket, TLS, a memory stream.
        n: how many bytes, 0 or more. 0 gives ``b""`` without touching the stream.

    Raises:
        ValueError: if ``n`` is negative.
        IncompleteReadError: if the stream ends first.
        trio.BrokenResourceError: if the connection breaks first, and whatever else ``stream`` raises.

    On cancellation, bytes that were already received are lost. The stream is then in the middle of a message
    and of no more use than to be closed.

    A checkpoint, even when nothing has to be waited for.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, not {n}")
    if n == 0:
        await trio.lowlevel.checkpoint()
    received = bytearray()
    while len(received) < n:
        # One receive_some is not one message: it gives what has arrived so far, one byte or more, up to what
        # we ask for. So we ask for what is missing, and ask again until nothing is.
        chunk = await stream.receive_some(min(n - len(received), RECEIVE_SIZE))
        if not chunk:
            raise IncompleteReadError(bytes(received), n, stream)
        received += chunk
    return bytes(received)
