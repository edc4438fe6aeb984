"""Transports: how `trioproto.Connection` moves bytes over a stream.

`transport_for` selects one. `StreamTransport` uses any stream's ``send_all`` and ``receive_some``. `SocketTransport` is
faster: it makes system calls directly, and waits through Trio only if they would block; bulk data moves inside the
kernel (splice(2)). `trioproto.tls` does the same for TLS.

Transports have no time-outs: the caller puts a cancel scope around whatever may wait.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Awaitable
from typing import Protocol, runtime_checkable

import trio

from trioproto.streams import RECEIVE_SIZE

# Bounds for a closing connection that discards what its peer still sends: seconds in total, seconds without data, and
# bytes. (nginx calls the first two lingering_time and lingering_timeout.)
LINGER_SECONDS = 5.0
LINGER_SILENCE = 1.0
LINGER_BYTES = 16 * 2**20

# How many seconds a stream other than a socket may take to close before it is closed forcefully.
CLOSE_SECONDS = 5.0

# The capacity of a pipe between two sockets, in bytes. Compared with the default of 64 KiB (pipe(7)), moving the same
# bytes takes a fifth less time.
PIPE_SIZE = 2**18

# What splice(2) and pipe2(2) report if the kernel does not support them, or a sandbox forbids them.
_REFUSED = {errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP}


@runtime_checkable
class Transport(Protocol):
    """The interface of transports.

    All methods raise `trio.BrokenResourceError` if the connection is broken, and `trio.ClosedResourceError` if the
    stream was closed.

    Attributes:
        needs_handshake: whether `handshake` must be called before sending or receiving.
        last_look: the least number of seconds that `wait_for_data` needs to deliver what has already arrived.
    """

    needs_handshake: bool
    last_look: float

    async def handshake(self) -> None:
        """Make the TLS handshake, or wait until another task has made it."""

    def receive_nowait(self) -> bytes | None:
        """Return what has arrived, at most `RECEIVE_SIZE` bytes; ``b""`` at end of stream; None if nothing has."""

    def wait_for_data(self) -> Awaitable[None]:
        """Wait until `receive_nowait` probably has something to return. Cancellation loses no data."""

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send as much of ``data`` as possible without waiting, and return how many bytes were sent."""

    async def send_some(self, data: memoryview) -> int:
        """Wait until at least one byte of ``data`` can be sent, send what can be, and return how many bytes were sent.

        On cancellation, a socket has sent nothing. Other streams may have sent part of ``data``, and can send nothing
        more.
        """

    async def wait_for_room(self) -> None:
        """Wait until data can probably be sent."""

    async def send_eof(self) -> None:
        """Send end of stream, if the stream supports half-close."""

    async def linger(self) -> None:
        """Send end of stream, and wait for the peer's, for a bounded time, so that no sent data is lost."""

    def reset(self) -> None:
        """Make `aclose` reset the connection instead of ending it normally."""

    async def aclose(self) -> None:
        """Close the stream; forcefully, if cancelled."""


def transport_for(stream: trio.abc.Stream) -> Transport:
    """Return the fastest available transport for ``stream``."""
    if isinstance(stream, trio.SocketStream) and os.name == "posix":
        return SocketTransport(stream)
    if isinstance(stream, Transport):  # as `trioproto.tls.TLSStream` is
        return stream
    return StreamTransport(stream)


class StreamTransport:
    """A transport for any stream."""

    __slots__ = ("_arrived", "_cut", "_reset", "_stream", "needs_handshake")

    # Enough for one or two passes through the scheduler.
    last_look: float = 0.01

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._arrived: bytes | None = None
        self._cut = False  # a send was cancelled or failed
        self._reset = False
        self.needs_handshake: bool = type(stream) is trio.SSLStream  # a final class; isinstance is slow for an ABC

    async def handshake(self) -> None:
        assert isinstance(self._stream, trio.SSLStream)  # noqa: S101 - for the type checker
        await self._stream.do_handshake()
        self.needs_handshake = False

    def receive_nowait(self) -> bytes | None:
        arrived, self._arrived = self._arrived, None
        return arrived

    async def wait_for_data(self) -> None:
        self._arrived = bytes(await self._stream.receive_some(RECEIVE_SIZE))

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:  # noqa: ARG002 - the interface's
        return 0

    async def send_some(self, data: memoryview) -> int:
        if self._cut:
            raise trio.BrokenResourceError("an earlier send was cut off")
        # In pieces, because a stream does not report progress, and the idle time-out is for each piece.
        piece = data[:RECEIVE_SIZE]
        self._cut = True
        await self._stream.send_all(piece)
        self._cut = False
        return len(piece)

    async def wait_for_room(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            await self._stream.send_eof()
        else:
            await trio.lowlevel.checkpoint()

    async def linger(self) -> None:
        await _linger(self._stream)

    def reset(self) -> None:
        self._reset = True

    async def aclose(self) -> None:
        if self._reset:
            await close_as_broken(self._stream)
            return
        if self.needs_handshake:
            await trio.aclose_forcefully(self._stream)
            return
        # TLS sends close_notify first, which may have to wait for buffer space.
        with trio.move_on_after(CLOSE_SECONDS), contextlib.suppress(trio.BrokenResourceError):
            await self._stream.aclose()


class SocketTransport:
    """A faster transport for sockets.

    Trio's sockets are non-blocking, so their descriptors can be read and written directly. The descriptor is looked up
    for each call, because it is -1 once the stream is closed.
    """

    __slots__ = ("_known_to_trio", "_socket", "_stream")

    needs_handshake: bool = False
    last_look: float = 0.0

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket
        self._known_to_trio = False  # no task has waited for it yet

    async def handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    def receive_nowait(self) -> bytes | None:
        try:
            return os.read(self._socket.fileno(), RECEIVE_SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _stream_error(error) from error

    def wait_for_data(self) -> Awaitable[None]:
        # Not a coroutine, which would take a fifth of a KiB for each idle connection.
        self._known_to_trio = True
        return trio.lowlevel.wait_readable(self._socket)  # noqa: ASYNC105

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _stream_error(error) from error

    async def send_some(self, data: memoryview) -> int:
        sent = 0
        while not sent:
            await self.wait_for_room()
            sent = self.send_nowait(data)
        return sent

    async def wait_for_room(self) -> None:
        self._known_to_trio = True
        await trio.lowlevel.wait_writable(self._socket)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def linger(self) -> None:
        self._known_to_trio = True
        await _linger(self._stream)

    def reset(self) -> None:
        _reset_when_closed(self._socket)

    async def aclose(self) -> None:
        # Before Trio closes a socket, it wakes tasks that wait for it and removes it from epoll. If no task has ever
        # waited, as is common for short conversations, this would cost an exception and a system call for nothing.
        if self._known_to_trio:
            self._socket.close()
        elif (descriptor := self._socket.detach()) != -1:
            os.close(descriptor)

    def splice_to(self, pipe: "Pipe") -> int:
        """Move what has arrived into ``pipe``, and return how many bytes; 0 also at end of stream."""
        return _splice(self._socket.fileno(), pipe.inlet)

    def splice_from(self, pipe: "Pipe") -> int:
        """Send as much from ``pipe`` as possible without waiting, and return how many bytes were sent."""
        return _splice(pipe.outlet, self._socket.fileno())


class Pipe:
    """A pipe to move bytes from one socket to another inside the kernel, on Linux.

    Raises:
        OSError: on creation, if the kernel can create no pipe, or does not have splice(2).
    """

    def __init__(self) -> None:
        if not hasattr(os, "splice"):  # FreeBSD has no splice(2)
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self.outlet: int
        self.inlet: int
        self.outlet, self.inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        import fcntl  # noqa: PLC0415 - not on Windows

        with contextlib.suppress(OSError):  # the user's limit for pipes is reached; the default size works, too
            fcntl.fcntl(self.inlet, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.outlet)
        os.close(self.inlet)


def _splice(source: int, target: int) -> int:
    try:
        return os.splice(source, target, PIPE_SIZE)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno in _REFUSED:
            raise
        raise _stream_error(error) from error


def _stream_error(error: OSError) -> Exception:
    """Return the exception that Trio's streams raise for ``error``."""
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("this socket was already closed")
    return trio.BrokenResourceError(f"socket connection broken: {error}")


async def close_as_broken(stream: trio.abc.AsyncResource) -> None:
    """Close ``stream`` so that its peer does not see a normal end: with a reset, if the stream supports it."""
    below = getattr(stream, "transport_stream", stream)  # below TLS
    if isinstance(below, trio.SocketStream):
        _reset_when_closed(below.socket)
    elif hasattr(below, "reset"):  # a stream of an in-memory network
        below.reset()
    await trio.aclose_forcefully(stream)  # without close_notify


def _reset_when_closed(closing: trio.socket.SocketType) -> None:
    """Make ``close`` send a reset and drop unsent data: linger for 0 seconds (socket(7), SO_LINGER)."""
    with contextlib.suppress(OSError):  # the socket may be closed already, or not support this
        closing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _linger(stream: trio.abc.Stream) -> None:
    """End ``stream`` so that no sent data is lost.

    If a socket is closed while it has unread data, or more data arrives later, the kernel sends a reset (RFC 1122,
    section 4.2.2.13) and drops its send buffer; and some systems that receive a reset discard data that has arrived and
    is not read yet. So we send end of stream, then receive and discard data until the client ends its side, too. Time
    and amount are bounded, so that a client cannot keep the connection open.

    Errors of the client are ignored.
    """
    with trio.move_on_after(LINGER_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        if isinstance(stream, trio.SSLStream):
            below = stream.transport_stream
            try:
                # Sends close_notify and waits for the client's. Any other data instead is a TLS error.
                with trio.move_on_after(LINGER_SILENCE), contextlib.suppress(trio.BrokenResourceError):
                    await stream.unwrap()
                await _linger(below)
            finally:
                await trio.aclose_forcefully(below)
        elif isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
            left = LINGER_BYTES
            more = True
            while more and left > 0:
                more = False
                with trio.move_on_after(LINGER_SILENCE):
                    received = len(await stream.receive_some(RECEIVE_SIZE))
                    more = received > 0
                    left -= received
