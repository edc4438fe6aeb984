"""The PROXY protocol: a proxy sends a header with the client's address at the start of each connection.

Most proxies and load balancers support it. The sections cited below are those of HAProxy's specification:
https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt. The header is text in version 1 (section 2.1), and binary
in version 2 (section 2.2).

A header can contain any address, so it is accepted only from the proxies that the operator trusts, and other peers are
not served (section 2: whether there is a header must be configured, not guessed).
"""

import ipaddress
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from trioproto.addresses import failure_reason
from trioproto.connection import FIRST_REQUEST_GRACE
from trioproto.draining import Accepted, Ending, accepted_as
from trioproto.limits import ClientLimit
from trioproto.streams import IncompleteReadError, receive_exactly
from trioproto.transport import close_as_broken

_log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Stands for the clients of UNIX sockets, which have no IP address.
UNIX = "unix"

_V1 = b"PROXY"
_V1_SHORTEST = len(b"PROXY UNKNOWN\r\n")
_V1_LONGEST = 107
_V1_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: .*)?|"
    rb"(TCP4|TCP6) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4}))\r\n",
    re.DOTALL,
)
_MAX_PORT = 0xFFFF

_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_START = 16
_LOCAL, _PROXY = range(2)
_UNSPEC, _INET, _INET6, _UNIX = range(4)
_MAX_PROTOCOL = 2  # 0 unspecified, 1 stream, 2 datagram
_UNIX_PATH = 108
# The size in bytes of both addresses and their ports, by family.
_ADDRESSES = {_UNSPEC: 0, _INET: 2 * 4 + 2 * 2, _INET6: 2 * 16 + 2 * 2, _UNIX: 2 * _UNIX_PATH}


class HeaderError(ValueError):
    """A proxy sent an invalid PROXY header, or none."""


# Parsing headers, in synchronous code.


def parse_v1(line: bytes) -> tuple[str, int] | None:
    """Return the client's address and port from a version 1 header; None if it does not have them.

    Args:
        line: the header, including the CRLF at its end.

    Raises:
        HeaderError: if it is not exactly what section 2.1 allows.
    """
    match = _V1_LINE.fullmatch(line)
    if match is None:
        raise HeaderError(f"not a PROXY header: {line!r}")
    family, source, target, *ports = [text and text.decode() for text in match.groups()]
    if family is None:
        return None
    parse = ipaddress.IPv4Address if family == "TCP4" else ipaddress.IPv6Address
    try:
        address = parse(source)
        parse(target)
    except ValueError as error:
        raise HeaderError(f"invalid address in a PROXY header: {error}") from None
    source_port, target_port = map(int, ports)
    if max(source_port, target_port) > _MAX_PORT:
        raise HeaderError(f"invalid port in a PROXY header: {line!r}")
    return str(address), source_port


def check_v2_start(start: bytes) -> int:
    """Return how many bytes of a version 2 header follow its first 16 (section 2.2).

    Raises:
        HeaderError: if they are not the start of a valid header, or its length is too small for its address family.
    """
    version, command = divmod(start[12], 16)
    family, protocol = divmod(start[13], 16)
    length = int.from_bytes(start[14:])
    if not start.startswith(_V2):
        raise HeaderError(f"not a PROXY header: {start!r}")
    if version != 2 or command not in (_LOCAL, _PROXY):  # noqa: PLR2004
        raise HeaderError(f"a PROXY header of version {version} with command {command}")
    if command == _PROXY:
        if family not in _ADDRESSES or protocol > _MAX_PROTOCOL:
            raise HeaderError(f"a PROXY header for address family {family} and protocol {protocol}")
        if length < _ADDRESSES[family]:
            raise HeaderError(f"a PROXY header with {length} bytes for address family {family}")
    return length


def parse_v2(start: bytes, rest: bytes) -> tuple[str, int] | str | bytes | None:
    """Return the client's address from a version 2 header, as the socket module represents it; None if it has none.

    The type-length-value fields (TLVs) after the addresses are ignored, including the checksum: TCP has its own.

    Args:
        start: the first 16 bytes, checked by `check_v2_start`.
        rest: the following bytes, as many as it returned.
    """
    command, (family, protocol) = start[12] % 16, divmod(start[13], 16)
    if command == _LOCAL or _UNSPEC in (family, protocol):
        return None
    if family == _INET:
        return socket.inet_ntop(socket.AF_INET, rest[:4]), int.from_bytes(rest[8:10])
    if family == _INET6:
        return socket.inet_ntop(socket.AF_INET6, rest[:16]), int.from_bytes(rest[32:34])
    path = rest[:_UNIX_PATH].rstrip(b"\0")
    if path.startswith(b"\0"):  # Linux's abstract namespace
        return path
    return os.fsdecode(path.partition(b"\0")[0])


async def receive_header(stream: trio.abc.ReceiveStream) -> tuple[str, int] | str | bytes | None:
    """Receive a header of either version, and nothing after it, however the data is fragmented.

    Version 2 contains its length, and takes an eighth of the time.

    Returns:
        The client's address, as the socket module represents it; None if the proxy connects for itself (LOCAL), or does
        not know the client (UNKNOWN, AF_UNSPEC).

    Raises:
        HeaderError: as soon as it is clear that this is not a header, or if the stream ends in the middle of one.
        IncompleteReadError: if the stream ends within the first 5 bytes.
        trio.BrokenResourceError: if the connection breaks.

    On cancellation, the part received so far is lost. A checkpoint.
    """
    start = await receive_exactly(stream, len(_V1))
    try:
        if start == _V1:
            return parse_v1(await _receive_line(stream, start))
        if _V2.startswith(start):
            start += await receive_exactly(stream, _V2_START - len(start))
            return parse_v2(start, await receive_exactly(stream, check_v2_start(start)))
    except IncompleteReadError as error:
        raise HeaderError(f"incomplete PROXY header: {error}") from None
    raise HeaderError(f"not a PROXY header: {start!r}")


async def _receive_line(stream: trio.abc.ReceiveStream, start: bytes) -> bytes:
    line = start + await receive_exactly(stream, _V1_SHORTEST - len(start))
    # The length of the line is not known. Until it ends with CRLF, two more bytes are missing, or after CR, one.
    while not line.endswith(b"\r\n"):
        missing = 1 if line.endswith(b"\r") else 2
        if len(line) + missing > _V1_LONGEST:
            raise HeaderError(f"a PROXY header without CRLF in {_V1_LONGEST} bytes: {line!r}")
        line += await receive_exactly(stream, missing)
    return line


# Serving.


def trusted_network(network: str | Network) -> Network | str:
    """Parse what identifies trusted proxies: an address, a network such as ``10.0.0.0/8``, or ``unix``.

    Raises:
        ValueError: if it is none of these. The text says why.
    """
    return UNIX if network == UNIX else ipaddress.ip_network(network)


def is_trusted(address: object, trusted: Sequence[Network | str]) -> bool:
    """Whether ``address``, as the socket module represents it, is in one of the networks."""
    match address:
        case (str(host), int(), *_):
            ip = ipaddress.ip_address(host)
            if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
                ip = ip.ipv4_mapped
            return any(ip in network for network in trusted if not isinstance(network, str))
        case str() | bytes():  # of a UNIX socket
            return UNIX in trusted
        case _:
            return False


def behind_proxies(
    handler: Callable[[Any], Awaitable[object]],
    trusted: Sequence[Network | str],
    header_timeout: float,
    limit: ClientLimit | None,
) -> Callable[[Any], Awaitable[None]]:
    """Return a handler that receives a PROXY header, and then runs ``handler`` for the client with that address.

    `trioproto.Connection.peer` and the log then have the client's address. Connections that are not from a trusted
    proxy, or whose header is invalid or late, are reset with a warning. A stop of the server ends the wait for a
    header, like the wait for a client's first request.

    Args:
        handler: serves the client, on the same stream.
        trusted: the proxies whose headers are accepted; see `trusted_network`.
        header_timeout: seconds that a header may take; 3 or more allow for a retransmission (section 2).
        limit: limits the connections of each client; None for no limit.
    """

    async def handle(stream: trio.abc.Stream) -> None:
        accepted = accepted_as(stream)
        if not is_trusted(accepted.address, trusted):
            _log.warning("%s to %s: refused: not a trusted proxy", accepted.peer, accepted.server)
            await _refuse(accepted)
        elif not await _learn_client(accepted, stream, header_timeout):
            await close_as_broken(stream)
        elif limit is None:
            await handler(stream)
        elif limit.enter(client := accepted.address):
            try:
                await handler(stream)
            finally:
                limit.leave(client)
        else:
            await _refuse(accepted)

    return handle


async def _refuse(accepted: Accepted) -> None:
    accepted.refused = True
    await close_as_broken(accepted.stream)


async def _learn_client(accepted: Accepted, stream: trio.abc.Stream, header_timeout: float) -> bool:
    """Receive the header, and store the client's address. If there is none, log that and return False."""
    proxy = accepted.peer
    how: Ending = "late"
    level, what = logging.WARNING, "timed out waiting for a PROXY header"
    try:
        earliest = accepted.at + FIRST_REQUEST_GRACE
        with trio.move_on_after(header_timeout), accepted.drain.ends_wait(earliest=earliest) as stop:
            client = await receive_header(stream)
            if client is not None:
                accepted.address = client
            _log.debug("%s to %s: a PROXY header names %s", proxy, accepted.server, accepted.peer)
            return True
        if stop.cancelled_caught:
            how, level, what = "stopped", logging.DEBUG, "the server is stopping"
    except HeaderError as error:
        how, what = "malformed", str(error)
    except IncompleteReadError as error:  # a health check may just connect and disconnect
        how, level = "ended", logging.WARNING if error.partial else logging.DEBUG
        what = f"no PROXY header: {error}"
    except trio.BrokenResourceError as error:
        how, level = "reset", logging.DEBUG
        what = f"connection broken while waiting for a PROXY header: {failure_reason(error)}"
    accepted.how = how
    _log.log(level, "%s to %s: %s", proxy, accepted.server, what)
    return False
