import contextlib
import functools
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from trioproto import receive_exactly, serve_tcp

EXAMPLE = Path(__file__).parents[2] / "examples" / "6c_proxy.py"
example = runpy.run_path(str(EXAMPLE))


@attrs.frozen
class Proxied:
    """Both ends of a connection through the proxy, and the event that stops the proxy."""

    client: trio.abc.HalfCloseableStream
    server: trio.abc.HalfCloseableStream
    shutdown: trio.Event = attrs.field(factory=trio.Event)


@contextlib.asynccontextmanager
async def proxied() -> AsyncIterator[Proxied]:
    """Connect a client to a server through the proxy, on sockets; afterwards, stop the proxy."""
    shutdown = trio.Event()
    send, receive = trio.open_memory_channel[trio.SocketStream](0)

    async def upstream(stream: trio.SocketStream) -> None:
        await send.send(stream)
        await trio.sleep_forever()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (target,) = await nursery.start(functools.partial(trio.serve_tcp, upstream, 0, host="127.0.0.1"))
            handler = functools.partial(example["proxy"], target.socket.getsockname())
            async with trio.open_nursery() as proxying:
                serve = functools.partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
                (listener,) = await proxying.start(serve)
                client = await trio.open_tcp_stream(*listener.socket.getsockname())
                async with client, await receive.receive() as server:
                    yield Proxied(client, server, shutdown)
                shutdown.set()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def proxied_in_memory(monkeypatch: pytest.MonkeyPatch, *, buffered: bool = True) -> AsyncIterator[Proxied]:
    """Connect a client to a server through the proxy, in memory; unless ``buffered``, each send waits for a receive."""
    pair = trio.testing.memory_stream_pair if buffered else trio.testing.lockstep_stream_pair
    client, served = pair()
    connected, server = pair()

    async def connect(host: str, port: int) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        return connected

    monkeypatch.setattr(trio, "open_tcp_stream", connect)
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["proxy"], ("server.test", 80), served)
            yield Proxied(client, server)


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Receive until end of stream."""
    return b"".join([bytes(data) async for data in stream])


async def test_client_that_half_closes_gets_the_answer() -> None:
    """The client's half-close reaches the server, and the server's answer still reaches the client."""
    async with proxied() as ends:
        await ends.client.send_all(b"request")
        await ends.client.send_eof()
        assert await receive_all(ends.server) == b"request"
        await ends.server.send_all(b"answer")
        await ends.server.send_eof()
        assert await receive_all(ends.client) == b"answer"


async def test_server_that_half_closes_gets_what_the_client_still_sends() -> None:
    """The server's half-close reaches the client, and what the client still sends reaches the server."""
    async with proxied() as ends:
        await ends.server.send_all(b"greeting")
        await ends.server.send_eof()
        assert await receive_all(ends.client) == b"greeting"
        await ends.client.send_all(b"request")
        await ends.client.send_eof()
        assert await receive_all(ends.server) == b"request"


async def test_bulk_goes_both_ways_at_once() -> None:
    """Megabytes sent in both directions at once arrive unchanged."""
    to_server, to_client = os.urandom(10_000_000), os.urandom(10_000_000)
    received = {}

    async def send(stream: trio.abc.HalfCloseableStream, data: bytes) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async def receive(name: str, stream: trio.abc.ReceiveStream) -> None:
        received[name] = await receive_all(stream)

    async with proxied() as ends, trio.open_nursery() as nursery:
        nursery.start_soon(send, ends.client, to_server)
        nursery.start_soon(send, ends.server, to_client)
        nursery.start_soon(receive, "server", ends.server)
        nursery.start_soon(receive, "client", ends.client)

    assert received["server"] == to_server
    assert received["client"] == to_client


async def test_connection_without_data_in_either_direction_times_out(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 300 seconds without a byte in either direction, both connections end."""
    async with proxied_in_memory(monkeypatch) as ends:
        await ends.client.send_all(b"request")
        assert await receive_exactly(ends.server, 7) == b"request"
        with contextlib.suppress(trio.BrokenResourceError):
            assert await ends.client.receive_some() == b""
        with contextlib.suppress(trio.BrokenResourceError):
            assert await ends.server.receive_some() == b""
        assert trio.current_time() == pytest.approx(300, abs=0.1)


async def test_server_that_does_not_answer_times_out(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The idle time-out also applies when the client has half-closed, and only the answer is missing."""
    async with proxied_in_memory(monkeypatch) as ends:
        await ends.client.send_all(b"request")
        await ends.client.send_eof()
        assert await receive_all(ends.server) == b"request"
        with contextlib.suppress(trio.BrokenResourceError):
            assert await ends.client.receive_some() == b""
        assert 300 <= trio.current_time() < 302  # the proxy closes the server's connection first


@pytest.mark.parametrize("sender", ["client", "server"])
async def test_side_that_receives_nothing_is_disconnected(
    sender: str, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client or a server that receives nothing of what it is sent for 300 seconds is disconnected."""
    async with proxied_in_memory(monkeypatch, buffered=False) as ends:
        sending = ends.client if sender == "client" else ends.server
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await sending.send_all(b"more")
                await trio.sleep(100)
    assert 300 <= trio.current_time() < 402


@pytest.mark.parametrize("sender", ["client", "server"])
async def test_data_in_one_direction_keeps_both_alive(
    sender: str, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download or an upload does not time out because the other direction is idle."""
    async with proxied_in_memory(monkeypatch) as ends:
        first, second = (ends.client, ends.server) if sender == "client" else (ends.server, ends.client)
        for _ in range(10):
            await trio.sleep(200)
            await first.send_all(b"more")
            assert await receive_exactly(second, 4) == b"more"
        await first.send_eof()
        assert await second.receive_some() == b""
        await second.send_all(b"done")
        await second.send_eof()
        assert await receive_all(first) == b"done"


async def test_stop_lets_an_answer_under_way_finish() -> None:
    """A stop ends the direction from the client, and the server's answer still arrives."""
    async with proxied() as ends:
        await ends.client.send_all(b"request")
        assert await receive_exactly(ends.server, 7) == b"request"
        await ends.server.send_all(b"half an")
        assert await receive_exactly(ends.client, 7) == b"half an"
        ends.shutdown.set()
        assert await receive_all(ends.server) == b""
        await trio.sleep(0.1)
        await ends.server.send_all(b" answer")
        await ends.server.send_eof()
        assert await receive_all(ends.client) == b" answer"


@pytest.mark.parametrize("breaks", ["client", "server"])
async def test_broken_connection_is_passed_on_as_a_reset(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    """When one side breaks, the other is reset, so that half a message does not look complete; nothing is logged."""
    async with proxied() as ends:
        first, second = (ends.client, ends.server) if breaks == "client" else (ends.server, ends.client)
        await first.send_all(b"half a mess")
        assert await receive_exactly(second, 11) == b"half a mess"
        assert isinstance(first, trio.SocketStream)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # so that closing it is a reset
        await first.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await second.receive_some()

    assert not caplog.records


async def test_target_that_refuses_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """When the target refuses the connection, the client gets end of stream, and one line is logged."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(example["proxy"], ("127.0.0.1", port), served)
        await client.send_all(b"request")
        await client.send_eof()
        assert await client.receive_some() == b""

    assert [record.getMessage() for record in caplog.records] == [
        f"StapledStream: cannot connect to 127.0.0.1 port {port}: Connection refused"
    ]
    assert caplog.records[0].exc_info is None


async def test_connecting_to_the_target_times_out(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy waits at most 10 seconds for a connection to the target."""

    async def connect(host: str, port: int) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_stream", connect)
    client, served = trio.testing.memory_stream_pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["proxy"], ("server.test", 80), served)
            assert await client.receive_some() == b""
            assert trio.current_time() == pytest.approx(10, abs=0.1)
            await client.aclose()

    assert [record.message for record in caplog.records] == [
        "StapledStream: cannot connect to server.test port 80: timed out"
    ]


def test_proxy_has_at_most_30_lines() -> None:
    """The example is as short as it says, counting blank lines."""
    server = EXAMPLE.read_text(encoding="utf-8").partition("from here …\n")[2].partition("# … to here")[0]
    assert 10 < len(server.strip().splitlines()) <= 30


def test_example_shows_each_end() -> None:
    """The answer arrives after a half-close and during a stop; the idle client times out."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=60)

    assert run.stderr == ""
    half_close, idle, stop = re.split(r"\n\n(?=\w)", run.stdout)[:3]
    answered = ["the client receives '5 bytes'", "the client receives end of stream"]
    begun = ["the client sends 5 bytes", "the client half-closes the connection"]
    assert re.findall(r"^   0\.\d s   (.*)$", half_close, re.MULTILINE) == begun + answered
    assert re.findall(r"^   (\d)\.\d s   (.*)$", idle, re.MULTILINE) == [
        ("0", "the client sends 5 bytes"),
        ("1", "the connection is reset"),
    ]
    assert re.findall(r"^  +(?:0\.\d s)? +(.*)$", stop, re.MULTILINE) == [
        *begun,
        "the stop begins",
        *answered,
    ]
    assert run.stdout.endswith("\n\nThe proxy has stopped.\n")


def test_example_serves_until_sigterm() -> None:
    """Run with a port and a target, it prints where it listens, and serves until SIGTERM."""
    with (
        socket.create_server(("127.0.0.1", 0)) as target,
        subprocess.Popen(
            [sys.executable, EXAMPLE, "0", "127.0.0.1", str(target.getsockname()[1])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as proxy,
    ):
        assert proxy.stdout is not None
        try:
            said = re.search(r"listening on 127\.0\.0\.1:(\d+)$", proxy.stdout.readline())
            assert said is not None
            target.settimeout(10)
            with socket.create_connection(("127.0.0.1", int(said[1])), timeout=10) as client:
                client.sendall(b"request")
                server, _ = target.accept()
                with server:
                    server.settimeout(10)
                    assert server.recv(7) == b"request"
                    proxy.send_signal(signal.SIGTERM)
                    assert server.recv(1) == b""
                    server.sendall(b"answer")
                assert client.makefile("rb").read() == b"answer"
            _, err = proxy.communicate(timeout=10)
        finally:
            proxy.kill()

    assert (proxy.returncode, err) == (0, "")
