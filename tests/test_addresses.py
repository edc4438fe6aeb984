"""How addresses, peers, and failures are written."""

import errno
import os
import socket
import ssl
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import MemoryListener, reset, socket_streams

from trioproto.addresses import failure_reason, format_address, peer_address, peer_name


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 9190), "127.0.0.1:9190"),
        (("::1", 9190, 0, 0), "[::1]:9190"),
        (("localhost", 9190), "localhost:9190"),
        ("/run/echo.sock", "unix:/run/echo.sock"),
        ("", "unix"),
        (b"", "unix"),
        (b"\0echo", "unix:@echo"),
        (b"\0\xff", "unix:@\\xff"),
    ],
)
def test_format(address: object, text: str) -> None:
    """Each kind of address has its usual form; an IPv6 address stands in brackets."""
    assert format_address(address) == text


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_tcp_peer(family: socket.AddressFamily, host: str) -> None:
    """The peer of a TCP stream is the address at its other end, also under TLS."""
    try:
        listeners = await trio.open_tcp_listeners(0, host=host)
    except OSError as error:
        pytest.skip(f"no {family.name} here: {error}")
    async with listeners[0] as listener, await trio.testing.open_stream_to_socket_listener(listener) as stream:
        expected = format_address(listener.socket.getsockname())
        assert peer_name(stream) == expected
        assert peer_name(trio.SSLStream(stream, ssl.create_default_context())) == expected


async def test_unix_peer(tmp_path: Path) -> None:
    """The peer of a UNIX stream is the path that it was connected to; a client has no name."""
    path = str(tmp_path / "socket")
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(path)
        sock.listen()
        async with await trio.open_unix_socket(path) as client, await trio.SocketListener(sock).accept() as served:
            assert peer_name(client) == f"unix:{path}"
            assert peer_name(served) == "unix"


async def test_peer_that_is_gone() -> None:
    """A connection that was reset has no address any more, and asking for it is no error."""
    client, served = await socket_streams()
    async with served:
        reset(client)
        assert peer_address(served) is None
        assert peer_name(served) == "SocketStream"


def test_peer_without_socket() -> None:
    """A stream in memory goes by the name of its class, unless it has an address of its own."""
    stream, _ = trio.testing.memory_stream_pair()
    assert peer_address(stream) is None
    assert peer_name(stream) == "StapledStream"

    class Addressed(MemoryListener):
        peer_address = ("client", 50000)

    assert peer_name(Addressed()) == "client:50000"


# Failures.


def caused(error: Exception, cause: Exception) -> Exception:
    """Return ``error`` as ``raise error from cause`` leaves it."""
    error.__cause__ = cause
    return error


REFUSED = OSError(errno.ECONNREFUSED, "as Python has it")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (REFUSED, os.strerror(errno.ECONNREFUSED)),
        (caused(trio.BrokenResourceError("broken"), REFUSED), os.strerror(errno.ECONNREFUSED)),
        (caused(OSError("all attempts failed"), ExceptionGroup("", [REFUSED])), os.strerror(errno.ECONNREFUSED)),
        (ssl.SSLError(1, "wrong version (_ssl.c:1006)"), "wrong version"),
        (socket.gaierror(socket.EAI_NONAME, "unknown name"), "unknown name"),
        (OSError("no number"), "no number"),
        (trio.BrokenResourceError("broken"), "broken"),
    ],
    ids=repr,
)
def test_failure_reason(error: Exception, reason: str) -> None:
    """A failure is given in the words of the system, from its first cause; those of TLS in the words of OpenSSL."""
    assert failure_reason(error) == reason
