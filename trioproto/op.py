"""The op protocol: integers and an operator one way, the result the other way.

======== ============= ==========================================
request  bytes         form
======== ============= ==========================================
count    1             unsigned, 1 to 255
operands 4 for each    int32, two's complement, little-endian
operator 1             ASCII ``+``, ``-`` or ``*``
======== ============= ==========================================

The reply is the result alone: 4 bytes, int32, little-endian. A client may send many requests before it reads a
reply; replies come in order.

The protocol itself is plain synchronous code: `Request`, `Reply` and `answer` turn messages into bytes and back and do
no I/O. The handler and `op_request` at the end are the thin layer that does.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import Struct, pack
from typing import ClassVar, Self

import attrs
import trio

from trioproto.connection import IDLE_TIMEOUT, REQUEST_TIMEOUT, Connection, ProtocolError
from trioproto.streams import receive_exactly

MAX_OPERANDS = 255
INT32_MIN = -(2**31)
INT32_MAX = 2**31 - 1


def _subtract(operands: Sequence[int]) -> int:
    return 2 * operands[0] - sum(operands)


# Each folds all operands at once, in integers without bounds, and the result is wrapped once at the end: modulo
# 2**32 that gives the same as wrapping after each step, as the C original does.
_FOLDS: dict[int, Callable[[Sequence[int]], int]] = {ord("+"): sum, ord("-"): _subtract, ord("*"): math.prod}

# For each count, how that many operands lie on the wire.
_OPERANDS = [Struct(f"<{count}i") for count in range(MAX_OPERANDS + 1)]


def _as_tuple(operands: Iterable[int]) -> tuple[int, ...]:
    return tuple(operands)


def _check_operands(_request: object, _attribute: object, operands: tuple[object, ...]) -> None:
    if not 1 <= len(operands) <= MAX_OPERANDS:
        raise ValueError(f"a request has 1 to {MAX_OPERANDS} operands, not {len(operands)}")
    for number, operand in enumerate(operands, 1):
        if not isinstance(operand, int):
            raise ValueError(f"operand {number} must be an integer, not {operand!r}")  # noqa: TRY004 - one error for all
        if not INT32_MIN <= operand <= INT32_MAX:
            raise ValueError(f"operand {number} must be in int32, {INT32_MIN} to {INT32_MAX}, not {operand}")


def _check_operator(_request: object, _attribute: object, operator: str) -> None:
    if operator not in ("+", "-", "*"):
        raise ValueError(f"operator must be one of + - *, not {operator!r}")


@attrs.frozen
class Request:
    """One request.

    Attributes:
        operands: 1 to 255 integers, each in int32.
        operator: ``"+"``, ``"-"`` or ``"*"``.

    Raises:
        ValueError: on creation, if one of them is anything else; the message says which and why.
    """

    operands: tuple[int, ...] = attrs.field(converter=_as_tuple, validator=_check_operands)
    operator: str = attrs.field(validator=_check_operator)

    def encode(self) -> bytes:
        """Return the request as it goes over the wire."""
        count = len(self.operands)
        return bytes([count]) + _OPERANDS[count].pack(*self.operands) + self.operator.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the one request that ``data`` is.

        Raises:
            ProtocolError: if ``data`` is no request, or less than one, or more.
        """
        for operands, operator, end in _complete_requests(data):
            if end == len(data):
                return cls(operands, chr(operator))
            break
        raise ProtocolError(f"{len(data)} bytes are not one whole request")


@attrs.frozen
class Reply:
    """One reply.

    Attributes:
        result: in int32.
    """

    SIZE: ClassVar[int] = 4

    result: int

    def encode(self) -> bytes:
        """Return the reply as it goes over the wire."""
        return self.result.to_bytes(self.SIZE, "little", signed=True)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the reply that ``data``, `SIZE` bytes, holds."""
        return cls(int.from_bytes(data, "little", signed=True))


def _complete_requests(data: bytes) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield each complete request at the start of ``data``: its operands, its operator's byte, where it ends.

    Stops before a request that is not complete. No `Request` is made: a server answers hundreds of thousands of
    these a second, and has nothing to check that the wire format does not already ensure.

    Raises:
        ProtocolError: when it comes to one that is malformed.
    """
    start = 0
    while start < len(data):
        count = data[start]
        if count == 0:
            raise ProtocolError("operand count is 0")
        end = start + 1 + 4 * count + 1
        if end > len(data):
            return
        operator = data[end - 1]
        if operator not in _FOLDS:
            raise ProtocolError(f"operator must be one of + - *, not {bytes([operator])!r}")
        yield _OPERANDS[count].unpack_from(data, start + 1), operator, end
        start = end


def calculate(operands: Iterable[int], operator: str) -> int:
    """Fold ``operands`` from the left with ``operator``, and wrap the result into int32.

    Args:
        operands: 1 to 255 integers, each in int32.
        operator: ``"+"``, ``"-"`` or ``"*"``.

    Raises:
        ValueError: for anything else; the message says what is wrong.
    """
    request = Request(operands, operator)
    result = _FOLDS[ord(operator)](request.operands)
    # Two's complement: what does not fit drops its high bits, and the highest that is left is the sign.
    return ((result - INT32_MIN) & 0xFFFFFFFF) + INT32_MIN


def answer(data: bytes) -> tuple[bytes, bytes]:
    """Answer all the requests that ``data`` begins with.

    Returns:
        Their replies, and what is left of ``data``: a request that is not complete, or one that is malformed.

    Raises:
        ProtocolError: if ``data`` begins with a request that is malformed.
    """
    results = []
    end = 0
    try:
        for operands, operator, end in _complete_requests(data):  # noqa: B007 - the last end is used below
            results.append(_FOLDS[operator](operands) & 0xFFFFFFFF)
    except ProtocolError:
        if not results:  # otherwise those before it are answered first
            raise
    return pack(f"<{len(results)}I", *results), data[end:]


async def read_and_answer(connection: Connection) -> bytes:
    """Receive all the requests that have arrived, at least one, and return their replies."""
    data = await connection.receive_some()
    replies, rest = answer(data)
    while not replies:
        replies, rest = answer(rest + await connection.receive_some())
    connection.unreceive(rest)
    connection.count_requests(len(replies) // Reply.SIZE - 1)  # they are returned as one
    return replies


async def op_handler(
    stream: trio.abc.Stream, *, idle_timeout: float = IDLE_TIMEOUT, request_timeout: float = REQUEST_TIMEOUT
) -> None:
    """Serve one op connection until the client ends it, or sends what is no request.

    Runs under `trioproto.serve_tcp` and `trio.serve_tcp`, on any stream. Whatever the client does ends this
    connection and nothing else: a client's faults are never raised, but logged in one line each. A malformed
    request has no reply; the client gets every reply to the requests before it, then end of stream.

    Args:
        stream: the client's. It is closed when this returns.
        idle_timeout: seconds, above 0, between two requests, or without the client taking a byte of a reply, after
            which the server ends the connection.
        request_timeout: seconds, above 0, from a request's first byte to its last, after which it does.

    On cancellation, the connection is closed at once and the cancellation goes on.
    """
    async with Connection(stream, idle_timeout=idle_timeout, request_timeout=request_timeout) as connection:
        async for replies in connection.requests(read_and_answer):
            connection.push(replies)


async def op_request(stream: trio.abc.Stream, operands: Iterable[int], operator: str) -> int:
    """Ask an op server for the result of ``operands`` folded with ``operator``.

    Args:
        stream: connected to an op server. It stays open, for the next request.
        operands: 1 to 255 integers, each in int32.
        operator: ``"+"``, ``"-"`` or ``"*"``.

    Raises:
        ValueError: for other operands or another operator, before anything is sent; the message says what is wrong.
        IncompleteReadError: if the server ends the connection before it has replied.
        trio.BrokenResourceError: if the connection breaks first.

    On cancellation, the stream is left in the middle of a message and of no more use than to be closed.
    """
    await stream.send_all(Request(operands, operator).encode())
    return Reply.decode(await receive_exactly(stream, Reply.SIZE)).result
