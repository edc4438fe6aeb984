"""How many connections one client may have at once, so that none can take all the places of a server."""

import logging
import socket

_log = logging.getLogger(__name__)

# How many bytes of an IPv6 address tell one client from another. The rest is the client's own choice: it can have any
# address in its network (RFC 4291, section 2.5.4; RFC 8981).
_IPV6_NETWORK = 8

# An IPv4 address behind this is an IPv6 one, as a socket for both gives it (RFC 4291, section 2.5.5.2).
_IPV4_MAPPED = bytes(10) + b"\xff\xff"


class ClientLimit:
    """Counts the connections of each client, and refuses those that are too many.

    A client that has connections costs an entry in a dict, and any other nothing.

    Args:
        most: how many connections a client may have at once, 1 or more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[str | bytes, int] = {}
        self._refused: set[str | bytes] = set()  # who has its warning; all of them have as many connections as they may

    def enter(self, address: object) -> bool:
        """Count one more connection from ``address``, and return True; False if it is one too many.

        The first one that is too many is logged, and then no more until the client has had fewer than the limit.

        Args:
            address: as the system gives it. Each IPv4 address is a client, and each IPv6 network of 64 bits. What is no
                IP address, such as that of a UNIX socket's client, is not limited.
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
        """Count one connection from ``address`` less, which `enter` has counted."""
        client = _client(address)
        if client is None:
            return
        self._refused.discard(client)
        self._counts[client] -= 1
        if not self._counts[client]:
            del self._counts[client]


def _client(address: object) -> str | bytes | None:
    """Return which client connects from ``address``: IPv4 as text, an IPv6 network as bytes, None for neither."""
    match address:
        case (str(host), int(), *_):
            pass
        case _:
            return None
    try:
        packed = socket.inet_pton(socket.AF_INET6, host)
    except OSError:  # IPv4, or the name of a host in a network in memory
        return host
    if packed.startswith(_IPV4_MAPPED):
        return socket.inet_ntoa(packed[len(_IPV4_MAPPED) :])
    return packed[:_IPV6_NETWORK]


def _name(client: str | bytes) -> str:
    """Write a client for log lines: ``192.0.2.1``, ``2001:db8::/64``."""
    if isinstance(client, str):
        return client
    return f"{socket.inet_ntop(socket.AF_INET6, client.ljust(16, bytes(1)))}/{8 * len(client)}"
