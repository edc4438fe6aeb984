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

# For how long our handlers wait for a client, unless they are told otherwise: for its next request, and for all of one
# that has begun.
IDLE_TIMEOUT = 300.0
REQUEST_TIMEOUT = 30.0

# A closing connection goes on discarding what its client still sends for as long as this in all, this long after the
# last of it, and for this much. (nginx calls these lingering_time and lingering_timeout.)
LINGER_SECONDS = 5.0
LINGER_SILENCE = 1.0
LINGER_BYTES = 16 * 2**20

# A client that is connected when the server begins to stop, and has not sent anything yet, mostly has its first
# request, or its TLS handshake, on the way. It has this many seconds, from when it was accepted, to get it here.
FIRST_REQUEST_GRACE = 1.0

# A client that always has its next request on its way is answered for this many seconds of a stop, and then ended
# between two requests. If nothing did, the end of the grace period would: in the middle of a reply.
LAST_REQUESTS_SECONDS = 1.0

# What a connection awaits from its client, in the words of the log.
_NOTHING = "nothing"
_HANDSHAKE = "a TLS handshake"
_REQUEST = "a request"
_REST = "the rest of a request"
_ROOM = "room for a reply"

_FAULTS = (trio.BrokenResourceError, trio.TooSlowError)


class ClientError(trio.BrokenResourceError):
    """The client broke the connection, or took too long.

    Attributes:
        timed_out: whether it took too long.
    """

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Connection:
    """The server's side of one conversation with one client.

    Use it as an async context manager around the conversation; leaving the block closes the stream. A client that
    breaks the connection, or overstays a time-out, ends the block without an error, because to a server these are
    ordinary ways to leave.

    If the server ends the conversation, and not the client, the client still gets everything that was sent: the
    stream is ended first (FIN) and closed when the client has ended its side, or after `LINGER_SECONDS`.

    In a server's graceful stop, a wait for the next request becomes the end of the conversation; a request that is
    partly received may be finished. A client that leaves nothing to wait for is ended between two requests after
    `LAST_REQUESTS_SECONDS`.

    Args:
        stream: the client's stream, of any kind. The connection takes charge of it: no other task may use it.
        idle_timeout: seconds, above 0, that a client may let pass between two requests, or without taking any byte
            of a reply.
        request_timeout: seconds, above 0, that a request may take from its first byte to its last, and that a TLS
            handshake may take.

    Cancellation closes the stream without ceremony, and goes on.
    """

    __slots__ = (
        "_accepted",
        "_client_ended",
        "_drain",
        "_fresh",
        "_handshake",
        "_idle_timeout",
        "_request_due",
        "_request_timeout",
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
        self._request_due: float | None = None  # when the request that is partly received must be complete
        self._waits_for = _NOTHING
        self._drain = current_drain()
        self._accepted = trio.current_time()
        self._fresh = True  # nothing was received yet
        self._client_ended = False

    @property
    def peer(self) -> str:
        """The client's name, for log lines."""
        return peer_name(self._stream)

    @property
    def client_ended(self) -> bool:
        """Whether the client has sent its last."""
        return self._client_ended

    async def __aenter__(self) -> Self:
        self._drain.listen(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._drain.unlisten(self)
        try:
            alive = error is None or (isinstance(error, ClientError) and error.timed_out)
            if alive and not self._client_ended:
                await _linger(self._stream)
        finally:
            await self._transport.aclose()
        return isinstance(error, ClientError)

    async def exchange(self, reply: bytes, *, mid_request: bool = False) -> bytes:
        """Send ``reply``, then receive what the client sends next.

        The reply goes out whole before anything more is taken in, so a client that does not read holds back only
        itself: no replies pile up here, and TCP's flow control stops the client from sending.

        Args:
            reply: bytes that the client is owed; none if there are none.
            mid_request: whether the client is in the middle of a request, and not between two. With a reply, it is
                another request than before.

        Returns:
            The next bytes as they arrive, at most `RECEIVE_SIZE` of them; ``b""`` when there will be no more: the
            client has sent its last, or the server stops.

        Raises:
            ClientError: if the client broke the connection, or took too long. The handler lets it pass; the block
                around the conversation ends on it.

        On cancellation, part of the reply may have been sent.
        """
        try:
            if self._fresh and type(self._stream) is trio.SSLStream:  # a final class; isinstance is slow with its kind
                self._waits_for = _HANDSHAKE
                with trio.fail_after(self._request_timeout) as self._handshake:
                    if self._drain.began:
                        self.stop_waiting()
                    await self._stream.do_handshake()
            if reply:
                self._waits_for = _ROOM
                await self._transport.send_all(reply, self._idle_timeout)
            if self._drain.began and (reply or not mid_request) and self._heard_enough():
                return b""
            self._waits_for = _REST if mid_request else _REQUEST
            received = await self._transport.receive(self._patience(mid_request=mid_request, another=bool(reply)))
        except _FAULTS as error:
            raise self._fault(error) from error
        if received is None:
            if self._drain.began and not mid_request:
                return b""
            raise self._fault(trio.TooSlowError())
        self._waits_for = _NOTHING
        self._fresh = False
        self._client_ended = not received
        return received

    async def send(self, reply: bytes) -> None:
        """Send ``reply``, whole.

        Raises:
            ClientError: as `exchange` does.

        On cancellation, part of it may have been sent.
        """
        self._waits_for = _ROOM
        try:
            await self._transport.send_all(reply, self._idle_timeout)
        except _FAULTS as error:
            raise self._fault(error) from error
        await trio.lowlevel.checkpoint()

    async def relay(self) -> None:
        """Send back what has arrived, unseen, for a while as long as there is more; not at all where it cannot be done.

        Raises:
            ClientError: as `exchange` does.

        On cancellation, bytes may be lost on their way through.
        """
        self._waits_for = _ROOM
        try:
            await self._transport.relay(self._idle_timeout)
        except _FAULTS as error:
            raise self._fault(error) from error

    def stop_waiting(self) -> None:
        """Wait for a next request no longer, as the server stops. Its `Drain` calls this."""
        if self._waits_for == _REQUEST:
            self._transport.hurry(self._last_call())
        elif self._waits_for == _HANDSHAKE:
            in_time = trio.current_time() + self._last_call()
            self._handshake.deadline = min(self._handshake.deadline, in_time)

    def _patience(self, *, mid_request: bool, another: bool) -> float:
        """How many seconds the client has, counted from now; `trio.TooSlowError` if a request has none left."""
        if not mid_request:
            self._request_due = None
            return self._last_call() if self._drain.began else self._idle_timeout
        now = trio.current_time()
        if self._request_due is None or another:
            self._request_due = now + self._request_timeout
        if now >= self._request_due:  # however many bytes of it go on arriving
            raise trio.TooSlowError
        return self._request_due - now

    def _heard_enough(self) -> bool:
        return not self._fresh and trio.current_time() >= self._drain.began_at + LAST_REQUESTS_SECONDS

    def _last_call(self) -> float:
        """How many seconds there are in a stop for a request to arrive: none, except for a client's first."""
        return max(0.0, self._accepted + FIRST_REQUEST_GRACE - trio.current_time()) if self._fresh else 0.0

    def _fault(self, error: Exception) -> ClientError:
        timed_out = isinstance(error, trio.TooSlowError)
        fault = "timed out" if timed_out else f"broke the connection: {error.__cause__ or error}"
        # A client that falls asleep between two requests, or breaks off, is no news.
        news = (_HANDSHAKE, _REST, _ROOM) if timed_out else (_HANDSHAKE,)
        level = logging.WARNING if self._waits_for in news else logging.DEBUG
        if _log.isEnabledFor(level):  # asking the kernel for the name is not for nothing
            _log.log(level, "%s, awaiting %s, %s", self.peer, self._waits_for, fault)
        return ClientError(fault, timed_out=timed_out)


async def _linger(stream: trio.abc.Stream) -> None:
    """End ``stream`` such that replies already sent are not destroyed on their way.

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
