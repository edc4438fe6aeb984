"""Settings and fixtures for all tests."""

import os
from collections.abc import AsyncIterator

import pytest
import trio
from helpers import socket_streams
from hypothesis import settings

from trioproto.transport import SocketTransport

# Where Python is told to write no bytecode, each command that a test starts would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# No example is timed: how fast a machine is says nothing about whether the code is right.
settings.register_profile("trioproto", deadline=None)
settings.load_profile("trioproto")


@pytest.fixture
async def fast() -> AsyncIterator[tuple[SocketTransport, trio.SocketStream]]:
    """The transport of a socket, and the socket's peer."""
    peer, stream = await socket_streams()
    async with peer, stream:
        yield SocketTransport(stream), peer


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
def tls(request: pytest.FixtureRequest) -> bool:
    """Whether connections are over TLS: a promise about what happens on the network is kept over either."""
    over: bool = request.param
    return over
