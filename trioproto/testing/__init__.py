"""Fakes for tests of protocols, those of your own among them."""

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
    "breaking_stream",
    "converse",
    "fragmentations",
    "fragmented_stream_pair",
    "random_cuts",
    "stalling_stream",
]
