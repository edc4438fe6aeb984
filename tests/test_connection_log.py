"""What the log says of a client: who it is, which server it is connected to, and what it did."""

import logging
import re

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT,
    Handler,
    MemoryListener,
    Stream,
    connected,
    receive_to_end,
    reset,
    server_tls,
    serving,
    socket_streams,
)

from trioproto import Connection, ProtocolError, serve_listeners
from trioproto.addresses import format_address
from trioproto.draining import Accepted, Drain, accepted_as, announce


async def complain(stream: trio.abc.Stream) -> None:
    """Wait until the client says something, and take it for nonsense."""
    async with Connection(stream) as connection:
        await connection.receive_some()
        await trio.sleep(0.05)
        raise ProtocolError("nonsense")


async def complain_behind_tls(stream: trio.abc.Stream) -> None:
    """Do so behind TLS."""
    async with Connection(server_tls(stream)):
        await trio.sleep(0.05)
        raise ProtocolError("nonsense")


@pytest.mark.parametrize("handler", [complain, complain_behind_tls])
async def test_client_that_is_gone(handler: Handler, caplog: pytest.LogCaptureFixture) -> None:
    """A client is named by the address that it had when it was accepted, although it is gone; so is the server."""
    async with connected(handler) as client:
        name = "{} to {}".format(
            *(format_address(a) for a in (client.socket.getsockname(), client.socket.getpeername()))
        )
        await client.send_all(b"hello")
        await trio.testing.wait_all_tasks_blocked()
        reset(client)
        await trio.sleep(0.1)
    assert caplog.messages == [f"{name}: protocol error: nonsense"]


async def test_two_servers(caplog: pytest.LogCaptureFixture) -> None:
    """Two servers in one process are told apart."""
    caplog.set_level(logging.DEBUG, "trioproto")
    listeners = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
    names = [format_address(listener.socket.getsockname()) for listener in listeners]
    async with serving(complain, listeners[0]) as shutdown, serving(complain, listeners[1]) as another_shutdown:
        for listener, name in zip(listeners, names, strict=True):
            caplog.clear()
            async with await trio.testing.open_stream_to_socket_listener(listener) as client:
                peer = format_address(client.socket.getsockname())
                await client.send_all(b"hello")
                assert await receive_to_end(client) == b""
            await trio.testing.wait_all_tasks_blocked(0.01)
            began, complaint, ended = caplog.messages
            assert began == f"connection 1 from {peer} to {name}"
            assert complaint == f"{peer} to {name}: protocol error: nonsense"
            assert ended.startswith(f"connection 1 from {peer} to {name}: malformed after 0.")
        shutdown.set()
        another_shutdown.set()


async def test_address_that_the_server_knows(caplog: pytest.LogCaptureFixture) -> None:
    """The client's address is the one that the server knows, such as from in front of a proxy, and not the stream's."""
    client, theirs = await socket_streams()

    async def handler() -> None:
        announce(Accepted(theirs, ("203.0.113.7", 50000), "192.0.2.1:443", Drain(), trio.current_time()))
        async with Connection(theirs) as connection:
            assert connection.peer == "203.0.113.7:50000"
            raise ProtocolError("nonsense")

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler)
            assert await receive_to_end(client) == b""
            await client.aclose()
    assert caplog.messages == ["203.0.113.7:50000 to 192.0.2.1:443: protocol error: nonsense"]


async def test_without_a_server_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """Under another server, a client is named by its address alone, also when it is gone."""
    client, theirs = await socket_streams()
    name = format_address(client.socket.getsockname())
    connection = Connection(theirs)
    reset(client)
    await trio.sleep(0.01)
    assert connection.peer == name
    async with connection:
        raise ProtocolError("nonsense")
    assert caplog.messages == [f"{name}: protocol error: nonsense"]


async def test_other_streams_of_a_handler() -> None:
    """Only the accepted stream has the client's address, also through TLS; another one has its own."""
    found = []

    async def handler(stream: Stream) -> None:
        other = trio.testing.memory_stream_pair()[0]
        for each in (stream, server_tls(stream), other, server_tls(other)):
            accepted = accepted_as(each)
            found.append((accepted.server, accepted.stream is stream, accepted.drain is accepted_as(stream).drain))

    listener = MemoryListener()
    listener.connect()
    shutdown = trio.Event()
    shutdown.set()
    await serve_listeners(handler, [listener], shutdown=shutdown)
    assert found == [("MemoryListener", True, True)] * 2 + [(None, False, False)] * 2


async def test_nothing_is_formatted_that_is_not_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a line is not logged, the client's name is not worked out either."""
    caplog.set_level(logging.ERROR, "trioproto")

    def peer(connection: Connection) -> str:
        raise AssertionError

    monkeypatch.setattr(Connection, "peer", property(peer))
    client, theirs = trio.testing.memory_stream_pair()
    await client.aclose()
    async with Connection(theirs):
        raise ProtocolError("nonsense")


async def test_what_a_client_did(caplog: pytest.LogCaptureFixture) -> None:
    """A client that broke the connection is named for debugging only, with the system's reason."""
    caplog.set_level(logging.DEBUG, "trioproto.connection")

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await connection.receive_exactly(5)

    for sent, awaited in ((b"", "a request"), (b"he", "the rest of a request")):
        caplog.clear()
        async with connected(handler) as client:
            await client.send_all(sent)
            await trio.testing.wait_all_tasks_blocked(0.01)
            reset(client)
            await trio.sleep(0.05)
        [record] = caplog.records
        assert record.levelno == logging.DEBUG
        assert re.fullmatch(
            rf"127.0.0.1:\d+ to 127.0.0.1:\d+: connection broken while waiting for {awaited}: Connection reset by peer",
            record.getMessage(),
        )
