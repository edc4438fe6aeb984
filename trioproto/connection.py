"""A served connection, turn by turn: replies out, the next bytes in.

Every server handler here is a loop over `Connection.exchange`. What a handler would otherwise have to see to lives
behind it: time-outs, a server's graceful stop, a peer that breaks the connection, and closing without loss.
"""

import contextlib
import logging
import math
from types import TracebackType
from typing import Self

import trio

from trioproto.addresses import peer_name
from trioproto.draining import current_drain
from trioproto.streams import RECEIVE_SIZE
from trioproto.transport import transport_for

_log = logging.getLogger(__name__)

# A closing connection goes on discarding what its client still sends for as long as this in all, this long after the
# last of it, and for this much. (nginx calls these lingering_time and lingering_timeout.)
LINGER_SECONDS = 5.0
LINGER_SILENCE = 1.0
LINGER_BYTES = 16 * 2**20

# A client that had connected when the server began to stop, and has not sent anything yet, mostly has its first
# request on the way. It has this many seconds, from its connecting, to get it here.
FIRST_REQUEST_GRACE = 1.0

# What a connection awaits from its client, in the words of the log.
_NOTHING = "nothing"
_HANDSHAKE = "a TLS handshake"
_REQUEST = "a request"
_REST = "the rest of a request"
_ROOM = "room for a reply"


class Connection:
    """The server's side of one conversation with one client.

    Use it as an async context manager around the conversation; leaving the block closes the stream. A client that
    breaks the connection, or overstays a time-out, ends the block without an error, because to a server these are
    ordinary ways to leave.

    If the server ends the conversation, and not the client, the client still gets everything that was sent: the
    stream is ended first (FIN) and closed when the client has ended its side, or after `LINGER_SECONDS`.

    In a server's graceful stop, a wait for the next request becomes the end of the conversation; a request that is
    partly received may be finished.

    Args:
        stream: the client's stream, of any kind. The connection takes charge of it.
        idle_timeout: seconds, above 0, that a client may let pass between two requests, or without taking any byte
            of a reply. It may get a sixteenth more of it, and at most one second.
        request_timeout: seconds, above 0, that a request may take from its first byte to its last, and that a TLS
            handshake may take. It may get a sixteenth more of it, and at most one second.

    Cancellation closes the stream without ceremony, and goes on.
    """

    __slots__ = (
        "_accepted",
        "_client_ended",
        "_deadline",
        "_drain",
        "_fresh",
        "_idle_timeout",
        "_mid_request",
        "_request_timeout",
        "_scope",
        "_stream",
        "_transport",
        "_waits_for",
    )

    def __init__(
        self, stream: trio.abc.Stream, *, idle_timeout: float = math.inf, request_timeout: float = math.inf
    ) -> None:
        self._stream = stream
        self._transport = transport_for(stream)
        self._idle_timeout = idle_timeout
        self._request_timeout = request_timeout
        self._accepted = trio.current_time()
        # One scope for the whole conversation: to give the client more time is to move its deadline.
        self._deadline = self._accepted + idle_timeout + _leeway(idle_timeout)
        self._scope = trio.CancelScope(deadline=self._deadline)
        self._waits_for = _NOTHING
        self._drain = current_drain()
        self._fresh = True  # nothing was received yet
        self._mid_request = False
        self._client_ended = False

    @property
    def peer(self) -> str:
        """The client's name, for log lines."""
        return peer_name(self._stream)

    async def __aenter__(self) -> Self:
        self._scope.__enter__()
        self._drain.listen(self._stop_waiting)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._drain.unlisten(self._stop_waiting)
        try:
            self._scope.__exit__(kind, error, traceback)
            timed_out = self._scope.cancelled_caught
            broken = isinstance(error, trio.BrokenResourceError)
            if error is not None and not timed_out and not broken:
                return False
            if timed_out:
                self._log_fault("timed out", timed_out=True)
            elif isinstance(error, trio.BrokenResourceError):
                self._log_fault(f"broke the connection: {error.__cause__ or error}")
            if not broken and not self._client_ended:
                await _linger(self._stream)
            return True
        finally:
            await self._transport.aclose()

    async def exchange(self, reply: bytes, *, mid_request: bool = False) -> bytes:
        """Send ``reply``, then receive what the client sends next.

        The reply goes out whole before anything more is taken in, so a client that does not read holds back only
        itself: no replies pile up here, and TCP's flow control stops the client from sending.

        Args:
            reply: bytes that the client is owed; none if there are none.
            mid_request: whether the client is in the middle of a request, and not between two. A reply tells that
                this is another request than before.

        Returns:
            The next bytes as they arrive, at most `RECEIVE_SIZE` of them; ``b""`` when there will be no more: the
            client has sent its last, or the server stops.

        Raises:
            trio.BrokenResourceError: if the client broke the connection. The handler lets it pass; the block
                around the conversation ends on it.

        On cancellation, part of the reply may have been sent.
        """
        if self._fresh and isinstance(self._stream, trio.SSLStream):
            self._allow(self._request_timeout, _HANDSHAKE)
            await self._stream.do_handshake()
        if reply:
            await self._transport.send_all(reply, self._wait_for_room)
        if not mid_request:
            self._allow(self._idle_timeout, _REQUEST)
            if self._drain.began:
                self._stop_waiting()
        elif reply or not self._mid_request:
            self._allow(self._request_timeout, _REST)
        else:
            self._waits_for = _REST
        self._mid_request = mid_request
        received = await self._transport.receive()
        self._waits_for = _NOTHING
        self._fresh = False
        self._client_ended = received == b""
        return received or b""

    async def send(self, reply: bytes) -> None:
        """Send ``reply``, whole.

        Raises:
            trio.BrokenResourceError: as `exchange` does.

        On cancellation, part of it may have been sent.
        """
        await self._transport.send_all(reply, self._wait_for_room)
        await trio.lowlevel.checkpoint()

    async def relay(self) -> None:
        """Send back what has arrived, unseen, as long as more of it is there; do nothing where the system cannot.

        Raises:
            trio.BrokenResourceError: as `exchange` does.

        On cancellation, bytes may be lost on their way through.
        """
        await self._transport.relay(self._wait_for_room)

    def _log_fault(self, fault: str, *, timed_out: bool = False) -> None:
        # A client that falls asleep between two requests, or breaks off, is no news.
        news = self._waits_for in (_REST, _ROOM, _HANDSHAKE) if timed_out else self._waits_for == _HANDSHAKE
        level = logging.WARNING if news else logging.DEBUG
        if _log.isEnabledFor(level):  # asking the kernel for the name is not for nothing
            _log.log(level, "%s, awaiting %s, %s", self.peer, self._waits_for, fault)

    def _wait_for_room(self) -> None:
        self._allow(self._idle_timeout, _ROOM)

    def _allow(self, seconds: float, waits_for: str) -> None:
        """Give the client ``seconds`` from now, or up to a sixteenth more.

        Moving a deadline costs as much as a request does. So it is moved a little too far, and then stays where it
        is until that little has passed.
        """
        self._waits_for = waits_for
        deadline = trio.current_time() + seconds
        latest = deadline + _leeway(seconds)
        if not deadline <= self._deadline <= latest:
            self._deadline = self._scope.deadline = latest

    def _stop_waiting(self) -> None:
        """The server stops: end the wait for a request, if there is one."""
        if self._waits_for != _REQUEST:
            return
        first_request_due = self._accepted + FIRST_REQUEST_GRACE
        if self._fresh and trio.current_time() < first_request_due:
            self._deadline = self._scope.deadline = first_request_due
        else:
            self._transport.interrupt()


def _leeway(seconds: float) -> float:
    return min(seconds / 16, 1.0)


async def _linger(stream: trio.abc.Stream) -> None:
    """End ``stream`` such that replies already sent are not destroyed on their way.

    Closing a socket that holds bytes nobody has received, or that is sent more later, makes the kernel send a
    reset (RFC 1122, section 4.2.2.13), and a reset makes the client's kernel throw away replies that its program
    has not read yet. So we send end of stream, and take in and discard what still comes until the client has seen
    it and ends its side too; for a bounded time and amount, as nobody may keep us here.

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
