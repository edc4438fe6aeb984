import contextlib
import functools
import logging
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from trioproto import Connection, serve_tcp

EXAMPLE = Path(__file__).parents[2] / "examples" / "6b_chat.py"
example = runpy.run_path(str(EXAMPLE))


class Room:
    """A chat in memory, and its members."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.members: set[Connection] = set()

    def connect(self, *, slow: bool = False) -> trio.abc.HalfCloseableStream:
        """Connect a client; if ``slow``, without any buffer: a send to it waits until it receives."""
        pair = trio.testing.lockstep_stream_pair if slow else trio.testing.memory_stream_pair
        client, served = pair()
        self._nursery.start_soon(example["chat"], self.members, served)
        return client

    async def join(self, name: str) -> trio.abc.HalfCloseableStream:
        """Connect a client, and have it send its name."""
        client = self.connect()
        await client.send_all(name.encode() + b"\n")
        await trio.testing.wait_all_tasks_blocked()
        return client


@contextlib.asynccontextmanager
async def room() -> AsyncIterator[Room]:
    """Open a chat, and close it."""
    with trio.fail_after(100_000):
        async with trio.open_nursery() as nursery:
            yield Room(nursery)
            nursery.cancel_scope.cancel()


async def heard(client: trio.abc.ReceiveStream) -> bytes:
    """Return what a client has been sent so far."""
    await trio.testing.wait_all_tasks_blocked()
    received = b""
    with trio.move_on_after(0.001):
        while data := await client.receive_some():
            received += data
    return received


async def test_everybody_hears_everybody(autojump_clock: trio.testing.MockClock) -> None:
    """Arrivals, lines and departures are sent to all members, including the one that sent the line."""
    async with room() as chat:
        ann = await chat.join("Ann")
        bob = await chat.join("Bob")
        await ann.send_all(b"Hello, Bob\nHow a")
        await bob.send_all(b"Hello\n")
        await trio.testing.wait_all_tasks_blocked()
        await ann.send_all(b"re you?\r\n")
        await trio.testing.wait_all_tasks_blocked()
        await ann.send_eof()

        assert await heard(ann) == (
            b"Your name?\nAnn is here.\nBob is here.\nAnn: Hello, Bob\nBob: Hello\nAnn: How are you?\n"
        )
        assert await heard(bob) == (
            b"Your name?\nBob is here.\nAnn: Hello, Bob\nBob: Hello\nAnn: How are you?\nAnn has left.\n"
        )


async def test_control_characters_do_not_reach_the_others_terminals(autojump_clock: trio.testing.MockClock) -> None:
    """Control characters are removed and invalid UTF-8 is replaced; letters of other alphabets pass."""
    async with room() as chat:
        ann = await chat.join("\x1b[2JAnn")
        await ann.send_all("\x1b]0;title\x07 жаба\xa0\u202e!\n".encode() + b"\xff\n")

        assert (await heard(ann)).decode() == (
            "Your name?\n[2JAnn is here.\n[2JAnn: ]0;title жаба!\n[2JAnn: \N{REPLACEMENT CHARACTER}\n"
        )


async def test_slow_client_delays_no_other_and_is_disconnected(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A slow client delays nobody while its unsent bytes grow; above the limit, it is disconnected."""
    async with room() as chat:
        ann = await chat.join("Ann")
        carl = chat.connect(slow=True)
        assert await carl.receive_some() == b"Your name?\n"
        await carl.send_all(b"Carl\n")
        bob = await chat.join("Bob")
        assert len(chat.members) == 3
        most = example["MAX_UNSENT"]
        lines = 0
        while len(chat.members) == 3:
            assert not caplog.records
            assert max(member.unsent for member in chat.members) <= most
            await ann.send_all(800 * b"x" + b"\n")
            await trio.testing.wait_all_tasks_blocked()
            lines += 1
            assert lines < most
        assert trio.current_time() == 0
        assert lines == pytest.approx(most / 806, abs=2)
        assert (await heard(bob)).endswith(b"Ann: " + 800 * b"x" + b"\nCarl has left.\n")

    (record,) = caplog.records
    assert re.search(rf"overrun: \d+ unsent bytes, more than {most}$", record.message)


async def test_client_that_only_listens_stays_until_nothing_is_said_for_an_hour(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client that receives lines never has to send any; after an hour without a line, all are disconnected."""
    async with room() as chat:
        ann = await chat.join("Ann")
        await chat.join("Bob")
        for _ in range(5):
            await trio.sleep(3000)
            await ann.send_all(b"Hello\n")
        await trio.sleep(3599)
        assert len(chat.members) == 2
        await trio.sleep(2)
        assert chat.members == set()


@pytest.mark.parametrize("line", [b"", b"Hello, B"])
async def test_line_takes_30_seconds_at_most(line: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A line or a name that is not complete after 30 seconds ends its connection, and no other."""
    async with room() as chat:
        bob = await chat.join("Bob")
        ann = chat.connect()
        await ann.send_all(b"Ann\n" + line if line else b"An")
        await trio.sleep(31)

        assert len(chat.members) == 1
        assert (await heard(bob)).endswith(b"Ann has left.\n" if line else b"Bob is here.\n")


@pytest.mark.parametrize("name", [b"", b"Ann\n"])
async def test_line_too_long_ends_its_connection_only(
    name: bytes, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A line or a name of more than 1000 bytes ends its connection, and no other."""
    async with room() as chat:
        bob = await chat.join("Bob")
        ann = chat.connect()
        await ann.send_all(name + 1000 * b"a" + b"\n" + 1001 * b"b")
        await trio.testing.wait_all_tasks_blocked()
        await bob.send_all(b"Bye\n")

        assert (await heard(bob)).endswith(b" has left.\nBob: Bye\n")
        assert len(chat.members) == 1

    (record,) = caplog.records
    assert record.message.endswith("protocol error: more than 1000 bytes before b'\\n'")


async def test_flood_reaches_every_client_that_receives() -> None:
    """When 2000 lines are sent at once, over sockets, a client that receives them misses none."""
    said = b"".join(b"line %d\n" % number for number in range(2000))
    heard = {"Ann": b"", "Bob": b""}
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            serve = functools.partial(serve_tcp, functools.partial(example["chat"], set()), 0, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            async with trio.open_nursery() as clients:

                async def chat(name: str) -> None:
                    async with await trio.open_tcp_stream(*listener.socket.getsockname()) as client:
                        await client.send_all(name.encode() + b"\n")
                        if name == "Ann":
                            await trio.sleep(0.2)  # until Bob is there
                            await client.send_all(said)
                        while b"line 1999\n" not in heard[name]:
                            data = await client.receive_some()
                            assert data
                            heard[name] += data

                clients.start_soon(chat, "Ann")
                clients.start_soon(chat, "Bob")
            nursery.cancel_scope.cancel()

    spoken = b"".join(b"Ann: line %d\n" % number for number in range(2000))
    assert all(spoken in received for received in heard.values())


async def test_stop_ends_idle_clients_at_once_and_sends_a_line_under_way(caplog: pytest.LogCaptureFixture) -> None:
    """At a stop, idle clients get end of stream at once; a client may finish a line that it has begun."""
    caplog.set_level(logging.WARNING)
    shutdown = trio.Event()
    handler = functools.partial(example["chat"], set())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            serve = functools.partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
            (listener,) = await nursery.start(serve)
            clients = [await trio.open_tcp_stream(*listener.socket.getsockname()) for _ in range(3)]
            for client, name in zip(clients, [b"Ann\n", b"Bob\n", b"Carl\nHal"], strict=True):
                await client.send_all(name)
            await trio.sleep(0.1)
            shutdown.set()
            ann, bob, carl = clients
            for client in (ann, bob):
                async for data in client:
                    assert b"Hal" not in data
                await client.aclose()
            await carl.send_all(b"lo\n")
            received = b"".join([bytes(data) async for data in carl])
            assert received.endswith(b"Carl: Hallo\n")
            await carl.aclose()

    assert not caplog.records


def test_server_has_at_most_30_lines() -> None:
    """The example is as short as it says, blank lines counted."""
    server = EXAMPLE.read_text(encoding="utf-8").partition("from here …\n")[2].partition("# … to here")[0]
    assert 20 < len(server.strip().splitlines()) <= 30


@pytest.mark.skipif(sys.platform != "linux", reason="how much a kernel buffers differs elsewhere")
def test_example_shows_the_slow_client_being_disconnected() -> None:
    """Carl's unsent bytes grow until he is disconnected; Bob gets every line, and end of stream at the stop."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=60)

    assert run.stderr == ""
    assert max(map(len, run.stdout.splitlines())) <= 120
    waiting = [int(number) for number in re.findall(r"(\d+) bytes$", run.stdout.partition("overrun")[0], re.MULTILINE)]
    assert len(waiting) >= 4
    assert waiting == sorted(waiting)
    before, after = run.stdout.split("to everybody: Carl has left.\n")
    assert re.search(r"the server logs: 127\.0\.0\.1:\d+ to .*: overrun: \d+ unsent bytes", before)
    assert set(re.findall(r"(\d+) bytes$", after, re.MULTILINE)) == {"0"}
    slowest = re.search(r"Bob has received every line, the slowest after ([\d.]+) ms", after)
    assert slowest is not None
    assert float(slowest[1]) < 1000
    assert after.endswith("The server stops: Bob has received end of stream.\n")


def test_example_serves_until_sigterm() -> None:
    """Run with a port, it prints where it listens, and serves the chat until SIGTERM."""
    with subprocess.Popen(
        [sys.executable, EXAMPLE, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            said = re.search(r"listening on 127\.0\.0\.1:(\d+)$", server.stdout.readline())
            assert said is not None
            address = ("127.0.0.1", int(said[1]))
            with socket.create_connection(address, timeout=10) as client, client.makefile("rw") as lines:
                lines.write("Ann\n")
                lines.flush()
                assert [lines.readline(), lines.readline()] == ["Your name?\n", "Ann is here.\n"]
                server.send_signal(signal.SIGTERM)
                assert lines.read() == ""
            _, err = server.communicate(timeout=10)
        finally:
            server.kill()

    assert (server.returncode, err) == (0, "")
