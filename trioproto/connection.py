"""`Connection`: a server's side of the conversation with one client, for every kind of handler.

A handler only has to receive, send, and push. `Connection` takes care of time-outs, back-pressure, the server's
graceful stop, clients that disconnect or send invalid data, and closing without loss.
"""

import contextlib
import logging
import math
import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import trio

from trioproto.addresses import failure_reason
from trioproto.buffer import ReceiveBuffer
from trioproto.draining import Ending, accepted_as
from trioproto.streams import RECEIVE_SIZE, IncompleteReadError
from trioproto.transport import Pipe, SocketTransport, close_as_broken, transport_for

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")

# Default time-outs of our handlers, in seconds: for a client's next request to begin, and for a request that has begun
# to be complete.
IDLE_TIMEOUT = 300.0
REQUEST_TIMEOUT = 30.0

# When a stop begins, a client that has just connected and not sent anything yet usually has its first request, or its
# TLS handshake, on the way. It has this many seconds, from when it was accepted, for that to arrive.
FIRST_REQUEST_GRACE = 1.0

# In a stop, a client that never pauses between requests is answered for this many seconds. Its connection is then ended
# between two requests. Otherwise, it would last until the end of the grace period, and be cut in the middle of a reply.
LAST_REQUESTS_SECONDS = 1.0

# When this many pushed bytes are unsent, `requests` waits until they are sent. So it reads no more requests from a
# client that does not receive its replies.
MAX_OWED = 65536

# Requests that have arrived together are read without a checkpoint, except for one after this many.
REQUESTS_PER_TURN = 64

# How many times a relay moves data within the kernel before it checks whether the server is stopping.
SPLICES_PER_TURN = 16

# What a connection waits for, as named in the log.
_HANDSHAKE = "a TLS handshake"
_REQUEST = "a request"
_REST = "the rest of a request"
_ROOM = "room for a reply"

_NOTHING = memoryview(b"")
_NO_SCOPE = contextlib.nullcontext()

How = Literal["reset", "idle", "late", "ended", "overrun", "stopped"]


class ProtocolError(ValueError):
    """A client sent data that violates the protocol."""


class ClientError(trio.BrokenResourceError):
    """The conversation with a client cannot go on, through no fault of the handler, which need not catch this.

    A loop that catches all exceptions must end on this one, because every further call would raise it again.

    Attributes:
        connection: the `Connection`. Its own block ends quietly on this; in the block of another one, it is an error
            like any other.
        how: ``reset``, the connection broke; ``idle``, the client began no request in time; ``late``, it took too long
            to complete one or the TLS handshake, or to receive what it was sent; ``ended``, it ended its side inside a
            request; ``overrun``, it did not receive what was pushed; or ``stopped``, the server is stopping, and a
            message that a handler waited for outside of `Connection.requests` had not begun.
    """

    def __init__(self, message: str, connection: "Connection", how: How, level: int) -> None:
        super().__init__(message)
        self.connection = connection
        self.how = how
        self.level = level  # of its log line


class _ClosedError(trio.ClosedResourceError):
    def __init__(self, connection: "Connection") -> None:
        super().__init__("this connection was closed")
        self.connection = connection


# The exceptions of a transport.
_FAILURES = (trio.BrokenResourceError, trio.ClosedResourceError)


class Connection(trio.abc.HalfCloseableStream):
    """A server's side of the conversation with one client: a stream with time-outs, requests, and a safe close.

    Use it as an async context manager around the conversation. It can be used like any Trio stream, except that it
    buffers: a cancelled receive loses no data. (But if it was still sending what was pushed, on a stream other than a
    socket, nothing more can be sent.) For a client that wants to see the errors of its connection, use it without the
    block, and close it.

    The block ends without an exception:

    - When its body ends. All that was sent and pushed is delivered, then end of stream. The client has a few seconds to
      end its side, so that the kernel does not drop unsent data.
    - On a `ClientError` of this connection, also in an exception group from a nursery inside the block. One that an
      operator should know about is logged, in one line.
    - On a `ProtocolError` from any source: the client violated the protocol. Pushed data is still sent. The message of
      the error is logged as a warning.
    - When another task has called `aclose`.

    Any other exception, including cancellation, closes the connection without sending anything more, and propagates. A
    connection that is closed in the middle of sending is reset, so that a truncated message cannot pass for a whole
    one.

    In the server's graceful stop, waiting for the next request ends: `requests` ends, and `receive_some` returns
    ``b""``. A partly received request may be completed. A client that has not sent anything yet has a second, from when
    it was accepted, for its first request (`FIRST_REQUEST_GRACE`). The connection of a client that never pauses is
    ended between two requests after a second (`LAST_REQUESTS_SECONDS`).

    Args:
        stream: any Trio stream. The connection owns it: nothing else may use it.
        idle_timeout: seconds, above 0, without data in either direction while waiting for the client's next request to
            begin; and how long a send may wait for buffer space. `math.inf`, the default, is no limit.
        request_timeout: seconds, above 0, that a request may take from its first byte to its last, and that a TLS
            handshake may take. The default is no limit, too.
        max_unsent: allows any task to push: how many pushed bytes, 0 or more, may be unsent before the client is
            disconnected. It should be more than the largest message. None: only the handler may push; what another
            task pushes is held back until the handler next begins to wait for the client.

    Raises:
        ValueError: on creation, for an argument out of range.
    """

    __slots__ = (
        "_accepted",
        "_begun",
        "_buffer",
        "_closed",
        "_cut",
        "_drain",
        "_due",
        "_ended",
        "_eof_sent",
        "_fresh",
        "_handshaken",
        "_idle_due",
        "_idle_timeout",
        "_in_pipe",
        "_let_go",
        "_max_owed",
        "_max_unsent",
        "_others",
        "_owed",
        "_promised",
        "_receiving",
        "_request_timeout",
        "_rest",
        "_rest_was_pushed",
        "_scope",
        "_send_all_busy",
        "_sender",
        "_sending",
        "_taken",
        "_taken_up",
        "_transport",
        "_waiting",
    )

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        idle_timeout: float = math.inf,
        request_timeout: float = math.inf,
        max_unsent: int | None = None,
    ) -> None:
        if not (idle_timeout > 0 and request_timeout > 0):
            raise ValueError(f"time-outs must be above 0 seconds, not {idle_timeout} and {request_timeout}")
        if max_unsent is not None and max_unsent < 0:
            raise ValueError(f"max_unsent must be at least 0 bytes, not {max_unsent}")
        self._transport = transport_for(stream)
        self._accepted = accepted_as(stream)
        self._accepted.counted = True
        self._drain = self._accepted.drain
        self._idle_timeout = idle_timeout
        self._request_timeout = request_timeout
        self._max_unsent = max_unsent
        self._max_owed = MAX_OWED if max_unsent is None else min(MAX_OWED, max_unsent // 2)
        self._handshaken = not self._transport.needs_handshake
        self._closed = False

        # Receiving.
        self._buffer = ReceiveBuffer()
        self._fresh = True  # nothing was received yet
        self._ended = False  # the client has ended its side
        self._begun = False  # a request, or another message, is partly received ...
        self._due: float | None = None  # ... and its deadline, once it had to be waited for
        self._idle_due: float | None = None  # deadline for the next message to begin, once it had to be waited for
        self._taken_up = 0  # requests since the last checkpoint
        self._receiving = False
        self._waiting: trio.CancelScope | None = None  # around a waiting receive

        # Sending.
        self._promised = 0  # total bytes to send so far ...
        self._taken = 0  # ... and how many of them the kernel has accepted
        self._owed: list[bytes] = []  # pushed, not sent yet
        self._rest: memoryview = _NOTHING  # the unsent part of what is being sent
        self._rest_was_pushed = False
        self._in_pipe = 0  # bytes of a relay that are in a pipe
        self._sending = False  # a task waits for buffer space
        self._send_all_busy = False
        self._others: trio.lowlevel.ParkingLot | None = None  # tasks that wait until another has sent, or pushed
        self._eof_sent = False
        self._cut = False  # sending has stopped in the middle of a message

        # The block, if any task may push.
        self._sender: contextlib.AsyncExitStack | None = None  # holds the nursery of the sending task
        self._scope: trio.CancelScope | None = None  # around the body
        self._let_go: ClientError | None = None  # why it was cancelled

    @property
    def peer(self) -> str:
        """The client's address as text, for log lines; still known after the connection is gone."""
        return self._accepted.peer

    @property
    def unsent(self) -> int:
        """How many pushed bytes the kernel has not accepted yet."""
        unsent = self._promised - self._taken
        return unsent if self._rest_was_pushed else unsent - len(self._rest)

    @property
    def stopping(self) -> trio.Event:
        """A `trio.Event`, set when the server's graceful stop begins.

        Never set if the stream was not accepted by a trioproto server.
        """
        return self._drain.began

    # The block.

    async def __aenter__(self) -> Self:
        self._drain.add_callback(self._stop)
        if self._max_unsent is not None:
            self._sender = contextlib.AsyncExitStack()
            nursery = await self._sender.enter_async_context(trio.open_nursery())
            self._sender.callback(nursery.cancel_scope.cancel)
            nursery.start_soon(self._send_what_is_pushed)
            self._scope = trio.CancelScope()
            self._scope.__enter__()
            if self._let_go is not None:  # too much was pushed before the block
                self._scope.cancel()
        return self

    async def __aexit__(  # type: ignore[override]
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        rest = error
        if self._scope is not None:
            # If the scope was cancelled, by an overrun or `aclose`, it catches the cancellation here.
            try:
                if self._scope.__exit__(kind, error, traceback):
                    rest = None
            except BaseException as others:  # noqa: BLE001 - the rest of a group
                rest = others
        own, rest = (None, None) if rest is None else self._split(rest)
        own = self._let_go or own
        self._accepted.how = self._how(own, rest)
        if own is not None:
            self._log(own)
        try:
            if rest is None and not self._closed:
                await self._finish(own)
        except ClientError as failure:
            if own is None:
                self._accepted.how = failure.how
                self._log(failure)
        finally:
            self._drain.remove_callback(self._stop)
            self._drop()
            self._let_go = None  # its traceback would keep the data that was being sent alive
            await self._close_all(rest)
        if rest is None:
            return True
        if rest is error:
            return False
        raise rest from None

    async def _close_all(self, rest: BaseException | None) -> None:
        """Close the stream, and end the sending task; ``rest`` is the exception that propagates from the block."""
        try:
            try:
                await self._transport.aclose()
            finally:
                if self._sender is not None:
                    await self._sender.aclose()
        except BaseException as error:
            # A cancellation is raised again at the next checkpoint; it must not replace a bug.
            if rest is None or BaseExceptionGroup("", [error]).split(trio.Cancelled)[1] is not None:
                raise

    def _split(self, error: BaseException) -> tuple[BaseException | None, BaseException | None]:
        """Split ``error`` into what ends this block quietly, and what propagates."""
        if isinstance(error, BaseExceptionGroup):
            # Python 3.11 requires a function, not a bound method.
            group, rest = error.split(lambda leaf: self._is_own(leaf))  # noqa: PLW0108
            own: BaseException | None = group
            while isinstance(own, BaseExceptionGroup):  # one log line is enough
                own = own.exceptions[0]
            return own, rest
        return (error, None) if self._is_own(error) else (None, error)

    def _is_own(self, error: BaseException) -> bool:
        match error:
            case ClientError():
                return error.connection is self
            case IncompleteReadError():
                return error.stream is self
            case _ClosedError():
                return error.connection is self and self._closed
            case _:
                return isinstance(error, ProtocolError)

    async def _finish(self, own: BaseException | None) -> None:
        """Send pending data, and end the connection so that all of it arrives, unless the client is gone."""
        if self._cut or (
            isinstance(own, ClientError)
            and (own.how in ("reset", "overrun") or (self._rest and not self._sending) or not self._handshaken)
        ):
            return
        if self._scope is not None:  # an overrun or `aclose` can still end this
            self._scope = trio.CancelScope()
        self._send_all_busy = True  # no more sends after the pending data
        try:
            with self._scope or _NO_SCOPE:
                if self._owed or self._rest or self._sending:
                    await self._deliver_alone()
                self._closed = True
                while self._receiving:  # a task outside of the block, which now gets an exception
                    if self._waiting is not None:
                        self._waiting.cancel()
                    await self._wait_for_others()
                if not self._ended:
                    await self._transport.linger()
        except trio.ClosedResourceError:
            if not self._closed:
                raise
        if own is None and self._let_go is not None:
            raise self._let_go

    def _drop(self) -> None:
        """Drop all buffers; if that truncates a message, closing will reset the connection."""
        self._closed = True
        if self._cut or self._rest or self._in_pipe:
            self._transport.reset()
        self._buffer.clear()
        self._drop_unsent()
        self._wake_others()

    def _drop_unsent(self) -> None:
        self._owed.clear()
        self._rest = _NOTHING
        self._taken = self._promised

    async def aclose(self) -> None:
        """Close the connection, without sending what was pushed, and without lingering.

        From another task, this ends the block without an exception: with ``max_unsent`` at once, otherwise as soon as
        the handler uses the connection. In the middle of sending a message, the connection is reset.

        On cancellation, the connection is still closed. A checkpoint.
        """
        if self._scope is not None:
            self._scope.cancel()
        self._drop()
        await self._transport.aclose()
        await trio.lowlevel.checkpoint()

    def _end_block(self, error: ClientError) -> None:
        """End the block with ``error``, wherever its body is. Sending may stop in the middle of a message."""
        self._cut = True
        if self._let_go is None:
            self._let_go = error
        if self._scope is not None:
            self._scope.cancel()

    def _log(self, error: BaseException) -> None:
        accepted = self._accepted
        match error:
            case ClientError():
                level, what = error.level, str(error)
            case ProtocolError():
                level, what = logging.WARNING, f"protocol error: {error}"
            case IncompleteReadError():
                level, what = logging.WARNING if error.partial else logging.DEBUG, str(error)
            case _:
                level, what = logging.DEBUG, "closed by another task"
        if _log.isEnabledFor(level):
            name = self.peer if accepted.server is None else f"{self.peer} to {accepted.server}"
            _log.log(level, "%s: %s", name, what)

    def _how(self, own: BaseException | None, rest: BaseException | None) -> Ending:
        """Return how the conversation ended, for a block that ends with ``own`` or ``rest``."""
        match own:
            case ClientError():
                return own.how
            case ProtocolError():
                return "malformed"
        if rest is not None or self._closed:
            return "cut"
        return "stopped" if self._drain.began_at is not None and not self._ended else "ended"

    # Receiving.

    def requests(self, read: "Callable[[Connection], Awaitable[RequestT]]") -> AsyncIterator[RequestT]:
        """Iterate over the client's requests, each of which is returned by ``await read(connection)``.

        A request begins with its first byte and ends when ``read`` returns. Until the first byte, the idle time-out
        applies; from then on, the request time-out, for the whole request. If ``read`` is cancelled, nothing is lost:
        the next iteration, also of another iterator, begins at the first byte of the request again.

        The iteration ends when the client has ended its side (sent end of stream) between two requests, or when the
        server is stopping and no request has begun. It may be left with ``break`` and resumed, also with another
        ``read``.

        Before the next request is read, pushed data is sent, if it is 64 KiB or more (`MAX_OWED`; half of
        ``max_unsent``, if that is less), or if the request has not arrived yet. Requests that have arrived together are
        read without a checkpoint, except for one every 64 (`REQUESTS_PER_TURN`).

        Args:
            read: an async function that receives one request with the methods of this class, and returns it. It may
                also receive all that has arrived, and return many requests as one. It must give back the remainder with
                `unreceive`, and not keep it in a parser, because the next request begins with a received byte.

        Raises:
            ClientError: if the connection broke, or the client took too long, or ended its side inside a request.
            trio.BusyResourceError: if another task is receiving.
            trio.ClosedResourceError: if another task closed the connection.
        """
        return _Requests(self, read)

    def receive_some(self, max_bytes: int | None = None) -> Coroutine[Any, Any, bytes]:
        """Receive what has arrived, one byte or more; wait if nothing has.

        Args:
            max_bytes: the maximum to return, 1 or more; None for all that has arrived.

        Returns:
            ``b""`` at end of stream: the client has ended its side, or the server is stopping.

        Raises:
            ClientError: if the connection broke or the client took too long; inside a request (`requests`), also at end
                of stream.
            trio.BusyResourceError: if another task is receiving.
            trio.ClosedResourceError: if the connection is closed.

        On cancellation, no data is lost. A checkpoint, except inside a request for what has already arrived.
        """
        # Not a coroutine, which would be slower for many small messages.
        if max_bytes is None and not self._begun and not self._buffer.size:
            return self._receive()
        return self._receive_buffered(max_bytes)

    async def _receive_buffered(self, max_bytes: int | None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        if self._receiving or not self._buffer.size:
            data = await self._receive()
            if self._begun and not data:
                raise self._ended_early()
            self._buffer.append(data)
        elif not self._begun:
            self._due = None  # of an abandoned request
            await trio.lowlevel.checkpoint()
            self._check_open()
            if not self._buffer.size:
                raise trio.BusyResourceError("another task was receiving from this connection")
        return self._buffer.take(self._buffer.size if max_bytes is None else max_bytes)

    async def receive_exactly(self, n: int) -> bytes:
        """Receive exactly ``n`` bytes, however many pieces they arrive in.

        Args:
            n: how many bytes, 0 or more.

        Raises:
            ValueError: if ``n`` is negative.
            ClientError: if the connection broke, the client took too long, or the stream ended first; outside of
                `requests`, also if the server is stopping and no byte has arrived.
            trio.BusyResourceError: if another task is receiving.
            trio.ClosedResourceError: if the connection is closed.

        On cancellation, no data is lost. A checkpoint, except inside a request for what has already arrived.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, not {n}")
        if self._receiving or not self._begun or self._buffer.size < n:
            await self._receive_until_complete(lambda: self._buffer.size >= n)
        return self._buffer.take(n)

    async def receive_until(self, delimiter: bytes, *, max_bytes: int) -> bytes:
        """Receive up to the next ``delimiter``, and return what is before it.

        Args:
            delimiter: one byte or more.
            max_bytes: how many bytes may be before it, 0 or more.

        Raises:
            ValueError: if ``delimiter`` is empty.
            ProtocolError: if there are more than ``max_bytes`` before it.
            ClientError: as for `receive_exactly`, like its other exceptions.

        On cancellation, no data is lost. A checkpoint, except inside a request for what has already arrived.
        """
        if not delimiter:
            raise ValueError("the delimiter must not be empty")
        found = -1
        searched = 0

        def complete() -> bool:
            nonlocal found, searched
            found = self._buffer.find(delimiter, max(0, searched - len(delimiter) + 1))
            searched = self._buffer.size
            if found > max_bytes or (found < 0 and searched >= max_bytes + len(delimiter)):
                raise ProtocolError(f"more than {max_bytes} bytes before {delimiter!r}")
            return found >= 0

        if self._receiving or not self._begun or not complete():
            await self._receive_until_complete(complete)
        data = self._buffer.take(found)
        self._buffer.take(len(delimiter))
        return data

    def count_requests(self, number: int) -> None:
        """Add ``number`` to the connection's count of requests, for statistics.

        `requests` counts each of its items as one. This is for a ``read`` that returns several requests as one, and for
        handlers that do not use `requests`.
        """
        self._accepted.requests += number

    def unreceive(self, data: bytes) -> None:
        """Give back ``data``, the last bytes that were received: the next receive returns them first."""
        if data:
            self._buffer.give_back(data)

    async def _receive_until_complete(self, complete: Callable[[], bool]) -> None:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this connection")
        outside = not self._begun  # of a request: this is a message of its own
        if outside:
            self._due = None  # of an abandoned request
            await trio.lowlevel.checkpoint()
        try:
            while not complete():
                self._begun = not outside or self._buffer.size > 0
                data = await self._receive()
                if not data:
                    raise self._ended_early()
                self._buffer.append(data)
        finally:
            if outside:
                self._begun = False
                self._due = None

    async def _read_request(self, read: "Callable[[Connection], Awaitable[RequestT]]") -> RequestT:
        """Return the next request; raise `StopAsyncIteration` if there is none."""
        if self._begun:
            raise trio.BusyResourceError("another task is receiving from this connection")
        if self._promised - self._taken >= self._max_owed:
            await self._deliver()
        if not self._buffer.size:
            self._taken_up = 0
            data = await self._receive()
            if not data:
                raise StopAsyncIteration
            self._buffer.append(data)
        else:
            self._taken_up += 1
            if self._taken_up == REQUESTS_PER_TURN:
                self._taken_up = 0
                await trio.lowlevel.checkpoint()
            # With `_due` set, a request has begun, and was interrupted by a cancellation.
            if self._drain.began_at is not None and self._due is None and self._heard_enough():
                raise StopAsyncIteration
        self._begun = True
        self._buffer.mark()
        try:
            request = await read(self)
        except Exception:
            self._due = None
            self._buffer.unmark()
            raise
        except BaseException:  # a cancellation, perhaps in a group: the request's deadline remains
            if self._due is None:
                self._due = trio.current_time() + self._request_timeout
            self._buffer.rewind()
            raise
        finally:
            self._begun = False
        self._due = None
        self._buffer.unmark()
        self._accepted.requests += 1
        return request

    async def _receive(self) -> bytes:  # noqa: C901 - every step is short, and their order matters
        """Receive from the transport. ``b""`` at end of stream, or instead of waiting when the server is stopping.

        Always a checkpoint. Pushed data is sent first, so a client that does not receive delays only itself: its
        replies do not accumulate here, and TCP's flow control stops it from sending.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this connection")
        self._check_open()
        self._receiving = True
        try:
            if not self._handshaken:
                await self._handshake()
            if (self._owed or self._rest) and not self._sending and self._sender is None and not self._send_at_once():
                await self._deliver()
            # Let other tasks run. On a busy server, the next bytes have usually arrived by then, which saves waiting:
            # registering with Trio and the kernel.
            await trio.lowlevel.checkpoint()
            if self._ended or ((self._begun or self._drain.began_at is not None) and self._is_over()):
                return b""
            while (data := self._transport.receive_nowait()) is None:
                self._check_open()
                # Checked only now, so that data that arrived in time counts even if this task was late to run.
                if self._waiting is not None and self._waiting.cancelled_caught and self._gives_up_waiting():
                    return b""
                with trio.CancelScope(deadline=self._deadline()) as self._waiting:
                    await self._transport.wait_for_data()
        except (ClientError, _ClosedError):
            raise
        except _FAILURES as error:
            raise self._failure(_REST if self._begun else _REQUEST, error) from error
        finally:
            self._receiving = False
            self._waiting = None
            if self._others is not None:
                self._wake_others()
        if data:
            self._accepted.received += len(data)
            self._fresh = False
            self._idle_due = None
        else:
            self._ended = True
        return data

    def _is_over(self) -> bool:
        """Return whether to receive nothing more; raise `ClientError` if a request took too long."""
        if self._begun:
            now = trio.current_time()
            if self._due is None:
                self._due = now + self._request_timeout
            elif now >= self._due:  # even if more of it keeps arriving
                raise self._too_late(_REST)
            return False
        return self._heard_enough()

    def _gives_up_waiting(self) -> bool:
        """At the deadline, raise `ClientError`, or return whether a stop ends the conversation."""
        if self._begun:
            raise self._too_late(_REST)
        if self._drain.began_at is not None:
            return True
        if not self._sending:  # otherwise, the sending task has its own time-out
            raise ClientError("timed out waiting for a request", self, "idle", logging.DEBUG)
        self._idle_due = None
        return False

    def _deadline(self) -> float:
        """Return the client's deadline, on Trio's clock."""
        now = trio.current_time()
        if self._begun and self._due is not None:
            due = self._due
        elif self._drain.began_at is not None:
            due = self._last_call()
        else:
            if self._idle_due is None:
                self._idle_due = now + self._idle_timeout
            due = self._idle_due
        return max(due, now + self._transport.last_look)

    def _last_call(self) -> float:
        """Return until when a request may begin in a stop: only a client's first one may."""
        return self._accepted.at + FIRST_REQUEST_GRACE if self._fresh else -math.inf

    def _heard_enough(self) -> bool:
        began_at = self._drain.began_at
        return began_at is not None and not self._fresh and trio.current_time() >= began_at + LAST_REQUESTS_SECONDS

    def _stop(self) -> None:
        """Stop waiting for the next request. The server's `Drain` calls this when the stop begins."""
        if self._waiting is not None and not self._begun:
            self._waiting.deadline = min(self._waiting.deadline, self._deadline())

    # Sending.

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``, after what was pushed before, and wait until the kernel has accepted all of it.

        Args:
            data: a message, of any size. It is not interleaved with what other tasks push meanwhile.

        Raises:
            TypeError: if ``data`` is something else, such as a string; nothing is sent.
            ClientError: if the connection broke, or there was no buffer space for the idle time-out.
            trio.BusyResourceError: if another task is in `send_all`, `send_eof` or `wait_send_all_might_not_block`.
            trio.ClosedResourceError: if the connection is closed, or `send_eof` was called.

        On cancellation, none or part of it may have been sent. On a socket, if part was, the remainder is sent before
        anything else; other streams can send nothing more. A checkpoint.
        """
        if not isinstance(data, bytes):
            _check_data(data)
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            await self._deliver_alone()
            await self._send(data)
        finally:
            self._end_sending()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` might not have to wait.

        Raises:
            ClientError: as `send_all` does.
            trio.BusyResourceError: as `send_all` does.
            trio.ClosedResourceError: as `send_all` does.

        A checkpoint.
        """
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            await self._deliver_alone()
            self._sending = True
            try:
                with self._in_time_for_room():
                    await self._transport.wait_for_room()
            finally:
                self._sending = False
        finally:
            self._end_sending()

    async def send_eof(self) -> None:
        """Send end of stream, after what was pushed; the client may still send.

        `trio.SSLStream` does not support half-close; there, end of stream is sent when the connection is closed.

        Raises:
            ClientError: as `send_all` does.
            trio.BusyResourceError: as `send_all` does.
            trio.ClosedResourceError: if the connection is closed.

        On cancellation, end of stream may or may not have been sent. A checkpoint.
        """
        if self._eof_sent:
            self._check_open()
            await trio.lowlevel.checkpoint()
            return
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            await self._deliver_alone()
            self._eof_sent = True
            self._drop_unsent()  # pushed meanwhile
            try:
                await self._transport.send_eof()
            except _FAILURES as error:
                raise self._failure(_ROOM, error) from error
        finally:
            self._end_sending()

    def push(self, data: bytes | bytearray | memoryview) -> None:
        """Queue ``data`` for sending, after what was pushed before, and together with it. Never waits.

        With ``max_unsent``, from any task inside the block: ``data`` is sent at once, whatever the handler waits for.
        If more than ``max_unsent`` bytes are then unsent, the client is disconnected, and the block ends. To skip
        messages for a slow client instead, check `unsent` first.

        Without ``max_unsent``, only from the handler itself: ``data`` is sent at the latest when the handler next
        awaits a method of this connection that has to wait, and not while it awaits anything else. What another task
        pushes is held back until then.

        After the block, or after `send_eof` or `aclose`, does nothing.

        Args:
            data: a message.

        Raises:
            TypeError: if ``data`` is something else, such as a string.
        """
        if not isinstance(data, bytes):
            _check_data(data)
            data = bytes(data)
        if self._closed or self._eof_sent or not data:
            return
        self._owed.append(data)
        self._promised += len(data)
        if self._max_unsent is None:
            return
        if self.unsent > self._max_unsent and self._handshaken and not self._sending:
            try:
                self._send_at_once()
            except ClientError as error:
                self._end_block(error)
                return
            except trio.ClosedResourceError:  # closed from outside; the handler will get the exception
                return
        if self.unsent > self._max_unsent:
            message = f"overrun: {self.unsent} unsent bytes, more than {self._max_unsent}"
            self._end_block(ClientError(message, self, "overrun", logging.WARNING))
        self._wake_others()

    async def relay(self, target: trio.abc.Stream) -> None:
        """Send what the client sends to another stream, or back to itself, until end of stream; then send that, too.

        Each direction of a proxy is a relay. Between sockets, bulk data moves inside the kernel (splice(2), on Linux).

        Args:
            target: a `Connection` or any other stream; this connection for an echo. On failure, a `Connection` will be
                reset when it is closed, and another stream is reset at once.

        Raises:
            ClientError: if the connection broke, or the client was idle and was sent nothing either; or the same for
                the target, with the target as its connection.
            trio.BusyResourceError: if another task is receiving from this connection, or sending to the target.
            trio.ClosedResourceError: if one of the two is closed.

        On cancellation, data in transit may be lost. Also ends when the server is stopping and all that has arrived is
        sent: a relay does not know where messages end, so a message that pauses there may be cut. A checkpoint.
        """
        out = target if isinstance(target, Connection) else Connection(target, idle_timeout=self._idle_timeout)
        try:
            while chunk := await self.receive_some():
                out._begin_sending()  # noqa: SLF001 - this class's
                try:
                    await out._deliver_alone()  # noqa: SLF001
                    await out._send(chunk)  # noqa: SLF001
                    if len(chunk) == RECEIVE_SIZE:  # more than one receive takes: let the kernel move the rest
                        await self._splice(out)
                finally:
                    out._end_sending()  # noqa: SLF001
            await out.send_eof()
        except BaseException:
            if out is not self:  # it has not got all of the data
                out._cut_off()  # noqa: SLF001
            if out is not target:
                await close_as_broken(target)
            raise

    # Not a context manager, which would be slower for every message.

    def _begin_sending(self) -> None:
        """Make this the only task that sends, until `_end_sending`."""
        self._check_open()
        if self._send_all_busy:
            raise trio.BusyResourceError("another task is sending to this connection")
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of the stream was already sent")
        self._send_all_busy = True

    def _end_sending(self) -> None:
        self._send_all_busy = False
        self._wake_others()

    async def _deliver(self) -> None:
        """Wait until all pending data is sent. Not a checkpoint if the kernel accepts all of it at once."""
        due = self._promised
        # Data that is pushed meanwhile is included only if there is no sending task for it.
        while self._taken < due or (self._taken < self._promised and self._sender is None):
            await self._deliver_some()

    async def _deliver_alone(self) -> None:
        """Wait until all pending data is sent, and no other message is being sent."""
        await self._deliver()
        while self._rest or self._sending:
            await self._deliver_some()

    async def _deliver_some(self) -> None:
        self._check_open()
        if self._sending:  # another task is sending, perhaps the pending data, too
            await self._wait_for_others()
        elif not self._handshaken:
            await self._handshake()
        elif not self._send_at_once():
            await self._send_rest()

    def _send_at_once(self) -> bool:
        """Send as much pending data as the kernel accepts without waiting, and return whether that was all."""
        data: bytes | memoryview
        if self._rest:
            data, pushed = self._rest, self._rest_was_pushed
        else:
            data = self._owed[0] if len(self._owed) == 1 else b"".join(self._owed)
            pushed = True
            self._owed.clear()
        try:
            sent = self._transport.send_nowait(data)
        except _FAILURES as error:
            raise self._failure(_ROOM, error) from error
        self._taken += sent
        self._accepted.sent += sent
        if sent:
            self._idle_due = None
            if self._waiting is not None:
                self._client_is_there()
        if sent == len(data):
            self._rest = _NOTHING
            return not self._owed
        self._rest = memoryview(data)[sent:]
        self._rest_was_pushed = pushed
        return False

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        """Send a message that was not pushed, when nothing else is pending."""
        if not data:
            return
        self._rest = memoryview(data)
        self._rest_was_pushed = False
        self._promised += len(data)
        try:
            await self._deliver()
        finally:
            if self._rest:  # after a cancellation: copied, as the caller may change it
                self._rest = memoryview(bytes(self._rest))

    async def _send_rest(self) -> None:
        self._sending = True
        try:
            with self._in_time_for_room() as scope:  # one for all pieces, because each would cost as much as a write
                while self._rest:
                    sent = await self._transport.send_some(self._rest)
                    self._rest = self._rest[sent:]
                    self._taken += sent
                    self._accepted.sent += sent
                    self._client_is_there()
                    scope.deadline = trio.current_time() + self._idle_timeout
            self._rest = _NOTHING  # an empty view would keep the caller's data alive
        finally:
            self._sending = False
            self._wake_others()

    @contextlib.contextmanager
    def _in_time_for_room(self) -> Iterator[trio.CancelScope]:
        try:
            with trio.fail_after(self._idle_timeout) as scope:
                yield scope
        except trio.TooSlowError:
            raise self._too_late(_ROOM) from None
        except _FAILURES as error:
            # From Python 3.12 on, its traceback would be in a reference cycle through the context manager's frame, and
            # keep the data that was being sent alive.
            raise self._failure(_ROOM, error) from error.with_traceback(None)

    def _client_is_there(self) -> None:
        """Restart the idle time-out, because the client has received something."""
        self._idle_due = None
        if self._waiting is not None and not self._begun and self._drain.began_at is None:
            self._waiting.deadline = self._deadline()

    async def _send_what_is_pushed(self) -> None:
        while not self._closed:
            # A task in `send_all` delivers what was pushed before; what is pushed meanwhile is sent after it.
            if self._send_all_busy or self._taken == self._promised:
                await self._wait_for_others()
                continue
            try:
                await self._deliver()
            except ClientError as error:
                self._end_block(error)
                return
            except trio.ClosedResourceError:
                return

    async def _wait_for_others(self) -> None:
        if self._others is None:
            self._others = trio.lowlevel.ParkingLot()
        await self._others.park()

    def _wake_others(self) -> None:
        if self._others is not None:
            self._others.unpark_all()

    async def _splice(self, out: "Connection") -> None:
        """Move data to ``out`` inside the kernel, if possible, as long as more has arrived, up to a limit."""
        source, target = self._transport, out._transport  # noqa: SLF001
        if not isinstance(source, SocketTransport) or not isinstance(target, SocketTransport):
            return
        try:
            pipe = Pipe()
        except OSError:  # no descriptors left, or not Linux: use plain sends
            return
        self._receiving = out._sending = True  # noqa: SLF001
        try:
            for _ in range(SPLICES_PER_TURN):
                out._in_pipe = self._splice_to(source, pipe)  # noqa: SLF001
                if not out._in_pipe:  # noqa: SLF001
                    return
                while out._in_pipe:  # noqa: SLF001
                    out._in_pipe -= await out._splice_from(pipe, target)  # noqa: SLF001
                await trio.lowlevel.checkpoint()
        except BaseException:
            if out._in_pipe:  # noqa: SLF001
                out._cut_off()  # noqa: SLF001
            raise
        finally:
            self._receiving = out._sending = False  # noqa: SLF001
            out._wake_others()  # noqa: SLF001
            pipe.close()

    def _splice_to(self, source: SocketTransport, pipe: Pipe) -> int:
        try:
            moved = source.splice_to(pipe)
        except _FAILURES as error:
            raise self._failure(_REQUEST, error) from error
        except OSError:  # forbidden by a sandbox: use plain sends
            return 0
        self._accepted.received += moved
        return moved

    async def _splice_from(self, pipe: Pipe, target: SocketTransport) -> int:
        with self._in_time_for_room():
            sent = target.splice_from(pipe)
            if not sent:
                await target.wait_for_room()
        self._accepted.sent += sent
        self._client_is_there()
        return sent

    def _cut_off(self) -> None:
        """Reset the connection when it is closed, because what was sent is incomplete."""
        self._cut = True
        self._transport.reset()

    # What a client did.

    async def _handshake(self) -> None:
        if self._idle_due is None:  # kept, so that cancelled waits do not extend it
            self._idle_due = trio.current_time() + self._request_timeout
        stop = None
        try:
            with trio.fail_at(self._idle_due), self._drain.ends_wait(earliest=self._last_call()) as stop:
                await self._transport.handshake()
        except trio.TooSlowError:
            raise self._too_late(_HANDSHAKE) from None
        except _FAILURES as error:
            raise self._failure(_HANDSHAKE, error) from error
        if stop.cancelled_caught:
            raise self._too_late(_HANDSHAKE)
        self._handshaken = True
        self._idle_due = None

    def _check_open(self) -> None:
        if self._closed:
            raise _ClosedError(self)

    def _too_late(self, what: str) -> ClientError:
        return ClientError(f"timed out waiting for {what}", self, "late", logging.WARNING)

    def _failure(self, what: str, error: trio.BrokenResourceError | trio.ClosedResourceError) -> Exception:
        if isinstance(error, trio.ClosedResourceError):
            return _ClosedError(self)
        # A client that disconnects is normal; a failed TLS handshake may need attention.
        level = logging.WARNING if what == _HANDSHAKE else logging.DEBUG
        message = f"connection broken while waiting for {what}: {failure_reason(error)}"
        return ClientError(message, self, "reset", level)

    def _ended_early(self) -> ClientError:
        if not self._ended:
            return ClientError("the server is stopping", self, "stopped", logging.DEBUG)
        if not self._begun:
            return ClientError("end of stream", self, "ended", logging.DEBUG)
        return ClientError("end of stream in the middle of a request", self, "ended", logging.WARNING)


class _Requests(Generic[RequestT]):
    """The iterator of `Connection.requests`. Not a generator, because a cancellation would end it."""

    __slots__ = ("_connection", "_read")

    def __init__(self, connection: Connection, read: Callable[[Connection], Awaitable[RequestT]]) -> None:
        self._connection = connection
        self._read = read

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[RequestT]:
        return self._connection._read_request(self._read)  # noqa: SLF001 - this is part of it


def _check_data(data: object) -> None:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data must be bytes, bytearray or memoryview, not {type(data).__name__}")
