"""A graceful stop in code of one's own: with a `Connection`, and with `current_drain` alone."""

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Handler,
    MemoryListener,
    Stream,
    client_tls,
    receive_to_end,
    server_tls,
    serving,
)

from trioproto import ClientError, Connection, receive_exactly, serve_listeners
from trioproto.connection import FIRST_REQUEST_GRACE, LAST_REQUESTS_SECONDS
from trioproto.draining import Drain, current_drain

SOON = 0.1  # seconds: more than a stop takes that waits for nobody


async def read_line(connection: Connection) -> bytes:
    """Read a line."""
    return await connection.receive_until(b"\n", max_bytes=1000)


@contextlib.asynccontextmanager
async def stopping(
    handler: Handler,
    *,
    after: float = 5,
    ended_within: float = SOON,
    pair: Callable[[], tuple[Stream, Stream]] = trio.testing.memory_stream_pair,
) -> AsyncIterator[Stream]:
    """Serve one client with ``handler``, and stop the server ``after`` seconds.

    The server must have returned so soon after that.
    """
    listener = MemoryListener(pair=pair)
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_listeners, handler, [listener], shutdown=shutdown))

        async def stop() -> None:
            await trio.sleep(after)
            shutdown.set()

        nursery.start_soon(stop)
        async with listener.connect() as client:
            yield client
    assert trio.current_time() <= after + ended_within


# With a Connection.


async def test_requests(autojump_clock: trio.testing.MockClock) -> None:
    """`requests` ends when no request is under way; what the handler then sends arrives."""
    lines = []

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            lines.extend([line async for line in connection.requests(read_line)])
            assert connection.stopping.is_set()
            await connection.send_all(b"goodbye")

    async with stopping(handler) as client:
        await client.send_all(b"one\ntwo\n")
        assert await receive_to_end(client) == b"goodbye"
        assert trio.current_time() == pytest.approx(5, abs=SOON)
    assert lines == [b"one", b"two"]


async def test_request_under_way(autojump_clock: trio.testing.MockClock) -> None:
    """A request that has begun may be finished, and is answered; then `requests` ends."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, request_timeout=20) as connection:
            async for line in connection.requests(read_line):
                connection.push(line)

    async with stopping(handler, ended_within=7 + SOON) as client:
        for sent in (b"he", b"l", b"l"):
            await client.send_all(sent)
            await trio.sleep(4)
        await client.send_all(b"o\n")
        assert await receive_to_end(client) == b"hello"
        assert trio.current_time() == pytest.approx(12, abs=SOON)


@pytest.mark.parametrize("fresh", [True, False])
async def test_receive_some(fresh: bool, autojump_clock: trio.testing.MockClock) -> None:  # noqa: FBT001
    """`receive_some` returns ``b""``, as at the end of the stream, also again and again."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            if not fresh:
                assert await connection.receive_some() == b"hello"
            for _ in range(2):
                assert await connection.receive_some() == b""
            await connection.send_all(b"goodbye")

    async with stopping(handler) as client:
        await client.send_all(b"" if fresh else b"hello")
        assert await receive_to_end(client) == b"goodbye"


@pytest.mark.parametrize(
    "receive",
    [
        pytest.param(lambda connection: connection.receive_exactly(5), id="receive_exactly"),
        pytest.param(read_line, id="receive_until"),
    ],
)
@pytest.mark.parametrize("sent", [b"", b"hel"])
async def test_message_outside_of_requests(
    sent: bytes, receive: Callable[[Connection], Awaitable[bytes]], autojump_clock: trio.testing.MockClock
) -> None:
    """What has not begun ends the block quietly, with an error that says so; what has begun may be finished."""
    errors = []

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            try:
                while True:
                    connection.push(await receive(connection))
            except ClientError as error:
                errors.append((error.how, str(error)))
                raise

    async with stopping(handler, ended_within=3 + SOON) as client:
        await client.send_all(b"first" if receive is not read_line else b"first\n")
        assert await receive_exactly(client, 5) == b"first"
        await client.send_all(sent)
        if sent:
            await trio.sleep(8)
            await client.send_all(b"lo" if receive is not read_line else b"lo\n")
        assert await receive_to_end(client) == (b"hello" if sent else b"")
    assert errors == [("stopped", "the server is stopping")]


@pytest.mark.parametrize("reads", [True, False])
async def test_one_receives_and_another_sends(reads: bool, autojump_clock: trio.testing.MockClock) -> None:  # noqa: FBT001
    """A stop reaches the task that receives although another one sends, and also while that one waits for room."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection, trio.open_nursery() as nursery:

            async def send() -> None:
                while True:
                    await connection.send_all(b"news")
                    await trio.sleep(1)

            nursery.start_soon(send)
            async for _ in connection.requests(read_line):
                pytest.fail("there was no request")
            nursery.cancel_scope.cancel()

    async with stopping(handler, pair=trio.testing.lockstep_stream_pair) as client:
        received = await receive_to_end(client) if reads else b""
        await trio.sleep_until(5 + SOON / 2)
    assert received[:20] == b"news" * (5 if reads else 0)


async def test_stopping(autojump_clock: trio.testing.MockClock) -> None:
    """A handler that waits for something else can wait for `stopping`."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await connection.stopping.wait()
            connection.push(b"goodbye")

    async with stopping(handler) as client:
        assert await receive_to_end(client) == b"goodbye"


async def test_never_stopping(autojump_clock: trio.testing.MockClock) -> None:
    """A connection that no server of ours accepted is never stopped, whatever stops around it."""
    client, theirs = trio.testing.memory_stream_pair()
    connection = Connection(theirs)
    assert not connection.stopping.is_set()
    with trio.move_on_after(1000) as scope:
        await connection.stopping.wait()
    assert scope.cancelled_caught
    await client.aclose()


async def some(connection: Connection) -> None:
    async for _ in connection:
        pass


async def requests(connection: Connection) -> None:
    async for _ in connection.requests(read_line):
        pass


async def requests_that_came_together(connection: Connection) -> None:
    await connection.receive_some()
    connection.unreceive(b"line\n" * 1000)
    async for _ in connection.requests(read_line):
        await trio.sleep(0.1)


@pytest.mark.parametrize("serve", [some, requests, requests_that_came_together])
async def test_client_that_never_pauses(
    serve: Callable[[Connection], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    """A client that leaves nothing to wait for is ended after `LAST_REQUESTS_SECONDS`, in a loop of any kind."""
    ended_at = []

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await serve(connection)
            ended_at.append(trio.current_time())

    async with stopping(handler, ended_within=10) as client:
        while not ended_at:
            await client.send_all(b"line\n")
            await trio.sleep(0.005)
    assert ended_at == pytest.approx([5 + LAST_REQUESTS_SECONDS], abs=2 * SOON)


@pytest.mark.parametrize("max_unsent", [None, 100])
@pytest.mark.parametrize("after", [0.5, 5])
async def test_handshake_when_the_server_sends_first(
    after: float,
    max_unsent: int | None,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A stop hurries a handshake also where the server sends first; a new client has a second for it."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream), max_unsent=max_unsent) as connection:
            if max_unsent is None:
                await connection.send_all(b"hello")
            connection.push(b"hello")
            await trio.sleep(1000)

    ended_within = max(FIRST_REQUEST_GRACE - after, 0) + SOON
    async with stopping(handler, after=after, ended_within=ended_within) as client:
        assert await client.receive_some() == b""
    assert caplog.messages == ["StapledStream to MemoryListener: timed out waiting for a TLS handshake"]


async def test_through_tls(autojump_clock: trio.testing.MockClock) -> None:
    """A stop belongs to the accepted stream also through TLS that the handler puts on it."""

    async def handler(stream: Stream) -> None:
        async with Connection(server_tls(stream)) as connection:
            async for line in connection.requests(read_line):
                connection.push(line)

    async with stopping(handler) as transport:
        client = client_tls(transport)
        await client.send_all(b"hello\n")
        assert await receive_to_end(client) == b"hello"
        assert trio.current_time() == pytest.approx(5, abs=SOON)


async def test_upstream(autojump_clock: trio.testing.MockClock) -> None:
    """A connection that a handler opens itself is not drained: the answer to a request under way arrives."""
    server, ours = trio.testing.memory_stream_pair()

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection, Connection(ours) as upstream:
            assert upstream.stopping is not connection.stopping
            async for line in connection.requests(read_line):
                await upstream.send_all(line + b"\n")
                connection.push(await read_line(upstream))

    async with stopping(handler, ended_within=10) as client:
        await client.send_all(b"question\n")
        assert await receive_exactly(server, 9) == b"question\n"
        await trio.sleep(8)
        await server.send_all(b"answer\n")
        assert await receive_exactly(client, 6) == b"answer"
        assert trio.current_time() == pytest.approx(8, abs=SOON)
        await server.aclose()
        assert await receive_to_end(client) == b""


async def test_two_servers(autojump_clock: trio.testing.MockClock) -> None:
    """A connection outlives the stop of a server that a task around it belongs to, but that did not accept it."""

    async def inner(stream: Stream) -> None:
        async with Connection(stream) as connection:
            async for line in connection.requests(read_line):
                connection.push(line)

    async def outer(stream: Stream) -> None:
        listener = MemoryListener()
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(serve_listeners, inner, [listener])
            client = listener.connect()
            await current_drain().began.wait()
            await trio.sleep(10)
            await client.send_all(b"hello\n")
            await stream.send_all(await receive_exactly(client, 5))
            nursery.cancel_scope.cancel()

    async with stopping(outer, ended_within=10 + SOON) as client:
        assert await receive_to_end(client) == b"hello"


# Without a Connection.


async def answer(stream: Stream, works: list[str]) -> None:
    """Serve one byte at a time, each with a second of work, and take part in a stop by `current_drain` alone."""
    drain = current_drain()
    while True:
        with drain.ends_wait() as scope:
            await stream.receive_some(1)
        if scope.cancelled_caught:
            break
        works.append("begun")
        await trio.sleep(2)
        await stream.send_all(b"done")
        works.append("done")


@pytest.mark.parametrize("sent_at", [1, 4])
async def test_ends_wait(sent_at: float, autojump_clock: trio.testing.MockClock) -> None:
    """A stop ends the wait, and not the work; in a stop, no further wait begins."""
    works: list[str] = []
    async with stopping(partial(answer, works=works), ended_within=1 + SOON) as client:
        await trio.sleep(sent_at)
        await client.send_all(b"x")
        assert await receive_to_end(client) == b"done"
        assert trio.current_time() == pytest.approx(max(5, sent_at + 2), abs=SOON)
    assert works == ["begun", "done"]


async def test_server_inside_a_handler() -> None:
    """What a handler starts runs under its server, such as a `trio.serve_tcp`: its handlers see the stop, too."""

    async def inner(stream: trio.SocketStream) -> None:
        await answer(stream, [])

    async def outer(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, inner, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            await stream.send_all(port.to_bytes(2, "big"))
            await current_drain().began.wait()
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(LIMIT):
        async with (
            serving(outer, listener) as shutdown,
            await trio.testing.open_stream_to_socket_listener(listener) as client,
        ):
            port = int.from_bytes(await receive_exactly(client, 2), "big")
            async with await trio.open_tcp_stream("127.0.0.1", port) as inner_client:
                await trio.testing.wait_all_tasks_blocked(0.01)
                shutdown.set()
                assert await inner_client.receive_some() == b""


async def test_no_server(autojump_clock: trio.testing.MockClock) -> None:
    """Without a server, there is a drain that never begins, and its waits are not ended."""
    drain = current_drain()
    assert not drain.began.is_set()
    with trio.move_on_after(1000) as outer, drain.ends_wait() as scope:
        await trio.sleep_forever()
    assert outer.cancelled_caught
    assert not scope.cancelled_caught


@pytest.mark.parametrize(
    ("earliest", "ended_at"),
    [(-math.inf, 5), (3, 5), (7, 7), (math.inf, 100)],
)
async def test_earliest(earliest: float, ended_at: float, autojump_clock: trio.testing.MockClock) -> None:
    """A stop that begins earlier than ``earliest`` ends the wait then, and one that begins later at once."""
    for begins in ("before", "meanwhile"):
        drain = Drain()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            if begins == "meanwhile":
                nursery.start_soon(begin_after, drain, 5)
            else:
                await begin_after(drain, 5)
            with trio.move_on_at(start + 100), drain.ends_wait(earliest=start + earliest):
                await trio.sleep_forever()
        assert trio.current_time() == pytest.approx(start + ended_at)


async def begin_after(drain: Drain, seconds: float) -> None:
    """Begin a stop later."""
    await trio.sleep(seconds)
    drain.begin()


async def test_time_limit_of_a_wait(autojump_clock: trio.testing.MockClock) -> None:
    """The scope may have a deadline of its own, which a stop does not put off."""
    drain = Drain()
    with drain.ends_wait() as scope:
        scope.deadline = trio.current_time() + 3
        await begin_after(drain, 0)
        assert scope.deadline == 0
    with drain.ends_wait(earliest=10) as scope:
        scope.deadline = 3
        drain.begin()
        assert scope.deadline == 3


async def test_callbacks(autojump_clock: trio.testing.MockClock) -> None:
    """Callbacks are called once, when the stop begins; not those that were taken back, nor those that come later."""
    drain = Drain()
    called: list[str] = []
    callbacks = [partial(called.append, name) for name in ("one", "two", "three")]
    drain.add_callback(callbacks[0])
    drain.add_callback(callbacks[1])
    drain.remove_callback(callbacks[1])
    drain.remove_callback(callbacks[1])
    assert drain.began_at is None
    await trio.sleep(5)
    drain.begin()
    drain.add_callback(callbacks[2])
    assert called == ["one"]
    assert drain.began.is_set()
    assert drain.began_at == 5


async def test_callbacks_that_take_back_others() -> None:
    """A callback may take back itself and others, whichever is called first."""
    drain = Drain()
    called = []

    def leave(name: str) -> None:
        called.append(name)
        for callback in callbacks:
            drain.remove_callback(callback)

    callbacks = [partial(leave, "one"), partial(leave, "two")]
    for callback in callbacks:
        drain.add_callback(callback)
    drain.begin()
    drain.begin()
    assert 1 <= len(called) <= 2


async def test_waits_leave_nothing_behind() -> None:
    """A wait and a connection that are over are forgotten by the drain, although it lives longer."""
    drains = []

    async def handler(stream: Stream) -> None:
        drains.append(current_drain())
        with drains[0].ends_wait():
            await trio.lowlevel.checkpoint()
        async with Connection(stream) as connection:
            await connection.aclose()

    listener = MemoryListener()
    async with serving(handler, listener) as shutdown:
        assert await listener.connect().receive_some() == b""
        await trio.testing.wait_all_tasks_blocked()
        assert drains[0]._callbacks == set()  # noqa: SLF001 - there is nothing else to see it by
        shutdown.set()


async def test_request_whose_reading_was_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """A request that has arrived before the stop is answered, though reading it was cancelled by somebody else."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream, request_timeout=60) as connection:

            async def read(connection: Connection) -> bytes:
                request = await connection.receive_exactly(4)
                await trio.sleep(look_up)
                return request

            look_up = 10
            requests = connection.requests(read)
            with trio.move_on_after(5):
                await anext(requests)
            look_up = 0
            connection.push(await anext(requests))

    listener = MemoryListener()
    async with serving(handler, listener) as shutdown:
        client = listener.connect()
        await client.send_all(b"abcd")
        await trio.sleep(0.1)
        shutdown.set()
        assert await receive_to_end(client) == b"abcd"
