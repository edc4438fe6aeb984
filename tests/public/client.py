"""A user's project: uses every public name, fully typed, as its type checker insists."""

import functools
from typing import assert_type

import trio
import trio.testing

from trioproto import (
    ClientError,
    Connection,
    IncompleteReadError,
    ProtocolError,
    ServerStats,
    calculate,
    echo_handler,
    echo_request,
    op_handler,
    op_request,
    receive_exactly,
    serve_listeners,
    serve_tcp,
    serve_until_signal,
)
from trioproto.draining import current_drain
from trioproto.testing import (
    Cuts,
    Network,
    NetworkListener,
    NetworkStream,
    breaking_stream,
    converse,
    fragmentations,
    fragmented_stream_pair,
    random_cuts,
    stalling_stream,
)

# A protocol: a handler whose requests are objects of its own.


class Command:
    """A request: a verb, and what follows it."""

    def __init__(self, verb: str, argument: bytes) -> None:
        self.verb = verb
        self.argument = argument


async def read_command(connection: Connection) -> Command:
    """Read one request."""
    line = await connection.receive_until(b"\n", max_bytes=1000)
    verb, _, argument = line.partition(b" ")
    if not verb:
        raise ProtocolError("an empty command")
    return Command(verb.decode("ascii", "replace"), argument)


async def handler(stream: trio.SocketStream) -> None:
    """Serve one client."""
    async with Connection(stream, idle_timeout=300, request_timeout=30, max_unsent=65536) as connection:
        assert_type(connection, Connection)
        assert_type(connection.peer, str)
        hello = await connection.receive_exactly(4)
        connection.unreceive(hello)
        async for command in connection.requests(read_command):
            assert_type(command, Command)
            connection.push(command.verb.encode())
            await connection.send_all(command.argument)
            if connection.unsent > 1000 or connection.stopping.is_set():
                break
        some = await connection.receive_some()
        assert_type(some, bytes)
        await connection.wait_send_all_might_not_block()
        await connection.send_eof()


async def read_number(connection: Connection) -> int:
    """Read a number of two bytes."""
    return int.from_bytes(await connection.receive_exactly(2), "big")


async def proxy(stream: trio.abc.Stream) -> None:
    """Pass a client on to a server."""
    async with (
        Connection(stream) as client,
        Connection(await trio.open_tcp_stream("127.0.0.1", 9190)) as upstream,
        trio.open_nursery() as nursery,
    ):
        number = await anext(client.requests(read_number))
        assert_type(number, int)
        nursery.start_soon(client.relay, upstream)
        await upstream.relay(client)


async def raw(stream: trio.abc.Stream) -> None:
    """Serve without a Connection's block, and see its errors."""
    connection = Connection(stream)
    try:
        await connection.send_all(await receive_exactly(connection, 3))
    except IncompleteReadError as error:
        assert_type(error.partial, bytes)
        assert_type(error.expected, int)
    except ClientError as error:
        assert_type(error.connection, Connection)
    await connection.aclose()


async def waits(_stream: trio.abc.Stream) -> None:
    """Take part in a stop without a Connection."""
    drain = current_drain()
    with drain.ends_wait() as scope:
        await drain.began.wait()
    assert_type(scope.cancelled_caught, bool)


# Serving.


async def on_tick(stats: ServerStats) -> None:
    """Look at the statistics."""
    assert_type((stats.accepted, stats.active, stats.crashed, stats.uptime), tuple[int, int, int, float])
    await trio.lowlevel.checkpoint()


async def app() -> None:
    """Serve inside an app."""
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        serve = functools.partial(
            serve_tcp, handler, 0, tick=1.0, on_tick=on_tick, max_connections=10, shutdown=shutdown, grace_period=1.0
        )
        listeners: list[trio.SocketListener] = await nursery.start(serve)
        nursery.start_soon(serve_tcp, echo_handler, 0)
        nursery.start_soon(functools.partial(serve_tcp, functools.partial(op_handler, idle_timeout=1.0), 0))
        async with await trio.testing.open_stream_to_socket_listener(listeners[0]) as stream:
            assert_type(await op_request(stream, [1, 2, 3], "+"), int)
            assert_type(await echo_request(stream, b"hello"), bytes)
            assert_type(calculate([1, 2, 3], "+"), int)
        shutdown.set()
    stats = await serve_listeners(raw, await trio.open_tcp_listeners(0), shutdown=shutdown)
    assert_type(stats, ServerStats)


async def service() -> None:
    """Serve until a signal comes."""
    stats = await serve_until_signal(handler, 9000, host=["127.0.0.1", "::1"], on_tick=on_tick, tick=10.0)
    assert_type(stats, ServerStats | None)


def main() -> None:
    """Serve, and nothing else."""
    trio.run(serve_until_signal, handler, 9000)
    trio.run(functools.partial(serve_until_signal, proxy, 9000, unix="socket", grace_period=5.0, announce=print))


# Tests.


async def in_memory() -> None:
    """Test on a network in memory."""
    network = Network(seed=1, latency=0.01)
    listener = network.listen("server", 9000)
    assert_type(listener, NetworkListener)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_listeners, echo_handler, [listener])
        async with await network.connect("server", 9000) as stream:
            assert_type(stream, NetworkStream)
            await echo_request(stream, b"hello")
        network.partition("client", "server")
        assert_type(network.trace, list[tuple[float, str, str, int]])
        nursery.cancel_scope.cancel()


async def in_pieces() -> None:
    """Test with fakes of streams."""
    cuts: Cuts = random_cuts(1)
    assert_type(await converse(echo_handler, b"hello", cuts), bytes)
    for pieces in fragmentations(5):
        first, second = fragmented_stream_pair(to_second=pieces)
        await stalling_stream(first, 3).receive_some()
        await breaking_stream(second, 3).receive_some()
