"""For tests of servers and protocols, your own among them: a network in memory, and fakes of single streams."""

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
