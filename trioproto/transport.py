"""How a stream's bytes move, for a server: the seam behind which the fast way differs from the plain one.

`transport_for` picks the way. The plain one is any stream's own ``send_all`` and ``receive_some``. The fast one is for
sockets: what the kernel takes or has at once moves with a direct call, and only what has to wait goes through Trio's
waiting; bulk is moved inside the kernel (splice(2)). `trioproto.tls` has such a way for TLS.

Time-outs are the caller's: it puts a cancel scope around whatever may have to wait.
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

# A closing connection goes on discarding what its peer still sends for as long as this in all, this long after the
# last of it, and for this much. (nginx calls these lingering_time and lingering_timeout.)
LINGER_SECONDS = 5.0
LINGER_SILENCE = 1.0
LINGER_BYTES = 16 * 2**20

# How long a stream that is no socket may take to close before it is closed by force.
CLOSE_SECONDS = 5.0

# What a pipe between two sockets holds at most: more than the 64 KiB that it holds by default (pipe(7)), which takes a
# fifth less time for the same bytes.
PIPE_SIZE = 2**18

# What splice(2) and pipe2(2) report where the system, or a sandbox, has or allows no such thing.
_REFUSED = {errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP}


@runtime_checkable
class Transport(Protocol):
    """What `transport_for` returns.

    All of it raises `trio.BrokenResourceError` if the connection is broken, and `trio.ClosedResourceError` if somebody
    has closed the stream.

    Attributes:
        needs_handshake: whether nothing moves before `handshake`.
        last_look: how many seconds `wait_for_data` needs, at the least, to hand over what has already arrived.
    """

    needs_handshake: bool
    last_look: float

    async def handshake(self) -> None:
        """Make the TLS handshake, or wait until another task has made it."""

    def receive_nowait(self) -> bytes | None:
        """Return what has arrived, at most `RECEIVE_SIZE` bytes; ``b""`` at the end of the stream; None for nothing."""

    def wait_for_data(self) -> Awaitable[None]:
        """Wait until `receive_nowait` probably has something to return. Cancellation loses no byte."""

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send what can be sent at once of ``data``, from its start, and return how many bytes that were."""

    async def send_some(self, data: memoryview) -> int:
        """Wait until some of ``data`` can be sent, one byte or more, send it, and return how many bytes that were.

        On cancellation, a socket has sent nothing. Another stream may have sent part of it, and sends no more then.
        """

    async def wait_for_room(self) -> None:
        """Wait until something can probably be sent."""

    async def send_eof(self) -> None:
        """End this side, if the stream can end one side alone."""

    async def linger(self) -> None:
        """End this side such that nothing is lost of what was sent: wait for the peer to end its side, for a while."""

    def reset(self) -> None:
        """Have `aclose` tell the peer that the connection is broken, and not that it has ended."""

    async def aclose(self) -> None:
        """Close the stream; by force, if cancelled."""


def transport_for(stream: trio.abc.Stream) -> Transport:
    """Return the fastest transport that there is for ``stream``."""
    if isinstance(stream, trio.SocketStream) and os.name == "posix":
        return SocketTransport(stream)
    if isinstance(stream, Transport):  # as `trioproto.tls.TLSStream` is
        return stream
    return StreamTransport(stream)


class StreamTransport:
    """The plain way, for any stream."""

    __slots__ = ("_arrived", "_cut", "_reset", "_stream", "needs_handshake")

    # A pass or two through the scheduler, and no time.
    last_look: float = 0.01

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._arrived: bytes | None = None
        self._cut = False  # a send ended before its data did
        self._reset = False
        self.needs_handshake: bool = type(stream) is trio.SSLStream  # a final class; isinstance is slow with its kind

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
        # In pieces, because a stream does not tell how far it is, and a peer is given time for each.
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
        # TLS says goodbye first, and may have to wait for room to say it.
        with trio.move_on_after(CLOSE_SECONDS), contextlib.suppress(trio.BrokenResourceError):
            await self._stream.aclose()


class SocketTransport:
    """The fast way, for a socket.

    Trio's sockets are non-blocking, so their descriptors can be read and written directly, between two waits of
    Trio's. The descriptor is asked for anew each time: it is -1 as soon as somebody has closed the stream.
    """

    __slots__ = ("_known_to_trio", "_socket", "_stream")

    needs_handshake: bool = False
    last_look: float = 0.0

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket
        self._known_to_trio = False  # nobody has waited for it yet

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
        # No coroutine of its own, which would cost each idle connection a fifth of a KiB.
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
        # Before it closes a socket, Trio wakes those who wait for it, and has epoll forget it. A short conversation has
        # often never waited: then this descriptor means nothing to either, and looking for it is an exception and a
        # system call for nothing.
        if self._known_to_trio:
            self._socket.close()
        elif (descriptor := self._socket.detach()) != -1:
            os.close(descriptor)

    def splice_to(self, pipe: "Pipe") -> int:
        """Move what has arrived into ``pipe``, and return how many bytes; none at the end of the stream, too."""
        return _splice(self._socket.fileno(), pipe.inlet)

    def splice_from(self, pipe: "Pipe") -> int:
        """Send what can be sent at once of what ``pipe`` holds, and return how many bytes that were."""
        return _splice(pipe.outlet, self._socket.fileno())


class Pipe:
    """A pipe that bytes go through from one socket to another inside the kernel, on Linux.

    Raises:
        OSError: on creation, if the system has none to give, or no splice(2).
    """

    def __init__(self) -> None:
        if not hasattr(os, "splice"):  # FreeBSD has pipes, and no splice(2)
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self.outlet: int
        self.inlet: int
        self.outlet, self.inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        import fcntl  # noqa: PLC0415 - Windows has none

        with contextlib.suppress(OSError):  # one user's pipes have a bound; the default size does, too
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
    """What Trio's streams raise for ``error``."""
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("this socket was already closed")
    return trio.BrokenResourceError(f"socket connection broken: {error}")


async def close_as_broken(stream: trio.abc.AsyncResource) -> None:
    """Close ``stream``, such that its peer does not take the end for one in order; with a reset, if it knows resets."""
    below = getattr(stream, "transport_stream", stream)  # TLS is on another one
    if isinstance(below, trio.SocketStream):
        _reset_when_closed(below.socket)
    elif hasattr(below, "reset"):  # a network in memory knows resets, too
        below.reset()
    await trio.aclose_forcefully(stream)  # TLS then says no goodbye


def _reset_when_closed(closing: trio.socket.SocketType) -> None:
    """Have ``close`` send a reset and drop what is not sent yet: linger for 0 seconds (socket(7), SO_LINGER)."""
    with contextlib.suppress(OSError):  # the socket may be closed already, or be of a kind that knows no reset
        closing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _linger(stream: trio.abc.Stream) -> None:
    """End ``stream`` such that what was sent is not destroyed on its way.

    Closing a socket that holds bytes nobody has received, or that is sent more later, makes the kernel send a
    reset (RFC 1122, section 4.2.2.13), in place of what still lies in its output buffer; and some systems that get
    a reset throw away what has arrived and is not read yet. So we send end of stream, and take in and discard what
    still comes until the client has seen it and ends its side too; for a bounded time and amount, as nobody may keep
    us here.

    What the client does meanwhile is no fault any more.
    """
    with trio.move_on_after(LINGER_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        if isinstance(stream, trio.SSLStream):
            below = stream.transport_stream
            try:
                # Sends close_notify, and waits for the client's. Whatever comes in its stead is an error of TLS.
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
