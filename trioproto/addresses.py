"""Format socket addresses and connection errors for log lines and messages."""

import os
import re
import ssl

import trio


def format_address(address: object) -> str:
    """Format a socket address as ``127.0.0.1:9190``, ``[::1]:9190`` or ``unix:PATH``.

    Args:
        address: as `socket.socket.getsockname` or ``getpeername`` returns it. For a UNIX socket, this is its path;
            an unnamed one, such as most clients', becomes ``unix``. The path is chosen by the process that binds the
            socket, so characters that could forge log lines are escaped.
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
    """Return the peer address of ``stream``, as the socket module represents it; None if it is not known.

    For a socket whose connection is already gone, the kernel no longer knows the peer.
    """
    stream = getattr(stream, "transport_stream", stream)  # below TLS
    if not isinstance(stream, trio.SocketStream):
        return getattr(stream, "peer_address", None)  # streams of an in-memory network have addresses, too
    try:
        return stream.socket.getpeername()
    except OSError:
        return None


def peer_name(stream: trio.abc.AsyncResource) -> str:
    """Return the peer of ``stream`` for log lines: its address, or the name of the stream's class if it has none."""
    address = peer_address(stream)
    return type(stream).__name__ if address is None else format_address(address)


def failure_reason(error: BaseException) -> str:
    """Return the operating system's message for why connecting failed or a connection broke.

    Args:
        error: what Trio raised. The message is that of its root cause: the end of the chain of ``__cause__`` and, in
            groups, first exceptions.
    """
    cause = error
    while (below := cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__) is not None:
        cause = below
    if isinstance(cause, ssl.SSLError):  # its errno is not the operating system's
        return re.sub(r" \(_ssl\.c:\d+\)$", "", str(cause))  # drop the position in CPython's source
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return getattr(cause, "strerror", None) or str(cause)
