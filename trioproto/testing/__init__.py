r"""For tests of servers and protocols, including your own: an in-memory network, and fake streams.

`converse` and `fragmentations` test a handler with every way in which a request can be split. A whole server can run on
a `Network`, without real waiting: ``autojump_clock`` is a fixture of pytest-trio (with ``trio_mode = true`` in pytest's
settings) that skips all waits. This tests that the README's server, in a graceful stop, still answers a request that
has begun, even if the rest of it is late::

    async def test_stop(autojump_clock):
        network = Network(seed=1, latency=0.2)
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            serve = functools.partial(serve_listeners, shout, [network.listen("server", 9000)], shutdown=stop)
            nursery.start_soon(serve)
            async with await network.connect("server", 9000) as client:
                await client.send_all(b"half a ")
                await trio.sleep(1)  # until it has arrived
                network.partition("client", "server")
                stop.set()
                await client.send_all(b"line\n")
                await trio.sleep(5)  # less than the handler's request_timeout
                network.repair("client", "server")
                assert b"".join([data async for data in client]) == b"HALF A LINE\n"
"""

from trioproto.testing.network import Network, NetworkListener, NetworkStream
from trioproto.testing.streams import (
    Cuts,
    breaking_stream,
    converse,
    fragmentations,
    fragmented_stream_pair,
    random_cuts,
    stalling_stream,
)

__all__ = [
    "Cuts",
    "Network",
    "NetworkListener",
    "NetworkStream",
    "breaking_stream",
    "converse",
    "fragmentations",
    "fragmented_stream_pair",
    "random_cuts",
    "stalling_stream",
]
