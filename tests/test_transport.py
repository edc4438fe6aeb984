"""Transports: the fast way on sockets does what the plain way does."""

import hashlib
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Sticky,
    arrival,
    client_tls,
    fill,
    receive_to_end,
    reset,
    server_tls,
    socket_streams,
    tls_contexts,
)

from trioproto import receive_exactly
from trioproto.tls import TLSStream
from trioproto.transport import (
    CLOSE_SECONDS,
    LINGER_SECONDS,
    SocketTransport,
    StreamTransport,
    Transport,
    transport_for,
)

Pair = tuple[Transport, trio.SocketStream]


@pytest.fixture(params=[SocketTransport, StreamTransport], ids=["fast", "plain"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A transport at one end of a TCP connection, and the stream at its other end."""
    peer, stream = await socket_streams()
    async with peer:
        yield request.param(stream), peer
        await stream.aclose()


def test_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is for sockets on POSIX systems; everything else goes the plain way."""
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    with ours, theirs:
        assert type(transport_for(stream)) is SocketTransport
        assert type(transport_for(server_tls(stream))) is StreamTransport
        own_tls = TLSStream(stream, tls_contexts()[1], server_side=True)
        assert transport_for(own_tls) is own_tls
        assert type(transport_for(trio.testing.memory_stream_pair()[0])) is StreamTransport
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(os, "name", "nt")
            assert type(transport_for(stream)) is StreamTransport


async def test_handshake() -> None:
    """Only TLS has a handshake; both its sides wait for it."""
    ours, theirs = trio.testing.memory_stream_pair()
    transports = [transport_for(server_tls(ours)), transport_for(client_tls(theirs))]
    assert [transport.needs_handshake for transport in transports] == [True, True]
    async with trio.open_nursery() as nursery:
        for transport in transports:
            nursery.start_soon(transport.handshake)
    assert [transport.needs_handshake for transport in transports] == [False, False]
    assert not transport_for(ours).needs_handshake


async def test_no_handshake(fast: Pair) -> None:
    """On a socket there is none, and nothing to wait for."""
    transport, _peer = fast
    assert not transport.needs_handshake
    with trio.testing.assert_checkpoints():
        await transport.handshake()


# Receiving.


async def receive(transport: Transport) -> bytes:
    """Receive the way that the transports' caller does."""
    while (data := transport.receive_nowait()) is None:
        await transport.wait_for_data()
    return data


async def test_receive(pair: Pair) -> None:
    """What has arrived is returned as bytes, then ``b""`` at the end of the stream, again and again."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await peer.send_all(b"hello")
        received = await receive(transport)
        assert (type(received), received) == (bytes, b"hello")
        await peer.send_eof()
        assert await receive(transport) == b""
        assert await receive(transport) == b""


async def test_receive_nowait(fast: Pair) -> None:
    """What has arrived on a socket is there at once; None for nothing."""
    transport, peer = fast
    assert transport.receive_nowait() is None
    await arrival(peer, b"hello")
    assert transport.receive_nowait() == b"hello"
    assert transport.receive_nowait() is None
    await peer.send_eof()
    await trio.sleep(0.01)
    assert transport.receive_nowait() == b""


def test_receive_nowait_from_other_streams() -> None:
    """Other streams do not say what has arrived."""
    assert transport_for(trio.testing.memory_stream_pair()[0]).receive_nowait() is None


async def test_receive_waits(pair: Pair) -> None:
    """What has not arrived yet is waited for."""
    transport, peer = pair

    async def send_later() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await peer.send_all(b"hello")

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_later)
            assert await receive(transport) == b"hello"


async def test_receive_cancelled(pair: Pair) -> None:
    """A receive that is cancelled has taken nothing from the stream."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        with trio.move_on_after(0.01) as scope:
            await receive(transport)
        assert scope.cancelled_caught
        await arrival(peer, b"hello")
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.wait_for_data()
        assert scope.cancelled_caught
        assert await receive(transport) == b"hello"


async def test_receive_after_a_reset(pair: Pair) -> None:
    """A connection that the peer resets is broken, for a task that waits and for one that comes later."""
    transport, peer = pair

    async def reset_later() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        reset(peer)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reset_later)
            with pytest.raises(trio.BrokenResourceError):
                await receive(transport)
        with pytest.raises(trio.BrokenResourceError):
            await send_all(transport, b"hello")


# Sending.


async def send_all(transport: Transport, data: bytes) -> None:
    """Send all of ``data``, as `Connection` does."""
    sent = transport.send_nowait(data)
    while sent < len(data):
        sent += await transport.send_some(memoryview(data)[sent:])


async def test_send(pair: Pair) -> None:
    """Everything can be sent, in order, although it is more than the buffers on the way hold."""
    transport, peer = pair
    data = random.Random(1).randbytes(20_000_000)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, transport, data)
            received = await receive_exactly(peer, len(data))
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


async def test_send_nowait(fast: Pair) -> None:
    """A socket takes at once what it has room for, and nothing if it has none."""
    transport, _peer = fast
    assert transport.send_nowait(b"hello") == 5
    while transport.send_nowait(bytes(1_000_000)):
        pass


def test_send_nowait_to_other_streams() -> None:
    """Other streams take nothing at once."""
    assert transport_for(trio.testing.memory_stream_pair()[0]).send_nowait(b"hello") == 0


async def test_wait_for_room(pair: Pair) -> None:
    """There is room as soon as the peer has read."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await transport.wait_for_room()
        fill(transport._stream)  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way to it
        with trio.move_on_after(0.05) as scope:
            await transport.wait_for_room()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_to_end, peer)
            await transport.wait_for_room()
            nursery.cancel_scope.cancel()


async def test_send_cancelled(pair: Pair) -> None:
    """A send that waits for room can be cancelled; after that, a socket goes on, and another stream sends no more."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        filled = fill(transport._stream)  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way to it
        with trio.move_on_after(0.05) as scope:
            await transport.send_some(memoryview(b"hello"))
        assert scope.cancelled_caught
        if isinstance(transport, StreamTransport):
            with pytest.raises(trio.BrokenResourceError, match="cut off"):
                await transport.send_some(memoryview(b"hello"))
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.send_some, memoryview(b"hello"))
            received = await receive_exactly(peer, filled + 5)
    assert received[filled:] == b"hello"


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
                await send_all(transport, bytes(50_000_000))
        with pytest.raises(trio.BrokenResourceError):
            await send_all(transport, b"hello")


async def test_half_close(pair: Pair) -> None:
    """Each side can be ended alone: a peer that has sent its last can still be sent to."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await peer.send_eof()
        assert await receive(transport) == b""
        await send_all(transport, b"hello")
        await transport.send_eof()
        assert await receive_to_end(peer) == b"hello"


async def test_half_close_of_a_stream_that_has_none() -> None:
    """TLS cannot end one side alone; there, ending it does nothing."""
    transport = transport_for(server_tls(trio.testing.memory_stream_pair()[0]))
    with trio.testing.assert_checkpoints():
        await transport.send_eof()


# Closing.


@pytest.fixture(params=["receive", "send"])
def use(request: pytest.FixtureRequest) -> Callable[[Transport], Awaitable[object]]:
    """What has to wait: for bytes, or for room."""
    if request.param == "receive":
        return receive
    return lambda transport: send_all(transport, bytes(50_000_000))


async def test_closed_while_it_waits(pair: Pair, use: Callable[[Transport], Awaitable[object]]) -> None:
    """Closing by another task wakes a task that waits; the error says who closed."""
    transport, _peer = pair
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_when_it_waits, transport)
            with pytest.raises(trio.ClosedResourceError):
                await use(transport)


async def test_closed_before(pair: Pair) -> None:
    """A transport that is closed can be closed again, and not used; nor is another's descriptor of that number."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        await transport.aclose()
        await transport.aclose()
        assert await peer.receive_some() == b""
        ours, theirs = socket.socketpair()  # one has the number that has become free
        with ours, theirs:
            if isinstance(transport, SocketTransport):
                with pytest.raises(trio.ClosedResourceError):
                    transport.receive_nowait()
                with pytest.raises(trio.ClosedResourceError):
                    transport.send_nowait(b"hello")
            else:
                with pytest.raises(trio.ClosedResourceError):
                    await receive(transport)
                with pytest.raises(trio.ClosedResourceError):
                    await transport.send_some(memoryview(b"hello"))


async def test_reset(pair: Pair) -> None:
    """Closing then tells the peer that the connection is broken, and drops what is not sent yet."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        fill(transport._stream)  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way to it
        transport.reset()
        await transport.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(peer)
        transport.reset()  # nothing is left to be reset; that is no error


async def test_reset_behind_tls() -> None:
    """TLS then says no goodbye, and the connection below is reset."""
    client, stream = await socket_streams()
    transport = transport_for(server_tls(stream))
    tls = client_tls(client)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.handshake)
            await tls.do_handshake()
        transport.reset()
        await transport.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await tls.receive_some()
        await trio.aclose_forcefully(client)


async def test_reset_of_a_stream_that_knows_resets() -> None:
    """A stream that has a method for it, such as one of a network in memory, is reset by that."""

    class Resettable(Sticky):
        reset_by = ""

        def reset(self) -> None:
            self.reset_by = "reset"

    stream = Resettable()
    transport = transport_for(stream)
    transport.reset()
    await transport.aclose()
    assert stream.reset_by == "reset"


async def test_reset_of_another_stream() -> None:
    """A stream that knows no reset is closed by force."""
    client, stream = trio.testing.memory_stream_pair()
    transport = transport_for(stream)
    transport.reset()
    await transport.aclose()
    assert await client.receive_some() == b""


async def test_close_after_a_handshake_that_was_not_made(autojump_clock: trio.testing.MockClock) -> None:
    """TLS that has not got as far as its handshake says no goodbye, which would mean to make one."""
    client, stream = trio.testing.memory_stream_pair()
    transport = transport_for(server_tls(stream))
    await transport.aclose()
    assert trio.current_time() == 0
    assert await receive_to_end(client) == b""


async def test_closing_that_takes_too_long(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that cannot say goodbye is closed by force after `CLOSE_SECONDS`."""
    stream = Sticky()
    await transport_for(stream).aclose()
    assert stream.forced
    assert trio.current_time() == pytest.approx(CLOSE_SECONDS)


async def test_linger(pair: Pair) -> None:
    """Lingering ends this side, and takes in what the peer sends until it ends its side, so that nothing is reset."""
    transport, peer = pair
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.linger)
            assert await peer.receive_some() == b""
            await peer.send_all(bytes(1_000_000))
            await peer.send_eof()
        await transport.aclose()


async def test_linger_behind_tls(autojump_clock: trio.testing.MockClock) -> None:
    """Behind TLS, lingering says goodbye by TLS and then ends the stream below; a silent client does not delay it."""
    client, stream = trio.testing.memory_stream_pair()
    transport = transport_for(server_tls(stream))
    tls = client_tls(client)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.handshake)
        await tls.do_handshake()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.linger)
        assert await tls.receive_some() == b""
        assert await client.receive_some() == b""
    assert trio.current_time() <= LINGER_SECONDS
