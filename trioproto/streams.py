"""Receive a fixed number of bytes from a Trio stream.

TCP delivers a stream of bytes, not messages. The data of one ``send_all`` may arrive in many pieces, and the data of
many in one piece. The receiver learns the length of a message from the protocol, and receives until it has that many
bytes: `receive_exactly`.
"""

import trio

# The largest size of one receive. A larger buffer would be allocated for each receive, and mostly freed unused.
RECEIVE_SIZE = 65536


class IncompleteReadError(EOFError):
    """The stream ended before all expected bytes had arrived.

    Attributes:
        partial: the bytes that did arrive, possibly none.
        expected: how many bytes were expected.
        stream: the stream that ended, if known.
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

    Never receives more than ``n`` bytes: the next message stays in the stream.

    Args:
        stream: any receive stream: a socket, TLS, a memory stream.
        n: how many bytes, 0 or more. For 0, returns ``b""`` without using the stream.

    Raises:
        ValueError: if ``n`` is negative.
        IncompleteReadError: if the stream ends first.
        trio.BrokenResourceError: if the connection breaks first. Other exceptions of ``stream`` pass through.

    On cancellation, bytes that were already received are lost. The stream is then in the middle of a message, and can
    only be closed.

    Always a checkpoint.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, not {n}")
    if n == 0:
        await trio.lowlevel.checkpoint()
    received = bytearray()
    while len(received) < n:
        # One receive_some is not one message: it returns what has arrived so far, from one byte to the given maximum.
        # So we ask for the missing bytes until none are missing.
        chunk = await stream.receive_some(min(n - len(received), RECEIVE_SIZE))
        if not chunk:
            raise IncompleteReadError(bytes(received), n, stream)
        received += chunk
    return bytes(received)
