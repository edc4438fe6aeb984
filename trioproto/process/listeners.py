"""Where a server listens: TCP, UNIX sockets, inherited sockets. And how each ceases to listen without loss."""

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

# The environment variable by which a supervisor tells its worker what `ending_fds` returns.
ENDING_FDS = "TRIOPROTO_ENDING_FDS"

_MAX_PORT = 0xFFFF

_MAX_UNIX_PATH = 107  # unix(7): sun_path, without the byte that ends it

# What must be so for a UNIX socket's file to be made, by the error that says that it is not.
_UNIX_ADVICE = {
    errno.ENOENT: "create the directory {} first",
    errno.ENOTDIR: "{} must be a directory",
    errno.EACCES: "this user must be able to write to the directory {}",
    errno.EROFS: "the directory {} must be on a file system that can be written to",
}

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; the socket module does not name it

# Classic BPF on a TCP segment, from the first byte of its header: drop it if it has SYN and not ACK.
_DROP_SYN = [
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # then let 0 bytes pass
    (0x06, 0, 0, 0xFFFFFFFF),  # otherwise all
]


Kind = Literal["tcp", "unix", "fd", "metrics"]


class ListenError(OSError):
    """A server cannot listen somewhere. The text says where, and why: ``cannot listen on 127.0.0.1:9000: ...``.

    Attributes:
        kind: what it would have listened on: ``tcp``, a ``unix`` socket, an inherited descriptor (``fd``), or
            ``metrics``, also TCP.
        errno: as the system reported it; None for what is no name or path at all, or no listening socket.
    """

    def __init__(self, kind: Kind, where: str, cause: Exception) -> None:
        # What we raise ourselves says more than the system would.
        reason = getattr(cause, "strerror", None) or failure_reason(cause)
        super().__init__(getattr(cause, "errno", None), f"cannot listen on {where}: {reason}")
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
        fds: inherited descriptors; see `inherited_listener`. One that is given twice is listened on once.

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
    """Listen on ``address``, a host and a port, around a block; on nothing for None.

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

    Only its owner may connect (mode 600). A socket file that nobody listens on any more is replaced; of servers that
    start at the same time, one gets the path. When the block ends, the file is removed, unless another has taken its
    place; if it cannot be removed, that is logged. The listener stays open, for the connections that are queued.

    Raises:
        OSError: EADDRINUSE, if a server is alive behind ``path`` or it is no socket; and what bind(2) reports. The text
            says what to do about it.
    """
    file = Path(path).absolute()  # to be removed in the end, wherever this process has gone by then
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
        # This needs no lock: as long as the socket listens, no other server takes its file to be stale.
        try:
            if os.path.samestat(file.lstat(), ours):
                file.unlink()
        except FileNotFoundError:
            pass  # somebody has removed it
        except OSError as error:
            _log.warning("cannot remove %s: %s; the next server there will", format_address(path), error.strerror)


@contextlib.contextmanager
def _lock_beside(file: Path) -> Iterator[None]:
    """Keep other servers from starting on ``file`` while the block lasts.

    No system call removes a file only if it is still the stale one. Of two servers that find the same stale file, the
    slower one would remove what the faster one has just bound, and that would never have a client again. Between its
    bind and its listen, too, a server looks as if it were dead. So all that happens under a lock, which the kernel
    takes back even from a process that is killed.
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
        fcntl.flock(fd, fcntl.LOCK_EX)  # waits no longer than another server needs to bind
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), lock.lstat()):
                return fd
        # Who had the lock before has removed this very file, so somebody else may have locked the next one.
        os.close(fd)


def _remove_stale(file: Path, path: str) -> None:
    """Remove the socket that a dead server left. Raise EADDRINUSE if anything else is there."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a file that is no socket"
        raise OSError(errno.EADDRINUSE, f"{kind} is there, and is left alone", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # a live server's full queue is an answer too
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            text = f"{os.strerror(errno.EADDRINUSE)}: stop the server that listens there"
            raise OSError(errno.EADDRINUSE, text, path)
    file.unlink()


def _bind(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The file must not be open to others for even a moment, so setting its mode cannot wait until after bind.
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
        OSError: EBADF or ENOTSOCK, if there is none.
        ValueError: if it is no listening stream socket.
    """
    try:
        inherited = socket.socket(fileno=fd)
    except (OverflowError, ValueError):  # larger than any descriptor; beyond a C int, it counts as negative
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
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
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return list(range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)))


def ending_fds() -> list[int]:
    """Return which of the descriptors that a worker inherits are of sockets that end with its supervisor.

    Inherited sockets outlive a process, as a rule, and have another server. These have none: in a stop, it is up to the
    workers to serve those who wait in their queues. The environment variable that tells of them (`ENDING_FDS`) is
    removed, so that no child takes them for its own.
    """
    return [int(fd) for fd in os.environ.pop(ENDING_FDS, "").split()]
