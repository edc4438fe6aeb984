"""The op protocol: the client sends integers and an operator, and the server replies with the result.

======== ============= ==========================================
request  bytes         form
======== ============= ==========================================
count    1             unsigned, 1 to 255
operands 4 for each    int32, two's complement, little-endian
operator 1             ASCII ``+``, ``-`` or ``*``
======== ============= ==========================================

The reply is only the result: 4 bytes, int32, little-endian. A client may send many requests before it receives a reply;
replies are in order.

The protocol is plain synchronous code without I/O: `Request`, `Reply` and `answer` encode and decode messages. The
handler and `op_request` at the end are the only code that does I/O.
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


# These fold all operands at once, in unbounded integers, and the result is wrapped once at the end: modulo 2**32, this
# is the same as wrapping after each step, as the C original does.
_FOLDS: dict[int, Callable[[Sequence[int]], int]] = {ord("+"): sum, ord("-"): _subtract, ord("*"): math.prod}

# The wire format of the operands, by count.
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
        ValueError: on creation, for any other value; the message says which and why.
    """

    operands: tuple[int, ...] = attrs.field(converter=_as_tuple, validator=_check_operands)
    operator: str = attrs.field(validator=_check_operator)

    def encode(self) -> bytes:
        """Return the request in its wire format."""
        count = len(self.operands)
        return bytes([count]) + _OPERANDS[count].pack(*self.operands) + self.operator.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Decode ``data``, exactly one request.

        Raises:
            ProtocolError: if ``data`` is malformed, or less or more than one request.
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
        """Return the reply in its wire format."""
        return self.result.to_bytes(self.SIZE, "little", signed=True)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Decode ``data``, `SIZE` bytes."""
        return cls(int.from_bytes(data, "little", signed=True))


def _complete_requests(data: bytes) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield each complete request at the start of ``data``: its operands, its operator's byte, and where it ends.

    Stops before an incomplete request. No `Request` is created, because a server answers hundreds of thousands of
    requests a second, and the wire format already ensures what `Request` checks.

    Raises:
        ProtocolError: at a malformed request.
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
        ValueError: for any other value; the message says which and why.
    """
    request = Request(operands, operator)
    result = _FOLDS[ord(operator)](request.operands)
    # Two's complement: keep the low 32 bits; the highest of them is the sign.
    return ((result - INT32_MIN) & 0xFFFFFFFF) + INT32_MIN


def answer(data: bytes) -> tuple[bytes, bytes]:
    """Answer all complete requests at the start of ``data``.

    Returns:
        Their replies, and the rest of ``data``, which begins with an incomplete or malformed request, if not empty.

    Raises:
        ProtocolError: if ``data`` begins with a malformed request.
    """
    results = []
    end = 0
    try:
        for operands, operator, end in _complete_requests(data):  # noqa: B007 - the last end is used below
            results.append(_FOLDS[operator](operands) & 0xFFFFFFFF)
    except ProtocolError:
        if not results:  # otherwise, return the replies to the requests before it
            raise
    return pack(f"<{len(results)}I", *results), data[end:]


async def read_and_answer(connection: Connection) -> bytes:
    """Receive all requests that have arrived, at least one, and return their replies."""
    data = await connection.receive_some()
    replies, rest = answer(data)
    while not replies:
        replies, rest = answer(rest + await connection.receive_some())
    connection.unreceive(rest)
    connection.count_requests(len(replies) // Reply.SIZE - 1)  # `requests` counts one
    return replies


async def op_handler(
    stream: trio.abc.Stream, *, idle_timeout: float = IDLE_TIMEOUT, request_timeout: float = REQUEST_TIMEOUT
) -> None:
    """Serve one op connection until the client ends it, or sends a malformed request.

    Runs under `trioproto.serve_tcp` and `trio.serve_tcp`, on any stream. A misbehaving client affects only its own
    connection: client errors are never raised, but logged, in one line each. A malformed request has no reply; the
    client gets the replies to all requests before it, then end of stream.

    Args:
        stream: the client's. It is closed when this returns.
        idle_timeout: seconds, above 0, between two requests, or in which the client receives no byte of a reply, after
            which the server ends the connection.
        request_timeout: seconds, above 0, for a whole request from its first byte, and for a TLS handshake.

    On cancellation, the connection is closed at once, and the cancellation propagates.
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
        ValueError: for any other value, before anything is sent; the message says which and why.
        IncompleteReadError: if the server ends the connection before it has replied.
        trio.BrokenResourceError: if the connection breaks first.

    On cancellation, the stream is in the middle of a message, and can only be closed.
    """
    await stream.send_all(Request(operands, operator).encode())
    return Reply.decode(await receive_exactly(stream, Reply.SIZE)).result
