"""The task that sends what is pushed, while the block ends, and while its client only listens."""

from functools import partial

import pytest
import trio
import trio.testing

from trioproto import Connection, serve_tcp
from trioproto.testing import Network


async def read_hundred(connection: Connection) -> bytes:
    """Receive a request of 100 bytes."""
    return await connection.receive_exactly(100)


@pytest.mark.parametrize("max_unsent", [None, 1000])
async def test_end_inside_a_request(max_unsent: int | None, autojump_clock: trio.testing.MockClock) -> None:
    """A client that ends its side inside a request receives all that it is owed, though it is just being sent."""

    async def handler(stream: trio.abc.Stream) -> None:
        async with Connection(stream, idle_timeout=5, max_unsent=max_unsent) as connection:
            connection.push(b"hello world")
            async for _ in connection.requests(read_hundred):
                pass

    network = Network(buffer_size=4)
    listener = network.listen("server", 1)
    received = b""
    async with trio.open_nursery() as nursery:
        client = await network.connect("server", 1)
        nursery.start_soon(handler, await listener.accept())
        await client.send_all(b"half")
        await client.send_eof()
        async for chunk in client:
            received += chunk
        await client.aclose()
    assert received == b"hello world"


async def test_listening_is_no_idleness(nursery: trio.Nursery) -> None:
    """A client on a socket that only takes what is pushed to it outlives its idle time-out."""
    began = trio.current_time()

    async def handler(stream: trio.abc.Stream) -> None:
        async with Connection(stream, idle_timeout=0.5, max_unsent=1000) as connection, trio.open_nursery() as pushing:

            async def push() -> None:
                while trio.current_time() < began + 1.5:
                    connection.push(b".")
                    await trio.sleep(0.05)

            pushing.start_soon(push)
            await connection.receive_some()

    [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1"))
    with trio.fail_after(20):
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            async for _ in client:
                pass
    assert trio.current_time() - began > 1.5


@pytest.mark.parametrize("what", ["send_all", "wait_send_all_might_not_block", "send_eof", "end"])
async def test_publisher_that_never_pauses(what: str, autojump_clock: trio.testing.MockClock) -> None:
    """To a client that is slower than what is pushed, a message and the end still come in their turn."""
    network = Network(latency=0.001, buffer_size=100)
    listener = network.listen("server", 1)
    client = await network.connect("server", 1)
    connection = Connection(await listener.accept(), max_unsent=100_000)
    received = b""

    async def publish() -> None:
        while True:
            if connection.unsent < 10_000:
                connection.push(bytes(60))
            await trio.sleep(0.001)

    async def receive_slowly() -> None:
        nonlocal received
        while chunk := await client.receive_some(50):
            received += chunk
            await trio.sleep(0.001)
        await client.aclose()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_slowly)
            async with connection:
                nursery.start_soon(publish)
                await trio.sleep(0.3)
                if what == "send_all":
                    await connection.send_all(b"message")
                elif what == "wait_send_all_might_not_block":
                    await connection.wait_send_all_might_not_block()
                elif what == "send_eof":
                    await connection.send_eof()
                    assert connection.unsent == 0
            nursery.cancel_scope.cancel()
    assert (b"message" in received) == (what == "send_all")
