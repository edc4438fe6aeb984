"""TLS on a socket (RFC 8446) with direct reads and writes. OpenSSL only transforms bytes in memory.

A `trio.SSLStream` uses another stream, and so passes through Trio's scheduler whenever it sends or receives. Here, data
moves by direct system calls, and only waits go through Trio, as on a plain socket (`trioproto.transport`).
"""

import contextlib
import operator
import ssl
from collections.abc import Awaitable, Iterator

import trio

from trioproto.transport import CLOSE_SECONDS, SocketTransport

# The most bytes in one record (RFC 8446, section 5.1).
_RECORD = 2**14

# How many bytes of a message are encrypted at once, and must then be sent before more are.
_PIECE = 65536

# Responses to TLS messages, such as key updates, are sent with the next message. This is the most bytes that may wait
# for one.
_MAX_ANSWERS = 65536


class TLSStream(trio.abc.HalfCloseableStream):
    """TLS on a connected socket.

    The first send or receive makes the handshake. If it is cancelled, the next one continues the handshake. `send_eof`
    sends close_notify; before TLS 1.3 this would end both sides, so only `aclose` does.

    It is also a transport (`trioproto.transport.Transport`) for `trioproto.Connection`.

    Args:
        stream: the socket. It must not be used directly from then on.
        context: certificates and settings. Renegotiation (TLS 1.2) is not supported: a peer that requests it breaks
            the connection. `ssl.OP_NO_RENEGOTIATION` refuses it with an alert.
        server_side: whether this is the server's side of the connection.
        server_hostname: on the client's side, the name that the server's certificate must be for.

    All methods raise `trio.BrokenResourceError` if the connection is broken, or if what arrives is not TLS, fails the
    checks of ``context``, or ends without close_notify; and `trio.ClosedResourceError` if it is closed.

    Attributes:
        transport_stream: ``stream``.
    """

    __slots__ = (
        "_below",
        "_busy",
        "_cut",
        "_encrypted",
        "_encrypted_size",
        "_end",
        "_eof_sent",
        "_handshaking",
        "_incoming",
        "_left",
        "_object",
        "_outgoing",
        "needs_handshake",
        "transport_stream",
    )

    last_look: float = 0.0

    def __init__(
        self,
        stream: trio.SocketStream,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        self.transport_stream: trio.SocketStream = stream
        self.needs_handshake: bool = True
        self._below = SocketTransport(stream)
        self._handshaking = trio.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._end: ssl.SSLError | bytes | None = None  # b"" after close_notify, or why nothing more can be received
        self._encrypted: bytes | memoryview = b""  # not accepted by the kernel yet ...
        self._encrypted_size = 0  # ... and how many plaintext bytes it contains
        self._cut = False  # sending has stopped in the middle of a message
        # For use as a stream.
        self._left = b""  # received, but beyond max_bytes
        self._eof_sent = False
        self._busy: set[str] = set()

    # As a transport.

    async def handshake(self) -> None:
        """Make the TLS handshake, or wait until another task has made it. A checkpoint."""
        async with self._handshaking:
            if not self.needs_handshake:
                return
            if self._object.server_side:
                self._take_in()  # the client begins, and has usually done so by now
            while not self._make_handshake():
                await self._flush_all()
                while not self._take_in():
                    await self._below.wait_for_data()
            # In TLS 1.3, a server's session tickets are sent with its first message.
            if not self._object.server_side or self._object.version() != "TLSv1.3":
                await self._flush_all()
            self.needs_handshake = False

    def receive_nowait(self) -> bytes | None:
        if self._left:  # from `receive_some`
            data, self._left = self._left, b""
            return data
        # Data may have arrived together with the end of the handshake.
        if self._end is None and (self._incoming.pending or self._take_in()):
            data = self._decrypt()
            if self._incoming.pending:
                pieces = [data]
                while self._end is None and self._incoming.pending:
                    pieces.append(self._decrypt())
                data = b"".join(pieces)
            if self._outgoing.pending + len(self._encrypted) > _PIECE + _MAX_ANSWERS:
                raise trio.BrokenResourceError("too many key updates from the peer")
            if data:
                return data
        if isinstance(self._end, ssl.SSLError):
            raise _broken(self._end) from self._end
        return self._end

    def wait_for_data(self) -> Awaitable[None]:
        return self._below.wait_for_data()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        # Encrypting cannot be undone: until all of it is sent, this has to be called with the same ``data``.
        if not self._encrypted_size:
            try:
                self._encrypted_size = self._object.write(data if len(data) <= _PIECE else memoryview(data)[:_PIECE])
            except ssl.SSLError as error:
                raise _broken(error) from error
        if not self._flush():
            return 0
        sent, self._encrypted_size = self._encrypted_size, 0
        return sent

    async def send_some(self, data: memoryview) -> int:
        sent = 0
        while not sent:
            await self._below.wait_for_room()
            sent = self.send_nowait(data)
        return sent

    async def wait_for_room(self) -> None:
        await self._below.wait_for_room()

    async def linger(self) -> None:
        self._say_goodbye()
        with trio.move_on_after(CLOSE_SECONDS), contextlib.suppress(trio.BrokenResourceError):
            await self._flush_all()
        await self._below.linger()

    def reset(self) -> None:
        self._cut = True
        self._below.reset()

    def _make_handshake(self) -> bool:
        """Continue the handshake with what has arrived, and return whether it is complete."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            self._send_alert()
            raise _broken(error) from error
        return True

    def _take_in(self) -> bool:
        """Pass received bytes, or end of stream, to OpenSSL, and return whether there was either."""
        data = self._below.receive_nowait()
        if data is None:
            return False
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return True

    def _decrypt(self) -> bytes:
        """Return the data of the next record; ``b""`` if the record is incomplete, or has no application data."""
        try:
            data = self._object.read(_RECORD)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as error:
            self._end = error
            self._send_alert()
            return b""
        if not data:
            self._end = b""
        return data

    def _flush(self) -> bool:
        """Send encrypted data, and return whether the kernel has accepted all of it."""
        if self._outgoing.pending:
            encrypted = self._outgoing.read()
            self._encrypted = b"".join((self._encrypted, encrypted)) if self._encrypted else encrypted
        if self._encrypted:
            sent = self._below.send_nowait(self._encrypted)
            self._encrypted = b"" if sent == len(self._encrypted) else memoryview(self._encrypted)[sent:]
        return not self._encrypted

    async def _flush_all(self) -> None:
        while not self._flush():
            await self._below.wait_for_room()

    def _send_alert(self) -> None:
        """Send OpenSSL's alert for an error, if there is one (RFC 8446, section 6.2)."""
        with contextlib.suppress(trio.BrokenResourceError):
            self._flush()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # SSLWantReadError: the peer has not sent close_notify yet
            self._object.unwrap()

    # As a stream.

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive what has arrived, at most ``max_bytes``, 1 or more; wait if nothing has. ``b""`` after close_notify.

        On cancellation, no data is lost. A checkpoint.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        with self._only_one("receiving"):
            await self._shake_hands()
            while (data := self.receive_nowait()) is None:
                await self.wait_for_data()
            if max_bytes is not None:
                data, self._left = data[:max_bytes], data[max_bytes:]
            return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``, and wait until the kernel has accepted all of it.

        On cancellation, part of it may have been sent; then nothing more can be sent. A checkpoint.
        """
        with self._only_one("sending"):
            self._check_sending()
            await self._shake_hands()
            with memoryview(data) as view:
                self._cut = True
                sent = self.send_nowait(view) if view else 0
                while sent < len(view):
                    sent += await self.send_some(view[sent:])
                self._cut = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` might not have to wait. A checkpoint."""
        with self._only_one("sending"):
            self._check_sending()
            await self._shake_hands()
            await self.wait_for_room()

    async def send_eof(self) -> None:
        """Send end of stream; the peer may still send. Before TLS 1.3, only `aclose` sends it.

        On cancellation, end of stream may or may not have been sent. A checkpoint.
        """
        with self._only_one("sending"):
            if not self._eof_sent:
                self._check_sending()
            await self._shake_hands()
            self._eof_sent = True
            if self._object.version() == "TLSv1.3":
                self._say_goodbye()
                await self._flush_all()

    async def aclose(self) -> None:
        """Close the connection, after a close_notify unless sending was interrupted in the middle of a message.

        On cancellation, it is closed at once. A checkpoint.
        """
        try:
            if not (self._cut or self.needs_handshake):
                self._say_goodbye()
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    if not self._flush():
                        with trio.move_on_after(CLOSE_SECONDS):
                            await self._flush_all()
        finally:
            self._left = b""
            await self._below.aclose()
        await trio.lowlevel.checkpoint()

    async def _shake_hands(self) -> None:
        if self.needs_handshake:
            await self.handshake()
        else:
            await trio.lowlevel.checkpoint()

    def _check_sending(self) -> None:
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of the stream was already sent")
        if self._cut:
            raise trio.BrokenResourceError("an earlier send was cut off")

    @contextlib.contextmanager
    def _only_one(self, what: str) -> Iterator[None]:
        if what in self._busy:
            raise trio.BusyResourceError(f"another task is {what}")
        if self.transport_stream.socket.fileno() == -1:
            raise trio.ClosedResourceError("this connection was closed")
        self._busy.add(what)
        try:
            yield
        finally:
            self._busy.discard(what)


def _broken(error: ssl.SSLError) -> trio.BrokenResourceError:
    return trio.BrokenResourceError(f"TLS failed: {error}")
