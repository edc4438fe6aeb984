"""How a socket's address is written: in log lines, and in the line that says where a server listens."""

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
