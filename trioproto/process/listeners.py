"""Where a server listens: TCP, UNIX sockets, inherited sockets. And how each ceases to listen without loss."""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Literal

import trio

from trioproto.addresses import failure_reason, format_address

# The first inherited descriptor, by systemd's convention (sd_listen_fds(3)).
_LISTEN_FDS_START = 3

_MAX_PORT = 0xFFFF

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; the socket module does not name it

# Classic BPF on a TCP segment, from the first byte of its header: drop it if it has SYN and not ACK.
_DROP_SYN = [
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # then let 0 bytes pass
    (0x06, 0, 0, 0xFFFFFFFF),  # otherwise all
]


Kind = Literal["tcp", "unix", "fd"]


class ListenError(OSError):
    """A server cannot listen somewhere. The text says where, and why: ``cannot listen on 127.0.0.1:9000: ...``.

    Attributes:
        kind: what it would have listened on: ``tcp``, a ``unix`` socket, or an inherited descriptor, ``fd``.
        errno: as the system reported it; None for what is no name or path at all, or no listening socket.
    """

    def __init__(self, kind: Kind, where: str, cause: Exception) -> None:
        super().__init__(getattr(cause, "errno", None), f"cannot listen on {where}: {failure_reason(cause)}")
        self.kind = kind

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def _listening_on(kind: Kind, where: str) -> Iterator[None]:
    try:
        yield
    # The latter for a host that cannot be a name, a path with a zero byte, and what is no listening socket.
    except (OSError, ValueError) as error:
        raise ListenError(kind, where, error) from error


@contextlib.asynccontextmanager
async def open_listeners(
    port: int | None, *, host: str | Sequence[str], unix: str | None = None, fds: Sequence[int] = ()
) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen on everything that is given. When the block ends, no new connections can come in.

    The listeners stay open then, for the connections that are queued, and the caller closes them. Sockets that were
    inherited may have other servers, and go on to let connections in.

    Args:
        port: 0 to 65535; 0 lets the kernel pick one for each address. None: ``host`` is not listened on.
        host: the name or address to listen on, or several of them.
        unix: the path of a UNIX socket; see `unix_listener`.
        fds: inherited descriptors; see `inherited_listener`.

    Raises:
        ListenError: if it cannot listen on one of them.
        ValueError: if there is none, or the port is out of its range.

    On an error, and on cancellation, what was opened before is closed, inherited sockets included.
    """
    addresses = [] if port is None else [(name, port) for name in ([host] if isinstance(host, str) else host)]
    if port is not None and not 0 <= port <= _MAX_PORT:  # the system would take it modulo 65536
        raise ValueError(f"port must be from 0 to {_MAX_PORT}, not {port}")
    if not (addresses or unix is not None or fds):
        raise ValueError("there must be a port and a host, a UNIX socket, or a descriptor to listen on")
    listeners: list[trio.SocketListener] = []
    async with contextlib.AsyncExitStack() as accepting:
        try:
            for fd in fds:
                with _listening_on("fd", f"descriptor {fd}"):
                    listeners.append(inherited_listener(fd))
            if unix is not None:
                with _listening_on("unix", format_address(unix)):
                    listeners.append(accepting.enter_context(unix_listener(unix)))
            for address in addresses:
                with _listening_on("tcp", format_address(address)):
                    listeners += await accepting.enter_async_context(tcp_listeners(*address))
        except BaseException:
            close_listeners(listeners)
            raise
        yield listeners


def close_listeners(listeners: Sequence[trio.SocketListener]) -> None:
    """Close all of them at once, whether or not one is closed already. Not a checkpoint."""
    for listener in listeners:
        listener.socket.close()


@contextlib.asynccontextmanager
async def tcp_listeners(host: str, port: int) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen on each address of ``host``. When the block ends, no new connections can come in.

    The listeners stay open then, for the connections that are queued, and for handshakes that have begun. Closing a
    listener resets what its queue holds, and between the last look into the queue and the closing one more may
    arrive; if none can begin any more, the queue can be emptied first.

    Args:
        host: name or address.
        port: 0 to 65535; 0 lets the kernel pick one, another for each address.

    Raises:
        OSError: if it cannot listen there.
    """
    listeners = await trio.open_tcp_listeners(port, host=host)
    try:
        yield listeners
    finally:
        for listener in listeners:
            if listener.socket.fileno() != -1:
                _ignore_new_connections(listener.socket)


def _ignore_new_connections(listening: trio.socket.SocketType) -> None:
    """Have the kernel drop new attempts to connect. Handshakes that have begun are finished.

    To a client, its attempt seems lost on the way (RFC 9293, section 3.8.1): it tries again a second later, and finds
    the next server, or none. Only on Linux (socket(7), SO_ATTACH_FILTER). The filter belongs to the socket, so it
    would hold for every process that listens on it.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
    # struct sock_fprog: how many steps, and where they lie.
    filter_ = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    with contextlib.suppress(OSError):  # a sandbox may forbid it, and a server must be able to stop there too
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)


@contextlib.contextmanager
def unix_listener(path: str) -> Iterator[trio.SocketListener]:
    """Listen on a UNIX socket at ``path``. When the block ends, no new connections can come in.

    Only its owner may connect (mode 600). A socket file that nobody listens on any more is replaced. When the block
    ends, the file is removed, unless another has taken its place; the listener stays open, for the connections that
    are queued.

    Raises:
        OSError: EADDRINUSE, if a server is alive behind ``path`` or it is no socket; and what bind(2) reports.
    """
    file = Path(path)
    _remove_stale(file)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The file must not be open to others for even a moment, so setting its mode cannot wait until after bind.
    umask = os.umask(0o177)
    try:
        listening.bind(path)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(umask)
    listening.listen(socket.SOMAXCONN)
    ours = file.stat()
    try:
        yield trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    finally:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(file.stat(), ours):
                file.unlink()


def _remove_stale(file: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(file.lstat().st_mode)
    except FileNotFoundError:
        return
    if is_socket:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0)  # a live server's full queue is an answer too
            if probe.connect_ex(str(file)) == errno.ECONNREFUSED:
                file.unlink()
                return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(file))


def inherited_listener(fd: int) -> trio.SocketListener:
    """Listen on the socket that this process inherited as descriptor ``fd``.

    Raises:
        OSError: EBADF or ENOTSOCK, if there is none.
        ValueError: if it is no listening stream socket.
    """
    inherited = socket.socket(fileno=fd)
    try:
        return trio.SocketListener(trio.socket.from_stdlib_socket(inherited))
    except ValueError:
        inherited.detach()  # what we cannot use is not ours to close
        raise


def activated_fds() -> list[int]:
    """Return the descriptors of the listening sockets that systemd started this process with (sd_listen_fds(3)).

    The environment variables that tell of them are removed, so that no child takes them for its own.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return []
    return list(range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)))
