"""Limit the connections of each client, so that one client cannot take all connections of a server."""

import logging
import socket

_log = logging.getLogger(__name__)

# How many bytes of an IPv6 address identify a client. It chooses the rest: it can use any address in its network (RFC
# 4291, section 2.5.4; RFC 8981).
_IPV6_NETWORK = 8

# The prefix of an IPv4-mapped IPv6 address, as dual-stack sockets return them (RFC 4291, section 2.5.5.2).
_IPV4_MAPPED = bytes(10) + b"\xff\xff"


class ClientLimit:
    """Counts the connections of each client, and refuses those above the limit.

    Only clients with open connections take memory: one dict entry each.

    Args:
        most: how many connections a client may have at once, 1 or more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[str | bytes, int] = {}
        self._refused: set[str | bytes] = set()  # clients at the limit for which a warning was logged

    def enter(self, address: object) -> bool:
        """Count one more connection from ``address`` and return True, or return False if the limit is reached.

        The first refusal is logged; further ones are not until the client has had fewer connections than the limit.

        Args:
            address: as the socket module represents it. Each IPv4 address is a client, and each IPv6 /64 network.
                Others, such as UNIX sockets, are not limited.
        """
        client = _client(address)
        if client is None:
            return True
        count = self._counts.get(client, 0)
        if count < self._most:
            self._counts[client] = count + 1
            return True
        if client not in self._refused:
            self._refused.add(client)
            name = _name(client)
            _log.warning("%s has %d connections, the maximum for one client: more are refused", name, count)
        return False

    def leave(self, address: object) -> None:
        """Uncount a connection from ``address`` that `enter` has counted."""
        client = _client(address)
        if client is None:
            return
        self._refused.discard(client)
        self._counts[client] -= 1
        if not self._counts[client]:
            del self._counts[client]


def _client(address: object) -> str | bytes | None:
    """Return the client that ``address`` belongs to: an IPv4 address as text, an IPv6 network as bytes, else None."""
    match address:
        case (str(host), int(), *_):
            pass
        case _:
            return None
    try:
        packed = socket.inet_pton(socket.AF_INET6, host)
    except OSError:  # IPv4, or a host name in an in-memory network
        return host
    if packed.startswith(_IPV4_MAPPED):
        return socket.inet_ntoa(packed[len(_IPV4_MAPPED) :])
    return packed[:_IPV6_NETWORK]


def _name(client: str | bytes) -> str:
    """Format a client for log lines: ``192.0.2.1``, ``2001:db8::/64``."""
    if isinstance(client, str):
        return client
    return f"{socket.inet_ntop(socket.AF_INET6, client.ljust(16, bytes(1)))}/{8 * len(client)}"
