"""Bulk, floods, and readers that are slow or do not read, through the handlers on real sockets."""

import errno
import hashlib
import os
import random
import socket
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from helpers import LIMIT, below, connected_streams, request_bytes

from trioproto import Connection, echo_handler, echo_request, op_handler, op_request, serve_tcp


async def serve(
    nursery: trio.Nursery, handler: Callable[[trio.SocketStream], Awaitable[object]]
) -> trio.SocketListener:
    """Start a server."""
    [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1"))
    assert isinstance(listener, trio.SocketListener)
    return listener


def without_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a system that cannot."""
    monkeypatch.delattr(os, "splice", raising=False)


def without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no descriptors left for a pipe."""

    def pipe2(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe2", pipe2, raising=False)


def refusing(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a system, or a sandbox, that forbids it."""

    def splice(source: int, target: int, count: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "splice", splice, raising=False)


def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lack nothing."""


@pytest.fixture(
    params=[
        pytest.param(everything, id="nothing"),
        pytest.param(without_splice, id="no splice"),
        pytest.param(without_descriptors, id="no descriptors"),
        pytest.param(partial(refusing, errno.ENOSYS), id="ENOSYS"),
        pytest.param(partial(refusing, errno.EPERM), id="EPERM"),
        pytest.param(partial(refusing, errno.EINVAL), id="EINVAL"),
    ]
)
def lack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system lacks for the kernel to move a bulk echo."""
    request.param(monkeypatch)


@pytest.mark.usefixtures("lack")
@pytest.mark.parametrize(
    ("megabytes", "pause"), [pytest.param(50, 0, id="all at once"), pytest.param(5, 0.002, id="slow reader")]
)
async def test_bulk_echo(megabytes: int, pause: float, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """A bulk echo comes back unharmed, whether or not the kernel moves it, and whether or not the reader is slow."""
    listener = await serve(nursery, echo_handler)
    chunk = random.Random(1).randbytes(1_000_003)
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def send(client: trio.SocketStream) -> None:
        for _ in range(megabytes):
            await client.send_all(chunk)
            sent.update(chunk)
        await client.send_eof()

    with trio.fail_after(LIMIT):
        async with (
            await trio.testing.open_stream_to_socket_listener(listener) as client,
            trio.open_nursery() as sending,
        ):
            sending.start_soon(send, client)
            size = 0
            while data := await client.receive_some(50_000 if pause else 2**20):
                received.update(data)
                size += len(data)
                await trio.sleep(pause)
    assert size == megabytes * len(chunk)
    assert received.digest() == sent.digest()
    assert caplog.messages == []


@pytest.mark.parametrize("handler", [echo_handler, op_handler])
async def test_back_pressure(
    handler: Callable[..., Awaitable[object]], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read can send only what the buffers on the way hold; then the server takes no more."""
    listener = await serve(nursery, handler)
    sent = 0

    async def flood(client: trio.SocketStream) -> None:
        nonlocal sent
        while True:
            await client.send_all(request_bytes([1], "+") * 10_000)
            sent += 60_000

    with trio.fail_after(LIMIT):
        async with await trio.testing.open_stream_to_socket_listener(listener) as client:
            async with trio.open_nursery() as flooding:
                flooding.start_soon(flood, client)
                await trio.testing.wait_all_tasks_blocked(0.1)
                flooding.cancel_scope.cancel()
            assert 0 < sent < 200_000_000


FLOODS = {
    "echo": (echo_handler, b"hello"),
    "op": (op_handler, request_bytes([1, 2], "+")),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_flood(flood: str, nursery: trio.Nursery) -> None:
    """While one client floods the server, from a thread of its own, others get their turns."""
    handler, data = FLOODS[flood]
    listener = await serve(nursery, handler)
    enough = threading.Event()
    flooding = threading.Event()
    starved = threading.Event()

    def send(client: socket.socket) -> None:
        gives_up = time.monotonic() + LIMIT
        while not enough.is_set() and time.monotonic() < gives_up:
            client.sendall(data * 100_000)
            flooding.set()
        if not enough.is_set():
            starved.set()
        client.shutdown(socket.SHUT_WR)

    def receive(client: socket.socket) -> None:
        while client.recv(2**20):
            pass

    with trio.fail_after(2 * LIMIT), socket.create_connection(listener.socket.getsockname()) as client:
        async with trio.open_nursery() as threads:
            threads.start_soon(trio.to_thread.run_sync, send, client)
            threads.start_soon(trio.to_thread.run_sync, receive, client)
            while not flooding.is_set():  # noqa: ASYNC110 - a thread sets it
                await trio.sleep(0.01)
            for _ in range(20):
                async with await trio.testing.open_stream_to_socket_listener(listener) as other:
                    if handler is echo_handler:
                        assert await echo_request(other, b"hello") == b"hello"
                    else:
                        assert await op_request(other, [1, 2], "+") == 3
            enough.set()
    assert not starved.is_set()


@pytest.mark.parametrize("slow", [False, True], ids=["fast reader", "slow reader"])
async def test_one_large_message(*, tls: bool, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one large message is sent, other tasks have their turns, and no copy of it is made."""
    size = 32 * 2**20
    message = memoryview(bytearray(size))
    client, server = await connected_streams(tls=tls)
    if slow:
        below(client).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    sent_in_turn = most_in_turn = 0
    write = os.write

    def note(fd: int, data: bytes) -> int:
        nonlocal sent_in_turn, most_in_turn
        sent = write(fd, data)
        sent_in_turn += sent
        most_in_turn = max(most_in_turn, sent_in_turn)
        return sent

    async def take_turns() -> None:
        nonlocal sent_in_turn
        while True:
            await trio.lowlevel.checkpoint()
            sent_in_turn = 0

    async def receive() -> None:
        left = size
        while left:
            left -= len(await client.receive_some(65536))

    monkeypatch.setattr(os, "write", note)
    with trio.fail_after(LIMIT):
        async with client, Connection(server) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            nursery.start_soon(receive)
            tracemalloc.start()
            await connection.send_all(message)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            nursery.cancel_scope.cancel()
    # A plain socket takes what its buffers hold; TLS takes a piece, which has to be encrypted.
    assert most_in_turn < (200_000 if tls else size // 4)
    assert peak < 2**20
