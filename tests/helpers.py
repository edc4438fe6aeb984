"""What several test files need: a second opinion on the op protocol, and a listener without sockets."""

import ctypes
import math
import operator
from collections.abc import Sequence

import trio
import trio.testing
from hypothesis import strategies as st

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


class MemoryListener(trio.abc.Listener[trio.abc.HalfCloseableStream]):
    """A listener whose connections are memory streams.

    Args:
        errors: what the first calls of `accept` raise, one each.
    """

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self._connect, self._queue = trio.open_memory_channel[trio.abc.HalfCloseableStream](math.inf)
        self.closed = False

    def connect(self) -> trio.abc.HalfCloseableStream:
        """Queue a connection, and return the client's side of it."""
        client, served = trio.testing.memory_stream_pair()
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
