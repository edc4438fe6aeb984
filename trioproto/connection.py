"""A served connection, turn by turn: replies out, the next bytes in.

Every server handler here is a loop over `Connection.exchange`. What a handler would otherwise repeat lives behind
it: closing the stream, and what to do about a peer that breaks the connection.
"""

import logging
from types import TracebackType
from typing import Self

import trio

from trioproto.addresses import peer_name
from trioproto.streams import RECEIVE_SIZE

_log = logging.getLogger(__name__)

# How long, and how much, a closing connection goes on discarding what its client still sends.
LINGER_SECONDS = 5.0
LINGER_BYTES = 16 * 2**20


class Connection:
    """The server's side of one conversation with one client.

    Use it as an async context manager around the conversation; leaving the block closes the stream. A client that
    breaks the connection ends the block without an error, because to a server that is an ordinary way to leave.

    Args:
        stream: the client's stream, of any kind. The connection takes charge of it.

    Cancellation closes the stream without ceremony, and goes on.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._client_ended = False

    @property
    def peer(self) -> str:
        """The client's name, for log lines."""
        return peer_name(self._stream)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            if error is None and not self._client_ended:
                await _linger(self._stream)
        except trio.BrokenResourceError:
            pass  # The client left before we had done waiting for that.
        finally:
            await self._stream.aclose()
        if isinstance(error, trio.BrokenResourceError):
            _log.debug("%s broke the connection: %s", self.peer, error.__cause__ or error)
            return True
        return False

    async def send(self, reply: bytes) -> None:
        """Send ``reply``, whole.

        Raises:
            trio.BrokenResourceError: as `exchange` does.

        On cancellation, part of it may have been sent.
        """
        await self._stream.send_all(reply)

    async def exchange(self, reply: bytes) -> bytes:
        """Send ``reply``, then receive what the client sends next.

        The reply goes out whole before anything more is taken in, so a client that does not read holds back only
        itself: no replies pile up here, and TCP's flow control stops the client from sending.

        Args:
            reply: bytes that the client is owed; none if there are none.

        Returns:
            The next bytes as they arrive, at most `RECEIVE_SIZE` of them; ``b""`` when the client has sent its
            last.

        Raises:
            trio.BrokenResourceError: if the client broke the connection. The handler lets it pass; the block
                around the conversation ends on it.

        On cancellation, part of the reply may have been sent.
        """
        if reply:
            await self._stream.send_all(reply)
        received = await self._stream.receive_some(RECEIVE_SIZE)
        self._client_ended = not received
        return bytes(received)


async def _linger(stream: trio.abc.Stream) -> None:
    """End ``stream`` such that replies already sent are not destroyed on their way.

    Closing a socket that holds bytes nobody has received, or that is sent more later, makes the kernel send a
    reset (RFC 1122, section 4.2.2.13), and a reset makes the client's kernel throw away replies that its program
    has not read yet. So we send end of stream, and take in and discard what still comes until the client has seen
    it and ends its side too; for a bounded time and amount, as nobody may keep us here.

    Raises:
        trio.BrokenResourceError: if the client breaks the connection meanwhile.
    """
    if not isinstance(stream, trio.abc.HalfCloseableStream):
        return
    discarded = 0
    with trio.move_on_after(LINGER_SECONDS):
        await stream.send_eof()
        while discarded < LINGER_BYTES and (chunk := await stream.receive_some(RECEIVE_SIZE)):
            discarded += len(chunk)
