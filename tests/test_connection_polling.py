"""A handler that gives up waiting for a request again and again, as one with other things to do may."""

import trio
import trio.testing

from trioproto import Connection, serve_listeners
from trioproto.testing import Network


async def read_four(connection: Connection) -> bytes:
    """Receive a request of 4 bytes."""
    return await connection.receive_exactly(4)


async def poll(stream: trio.abc.Stream) -> None:
    """Send back each request; between them, and in the middle of them, look up every 1.5 seconds."""
    async with Connection(stream, idle_timeout=5, request_timeout=30) as connection:
        requests = connection.requests(read_four)
        while True:
            with trio.move_on_after(1.5):
                try:
                    connection.push(await anext(requests))
                except StopAsyncIteration:
                    return


async def test_idle_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """The idle time-out goes on through waits that are cancelled; what the client is sent, or sends, ends it."""
    network = Network(latency=0.0)
    listener = network.listen("server", 1)
    async with trio.open_nursery() as nursery:
        client = await network.connect("server", 1)
        nursery.start_soon(poll, await listener.accept())
        await trio.sleep(4)
        await client.send_all(b"half")
        assert await client.receive_some() == b"half"
        answered = trio.current_time()
        assert await client.receive_some() == b""
        assert trio.current_time() - answered == 5
        await client.aclose()


async def test_request_under_way_in_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    """A request that was under way when the stop began may be finished, though its read is cancelled meanwhile."""
    network, shutdown = Network(latency=0.0), trio.Event()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_listeners(poll, [network.listen("server", 1)], shutdown=shutdown)

        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        client = await network.connect("server", 1)
        await client.send_all(b"ha")
        await trio.sleep(1)
        shutdown.set()
        await trio.sleep(3)
        await client.send_all(b"lf")
        assert await client.receive_some() == b"half"
        assert await client.receive_some() == b""
        await client.aclose()
