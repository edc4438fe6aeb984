"""How a socket's address is written, and why connecting to one failed: in log lines and in messages."""

import os
import re
import ssl

import trio


def format_address(address: object) -> str:
    """Write a socket address as ``127.0.0.1:9190``, ``[::1]:9190`` or ``unix:PATH``.

    Args:
        address: what `socket.socket.getsockname` or ``getpeername`` gives. For a UNIX socket that is its path;
            an unnamed one, as a client's mostly is, becomes ``unix``. Whoever binds a socket chooses that path, so
            what could forge a line of the log is escaped.
    """
    match address:
        case (str(host), int(port), *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case "" | b"":
            return "unix"
        case bytes():  # Linux's abstract namespace: the name begins with a zero byte
            return "unix:@" + _printable(address[1:].decode(errors="backslashreplace"))
        case _:
            return "unix:" + _printable(str(address))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def peer_address(stream: trio.abc.AsyncResource) -> object:
    """Return the address of the other end of ``stream``, as the system gives it; None if there is none to be had.

    A socket whose connection is already gone has no peer that the system could tell of.
    """
    stream = getattr(stream, "transport_stream", stream)  # TLS is on another one
    if not isinstance(stream, trio.SocketStream):
        return getattr(stream, "peer_address", None)  # a network in memory has addresses, too
    try:
        return stream.socket.getpeername()
    except OSError:
        return None


def peer_name(stream: trio.abc.AsyncResource) -> str:
    """Name the other end of ``stream`` for a log line: its address, or the stream's class if it has none."""
    address = peer_address(stream)
    return type(stream).__name__ if address is None else format_address(address)


def failure_reason(error: BaseException) -> str:
    """Say in the system's words why connecting failed, or a connection broke.

    Args:
        error: what Trio raised: the first cause of it counts, through the groups that Trio makes and the errors that
            it names below the one that it raises.
    """
    cause = error
    while (below := cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__) is not None:
        cause = below
    if isinstance(cause, ssl.SSLError):  # whose errno is none of the system's
        return re.sub(r" \(_ssl\.c:\d+\)$", "", str(cause))  # where in Python's source it was raised
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return getattr(cause, "strerror", None) or str(cause)
