"""Where a server listens: TCP, UNIX sockets, inherited sockets. And how each ceases to listen without loss."""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

# The first inherited descriptor, by systemd's convention (sd_listen_fds(3)).
_LISTEN_FDS_START = 3

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; the socket module does not name it

# Classic BPF on a TCP segment, from the first byte of its header: drop it if it has SYN and not ACK.
_DROP_SYN = [
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # then let 0 bytes pass
    (0x06, 0, 0, 0xFFFFFFFF),  # otherwise all
]


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
