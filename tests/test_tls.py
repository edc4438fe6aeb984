"""TLS on a socket: a stream that passes Trio's checks, and does for `Connection` what a plain socket does."""

import contextlib
import functools
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from helpers import LIMIT, client_tls, fill, receive_to_end, reset, server_tls, serving, socket_streams, tls_contexts

from trioproto import ClientError, Connection, echo_handler, receive_exactly
from trioproto.tls import _MAX_ANSWERS, _PIECE, TLSStream

Ends = tuple[TLSStream, TLSStream]


async def ends() -> Ends:
    """A client's stream and its server's."""
    client, server = await socket_streams()
    return (
        TLSStream(client, tls_contexts()[0], server_hostname="localhost"),
        TLSStream(server, tls_contexts()[1], server_side=True),
    )


@contextlib.asynccontextmanager
async def shaken(client_class: Callable[[trio.SocketStream], trio.abc.Stream]) -> AsyncIterator[tuple[Any, TLSStream]]:
    """A client of another kind, and the server's stream, with the handshake made."""
    below, theirs = await socket_streams()
    client, server = client_class(below), TLSStream(theirs, tls_contexts()[1], server_side=True)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, b"hello")
            assert await receive_exactly(server, 5) == b"hello"
            await server.send_all(b"hello")
            assert await receive_exactly(client, 5) == b"hello"
        yield client, server
        for stream in (client, server):
            await trio.aclose_forcefully(stream)


def older_client(stream: trio.SocketStream) -> trio.SSLStream[trio.SocketStream]:
    """A client that knows no TLS 1.3."""
    context = ssl.create_default_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return trio.SSLStream(stream, context, server_hostname="localhost")


def serving_over_tls(
    handler: Callable[[TLSStream], Any], listener: trio.SocketListener
) -> contextlib.AbstractAsyncContextManager[trio.Event]:
    """Run a server whose handler gets TLS on what was accepted, as `trioproto.serve_until_signal` does."""
    return serving(lambda stream: handler(TLSStream(stream, tls_contexts()[1], server_side=True)), listener)


# As a stream.


async def test_stream() -> None:
    """It is a stream as Trio expects one, with half-close."""
    with trio.fail_after(LIMIT):
        await trio.testing.check_half_closeable_stream(ends, None)


async def test_connection() -> None:
    """So is a `Connection` on it."""

    async def connections() -> tuple[Connection, Connection]:
        client, server = await ends()
        return Connection(client), Connection(server)

    with trio.fail_after(LIMIT):
        await trio.testing.check_half_closeable_stream(connections, None)


@pytest.mark.parametrize("max_bytes", [1, 1000, 16384, None])
async def test_receive_some(max_bytes: int | None) -> None:
    """No more comes than was asked for, and nothing is lost."""
    message = os.urandom(100_000 if max_bytes != 1 else 100)
    async with shaken(client_tls) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, message)
        received = b""
        while len(received) < len(message):
            piece = await server.receive_some(max_bytes)
            assert 1 <= len(piece) <= (max_bytes or len(message))
            received += piece
        assert received == message


async def test_records_that_arrived_together() -> None:
    """They are received together: a record holds at most 16 KiB, and each receive costs a turn."""
    message = os.urandom(40_000)
    async with shaken(client_tls) as (client, server):
        await client.send_all(message)
        await trio.sleep(0.02)
        assert await server.receive_some() == message


async def test_large_messages_both_ways() -> None:
    """Bulk arrives as it was sent, although neither side's system takes it at once."""
    message = os.urandom(10_000_000)
    async with shaken(client_tls) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, message)
        nursery.start_soon(server.send_all, message)
        received: dict[str, bytes] = {}

        async def receive(name: str, stream: trio.abc.Stream) -> None:
            received[name] = await receive_exactly(stream, len(message))

        nursery.start_soon(receive, "client", client)
        nursery.start_soon(receive, "server", server)
    assert received == {"client": message, "server": message}


async def test_end_of_one_side() -> None:
    """After `send_eof` the peer sees end of stream, and may go on sending."""
    async with shaken(client_tls) as (client, server):
        await server.send_eof()
        assert await client.receive_some() == b""
        with pytest.raises(trio.ClosedResourceError):
            await server.wait_send_all_might_not_block()
        await client.send_all(b"still here")
        assert await receive_exactly(server, 10) == b"still here"
        await client.aclose()
        assert await server.receive_some() == b""
        assert await server.receive_some() == b""


async def test_end_of_one_side_before_tls_1_3() -> None:
    """There, close_notify ends both sides (RFC 5246, section 7.2.1), so it waits for the close."""
    async with shaken(older_client) as (client, server):
        await server.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await server.send_all(b"x")
        with trio.move_on_after(0.02) as nothing_yet:
            await client.receive_some()
        assert nothing_yet.cancelled_caught
        await client.send_all(b"still here")
        assert await receive_exactly(server, 10) == b"still here"
        await server.aclose()
        assert await client.receive_some() == b""


async def test_close() -> None:
    """Closing says goodbye, without waiting for the peer's."""
    async with shaken(client_tls) as (client, server):
        await server.aclose()
        assert await client.receive_some() == b""
        await server.aclose()


async def test_close_while_the_peer_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    """There may be no room for the goodbye: it is waited for, but not for ever."""
    async with shaken(client_tls) as (_client, server):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(server.transport_stream.socket.fileno(), bytes(65536))
        with trio.fail_after(10):
            await server.aclose()


async def test_reset() -> None:
    """The peer sees a reset, and no goodbye before it, which would make what was cut look whole."""
    async with shaken(client_tls) as (client, server):
        server.reset()
        await server.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await client.transport_stream.receive_some()


async def test_wait_for_room() -> None:
    """There is none while the peer does not read."""
    async with shaken(client_tls) as (_client, server):
        await server.wait_send_all_might_not_block()
        fill(server)
        with trio.move_on_after(0.02) as waiting:
            await server.wait_send_all_might_not_block()
        assert waiting.cancelled_caught


async def test_closed_under_a_receive() -> None:
    """A task that receives learns that another has closed the stream."""
    async with shaken(client_tls) as (_client, server), trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await server.receive_some()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await server.aclose()


async def test_cancelled_send() -> None:
    """What a cancellation has cut cannot be gone on with, nor be taken for whole."""
    async with shaken(client_tls) as (client, server):
        with trio.move_on_after(0.05) as scope:
            await server.send_all(bytes(50_000_000))
        assert scope.cancelled_caught
        for use in (functools.partial(server.send_all, b"x"), server.wait_send_all_might_not_block, server.send_eof):
            with pytest.raises(trio.BrokenResourceError):
                await use()
        await server.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)


async def test_first_as_a_stream_and_then_as_a_transport() -> None:
    """What `receive_some` left, not being asked for more, is a `Connection`'s next; after a close, nobody's."""
    async with shaken(client_tls) as (client, server):
        await client.send_all(b"<head><body>")
        assert await receive_exactly(server, 6) == b"<head>"
        connection = Connection(server)
        assert await connection.receive_exactly(6) == b"<body>"
        await client.send_all(b"<head><body>")
        assert await receive_exactly(server, 6) == b"<head>"
        await server.aclose()
        with pytest.raises(trio.ClosedResourceError):
            server.receive_nowait()


# The handshake.


async def test_handshake_whose_wait_is_cancelled() -> None:
    """The next use goes on with it."""
    client, server = await ends()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            received: list[bytes] = []

            async def poll() -> None:
                while not received:
                    with trio.move_on_after(0.001):
                        received.append(await server.receive_some())

            nursery.start_soon(poll)
            await trio.sleep(0.02)
            await client.send_all(b"hello")
        assert received == [b"hello"]
        await client.aclose()
        await server.aclose()


async def test_handshake_of_a_client_that_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes up at once what the client has sent, and does not look first what to do without it."""
    client, server = await ends()
    steps: list[TLSStream] = []
    make = TLSStream._make_handshake  # noqa: SLF001

    def note(stream: TLSStream) -> bool:
        steps.append(stream)
        return make(stream)

    monkeypatch.setattr(TLSStream, "_make_handshake", note)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.handshake)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await server.handshake()
        assert steps.count(server) == 2  # one for each flight of the client's
        for stream in (client, server):
            await trio.aclose_forcefully(stream)


async def test_closing_in_the_middle_of_a_handshake() -> None:
    """There is nothing to say then, and nothing is waited for."""
    client, server = await ends()
    with trio.fail_after(LIMIT):
        client._make_handshake()  # noqa: SLF001 - only the start of it
        client._flush()  # noqa: SLF001
        fill(server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.handshake)
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        with trio.fail_after(1):
            await server.aclose()
        await trio.aclose_forcefully(client)


async def test_handshake_that_is_cancelled_at_its_very_end() -> None:
    """A client whose last part of the handshake waits for room, such as a large certificate, goes on with that, too."""
    authority = trustme.CA()
    settings, server_settings = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for context, names in ((settings, [f"{number}.{'x' * 60}.org" for number in range(900)]), (server_settings, [])):
        authority.configure_trust(context)
        authority.issue_cert("localhost", *names).configure_cert(context)
    server_settings.verify_mode = ssl.CERT_REQUIRED
    below_client, below_server = await socket_streams()
    below_client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    below_server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client = TLSStream(below_client, settings, server_hostname="localhost")
    server = TLSStream(below_server, server_settings, server_side=True)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.handshake)
            with trio.move_on_after(0.05):
                # As far as the server's side of it: then nobody takes what the client says.
                while client._object.version() is None:  # noqa: SLF001
                    await trio.lowlevel.checkpoint()
                    if not server._outgoing.pending:  # noqa: SLF001
                        server._take_in()  # noqa: SLF001
                        server._make_handshake()  # noqa: SLF001
                    server._flush()  # noqa: SLF001
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert client.needs_handshake
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"hello")
            assert await receive_exactly(client, 5) == b"hello"
        for stream in (client, server):
            await trio.aclose_forcefully(stream)


async def test_handshake_of_two_tasks() -> None:
    """One that is cancelled leaves it to the other."""
    client, server = await ends()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                assert await server.receive_some() == b"hello"

            with trio.move_on_after(0.02) as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(server.send_all, b"x")
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(receive)
            assert scope.cancelled_caught
            await client.send_all(b"hello")
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(server)


async def test_time_of_a_handshake_whose_waits_are_cancelled() -> None:
    """It is not given anew: a client that does not shake hands is late for a handler that polls, too."""
    client, server = await ends()
    connection = Connection(server, request_timeout=0.1)

    async def poll() -> None:
        while True:
            with trio.move_on_after(0.01):
                await connection.receive_some()

    with trio.fail_after(LIMIT):
        with pytest.raises(ClientError, match="timed out waiting for a TLS handshake"):
            await poll()
        await connection.aclose()
        await client.aclose()


async def test_peer_that_speaks_no_tls() -> None:
    """It is told so, by an alert, and the stream is broken."""
    below, theirs = await socket_streams()
    server = TLSStream(theirs, tls_contexts()[1], server_side=True)
    with trio.fail_after(LIMIT):
        await below.send_all(b"\x16\x03\x01\x00\x05hello")
        with pytest.raises(trio.BrokenResourceError, match="TLS failed"):
            await server.receive_some()
        await server.aclose()
        assert (await below.receive_some())[:1] == b"\x15"  # an alert (RFC 8446, appendix B.1)
        await below.aclose()


@pytest.mark.parametrize("breaks", [trio.SocketStream.send_eof, reset])
async def test_peer_that_leaves_in_the_handshake(breaks: Callable[[trio.SocketStream], Any]) -> None:
    """The stream is broken, and closing it has nothing to say."""
    below, theirs = await socket_streams()
    server = TLSStream(theirs, tls_contexts()[1], server_side=True)
    with trio.fail_after(LIMIT):
        if (breaking := breaks(below)) is not None:
            await breaking
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()
        await server.aclose()
        await below.aclose()


async def test_certificate_of_another() -> None:
    """A client does not speak with a server whose certificate is for somebody else; both learn of it."""
    below, theirs = await socket_streams()
    client = TLSStream(below, tls_contexts()[0], server_hostname="example.org")
    server = TLSStream(theirs, tls_contexts()[1], server_side=True)

    async def serve() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()
        await server.aclose()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with pytest.raises(trio.BrokenResourceError, match="Hostname mismatch"):
                await client.send_all(b"secret")
            await client.aclose()


# What goes wrong later.


async def test_end_without_a_goodbye() -> None:
    """What came before it arrives; then the stream is broken: somebody may have cut off the rest."""
    async with shaken(client_tls) as (client, server):
        await client.send_all(b"half of it")
        await client.transport_stream.aclose()
        assert await receive_exactly(server, 10) == b"half of it"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError):
                await server.receive_some()


async def test_bytes_behind_the_goodbye() -> None:
    """Whatever comes behind close_notify is left to the system's buffers, however often it is asked for."""
    async with shaken(client_tls) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.unwrap)
            assert await server.receive_some() == b""
            nursery.cancel_scope.cancel()
        await client.transport_stream.send_all(bytes(1000))
        await trio.sleep(0.01)
        assert await server.receive_some() == b""
        assert len(await server.transport_stream.receive_some()) == 1000


async def test_bytes_that_are_no_record() -> None:
    """So it is after bytes that do not decrypt, however they come together with good ones."""
    async with shaken(client_tls) as (client, server):
        await client.send_all(b"good")
        await client.transport_stream.send_all((b"\x17\x03\x03\x00\x20" + bytes(32)) * 2)
        await trio.sleep(0.01)
        assert await server.receive_some() == b"good"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="TLS failed"):
                await server.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await server.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError) as told:
            await client.receive_some()
        assert "alert bad record mac" in str(told.value.__cause__)


async def test_peer_that_asks_for_new_keys_again_and_again() -> None:
    """The answers wait for the next message, and do not pile up without bound."""
    async with shaken(client_tls) as (client, server):
        most = _PIECE + _MAX_ANSWERS
        for answers, bound in ((most, contextlib.nullcontext()), (1, pytest.raises(trio.BrokenResourceError))):
            server._outgoing.write(bytes(answers))  # noqa: SLF001 - Python's ssl cannot ask for new keys
            await client.send_all(b"x")
            with bound:
                assert await server.receive_some() == b"x"


async def test_answers_that_wait_behind_a_message() -> None:
    """Those count that have been taken up with a message already, which the peer does not receive."""
    async with shaken(client_tls) as (client, server):
        fill(server)
        server._outgoing.write(bytes(_MAX_ANSWERS))  # noqa: SLF001
        assert server.send_nowait(bytes(_PIECE)) == 0
        await client.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


# As a Connection's transport.


async def test_message_that_was_cut_by_a_cancellation() -> None:
    """Its rest is sent before anything else, as on a plain socket."""
    async with shaken(client_tls) as (client, server), Connection(server) as connection:
        message = b"a" * 20_000_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, message)
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_all, b"b")
            received = await receive_exactly(client, len(message) + 1)
        assert received == message + b"b"
        await client.aclose()


async def test_answer_behind_a_message_that_is_being_sent() -> None:
    """What TLS has to say itself, such as new keys, comes behind what the system has not taken yet."""
    message = memoryview(os.urandom(_PIECE))
    async with shaken(client_tls) as (client, server), trio.open_nursery() as nursery:
        expected = b""
        while server.send_nowait(message):
            expected += message
        server._object.write(b"answer")  # noqa: SLF001 - any record will do
        nursery.start_soon(server.send_some, message)
        assert await receive_exactly(client, len(expected) + _PIECE + 6) == expected + message + b"answer"


async def test_everything_arrives_although_the_client_goes_on_sending() -> None:
    """The end of a block lingers over TLS, too."""
    async with shaken(client_tls) as (client, server), trio.open_nursery() as nursery:

        async def serve() -> None:
            async with Connection(server) as connection:
                await connection.receive_some()
                connection.push(b"reply" * 10_000)

        nursery.start_soon(serve)
        await client.send_all(bytes(1000))
        await trio.sleep(0.01)
        await client.transport_stream.send_all(bytes(1000))  # after the goodbye, nobody reads it as TLS
        assert await receive_to_end(client) == b"reply" * 10_000
        await client.aclose()


async def test_message_that_is_cut_off() -> None:
    """A message that is not sent to its end looks like a break to the client."""
    async with shaken(client_tls) as (client, server):
        with trio.move_on_after(0.05):
            async with Connection(server) as connection:
                await connection.send_all(bytes(50_000_000))
        with pytest.raises(trio.BrokenResourceError):
            await receive_to_end(client)


async def test_behind_a_server(caplog: pytest.LogCaptureFixture) -> None:
    """The address and the stop of what was accepted are those of TLS on it."""
    caplog.set_level(logging.DEBUG, "trioproto")
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    peers = []

    async def handler(stream: TLSStream) -> None:
        async with Connection(stream) as connection:
            peers.append(connection.peer)
            async for line in connection.requests(lambda it: it.receive_until(b"\n", max_bytes=10)):
                await connection.send_all(line.upper())

    async with serving_over_tls(handler, listener) as shutdown:
        below = await trio.testing.open_stream_to_socket_listener(listener)
        client = TLSStream(below, tls_contexts()[0], server_hostname="localhost")
        await client.send_all(b"hello\n")
        assert await receive_exactly(client, 5) == b"HELLO"
        shutdown.set()
        assert await client.receive_some() == b""
        await client.aclose()
    [peer] = peers
    assert peer.startswith("127.0.0.1:")


async def test_request_under_way_in_a_stop() -> None:
    """It is finished and answered, like on a plain socket; then the client sees end of stream, and no break."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def handler(stream: TLSStream) -> None:
        async with Connection(stream) as connection:
            async for line in connection.requests(lambda it: it.receive_until(b"\n", max_bytes=10)):
                await connection.send_all(line.upper())

    async with serving_over_tls(handler, listener) as shutdown:
        client = client_tls(await trio.testing.open_stream_to_socket_listener(listener))
        await client.send_all(b"one\ntw")
        assert await receive_exactly(client, 3) == b"ONE"
        shutdown.set()
        await trio.sleep(0.02)
        await client.send_all(b"o\n")
        assert await receive_to_end(client) == b"TWO"
        await client.aclose()


async def test_large_echo() -> None:
    """The echo handler serves it as it does a plain socket."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    message = os.urandom(5_000_000)
    async with serving_over_tls(echo_handler, listener) as shutdown:
        below = await trio.testing.open_stream_to_socket_listener(listener)
        async with client_tls(below) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, message)
            assert await receive_exactly(client, len(message)) == message
        shutdown.set()


async def test_proxy_in_front_of_plain_tcp() -> None:
    """A relay ends its target's side over TLS, too: the client learns of it, and may go on sending."""
    upstream, ours = await socket_streams()
    async with shaken(client_tls) as (client, server), Connection(server) as front, Connection(ours) as back:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(front.relay, back)
            nursery.start_soon(back.relay, front)
            await upstream.send_all(b"greeting")
            await upstream.send_eof()
            assert await receive_to_end(client) == b"greeting"
            await client.send_all(b"thanks")
            assert await receive_exactly(upstream, 6) == b"thanks"
            await client.aclose()
            assert await upstream.receive_some() == b""
        await upstream.aclose()


async def test_two_at_once() -> None:
    """Two tasks that receive, or send, at once: one gets an error."""
    async with shaken(client_tls) as (_client, server), trio.open_nursery() as nursery:
        for wait in (server.receive_some, functools.partial(server.send_all, bytes(50_000_000))):
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError):
                await wait()
        nursery.cancel_scope.cancel()


async def test_other_tls_stays_on_the_plain_way() -> None:
    """`trio.SSLStream`, from somebody else's listener, is served as before."""
    below, theirs = await socket_streams()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo_handler, server_tls(theirs))
            async with client_tls(below) as client:
                await client.send_all(b"hello")
                assert await receive_exactly(client, 5) == b"hello"
