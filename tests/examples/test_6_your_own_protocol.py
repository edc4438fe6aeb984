import functools
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from trioproto import receive_exactly, serve_tcp
from trioproto.testing import converse, fragmentations

EXAMPLE = Path(__file__).parents[2] / "examples" / "6_your_own_protocol.py"
example = runpy.run_path(str(EXAMPLE))

REQUESTS = b"S\x00\x01k\x00\x01v" + b"G\x00\x01k"
REPLIES = b"=" + b"=\x00\x01v"


async def test_every_fragmentation() -> None:
    """A set and a get have the same replies in every fragmentation."""
    for cuts in fragmentations(len(REQUESTS)):
        assert await converse(functools.partial(example["handler"], {}), REQUESTS, cuts) == REPLIES


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (b"S\xff\xff" + bytes(65535), "protocol error: a string of 65535 bytes: more than 1000"),
        (b"S\x00\x01k\x03\xe9" + bytes(1001), "protocol error: a string of 1001 bytes: more than 1000"),
        (b"G\x80\x00", "protocol error: a string of 32768 bytes: more than 1000"),
        (b"HELO", "protocol error: command b'H': not S or G"),
        (b"S\x00\x09half", "end of stream in the middle of a request"),
    ],
)
async def test_hostile_input_ends_the_connection(hostile: bytes, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """A length above the limit, an unknown command or half a request gets no reply, and ends the connection.

    Earlier requests are answered, and one log line says what was wrong.
    """
    store: dict[bytes, bytes] = {}

    assert await converse(functools.partial(example["handler"], store), REQUESTS + hostile) == REPLIES

    assert [record.message for record in caplog.records] == [f"StapledStream: {said}"]
    assert store == {b"k": b"v"}


async def test_bad_request_loses_no_earlier_reply() -> None:
    """A client that sends 1000 requests and a bad one, and only then receives, gets all replies, then end of stream.

    If the server just closed the connection after the bad request, the kernel would reset it because of what the client
    sent after that, and discard the replies that were not yet delivered.
    """
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            handler = functools.partial(example["handler"], {b"k": 10 * b"v"})
            (listener,) = await nursery.start(functools.partial(serve_tcp, handler, 0, host="127.0.0.1"))
            connecting = trio.socket.socket()
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the replies do not all fit into it
            await connecting.connect(listener.socket.getsockname())
            async with trio.SocketStream(connecting) as client:
                await client.send_all(1000 * b"G\x00\x01k" + b"HELO" + bytes(1000))
                await trio.sleep(0.5)
                await client.send_all(bytes(1000))
                await trio.sleep(0.1)
                replies = b"".join([bytes(data) async for data in client])
            nursery.cancel_scope.cancel()

    assert replies == 1000 * (b"=\x00\x0a" + 10 * b"v")


async def test_time_outs(autojump_clock: trio.testing.MockClock) -> None:
    """A connection may be idle for 300 seconds, and a request may take 30 seconds; then the server ends it."""
    for begun, seconds in [(b"", 300), (b"S\x00", 30)]:
        client, served = trio.testing.memory_stream_pair()
        began = trio.current_time()
        await client.send_all(REQUESTS + begun)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["handler"], {}, served)
            with trio.fail_after(seconds + 1):
                assert await receive_exactly(client, len(REPLIES)) == REPLIES
                assert await client.receive_some() == b""
            assert trio.current_time() - began == pytest.approx(seconds, abs=0.1)
            await client.aclose()


async def test_client_that_receives_no_reply_is_disconnected(autojump_clock: trio.testing.MockClock) -> None:
    """A client that receives nothing of its replies for 300 seconds is disconnected."""
    client, served = trio.testing.lockstep_stream_pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, REQUESTS)
            await example["handler"]({}, served)
    assert trio.current_time() == pytest.approx(300, abs=0.1)


async def test_stop_ends_an_idle_client_and_lets_a_request_under_way_finish() -> None:
    """A stopping server answers a request that has begun, and at once disconnects a client between two requests."""
    shutdown = trio.Event()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            handler = functools.partial(example["handler"], {})
            serve = functools.partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
            (listener,) = await nursery.start(serve)
            address = listener.socket.getsockname()
            async with await trio.open_tcp_stream(*address) as idle, await trio.open_tcp_stream(*address) as busy:
                await idle.send_all(REQUESTS)
                assert await receive_exactly(idle, len(REPLIES)) == REPLIES
                await busy.send_all(REQUESTS[:5])
                await trio.sleep(0.1)
                shutdown.set()
                assert await idle.receive_some() == b""
                await busy.send_all(REQUESTS[5:7])
                assert await receive_exactly(busy, 1) == b"="
                assert await busy.receive_some() == b""


async def test_longest_string_is_accepted() -> None:
    """A string of exactly the maximum length is stored and returned."""
    value = example["encode_string"](bytes(1000))

    replies = await converse(functools.partial(example["handler"], {}), b"S\x00\x01k" + value + b"G\x00\x01k")

    assert replies == b"==" + value


async def test_store_is_bounded() -> None:
    """A full store accepts new values for its keys, but no new key."""
    full = {bytes([high, low]): b"" for high in range(10) for low in range(100)}
    old, new = b"S\x00\x02\x00\x00\x00\x01v", b"S\x00\x03new\x00\x01v"

    assert await converse(functools.partial(example["handler"], full), old + new) == b"="

    assert len(full) == 1000
    assert full[b"\x00\x00"] == b"v"


def test_protocol_has_less_than_40_lines() -> None:
    """The example is as short as it says."""
    protocol = EXAMPLE.read_text(encoding="utf-8").partition("from here …")[2].partition("# … to here")[0]
    assert 20 < len([line for line in protocol.splitlines() if line]) < 40


def test_example_shows_the_wire_and_the_end_of_a_hostile_client() -> None:
    """It prints requests and replies, and ends the connection that announces too long a key."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=60)

    assert run.stderr == ""
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    get = lines.index(["client", r"b'G\x00\x06colour'"])
    assert lines[get + 1] == ["reply", r"b'=\x00\x03red'"]
    assert lines[-2][0] == "server"
    assert lines[-2][1].endswith("protocol error: a string of 65535 bytes: more than 1000")
    assert lines[-1] == ["reply", "none: end of stream"]
