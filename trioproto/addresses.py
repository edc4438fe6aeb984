"""How a socket's address is written, and why connecting to one failed: in log lines and in messages."""

import os
import ssl

import trio


def format_address(address: object) -> str:
    """Write a socket address as ``127.0.0.1:9190``, ``[::1]:9190`` or ``unix:PATH``.

    Args:
        address: what `socket.socket.getsockname` or ``getpeername`` gives. For a UNIX socket that is its path;
            an unnamed one, as a client's mostly is, becomes ``unix``.
    """
    match address:
        case (str(host), int(port), *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case "" | b"":
            return "unix"
        case bytes():  # Linux's abstract namespace: the name begins with a zero byte
            return "unix:@" + address[1:].decode(errors="backslashreplace")
        case _:
            return f"unix:{address}"


def peer_name(stream: trio.abc.Stream) -> str:
    """Name the other end of ``stream`` for a log line.

    For a stream that is no socket, the name of its class. A socket whose connection is already gone has no peer
    that the kernel could tell of: ``a peer that is gone``.
    """
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    if not isinstance(stream, trio.SocketStream):
        return type(stream).__name__
    try:
        return format_address(stream.socket.getpeername())
    except OSError:
        return "a peer that is gone"


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
        return str(cause)
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return getattr(cause, "strerror", None) or str(cause)
