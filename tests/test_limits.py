"""One client cannot take all the places: `max_connections_per_client`."""

import contextlib
import ipaddress
import logging
import socket
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import LIMIT
from hypothesis import given
from hypothesis import strategies as st
from processes import serving as serving_process

from trioproto import ServerStats, echo_handler, echo_request, serve_listeners, serve_tcp
from trioproto.limits import ClientLimit
from trioproto.testing.network import Network

Address = tuple[Any, ...]

# Clients.


def v4(host: str, port: int = 40000) -> Address:
    return (host, port)


def v6(host: str, port: int = 40000) -> Address:
    return (host, port, 0, 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (v4("192.0.2.1", 1), v4("192.0.2.1", 2), True),
        (v4("192.0.2.1"), v4("192.0.2.2"), False),
        (v6("2001:db8::1"), v6("2001:db8::ffff:ffff:ffff:ffff"), True),
        (v6("2001:db8:0:1::1"), v6("2001:db8:0:2::1"), False),
        (v6("::ffff:192.0.2.1"), v4("192.0.2.1"), True),
        (v6("::ffff:192.0.2.1"), v6("::ffff:192.0.2.2"), False),
        (("client", 1), ("client", 2), True),  # in a network in memory
        (("client", 1), ("another", 1), False),
    ],
)
def test_which_addresses_are_one_client(one: Address, other: Address, same: bool) -> None:  # noqa: FBT001
    """A client is an IPv4 address, also written as IPv6, or an IPv6 network of 64 bits; ports do not matter."""
    limit = ClientLimit(1)
    assert limit.enter(one)
    assert limit.enter(other) is not same


@given(st.ip_addresses(v=6), st.ip_addresses(v=6))
def test_ipv6_clients(one: ipaddress.IPv6Address, other: ipaddress.IPv6Address) -> None:
    """Whatever two IPv6 addresses are, they are one client if their first 64 bits are the same."""
    limit = ClientLimit(1)
    assert limit.enter(v6(str(one)))
    if one.ipv4_mapped is None and other.ipv4_mapped is None:
        assert limit.enter(v6(str(other))) is (one.packed[:8] != other.packed[:8])


@pytest.mark.parametrize("address", [None, "", "/run/client.sock", b"\0abstract", (3, 1234)])
def test_clients_without_ip_address_are_not_limited(address: object) -> None:
    """On UNIX sockets, and whatever else has no IP address, nobody is refused."""
    limit = ClientLimit(1)
    assert all(limit.enter(address) for _ in range(5))
    for _ in range(5):
        limit.leave(address)


def test_one_warning_for_each_episode(caplog: pytest.LogCaptureFixture) -> None:
    """The first refusal of a client is logged, and the next one after the client has had fewer than the limit."""
    limit = ClientLimit(2)
    client, other = v4("192.0.2.1"), v6("2001:db8::1")
    assert [limit.enter(client) for _ in range(5)] == [True, True, False, False, False]
    assert caplog.messages == ["192.0.2.1 has 2 connections, the maximum for one client: more are refused"]
    limit.leave(client)
    assert [limit.enter(client) for _ in range(3)] == [True, False, False]
    assert len(caplog.messages) == 2
    assert [limit.enter(other) for _ in range(5)] == [True, True, False, False, False]
    assert caplog.messages[2:] == ["2001:db8::/64 has 2 connections, the maximum for one client: more are refused"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60))
def test_limit_is_a_count_that_nobody_is_remembered_by(steps: list[tuple[bool, str]]) -> None:
    """Whatever comes and goes, who has fewer than the limit gets in; who has none is not remembered."""
    limit = ClientLimit(2)
    counts = dict.fromkeys("abc", 0)
    empty = vars(ClientLimit(2))
    for comes, name in steps:
        if comes:
            assert limit.enter((name, 1)) is (counts[name] < 2)
            counts[name] = min(2, counts[name] + 1)
        elif counts[name]:
            limit.leave((name, 1))
            counts[name] -= 1
    for name, count in counts.items():
        for _ in range(count):
            limit.leave((name, 1))
    assert vars(limit) == empty


# Servers.


async def connect(listener: trio.SocketListener, source: str) -> trio.SocketStream:
    """Connect from ``source``, an address of the loopback."""
    connecting = trio.socket.socket()
    await connecting.bind((source, 0))
    await connecting.connect(listener.socket.getsockname())
    return trio.SocketStream(connecting)


async def see_reset(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError) as caught:
        await stream.receive_some()
    assert isinstance(caught.value.__cause__, ConnectionResetError)


class Server:
    listener: trio.SocketListener
    stats: ServerStats


@contextlib.asynccontextmanager
async def serving(handler: Any = echo_handler, **settings: Any) -> AsyncIterator[Server]:
    """Serve around a block, and then stop; the last statistics are in ``stats``."""
    server, shutdown = Server(), trio.Event()

    async def serve(task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        server.stats = await serve_tcp(
            handler, 0, host="127.0.0.1", shutdown=shutdown, task_status=task_status, **settings
        )

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            [server.listener] = await nursery.start(serve)
            yield server
            shutdown.set()


async def test_more_are_reset(caplog: pytest.LogCaptureFixture) -> None:
    """What a client has beyond the limit is reset at once; what it has goes on, and another client is served."""
    async with serving(max_connections_per_client=2) as server, contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await connect(server.listener, "127.0.0.1")) for _ in range(5)]
        for stream in streams[2:]:
            await see_reset(stream)
        streams[2:] = [await stack.enter_async_context(await connect(server.listener, "127.0.0.2"))]
        for stream in streams:
            assert await echo_request(stream, b"hello") == b"hello"
    assert (server.stats.accepted, server.stats.refused, server.stats.active) == (6, 3, 0)
    assert caplog.messages == ["127.0.0.1 has 2 connections, the maximum for one client: more are refused"]


async def crash(stream: trio.SocketStream) -> None:
    await stream.receive_some(1)
    raise RuntimeError("a bug")


@pytest.mark.parametrize("handler", [echo_handler, crash])
async def test_connection_that_ends_makes_room(handler: Any) -> None:
    """However a connection ends, its client may have another."""
    async with serving(handler, max_connections_per_client=1) as server:
        for _ in range(3):
            async with await connect(server.listener, "127.0.0.1") as stream:
                await stream.send_all(b"hello")
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.receive_some(5)
            await trio.testing.wait_all_tasks_blocked(0.02)  # the server has seen the end
    assert (server.stats.accepted, server.stats.refused) == (3, 0)


async def test_refused_connection_takes_no_place() -> None:
    """With ``max_connections`` as well, what is refused leaves the last place to another client."""
    async with (
        serving(max_connections=2, max_connections_per_client=1) as server,
        await connect(server.listener, "127.0.0.1") as first,
    ):
        assert await echo_request(first, b"hello") == b"hello"
        for _ in range(3):
            async with await connect(server.listener, "127.0.0.1") as refused:
                await see_reset(refused)
        async with await connect(server.listener, "127.0.0.2") as other:
            assert await echo_request(other, b"hello") == b"hello"
    assert (server.stats.accepted, server.stats.refused) == (5, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="counts descriptors")
async def test_slowloris() -> None:
    """A client that opens more connections than there are places, and keeps them, takes 50 and disturbs nobody."""
    import resource  # noqa: PLC0415 - not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        async with (
            serving(max_connections=1000, max_connections_per_client=50) as server,
            contextlib.AsyncExitStack() as stack,
        ):
            for _ in range(1100):
                await stack.enter_async_context(await connect(server.listener, "127.0.0.66"))
            for number in range(1, 11):
                with trio.fail_after(1):
                    async with await connect(server.listener, f"127.0.0.{number}") as stream:
                        assert await echo_request(stream, b"hello") == b"hello"
        assert (server.stats.accepted, server.stats.refused) == (1110, 1050)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no UNIX sockets")
async def test_unix_socket_is_not_limited(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Clients of a UNIX socket have no address: as many are served as come."""
    path = tmp_path / "socket"
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()
    listener = trio.SocketListener(listening)
    await nursery.start(partial(serve_listeners, echo_handler, [listener], max_connections_per_client=1))
    with trio.fail_after(LIMIT):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                stream = await stack.enter_async_context(await trio.open_unix_socket(path))
                assert await echo_request(stream, b"hello") == b"hello"


async def test_network_in_memory(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """The limit holds for hosts in memory, too."""
    network = Network(seed=1)
    listener = network.listen("server", 9000)
    await nursery.start(partial(serve_listeners, echo_handler, [listener], max_connections_per_client=1))
    async with await network.connect("server", 9000, source="client") as first:
        assert await echo_request(first, b"hello") == b"hello"
        async with await network.connect("server", 9000, source="client") as second:
            with pytest.raises(trio.BrokenResourceError):
                await second.receive_some()
        async with await network.connect("server", 9000, source="another") as other:
            assert await echo_request(other, b"hello") == b"hello"


@pytest.mark.parametrize("workers", [1, 2])
async def test_command_line(workers: int) -> None:
    """The option reaches the server, and each worker, which counts its own connections."""
    options = [f"--workers={workers}", "--max-connections-per-client=1"]
    complaint = r"127\.0\.0\.1 has 1 connections, the maximum for one client: more are refused"
    async with serving_process("op", *options, complaints=[complaint]) as server, contextlib.AsyncExitStack() as stack:
        served = 0
        # The reset may come before connecting is done.
        with contextlib.suppress(trio.BrokenResourceError, ConnectionResetError):
            while served <= workers:
                await server.answers(await stack.enter_async_context(await server.tcp()))
                served += 1
        assert 1 <= served <= workers
        server.stop()


@pytest.mark.parametrize("limit", [0, -1])
async def test_limit_out_of_range(limit: int) -> None:
    """Nobody could be served at all: that is a mistake, and known before anything is open."""
    with pytest.raises(ValueError, match=f"max_connections_per_client must be at least 1, not {limit}"):
        await serve_tcp(echo_handler, 0, max_connections_per_client=limit)
