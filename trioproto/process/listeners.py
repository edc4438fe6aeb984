"""Listeners on TCP, UNIX sockets and inherited sockets, and how each stops listening without losing connections."""

import contextlib
import ctypes
import errno
import logging
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

_log = logging.getLogger(__name__)

# The first inherited descriptor, by systemd's convention (sd_listen_fds(3)).
_LISTEN_FDS_START = 3

# The environment variable in which a supervisor passes to its workers what `ending_fds` returns.
ENDING_FDS = "TRIOPROTO_ENDING_FDS"

_MAX_PORT = 0xFFFF

_MAX_UNIX_PATH = 107  # unix(7): sun_path, without the byte that ends it

# What to do when a UNIX socket's file cannot be created, by errno.
_UNIX_ADVICE = {
    errno.ENOENT: "create the directory {} first",
    errno.ENOTDIR: "{} must be a directory",
    errno.EACCES: "this user must be able to write to the directory {}",
    errno.EROFS: "the directory {} must be on a writable file system",
}

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; not in the socket module

# A classic BPF program, which gets a TCP segment from its header on: drop it if SYN is set and ACK is not.
_DROP_SYN = [
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # if only SYN is set ...
    (0x06, 0, 0, 0),  # ... pass 0 bytes
    (0x06, 0, 0, 0xFFFFFFFF),  # otherwise all
]


Kind = Literal["tcp", "unix", "fd", "metrics"]


class ListenError(OSError):
    """A server cannot listen. The text says where and why: ``cannot listen on 127.0.0.1:9000: ...``.

    Attributes:
        kind: where: on ``tcp``, a ``unix`` socket, an inherited descriptor (``fd``), or TCP for ``metrics``.
        errno: from the system call; None for an invalid name or path, or a socket that does not listen.
    """

    def __init__(self, kind: Kind, where: str, cause: Exception) -> None:
        # Where we raise the error, its strerror has more detail.
        reason = getattr(cause, "strerror", None) or failure_reason(cause)
        super().__init__(getattr(cause, "errno", None), f"cannot listen on {where}: {reason}")
        self.kind = kind

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def _listening_on(kind: Kind, where: str) -> Iterator[None]:
    try:
        yield
    # ValueError: an invalid host name, a path with a zero byte, or a socket that does not listen.
    except (OSError, ValueError) as error:
        raise ListenError(kind, where, error) from error


@contextlib.asynccontextmanager
async def open_listeners(
    port: int | None, *, host: str | Sequence[str], unix: str | None = None, fds: Sequence[int] = ()
) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen on all given addresses and sockets. When the block ends, no new connections can begin.

    The listeners stay open after the block, so that queued connections can be accepted; the caller closes them.
    Inherited sockets may have other servers, and still accept new connections.

    Args:
        port: 0 to 65535; 0 lets the kernel pick one for each address. None: do not listen on ``host``.
        host: the name or address to listen on, or several of them.
        unix: the path of a UNIX socket; see `unix_listener`.
        fds: inherited descriptors; see `inherited_listener`. Duplicates are ignored.

    Raises:
        ListenError: if it cannot listen on one of them.
        ValueError: if there is nothing to listen on, or the port is out of range.

    On an error, and on cancellation, all listeners opened so far are closed, including inherited sockets.
    """
    addresses = [] if port is None else [(name, port) for name in ([host] if isinstance(host, str) else host)]
    if port is not None and not 0 <= port <= _MAX_PORT:  # the kernel would use it modulo 65536
        raise ValueError(f"port must be from 0 to {_MAX_PORT}, not {port}")
    if not (addresses or unix is not None or fds):
        raise ValueError("there must be a port and a host, a UNIX socket, or a descriptor to listen on")
    listeners: list[trio.SocketListener] = []
    async with contextlib.AsyncExitStack() as accepting:
        try:
            for fd in dict.fromkeys(fds):
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


@contextlib.asynccontextmanager
async def metrics_listeners(address: tuple[str, int] | None) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen on ``address``, a host and a port, while the block runs; on nothing for None.

    Raises:
        ListenError: if it cannot listen there.
    """
    listeners: list[trio.SocketListener] = []
    if address is not None:
        host, port = address
        with _listening_on("metrics", format_address(address)):
            listeners = await trio.open_tcp_listeners(port, host=host)
    try:
        yield listeners
    finally:
        close_listeners(listeners)


def close_listeners(listeners: Sequence[trio.SocketListener]) -> None:
    """Close all of them, even if some are already closed. Not a checkpoint."""
    for listener in listeners:
        listener.socket.close()


@contextlib.asynccontextmanager
async def tcp_listeners(host: str, port: int) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen on each address of ``host``. When the block ends, no new connections can begin.

    The listeners stay open after the block, for queued connections and for handshakes that have begun. Closing a
    listener resets the connections in its accept queue, and one more may arrive between the last accept and the close.
    Once no new ones can begin, the queue can be emptied first.

    Args:
        host: name or address.
        port: 0 to 65535; 0 lets the kernel pick one for each address.

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
    """Have the kernel drop new attempts to connect. Handshakes that have begun are completed.

    To the client, the packet seems lost: it tries again a second later (RFC 9293, section 3.8.1), and reaches the next
    server, or none. Only on Linux (socket(7), SO_ATTACH_FILTER). The filter belongs to the socket, so it applies to
    every process that listens on it.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
    # struct sock_fprog: the number of steps, and a pointer to them.
    filter_ = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    with contextlib.suppress(OSError):  # a sandbox may forbid it, and a server must be able to stop there, too
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)


@contextlib.contextmanager
def unix_listener(path: str) -> Iterator[trio.SocketListener]:
    """Listen on a UNIX socket at ``path``. When the block ends, no new connections can begin.

    Only the owner may connect (mode 600). A stale socket file, on which no server listens, is replaced; of servers that
    start at the same time, one gets the path. When the block ends, the file is removed, unless it has been replaced; a
    failure to remove it is logged. The listener stays open, so that queued connections can be accepted.

    Raises:
        OSError: EADDRINUSE, if a server listens on ``path`` or it is not a socket; otherwise from bind(2). The text
            says what to do.
    """
    file = Path(path).absolute()  # so that it can be removed even if the current directory changes
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:
        text = f"the path of a UNIX socket has at most {_MAX_UNIX_PATH} bytes: a relative one may be shorter"
        raise OSError(errno.ENAMETOOLONG, text, path)
    try:
        with _lock_beside(file):
            _remove_stale(file, path)
            listening = _bind(path)
            ours = file.lstat()
    except OSError as error:
        if error.errno not in _UNIX_ADVICE:
            raise
        advice = _UNIX_ADVICE[error.errno].format(file.parent)
        raise OSError(error.errno, f"{error.strerror}: {advice}", path) from error
    try:
        yield trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    finally:
        # This needs no lock: while the socket listens, no other server considers its file stale.
        try:
            if os.path.samestat(file.lstat(), ours):
                file.unlink()
        except FileNotFoundError:
            pass  # already removed
        except OSError as error:
            _log.warning(
                "cannot remove %s: %s; the next server there will remove it", format_address(path), error.strerror
            )


@contextlib.contextmanager
def _lock_beside(file: Path) -> Iterator[None]:
    """Keep other servers from starting on ``file`` while the block runs.

    No system call removes a file only if it is still the stale one. If two servers find the same stale file, the slower
    one would remove the socket that the faster one has just bound, which clients could then never reach. A server also
    looks dead between its bind and its listen. So all of that is done under a lock, which the kernel releases even if
    the process is killed.
    """
    lock = file.with_name(file.name + ".lock")
    fd = _open_locked(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)


def _open_locked(lock: Path) -> int:
    import fcntl  # noqa: PLC0415 - not on Windows, where Python has no UNIX sockets either

    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)  # waits only while another server binds
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), lock.lstat()):
                return fd
        # The previous holder has removed this file, so another server may have locked a new one.
        os.close(fd)


def _remove_stale(file: Path, path: str) -> None:
    """Remove the socket of a dead server. Raise EADDRINUSE if anything else is there."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a file that is not a socket"
        raise OSError(errno.EADDRINUSE, f"{kind} is there, and is not replaced", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # if the queue is full, a server is alive
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            text = f"{os.strerror(errno.EADDRINUSE)}: stop the server that listens there"
            raise OSError(errno.EADDRINUSE, text, path)
    file.unlink()


def _bind(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Setting the mode after bind would let others connect until then.
    umask = os.umask(0o177)
    try:
        listening.bind(path)
        listening.listen(socket.SOMAXCONN)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(umask)
    return listening


def inherited_listener(fd: int) -> trio.SocketListener:
    """Listen on the socket that this process inherited as descriptor ``fd``.

    Raises:
        OSError: EBADF or ENOTSOCK, if it is not a socket.
        ValueError: if it is not a listening stream socket.
    """
    try:
        inherited = socket.socket(fileno=fd)
    except (OverflowError, ValueError):  # larger than any descriptor; beyond a C int, it becomes negative
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
    try:
        return trio.SocketListener(trio.socket.from_stdlib_socket(inherited))
    except ValueError:
        inherited.detach()  # leave it open: it is not ours
        raise


def activated_fds() -> list[int]:
    """Return the descriptors of the listening sockets that systemd passed to this process (sd_listen_fds(3)).

    Their environment variables are removed, so that child processes do not use them.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return list(range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)))


def ending_fds() -> list[int]:
    """Return those of a worker's inherited descriptors whose sockets end with its supervisor.

    Usually, an inherited socket outlives the process and has a next server. These do not: in a stop, the workers must
    serve the connections in their queues. The environment variable (`ENDING_FDS`) is removed, so that child processes
    do not use it.
    """
    return [int(fd) for fd in os.environ.pop(ENDING_FDS, "").split()]
