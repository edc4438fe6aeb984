"""A stream's bytes in and out, for a server: the seam behind which the fast way differs from the plain one.

`transport_for` picks the way. The plain one is any stream's own ``send_all`` and ``receive_some``. The fast one is for
sockets: what the kernel takes at once is sent without a pass through the scheduler, and bulk is moved inside the
kernel (splice(2)). Both do the same, `trio.lowlevel` included only what Trio documents.
"""

import errno
import os
from collections.abc import Callable
from typing import Protocol

import trio

from trioproto.streams import RECEIVE_SIZE

# How long a stream that is no socket is given, once interrupted, to hand over what has already arrived. That takes a
# pass or two through the scheduler, and no time.
LAST_LOOK = 0.01

# How long a stream that is no socket may take to close before it is closed by force.
CLOSE_SECONDS = 5.0

# What a relay moves in one go: what a pipe holds by default (pipe(7)).
RELAY_SIZE = 65536


class Transport(Protocol):
    """What `transport_for` returns."""

    async def send_all(self, data: bytes, progress: Callable[[], object]) -> None:
        """Send ``data``, whole. No checkpoint, if the kernel takes all of it at once.

        Args:
            data: what to send.
            progress: called before each wait for room in the kernel's buffer, as far as such waits can be seen.

        Raises:
            trio.BrokenResourceError: if the connection is broken.
        """

    async def receive(self) -> bytes | None:
        """Wait for bytes, and return what has arrived, at most `RECEIVE_SIZE`. Always a checkpoint.

        Returns:
            ``b""`` at the end of the stream; None if `interrupt` was called and nothing has arrived.

        Raises:
            trio.BrokenResourceError: if the connection is broken.
        """

    def interrupt(self) -> None:
        """Have the `receive` that waits now, and those from now on, return None instead of waiting."""

    async def relay(self, progress: Callable[[], object]) -> None:
        """Send back what has arrived, unseen, until nothing more is there; or do nothing, if the system cannot.

        A checkpoint for each `RELAY_SIZE` bytes.

        Args:
            progress: called before each wait for room in the kernel's buffer.

        Raises:
            trio.BrokenResourceError: if the connection is broken.
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

    __slots__ = ("_interrupted", "_stream", "_waiting")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._interrupted = False
        self._waiting: trio.CancelScope | None = None

    async def send_all(self, data: bytes, progress: Callable[[], object]) -> None:
        progress()
        await self._stream.send_all(data)

    async def receive(self) -> bytes | None:
        with trio.CancelScope() as self._waiting:
            if self._interrupted:
                self.interrupt()
            return bytes(await self._stream.receive_some(RECEIVE_SIZE))
        return None

    def interrupt(self) -> None:
        self._interrupted = True
        if self._waiting is not None:
            self._waiting.deadline = trio.current_time() + LAST_LOOK

    async def relay(self, progress: Callable[[], object]) -> None:  # noqa: ARG002 - the interface's
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

    __slots__ = ("_fileno", "_interrupted", "_stream")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._fileno = stream.socket.fileno
        self._interrupted = False

    async def send_all(self, data: bytes, progress: Callable[[], object]) -> None:
        sent = self._send_some(data)
        while sent < len(data):
            progress()
            await trio.lowlevel.wait_writable(self._fileno())
            data = data[sent:]
            sent = self._send_some(data)

    def _send_some(self, data: bytes) -> int:
        try:
            return os.write(self._fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _stream_error(error) from error

    async def receive(self) -> bytes | None:
        # One pass through the scheduler, in which the others have their turns. On a busy server the next bytes have
        # mostly arrived by then, and nothing needs to be registered with the kernel to wait for them.
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return os.read(self._fileno(), RECEIVE_SIZE)
            except BlockingIOError:
                if self._interrupted:
                    return None
            except OSError as error:
                raise _stream_error(error) from error
            try:
                await trio.lowlevel.wait_readable(self._fileno())
            except trio.ClosedResourceError:
                if not self._interrupted:
                    raise

    def interrupt(self) -> None:
        self._interrupted = True
        # Wakes the task that waits in `receive`, if one does. Nothing is closed: the socket can be waited for again.
        trio.lowlevel.notify_closing(self._fileno())

    async def relay(self, progress: Callable[[], object]) -> None:
        if not hasattr(os, "splice"):
            await trio.lowlevel.checkpoint()
            return
        try:
            pipe_out, pipe_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # No descriptors left. There is the plain way.
            await trio.lowlevel.checkpoint()
            return
        try:
            moved = 1
            while moved:
                await trio.lowlevel.checkpoint()
                moved = held = self._splice(self._fileno(), pipe_in, RELAY_SIZE)
                while held:
                    sent = self._splice(pipe_out, self._fileno(), held)
                    held -= sent
                    if held:
                        progress()
                        await trio.lowlevel.wait_writable(self._fileno())
        finally:
            os.close(pipe_out)
            os.close(pipe_in)

    def _splice(self, source: int, target: int, count: int) -> int:
        """Move up to ``count`` bytes; 0 at the end of the stream, and if nothing can be moved now."""
        try:
            return os.splice(source, target, count)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _stream_error(error) from error

    async def aclose(self) -> None:
        # Without telling Trio's waiters, for the only one that there may be is here: that saves a call to the kernel.
        fd = self._stream.socket.detach()
        if fd != -1:
            os.close(fd)


def _stream_error(error: OSError) -> Exception:
    """What Trio's streams raise for ``error``."""
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("this socket was already closed")
    return trio.BrokenResourceError(f"socket connection broken: {error}")
