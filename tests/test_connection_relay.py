"""`Connection.relay`: bytes move from one stream to another, and back to the client, until end of stream."""

import contextlib
import hashlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    MemoryListener,
    Stream,
    client_tls,
    connected,
    connected_streams,
    fill,
    receive_to_end,
    reset,
    send_after,
    served,
    server_tls,
    serving,
    socket_streams,
)

from trioproto import ClientError, Connection, receive_exactly
from trioproto.streams import RECEIVE_SIZE
from trioproto.testing import Network

linux_only = pytest.mark.skipif(not hasattr(os, "splice"), reason="no splice(2)")

Ends = tuple[Stream, Connection]


async def memory() -> Ends:
    client, theirs = trio.testing.memory_stream_pair()
    return client, Connection(theirs)


async def sockets() -> Ends:
    client, theirs = await socket_streams()
    return client, Connection(theirs)


async def sockets_with_tls() -> Ends:
    client, theirs = await connected_streams(tls=True)
    return client, Connection(theirs)


@pytest.fixture(
    params=[(memory, memory), (sockets, sockets), (sockets, memory), (sockets_with_tls, sockets)],
    ids=["memory", "sockets", "both", "TLS"],
)
async def proxy(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Ends, Ends]]:
    """A client with the connection to it, and an upstream server with the connection to that."""
    pairs = [await make() for make in request.param]
    with trio.fail_after(LIMIT):
        yield pairs[0], pairs[1]
        for end, connection in pairs:
            await connection.aclose()
            await end.aclose()


@pytest.fixture
def splices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much was moved inside the kernel, one entry for each system call."""
    moved: list[int] = []
    if hasattr(os, "splice"):
        splice = os.splice

        def note(source: int, target: int, count: int) -> int:
            moved.append(splice(source, target, count))
            return moved[-1]

        monkeypatch.setattr(os, "splice", note)
    return moved


async def echo(stream: Stream) -> None:
    """Relay back to the client."""
    async with Connection(stream) as connection:
        await connection.relay(connection)


# From one end to the other.


async def test_to_itself(autojump_clock: trio.testing.MockClock) -> None:
    """Relayed to itself, a connection is an echo, which ends with its client."""
    async with served(echo) as client:
        for message in (b"hello", b"world"):
            await client.send_all(message)
            assert await client.receive_some() == message
        await client.send_eof()
        assert await client.receive_some() == b""
    assert trio.current_time() == 0


async def test_both_ways(proxy: tuple[Ends, Ends]) -> None:
    """Each direction ends on its own: after its request, a client may end its side, and still gets its reply."""
    (client, downstream), (server, upstream) = proxy
    async with trio.open_nursery() as nursery:
        nursery.start_soon(downstream.relay, upstream)
        nursery.start_soon(upstream.relay, downstream)
        await client.send_all(b"question")
        await client.send_eof()
        assert await receive_to_end(server) == b"question"
        await server.send_all(b"answer")
        assert await receive_exactly(client, 6) == b"answer"
        await server.send_eof()
        assert await receive_to_end(client) == b""


async def test_bulk_both_ways(proxy: tuple[Ends, Ends]) -> None:
    """Bulk arrives unharmed in both directions at once."""
    (client, downstream), (server, upstream) = proxy
    data = random.Random(1).randbytes(1_000_003) * 10
    digests = []

    async def send(stream: Stream) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async def receive(stream: Stream) -> None:
        digests.append(hashlib.sha256(await receive_to_end(stream)).digest())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(downstream.relay, upstream)
        nursery.start_soon(upstream.relay, downstream)
        for stream in (client, server):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, stream)
    assert digests == [hashlib.sha256(data).digest()] * 2


async def test_behind_what_was_pushed_and_received(proxy: tuple[Ends, Ends]) -> None:
    """What the target was pushed goes out before, and what was given back is relayed first."""
    (client, downstream), (server, upstream) = proxy
    await client.send_all(b"one two")
    downstream.unreceive((await downstream.receive_exactly(7))[4:])
    upstream.push(b"zero ")
    await client.send_eof()
    await downstream.relay(upstream)
    assert await receive_to_end(server) == b"zero two"


async def test_to_a_plain_stream() -> None:
    """The target may be any stream. This side of it is ended, and it stays open for what comes back."""
    client, downstream = await memory()
    server, upstream = trio.testing.memory_stream_pair()
    await client.send_all(b"question")
    await client.send_eof()
    await downstream.relay(upstream)
    assert await receive_to_end(server) == b"question"
    await server.send_all(b"answer")
    assert await upstream.receive_some() == b"answer"


@linux_only
async def test_bulk_moves_inside_the_kernel(splices: list[int]) -> None:
    """Between sockets, what one receive does not take goes through the kernel; small messages do not."""
    client, downstream = await sockets()
    server, upstream = await sockets()
    with trio.fail_after(LIMIT):
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(downstream.relay, upstream)
            await client.send_all(b"hello")
            assert await receive_exactly(server, 5) == b"hello"
            assert splices == []
            nursery.start_soon(client.send_all, bytes(10_000_000))
            await receive_exactly(server, 10_000_000)
            nursery.start_soon(client.send_eof)
            assert await server.receive_some() == b""
    assert sum(splices) > 10_000_000
    await downstream.aclose()
    await upstream.aclose()


async def test_bulk_does_not_move_inside_the_kernel(splices: list[int]) -> None:
    """Where one of the two is no socket, it goes the plain way."""
    client, downstream = await sockets()
    server, upstream = await memory()
    with trio.fail_after(LIMIT):
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(downstream.relay, upstream)
            nursery.start_soon(client.send_all, bytes(1_000_000))
            await receive_exactly(server, 1_000_000)
            nursery.cancel_scope.cancel()
    assert splices == []
    await downstream.aclose()


# One at a time.


async def test_two_that_receive_or_send(proxy: tuple[Ends, Ends]) -> None:
    """While another task receives here, or sends there, there is nothing to relay."""
    (client, downstream), (_server, upstream) = proxy
    async with trio.open_nursery() as nursery:
        nursery.start_soon(downstream.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await downstream.relay(upstream)
        nursery.cancel_scope.cancel()
    await client.send_all(b"hello")
    upstream._begin_sending()  # noqa: SLF001 - as a sending task does
    with pytest.raises(trio.BusyResourceError):
        await downstream.relay(upstream)


async def test_closed(proxy: tuple[Ends, Ends]) -> None:
    """Neither of the two may be closed."""
    (client, downstream), (_server, upstream) = proxy
    await upstream.aclose()
    await client.send_all(b"hello")
    with pytest.raises(trio.ClosedResourceError):
        await downstream.relay(upstream)
    await downstream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await downstream.relay(upstream)


# Time-outs.


async def test_idle(autojump_clock: trio.testing.MockClock) -> None:
    """Each connection has its idle time-out, which what the other direction sends to it extends."""
    client, theirs = trio.testing.memory_stream_pair()
    server, ours = trio.testing.memory_stream_pair()
    times = []

    async def relay(source: Connection, target: Connection) -> None:
        with contextlib.suppress(ClientError):
            await source.relay(target)
        times.append(trio.current_time())

    downstream, upstream = Connection(theirs, idle_timeout=10), Connection(ours, idle_timeout=30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay, downstream, upstream)
        nursery.start_soon(relay, upstream, downstream)
        for _ in range(5):
            await trio.sleep(9)
            await server.send_all(b"news")
    assert times == pytest.approx([5 * 9 + 10, 5 * 9 + 30])
    assert await client.receive_some() == b"news" * 5


async def test_idle_while_bulk_is_sent_back() -> None:
    """A client that only receives bulk, which the kernel moves, is not idle."""
    client, theirs = await socket_streams()
    server, ours = await socket_streams()
    downstream, upstream = Connection(theirs, idle_timeout=0.3), Connection(ours)
    with trio.fail_after(LIMIT):
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(upstream.relay, downstream)
            nursery.start_soon(downstream.receive_some)  # raises, if the client is taken for idle
            nursery.start_soon(server.send_all, bytes(30_000_000))
            began = trio.current_time()
            received = 0
            while received < 30_000_000:
                received += len(await client.receive_some(2_000_000))
                await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
            assert trio.current_time() - began > 0.3
    await downstream.aclose()
    await upstream.aclose()


@pytest.mark.parametrize("size", [1000, 100_000_000], ids=["a message", "bulk"])
async def test_target_that_takes_nothing(size: int) -> None:
    """A target that takes nothing is reported with the target as the error's connection, and is reset when closed."""
    client, theirs = await socket_streams()
    server, ours = await socket_streams()
    downstream, upstream = Connection(theirs, idle_timeout=0.2), Connection(ours, idle_timeout=0.2)
    before = open_descriptors()
    with trio.fail_after(LIMIT):
        async with client, server, trio.open_nursery() as nursery:
            if size == 1000:
                fill(ours)
            nursery.start_soon(send_after, client, bytes(size), 0)
            with pytest.raises(ClientError) as caught:
                await downstream.relay(upstream)
            assert caught.value.connection is upstream
            assert str(caught.value) == "timed out waiting for room for a reply"
            assert open_descriptors() == before
            await upstream.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await receive_to_end(server)
            await downstream.aclose()


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/dev/fd").iterdir()))


async def test_plain_target_that_takes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A target that is another stream has the idle time-out of the connection; the error's connection is neither."""
    client, theirs = trio.testing.memory_stream_pair()
    _server, ours = trio.testing.lockstep_stream_pair()
    await client.send_all(b"hello")
    downstream = Connection(theirs, idle_timeout=10)
    with pytest.raises(ClientError) as caught:
        await downstream.relay(ours)
    assert trio.current_time() == pytest.approx(10)
    assert caught.value.connection is not downstream


# What goes wrong.


@pytest.mark.parametrize("plain", [False, True])
async def test_client_that_breaks_off(plain: bool, *, tls: bool) -> None:  # noqa: FBT001
    """If the client breaks off, the target is reset when it is closed: what it was sent is not all that there was."""
    client, theirs = await connected_streams(tls=tls)
    server, ours = await connected_streams(tls=tls)
    downstream = Connection(theirs)
    with trio.fail_after(LIMIT):
        async with server:
            await client.send_all(b"hello")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_reset, downstream, ours if plain else Connection(ours))
                assert await receive_exactly(server, 5) == b"hello"
                reset(client)
            await ours.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await receive_to_end(server)
    await downstream.aclose()


@pytest.mark.parametrize("target", ["tls", "network"])
async def test_client_that_breaks_off_before_a_plain_target(target: str) -> None:
    """It is so for any stream: in TLS there is no close_notify, in a network in memory there is a reset."""
    client, theirs = await socket_streams()
    downstream = Connection(theirs)
    with trio.fail_after(LIMIT):
        server: trio.abc.Stream
        ours: trio.abc.Stream
        if target == "tls":
            ends = await socket_streams()
            server, ours = server_tls(ends[0]), client_tls(ends[1])
        else:
            network = Network()
            listener = network.listen("upstream", 1)
            ours = await network.connect("upstream", 1)
            server = await listener.accept()
        await client.send_all(b"hello")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_reset, downstream, ours)
            assert await receive_exactly(server, 5) == b"hello"
            reset(client)
        await ours.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(server)
        await trio.aclose_forcefully(server)
    await downstream.aclose()


async def expect_reset(source: Connection, target: trio.abc.Stream) -> None:
    """Relay until the client breaks off."""
    with pytest.raises(ClientError) as caught:
        await source.relay(target)
    assert (caught.value.connection, caught.value.how) == (source, "reset")


@linux_only
@pytest.mark.parametrize("breaks", ["relay", "server"])
async def test_bulk_that_is_cut_off(breaks: str, splices: list[int]) -> None:
    """So it is when the kernel moves bulk, and the relay is cancelled or the target breaks off.

    No descriptor is left open.
    """
    client, theirs = await socket_streams()
    server, ours = await socket_streams()
    downstream, upstream = Connection(theirs), Connection(ours)
    before = open_descriptors()

    async def relay(nursery: trio.Nursery) -> None:
        with pytest.raises(ClientError) if breaks == "server" else contextlib.nullcontext() as caught:
            await downstream.relay(upstream)
        assert caught is not None
        assert caught.value.connection is upstream
        nursery.cancel_scope.cancel()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, nursery)
            nursery.start_soon(client.send_all, bytes(100_000_000))
            while not splices:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
            await receive_exactly(server, 1000)
            if breaks == "server":
                reset(server)
            else:
                await trio.sleep(0.1)
                nursery.cancel_scope.cancel()
        assert open_descriptors() == before - (breaks == "server")
        await downstream.aclose()
        await upstream.aclose()
        if breaks == "relay":
            with pytest.raises(trio.BrokenResourceError):
                await receive_to_end(server)
        await server.aclose()
        await client.aclose()


@linux_only
@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_bulk_echo_that_is_cut_off(how: str, splices: list[int]) -> None:
    """An echo that is cut off while the kernel holds some of it is reset, although all has been received."""
    scope = trio.CancelScope()
    connections = []

    async def handler(stream: trio.SocketStream) -> None:
        with scope:
            async with Connection(stream) as connection:
                connections.append(connection)
                await connection.relay(connection)

    async with connected(handler, receive_buffer=10_000) as client:
        await client.send_all(bytes(2 * RECEIVE_SIZE))
        await trio.testing.wait_all_tasks_blocked(0.05)
        await receive_exactly(client, RECEIVE_SIZE)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sum(splices) > 0
        if how == "closed":
            await connections[0].aclose()
        else:
            scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)


@linux_only
async def test_client_that_resets_under_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel reports for the source while it moves bulk is what the client did."""
    client, theirs = await socket_streams()
    server, ours = await socket_streams()
    downstream = Connection(theirs)

    def splice(source: int, target: int, count: int) -> int:
        raise ConnectionResetError(104, "reset")

    monkeypatch.setattr(os, "splice", splice)
    await client.send_all(bytes(2 * RECEIVE_SIZE))
    await trio.sleep(0.05)
    with trio.fail_after(LIMIT):
        async with client, server, ours, downstream:
            await expect_reset(downstream, ours)


async def test_end_of_a_handler(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """What either side does ends the block of its connection quietly, where the one is opened inside the other's."""
    for breaker in ("client", "server"):
        client, theirs = trio.testing.memory_stream_pair()
        server, ours = trio.testing.memory_stream_pair()

        async def handler(theirs: Stream, ours: Stream) -> None:
            async with (
                Connection(theirs, idle_timeout=10 if breaker == "client" else 50) as downstream,  # noqa: B023
                Connection(ours, idle_timeout=10 if breaker == "server" else 50) as upstream,  # noqa: B023
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(downstream.relay, upstream)
                nursery.start_soon(upstream.relay, downstream)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler, theirs, ours)
            await receive_to_end(client)
            await receive_to_end(server)
        assert trio.current_time() - began <= 13
    assert caplog.messages == []


# In a stop.


@pytest.mark.parametrize("sent", [b"", b"hello", bytes(1_000_000)], ids=len)
async def test_stop(sent: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A stop ends a relay when nothing is left that has arrived."""
    listener = MemoryListener()
    async with serving(echo, listener) as shutdown:
        client = listener.connect()
        await client.send_all(b"first")
        assert await receive_exactly(client, 5) == b"first"
        await client.send_all(sent)
        shutdown.set()
        assert await receive_to_end(client) == sent
        await client.aclose()
    assert trio.current_time() < 0.1


async def test_upstream_in_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    """In a stop, a proxy passes on the end of the client's side, and the answer that is under way arrives."""
    server, ours = trio.testing.memory_stream_pair()

    async def proxy(stream: Stream) -> None:
        async with (
            Connection(stream) as downstream,
            Connection(ours) as upstream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(downstream.relay, upstream)
            nursery.start_soon(upstream.relay, downstream)

    listener = MemoryListener()
    async with serving(proxy, listener) as shutdown:
        client = listener.connect()
        await client.send_all(b"question")
        assert await receive_exactly(server, 8) == b"question"
        shutdown.set()
        assert await server.receive_some() == b""
        await trio.sleep(10)
        await server.send_all(b"answer")
        await server.send_eof()
        assert await receive_to_end(client) == b"answer"
        await client.aclose()
