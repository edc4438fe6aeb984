"""A stream's bytes in and out, for a server: the seam behind which the fast way differs from the plain one.

`transport_for` picks the way. The plain one is any stream's own ``send_all`` and ``receive_some``. The fast one is for
sockets: what the kernel takes or has at once moves with a direct call, and only what has to wait goes through Trio's
waiting; bulk is moved inside the kernel (splice(2)).
"""

import contextlib
import errno
import os
from typing import Protocol

import trio

from trioproto.streams import RECEIVE_SIZE

# How long a stream that is no socket is given, at the least, to hand over what has already arrived. That takes a pass
# or two through the scheduler, and no time.
LAST_LOOK = 0.01

# How long a stream that is no socket may take to close before it is closed by force.
CLOSE_SECONDS = 5.0

# What a relay moves in one go, and has in the kernel at most: more than the 64 KiB that a pipe holds by default
# (pipe(7)), which takes a fifth less time for the same bytes.
RELAY_SIZE = 2**18
# How often one relay goes on, if there is more, before it returns to the handler, which may have to stop.
RELAY_TURNS = 16


class Transport(Protocol):
    """What `transport_for` returns. Cancellation may leave part of something sent, and closes nothing."""

    async def send_all(self, data: bytes, patience: float) -> None:
        """Send ``data``, whole. No checkpoint, if the kernel takes all of it at once.

        Args:
            data: what to send.
            patience: seconds to wait for the peer to make room. A socket counts anew whenever the kernel has room
                again; any other stream has them for all of ``data``, because it does not tell.

        Raises:
            trio.TooSlowError: if the peer lets them pass.
            trio.BrokenResourceError: if the connection is broken.
        """

    async def receive(self, patience: float) -> bytes | None:
        """Wait for bytes, and return what has arrived, at most `RECEIVE_SIZE`. Always a checkpoint.

        Args:
            patience: seconds to wait; with 0, only what has arrived already is returned.

        Returns:
            ``b""`` at the end of the stream; None if nothing arrives in time.

        Raises:
            trio.BrokenResourceError: if the connection is broken.
        """

    def hurry(self, patience: float) -> None:
        """Give a `receive` that is waiting now at most ``patience`` seconds more."""

    async def relay(self, patience: float) -> None:
        """Send back what has arrived, unseen, until nothing more is there; or do nothing, if the system cannot.

        At most `RELAY_TURNS` times `RELAY_SIZE` bytes, and a checkpoint after each of them.

        Args:
            patience: as for `send_all`, which this raises the same as.
        """

    async def aclose(self) -> None:
        """Close the stream; by force, if cancelled."""


def transport_for(stream: trio.abc.Stream) -> Transport:
    """Return the fastest transport that there is for ``stream``."""
    if isinstance(stream, trio.SocketStream) and os.name == "posix":
        return SocketTransport(stream)
    return StreamTransport(stream)


class StreamTransport:
    """The plain way, for any stream."""

    __slots__ = ("_stream", "_waiting")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._waiting = trio.CancelScope()  # of the last receive

    async def send_all(self, data: bytes, patience: float) -> None:
        with trio.fail_after(patience):
            await self._stream.send_all(data)

    async def receive(self, patience: float) -> bytes | None:
        with trio.move_on_after(max(patience, LAST_LOOK)) as self._waiting:
            return bytes(await self._stream.receive_some(RECEIVE_SIZE))
        return None

    def hurry(self, patience: float) -> None:
        in_time = trio.current_time() + max(patience, LAST_LOOK)
        self._waiting.deadline = min(self._waiting.deadline, in_time)

    async def relay(self, patience: float) -> None:  # noqa: ARG002 - the interface's
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        # TLS says goodbye first, and may have to wait for room to say it.
        with trio.move_on_after(CLOSE_SECONDS):
            await self._stream.aclose()


class SocketTransport:
    """The fast way, for a socket.

    Trio's sockets are non-blocking, so their descriptors can be read and written directly, between two waits of
    Trio's. The descriptor is asked for anew each time: it is -1 as soon as somebody has closed the stream.
    """

    __slots__ = ("_known_to_trio", "_patience", "_socket", "_waiting")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._patience = 0.0
        self._waiting: trio.CancelScope | None = None
        self._known_to_trio = False  # nobody has waited for it yet

    async def send_all(self, data: bytes, patience: float) -> None:
        while True:
            try:
                sent = os.write(self._socket.fileno(), data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise _stream_error(error) from error
            if sent == len(data):
                return
            data = data[sent:]
            await self._wait_for_room(patience)

    async def receive(self, patience: float) -> bytes | None:
        # One pass through the scheduler, in which the others have their turns. On a busy server the next bytes have
        # mostly arrived by then, and there is nothing to wait for, which saves telling Trio and the kernel about it.
        self._patience = patience
        await trio.lowlevel.checkpoint()
        in_time = True
        while True:
            try:
                return os.read(self._socket.fileno(), RECEIVE_SIZE)
            except BlockingIOError:
                if not in_time:
                    return None
            except OSError as error:
                raise _stream_error(error) from error
            self._known_to_trio = True
            with trio.move_on_after(self._patience) as self._waiting:
                await trio.lowlevel.wait_readable(self._socket)
            in_time = not self._waiting.cancelled_caught
            self._waiting = None

    def hurry(self, patience: float) -> None:
        self._patience = min(self._patience, patience)
        if self._waiting is not None:
            self._waiting.deadline = min(self._waiting.deadline, trio.current_time() + patience)

    async def relay(self, patience: float) -> None:
        await trio.lowlevel.checkpoint()
        if not hasattr(os, "splice"):  # not Linux; there is the plain way
            return
        try:
            outlet, inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no descriptors left; likewise
            return
        try:
            import fcntl  # noqa: PLC0415 - Windows has none

            with contextlib.suppress(OSError):  # one user's pipes have a bound; the default size does, too
                fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, RELAY_SIZE)
            for _ in range(RELAY_TURNS):
                held = self._splice(self._socket.fileno(), inlet)
                if not held:
                    return
                while held:
                    held -= self._splice(outlet, self._socket.fileno())
                    if held:
                        await self._wait_for_room(patience)
                await trio.lowlevel.checkpoint()
        finally:
            os.close(outlet)
            os.close(inlet)

    def _splice(self, source: int, target: int) -> int:
        """Move what can be moved now, up to `RELAY_SIZE` bytes; none, too, at the end of the stream."""
        try:
            return os.splice(source, target, RELAY_SIZE)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _stream_error(error) from error

    async def _wait_for_room(self, patience: float) -> None:
        self._known_to_trio = True
        with trio.fail_after(patience):
            await trio.lowlevel.wait_writable(self._socket)

    async def aclose(self) -> None:
        # Before it closes a socket, Trio wakes those who wait for it, and has epoll forget it. A short conversation has
        # often never waited: then this descriptor means nothing to either, and looking for it is an exception and a
        # system call for nothing.
        if self._known_to_trio:
            self._socket.close()
        elif (descriptor := self._socket.detach()) != -1:
            os.close(descriptor)


def _stream_error(error: OSError) -> Exception:
    """What Trio's streams raise for ``error``."""
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("this socket was already closed")
    return trio.BrokenResourceError(f"socket connection broken: {error}")
