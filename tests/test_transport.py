"""Transports: the fast way on sockets does what the plain way does, and neither keeps others waiting."""

import errno
import hashlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import request_bytes

from trioproto import echo_handler, echo_request, op_handler, op_request, receive_exactly, serve_tcp
from trioproto.transport import CLOSE_SECONDS, SocketTransport, StreamTransport, Transport, transport_for

LIMIT = 20  # seconds, for a test on real sockets that would otherwise hang
NOW = 0.0
LONG = 1000.0

Pair = tuple[Transport, trio.SocketStream]


@pytest.fixture(params=[SocketTransport, StreamTransport], ids=["fast", "plain"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A transport at one end of a TCP connection, and the stream at its other end."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await trio.testing.open_stream_to_socket_listener(listener) as peer:
        stream = await listener.accept()
        yield request.param(stream), peer
        await stream.aclose()


def test_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is for sockets on POSIX systems; everything else goes the plain way."""
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    with ours, theirs:
        assert type(transport_for(stream)) is SocketTransport
        assert type(transport_for(trio.testing.memory_stream_pair()[0])) is StreamTransport
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(os, "name", "nt")
            assert type(transport_for(stream)) is StreamTransport


# Receiving.


async def test_receive(pair: Pair) -> None:
    """What has arrived is returned as bytes, then ``b""`` at the end of the stream, again and again."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await peer.send_all(b"hello")
        received = await transport.receive(LONG)
        assert (type(received), received) == (bytes, b"hello")
        await peer.send_eof()
        assert await transport.receive(LONG) == b""
        assert await transport.receive(NOW) == b""


async def test_receive_waits(pair: Pair) -> None:
    """What has not arrived yet is waited for."""
    transport, peer = pair

    async def send_later() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await peer.send_all(b"hello")

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_later)
            assert await transport.receive(LONG) == b"hello"


@pytest.mark.parametrize("patience", [NOW, 0.05])
async def test_receive_without_success(patience: float, pair: Pair) -> None:
    """If nothing arrives in time, the result is None, and nothing is lost: the next receive gets what comes."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        began = trio.current_time()
        assert await transport.receive(patience) is None
        assert trio.current_time() - began >= patience
        await peer.send_all(b"hello")
        await peer.send_eof()
        assert await receive_all(transport) == b"hello"


async def receive_all(transport: Transport) -> bytes:
    """Receive until the end of the stream."""
    received = b""
    while chunk := await transport.receive(LONG):
        received += chunk
    return received


@pytest.mark.parametrize("sent", [b"hello", b""], ids=repr)
async def test_receive_is_a_checkpoint(sent: bytes, pair: Pair) -> None:
    """Each receive lets other tasks run, and can be cancelled, though the bytes, or the end, are there already."""
    transport, peer = pair
    await peer.send_all(sent)
    await peer.send_eof()
    await trio.sleep(0.01)
    with trio.testing.assert_checkpoints():
        await transport.receive(LONG)


async def test_receive_cancelled(pair: Pair) -> None:
    """A receive that is cancelled has taken nothing from the stream."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        with trio.move_on_after(0.01) as scope:
            await transport.receive(LONG)
        assert scope.cancelled_caught
        await peer.send_all(b"hello")
        await trio.sleep(0.01)
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.receive(LONG)
        assert scope.cancelled_caught
        assert await transport.receive(LONG) == b"hello"


async def test_receive_after_a_reset(pair: Pair) -> None:
    """A connection that the peer resets is broken, for who waits and for who comes later."""
    transport, peer = pair

    async def reset() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        # To close at once, with nothing to linger for, is to reset (socket(7)).
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await peer.aclose()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reset)
            with pytest.raises(trio.BrokenResourceError):
                await transport.receive(LONG)
        with pytest.raises(trio.BrokenResourceError):
            await transport.send_all(b"hello", LONG)


# Hurrying.


@pytest.mark.parametrize("patience", [NOW, 0.05])
async def test_hurry(patience: float, pair: Pair) -> None:
    """A receive that waits is given so much more time, and no longer; the next one is not concerned."""
    transport, peer = pair

    async def hurry() -> None:
        await trio.testing.wait_all_tasks_blocked()
        transport.hurry(patience)

    with trio.fail_after(LIMIT):
        transport.hurry(NOW)  # none waits
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hurry)
            assert await transport.receive(LONG) is None
        assert trio.current_time() - began >= patience
        transport.hurry(NOW)  # none waits
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(send_after, peer, b"hello", 0.05))
            assert await transport.receive(LONG) == b"hello"


async def send_after(stream: trio.SocketStream, data: bytes, seconds: float) -> None:
    """Send ``data`` later."""
    await trio.sleep(seconds)
    await stream.send_all(data)


async def test_hurry_before_the_wait(pair: Pair) -> None:
    """A receive that has begun, and does not wait yet, is hurried as well."""
    transport, _peer = pair
    received = []

    async def receive() -> None:
        received.append(await transport.receive(LONG))

    async def hurry() -> None:
        await trio.lowlevel.checkpoint()
        transport.hurry(NOW)

    with trio.fail_after(LIMIT):
        for _ in range(20):  # Trio decides by chance which of the two goes on first
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                nursery.start_soon(hurry)
    assert received == [None] * 20


async def test_hurry_takes_in_what_has_arrived(pair: Pair) -> None:
    """A receive that is hurried still returns what has arrived by then."""
    transport, peer = pair

    async def send_and_hurry() -> None:
        await trio.testing.wait_all_tasks_blocked()
        os.write(peer.socket.fileno(), b"hello")  # no checkpoint, so that the receiver has no turn in between
        transport.hurry(NOW)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_hurry)
            assert await transport.receive(LONG) == b"hello"


# Sending.


async def test_send(pair: Pair) -> None:
    """Everything is sent, though it be more than the buffers on the way hold."""
    transport, peer = pair
    data = random.Random(1).randbytes(20_000_000)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.send_all, data, LONG)
            received = await receive_exactly(peer, len(data))
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


async def test_send_to_a_peer_that_takes_nothing(pair: Pair) -> None:
    """A peer that takes nothing is given up."""
    transport, _peer = pair
    with trio.fail_after(LIMIT):
        began = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await transport.send_all(bytes(50_000_000), 0.2)
        assert trio.current_time() - began >= 0.2
        for _ in range(3):  # now not even the first byte finds room
            with pytest.raises(trio.TooSlowError):
                await transport.send_all(bytes(10_000_000), 0.05)


async def test_send_cancelled(pair: Pair) -> None:
    """A send that waits for room can be cancelled; part of it has been sent."""
    transport, peer = pair
    size = 50_000_000
    with trio.fail_after(LIMIT):
        with trio.move_on_after(0.1) as scope:
            await transport.send_all(bytes(size), LONG)
        assert scope.cancelled_caught
        await transport.aclose()
        received = 0
        async for chunk in peer:
            received += len(chunk)
    assert 0 < received < size


async def close_when_it_waits(end: Transport | trio.SocketStream) -> None:
    """Close ``end`` once every other task waits."""
    await trio.testing.wait_all_tasks_blocked(0.05)
    await end.aclose()


async def test_send_to_a_peer_that_has_gone(pair: Pair) -> None:
    """A peer that closes the connection breaks a send that waits for room, and each later one."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_when_it_waits, peer)
            with pytest.raises(trio.BrokenResourceError):
                await transport.send_all(bytes(50_000_000), LONG)
        with pytest.raises(trio.BrokenResourceError):
            await transport.send_all(b"hello", LONG)


async def test_half_close(pair: Pair) -> None:
    """A peer that has sent its last can still be sent to."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await peer.send_eof()
        assert await transport.receive(LONG) == b""
        await transport.send_all(b"hello", LONG)
        await transport.aclose()
        assert await peer.receive_some() == b"hello"
        assert await peer.receive_some() == b""


# Closing.


@pytest.fixture(params=["receive", "send"])
def use(request: pytest.FixtureRequest) -> Callable[[Transport], Awaitable[object]]:
    """What has to wait: for bytes, or for room."""
    if request.param == "receive":
        return lambda transport: transport.receive(LONG)
    return lambda transport: transport.send_all(bytes(50_000_000), LONG)


async def test_closed_while_it_waits(pair: Pair, use: Callable[[Transport], Awaitable[object]]) -> None:
    """Closing by another task wakes a task that waits; the error says who closed."""
    transport, _peer = pair
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_when_it_waits, transport)
            with pytest.raises(trio.ClosedResourceError):
                await use(transport)


async def test_closed_before(pair: Pair, use: Callable[[Transport], Awaitable[object]]) -> None:
    """A transport that is closed can be closed again, and not used; nor is another's descriptor of that number."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await transport.aclose()
        await transport.aclose()
        assert await peer.receive_some() == b""
        ours, theirs = socket.socketpair()  # one has the number that has become free
        with ours, theirs, pytest.raises(trio.ClosedResourceError):
            await use(transport)


async def test_relay_on_a_closed_socket() -> None:
    """A relay on a socket that somebody closes, before or meanwhile, says so."""
    transport, peer = await socket_pair()
    await transport.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await transport.relay(LONG)
    await peer.aclose()

    transport, peer = await socket_pair()
    with trio.fail_after(LIMIT):
        async with peer, trio.open_nursery() as nursery:
            nursery.start_soon(send_until_closed, peer)
            await trio.sleep(0.05)
            nursery.start_soon(close_after, transport, 0.1)
            with pytest.raises(trio.ClosedResourceError):
                await transport.relay(LONG)
            nursery.cancel_scope.cancel()


async def close_after(transport: Transport, seconds: float) -> None:
    """Close ``transport`` later."""
    await trio.sleep(seconds)
    await transport.aclose()


async def send_until_closed(stream: trio.SocketStream) -> None:
    """Send as much as the peer takes."""
    try:
        while True:
            await stream.send_all(bytes(100_000))
    except trio.BrokenResourceError:
        pass


async def test_closing_that_takes_too_long(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that cannot say goodbye is closed by force after `CLOSE_SECONDS`."""

    class Sticky(trio.abc.Stream):
        forced = False

        async def aclose(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                self.forced = True

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            raise NotImplementedError

        async def wait_send_all_might_not_block(self) -> None:
            raise NotImplementedError

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            raise NotImplementedError

    stream = Sticky()
    await transport_for(stream).aclose()
    assert stream.forced
    assert trio.current_time() == pytest.approx(CLOSE_SECONDS)


# Relaying inside the kernel.


async def socket_pair() -> tuple[SocketTransport, trio.SocketStream]:
    """Return the fast transport at one end of a TCP connection, and the stream at its other end."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        peer = await trio.testing.open_stream_to_socket_listener(listener)
        return SocketTransport(await listener.accept()), peer


linux_only = pytest.mark.skipif(not hasattr(os, "splice"), reason="no splice(2)")


@linux_only
async def test_relay() -> None:
    """A relay sends back all that has arrived, and returns when there is no more, at its end too."""
    transport, peer = await socket_pair()
    with trio.fail_after(LIMIT):
        async with peer:
            for data in (random.Random(1).randbytes(30_000), b"", b"a"):
                await peer.send_all(data)
                await trio.sleep(0.01)
                await transport.relay(LONG)
                assert await receive_exactly(peer, len(data)) == data
            await peer.send_eof()
            await trio.sleep(0.01)
            await transport.relay(LONG)
            assert await transport.receive(LONG) == b""
            await transport.aclose()


@linux_only
async def test_relay_is_a_checkpoint() -> None:
    """A relay lets other tasks run, and can be cancelled, whether or not anything has arrived."""
    transport, peer = await socket_pair()
    with trio.fail_after(LIMIT):
        async with peer:
            for data in (b"", b"hello"):
                await peer.send_all(data)
                await trio.sleep(0.01)
                with trio.testing.assert_checkpoints():
                    await transport.relay(LONG)
            await transport.aclose()


@linux_only
async def test_relay_to_a_peer_that_takes_nothing() -> None:
    """A relay gives up a peer that takes nothing, and leaves no descriptor open."""
    transport, peer = await socket_pair()
    before = open_descriptors()
    with trio.fail_after(LIMIT):
        async with peer, trio.open_nursery() as nursery:
            nursery.start_soon(send_until_closed, peer)
            await trio.sleep(0.05)
            with pytest.raises(trio.TooSlowError):
                await transport.relay(0.2)
            nursery.cancel_scope.cancel()
        assert open_descriptors() < before  # the peer's is closed, too
        await transport.aclose()


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/dev/fd").iterdir()))


@linux_only
async def test_relay_cancelled() -> None:
    """A relay can be cancelled, and leaves no descriptor open."""
    transport, peer = await socket_pair()
    before = open_descriptors()
    with trio.fail_after(LIMIT):
        async with peer, trio.open_nursery() as nursery:
            nursery.start_soon(send_until_closed, peer)
            await trio.sleep(0.05)
            with trio.move_on_after(0.1) as scope:
                await transport.relay(LONG)
            assert scope.cancelled_caught
            assert open_descriptors() == before
            nursery.cancel_scope.cancel()
        await transport.aclose()


@linux_only
async def test_relay_to_a_peer_that_has_gone() -> None:
    """A peer that breaks the connection breaks the relay."""
    transport, peer = await socket_pair()
    with trio.fail_after(LIMIT):
        await peer.send_all(bytes(30_000))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await peer.aclose()
        await trio.sleep(0.05)
        with pytest.raises(trio.BrokenResourceError):
            await transport.relay(LONG)
        await transport.aclose()


def without_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a system that cannot."""
    monkeypatch.delattr(os, "splice", raising=False)


def without_pipe2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a system that has neither."""
    without_splice(monkeypatch)
    monkeypatch.delattr(os, "pipe2", raising=False)


def without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no descriptors left for a pipe."""

    def pipe2(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe2", pipe2, raising=False)


Lack = Callable[[pytest.MonkeyPatch], object]


@pytest.mark.parametrize("lack", [without_splice, without_pipe2, without_descriptors])
async def test_relay_that_cannot(lack: Lack, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot, a relay does nothing, and is a checkpoint; the plain way never does anything."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await peer.send_all(b"hello")
        await trio.sleep(0.01)
        lack(monkeypatch)
        with trio.testing.assert_checkpoints():
            await transport.relay(LONG)
        assert await transport.receive(LONG) == b"hello"


# Through the handlers.


async def serve(
    nursery: trio.Nursery, handler: Callable[[trio.SocketStream], Awaitable[object]]
) -> trio.SocketListener:
    """Start a server."""
    [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1"))
    assert isinstance(listener, trio.SocketListener)
    return listener


def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lack nothing."""


@pytest.fixture(params=[everything, without_splice, without_descriptors])
def lack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system lacks for the kernel to move a bulk echo."""
    request.param(monkeypatch)


@pytest.mark.usefixtures("lack")
@pytest.mark.parametrize(
    ("megabytes", "pause"), [pytest.param(200, 0, id="all at once"), pytest.param(5, 0.002, id="slow reader")]
)
async def test_bulk_echo(megabytes: int, pause: float, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """A bulk echo comes back unharmed, whether or not the kernel moves it, and whether or not the reader is slow."""
    listener = await serve(nursery, echo_handler)
    chunk = random.Random(1).randbytes(1_000_003)
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def send(client: trio.SocketStream) -> None:
        for _ in range(megabytes):
            await client.send_all(chunk)
            sent.update(chunk)
        await client.send_eof()

    with trio.fail_after(LIMIT):
        async with (
            await trio.testing.open_stream_to_socket_listener(listener) as client,
            trio.open_nursery() as sending,
        ):
            sending.start_soon(send, client)
            size = 0
            while data := await client.receive_some(50_000 if pause else 2**20):
                received.update(data)
                size += len(data)
                await trio.sleep(pause)
    assert size == megabytes * len(chunk)
    assert received.digest() == sent.digest()
    assert caplog.messages == []


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_back_pressure(
    handler: Callable[..., Awaitable[object]], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read can send only what the buffers on the way hold; then the server takes no more."""
    listener = await serve(nursery, handler)
    sent = 0

    async def flood(client: trio.SocketStream) -> None:
        nonlocal sent
        while True:
            await client.send_all(request_bytes([1], "+") * 10_000)
            sent += 60_000

    with trio.fail_after(LIMIT):
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            async with trio.open_nursery() as flooding:
                flooding.start_soon(flood, client)
                await trio.testing.wait_all_tasks_blocked(0.1)
                flooding.cancel_scope.cancel()
            assert 0 < sent < 200_000_000


FLOODS = {
    "echo": (echo_handler, b"hello"),
    "op": (op_handler, request_bytes([1, 2], "+")),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_flood(flood: str, nursery: trio.Nursery) -> None:
    """While one client floods the server, from a thread of its own, others get their turns."""
    handler, data = FLOODS[flood]
    listener = await serve(nursery, handler)
    enough = threading.Event()
    flooding = threading.Event()
    starved = threading.Event()

    def send(client: socket.socket) -> None:
        gives_up = time.monotonic() + LIMIT / 4
        while not enough.is_set() and time.monotonic() < gives_up:
            client.sendall(data * 100_000)
            flooding.set()
        if not enough.is_set():
            starved.set()
        client.shutdown(socket.SHUT_WR)

    def receive(client: socket.socket) -> None:
        while client.recv(2**20):
            pass

    with trio.fail_after(LIMIT), socket.create_connection(listener.socket.getsockname()) as client:
        async with trio.open_nursery() as threads:
            threads.start_soon(trio.to_thread.run_sync, send, client)
            threads.start_soon(trio.to_thread.run_sync, receive, client)
            while not flooding.is_set():  # noqa: ASYNC110 - a thread sets it
                await trio.sleep(0.01)
            for _ in range(20):
                async with await trio.testing.open_stream_to_socket_listener(listener) as other:
                    if handler is echo_handler:
                        assert await echo_request(other, b"hello") == b"hello"
                    else:
                        assert await op_request(other, [1, 2], "+") == 3
            enough.set()
    assert not starved.is_set()
