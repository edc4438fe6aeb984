"""One record for each connection when it ends: who, how long, how much, and how it ended."""

import contextlib
import functools
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from helpers import LIMIT, Handler, MemoryListener, Stream, client_tls, connected, request_bytes, reset, server_tls

from trioproto import Connection, ProtocolError, echo_handler, op_handler, receive_exactly, serve_listeners
from trioproto.draining import ENDINGS, Accepted
from trioproto.process.proxy_protocol import behind_proxies

FIELDS = ("connection", "client", "server", "how", "seconds", "received", "sent", "requests")


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The records as they come: the fields that a formatter finds in each."""
    caplog.set_level(logging.DEBUG, "trioproto.access")
    found: list[dict[str, Any]] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.name == "trioproto.access":
            found.append({name: getattr(record, name) for name in FIELDS})
        return True

    caplog.handler.addFilter(keep)
    return found


@contextlib.asynccontextmanager
async def served(
    handler: Handler, pair: Callable[[], tuple[Stream, Stream]] = trio.testing.memory_stream_pair
) -> AsyncIterator[tuple[Stream, trio.Event]]:
    """Run a server, and give its one client's stream and the event that stops it; in the end, stop it."""
    listener = MemoryListener(pair=pair)
    client = listener.connect()
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_listeners, handler, [listener], shutdown=shutdown, grace_period=10))
        await trio.testing.wait_all_tasks_blocked()
        yield client, shutdown
        await trio.testing.wait_all_tasks_blocked()
        shutdown.set()


async def read_line(connection: Connection) -> bytes:
    return await connection.receive_until(b"\n", max_bytes=10)


async def shout(stream: trio.abc.Stream) -> None:
    async with Connection(stream, idle_timeout=300, request_timeout=30, max_unsent=1000) as connection:
        async for line in connection.requests(read_line):
            match line:
                case b"crash":
                    raise ValueError
                case b"sleep":
                    await trio.sleep_forever()
                case b"close":
                    await connection.aclose()
                case b"push":
                    connection.push(bytes(2000))
                case b"bye":
                    break
                case b"read":
                    await receive_exactly(connection, 5)
                case _:
                    connection.push(line.upper() + b"\n")


async def end(client: Stream, shutdown: trio.Event) -> None:
    await client.send_eof()


async def ask(client: Stream, line: bytes) -> None:
    await client.send_all(line)
    await trio.testing.wait_all_tasks_blocked()


def asks(line: bytes) -> Callable[[Stream, trio.Event], Awaitable[None]]:
    async def what(client: Stream, shutdown: trio.Event) -> None:
        await ask(client, line)

    return what


def waits(seconds: float, line: bytes = b"") -> Callable[[Stream, trio.Event], Awaitable[None]]:
    async def what(client: Stream, shutdown: trio.Event) -> None:
        await ask(client, line)
        await trio.sleep(seconds)

    return what


def stops(line: bytes) -> Callable[[Stream, trio.Event], Awaitable[None]]:
    async def what(client: Stream, shutdown: trio.Event) -> None:
        await ask(client, line)
        shutdown.set()

    return what


async def end_inside(client: Stream, shutdown: trio.Event) -> None:
    await client.send_all(b"hel")
    await client.send_eof()


async def end_in_a_read(client: Stream, shutdown: trio.Event) -> None:
    await client.send_all(b"read\nhel")
    await client.send_eof()


@pytest.mark.parametrize(
    ("what", "how", "seconds"),
    [
        (end, "ended", 0),
        (end_inside, "ended", 0),
        (end_in_a_read, "ended", 0),
        (asks(b"bye\n"), "ended", 0),
        (waits(400), "idle", 300),
        (waits(400, b"hel"), "late", 30),
        (asks(b"far too long a line\n"), "malformed", 0),
        (asks(b"push\n"), "overrun", 0),
        (asks(b"crash\n"), "crashed", 0),
        (stops(b"hello\n"), "stopped", 0),
        (stops(b"sleep\n"), "cut", 10),
        (asks(b"close\n"), "cut", 0),
    ],
)
async def test_how(
    what: Callable[[Stream, trio.Event], Awaitable[None]],
    how: str,
    seconds: float,
    records: list[dict[str, Any]],
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The record says in one word how the conversation ended, and how long it took, with up to a second of closing."""
    async with served(shout) as (client, shutdown):
        await what(client, shutdown)
    [record] = records
    assert record["how"] == how
    assert seconds <= record["seconds"] <= seconds + 1.1
    assert how in ENDINGS


async def test_end_in_a_stop(records: list[dict[str, Any]], autojump_clock: trio.testing.MockClock) -> None:
    """A client that ends its side itself, though the server stops, has ended."""

    async def read_to_end(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await trio.sleep(0.5)
            assert await connection.receive_some() == b"all"
            assert await connection.receive_some() == b""

    async with served(read_to_end) as (client, shutdown):
        await client.send_all(b"all")
        await client.send_eof()
        shutdown.set()
        await trio.sleep(1)
    assert [record["how"] for record in records] == ["ended"]


async def test_what_is_under_way_in_a_stop(
    records: list[dict[str, Any]], autojump_clock: trio.testing.MockClock
) -> None:
    """A request under way is finished, and counted; then the stop ends the connection."""
    async with served(shout) as (client, shutdown):
        await ask(client, b"he")
        shutdown.set()
        await client.send_all(b"llo\n")
        assert await client.receive_some() == b"HELLO\n"
    assert [(record["how"], record["requests"]) for record in records] == [("stopped", 1)]


async def test_too_late_for_a_reply(records: list[dict[str, Any]], autojump_clock: trio.testing.MockClock) -> None:
    """What keeps the last replies from being delivered is how the conversation ended."""

    async def say_goodbye(stream: Stream) -> None:
        async with Connection(stream, idle_timeout=5) as connection:
            connection.push(b"bye")

    client, theirs = trio.testing.lockstep_stream_pair()
    listener = MemoryListener(pair=lambda: (client, theirs))
    listener.connect()
    shutdown = trio.Event()
    shutdown.set()
    await serve_listeners(say_goodbye, [listener], shutdown=shutdown)
    assert [(record["how"], record["seconds"]) for record in records] == [("late", 5)]


async def test_reset(records: list[dict[str, Any]]) -> None:
    """A client that breaks the connection is named all the same, by the address that it had."""
    async with connected(shout) as client:
        host, port = client.socket.getsockname()
        server = "{}:{}".format(*client.socket.getpeername())
        await client.send_all(b"hello\n")
        assert await client.receive_some() == b"HELLO\n"
        reset(client)
        await trio.sleep(0.05)
    [record] = records
    assert 0 < record.pop("seconds") < LIMIT
    assert record == {
        "connection": 1,
        "client": f"{host}:{port}",
        "server": server,
        "how": "reset",
        "received": 6,
        "sent": 6,
        "requests": 1,
    }


async def test_cancelled_server(records: list[dict[str, Any]]) -> None:
    """When the server is cancelled, its connections are cut, also if a handler crashes on that: that is a crash."""

    async def crash(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError

    for handler in (shout, crash):
        listener = MemoryListener()
        listener.connect()
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_listeners, handler, [listener])
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert [record["how"] for record in records] == ["cut", "crashed"]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        (end, "ended"),
        (asks(b"GET / HTTP/1.1\r\n"), "malformed"),
        (waits(40), "late"),
        (stops(b""), "stopped"),
    ],
)
async def test_no_proxy_header(
    what: Callable[[Stream, trio.Event], Awaitable[None]],
    how: str,
    records: list[dict[str, Any]],
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A connection without a PROXY header ends as one without a request does, and nothing else is known of it."""

    def from_a_unix_socket() -> tuple[Stream, Stream]:
        client, theirs = trio.testing.memory_stream_pair()
        theirs.peer_address = ""  # type: ignore[attr-defined]
        return client, theirs

    handler = behind_proxies(shout, ["unix"], 30, None)
    async with served(handler, from_a_unix_socket) as (client, shutdown):
        await what(client, shutdown)
    assert [(record["how"], record["received"]) for record in records] == [(how, None)]


async def test_reset_before_a_proxy_header(records: list[dict[str, Any]]) -> None:
    """So does one that a proxy breaks."""
    async with connected(behind_proxies(shout, [ipaddress.ip_network("127.0.0.0/8")], 30, None)) as client:
        await trio.sleep(0.05)
        reset(client)
        await trio.sleep(0.05)
    assert [(record["how"], record["received"]) for record in records] == [("reset", None)]


async def test_refused(records: list[dict[str, Any]], autojump_clock: trio.testing.MockClock) -> None:
    """A connection that was refused has no record."""
    async with served(behind_proxies(shout, [], 30, None)):
        pass
    assert records == []


async def test_handler_with_a_time_limit(records: list[dict[str, Any]], autojump_clock: trio.testing.MockClock) -> None:
    """A handler that cancels its own conversation has cut it."""

    async def limited(stream: Stream) -> None:
        with trio.move_on_after(7):
            await shout(stream)

    async with served(limited):
        await trio.sleep(10)
    assert [(record["how"], record["seconds"]) for record in records] == [("cut", 7)]


async def test_handler_on_the_bare_stream(
    records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Of a handler without a `Connection`, only the time and the end are known; the line has dashes."""

    async def once(stream: Stream) -> None:
        await stream.send_all(await stream.receive_some())

    async with served(once) as (client, _):
        await trio.sleep(2)
        await client.send_all(b"hello")
        assert await client.receive_some() == b"hello"
    assert records == [
        {
            "connection": 1,
            "client": "StapledStream",
            "server": "MemoryListener",
            "how": "ended",
            "seconds": 2.0,
            "received": None,
            "sent": None,
            "requests": None,
        }
    ]
    assert caplog.messages == [
        "connection 1 from StapledStream to MemoryListener: ended after 2.000 s, - bytes received, - sent, - requests"
    ]


async def test_name_that_is_known_late(records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's name is taken at the end: by then, a proxy may have told of another."""
    monkeypatch.setattr(Accepted, "peer", property(lambda accepted: f"after {accepted.requests}"))
    async with served(shout) as (client, _):
        await client.send_all(b"hello\n")
        assert await client.receive_some() == b"HELLO\n"
        await client.aclose()
    assert [record["client"] for record in records] == ["after 1"]


@pytest.mark.parametrize("size", [5, 3_000_000])
async def test_bytes(size: int, records: list[dict[str, Any]]) -> None:
    """Every byte counts once, also what is sent with waits, and what the kernel moves unseen."""
    message = bytes(size)
    async with connected(echo_handler) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, message)
            assert await receive_exactly(client, size) == message
        await client.send_eof()
        assert await client.receive_some() == b""
    [record] = records
    assert (record["how"], record["received"], record["sent"], record["requests"]) == ("ended", size, size, 0)


async def test_bytes_that_were_not_taken(records: list[dict[str, Any]]) -> None:
    """What the system did not take was not sent."""

    async def send(stream: Stream) -> None:
        async with Connection(stream) as connection:
            await connection.send_all(bytes(10_000_000))

    async with connected(send, receive_buffer=4096) as client:
        await trio.sleep(0.1)
        reset(client)
        await trio.sleep(0.1)
    [record] = records
    assert record["how"] == "reset"
    assert 0 < record["sent"] < 10_000_000


async def test_bytes_behind_tls(records: list[dict[str, Any]]) -> None:
    """Behind TLS, the bytes of the protocol count."""

    async def handler(stream: Stream) -> None:
        await shout(server_tls(stream))

    async with served(handler) as (plain, _):
        client = client_tls(plain)
        await client.send_all(b"hello\n")
        assert await client.receive_some() == b"HELLO\n"
        await client.aclose()
    [record] = records
    assert (record["received"], record["sent"], record["requests"]) == (6, 6, 1)


async def test_requests_of_op(records: list[dict[str, Any]]) -> None:
    """Requests that op reads as one count each for itself; one that is malformed does not."""
    request = request_bytes([1, 2], "+")
    async with served(op_handler) as (client, _):
        await client.send_all(request * 1000 + request[:3])
        await receive_exactly(client, 4000)
        await client.send_all(request[3:] + b"\0")
        await receive_exactly(client, 4)
        assert await client.receive_some() == b""
    [record] = records
    assert (record["how"], record["requests"], record["sent"]) == ("malformed", 1001, 4004)


async def test_upstream_connection(records: list[dict[str, Any]]) -> None:
    """What a handler sends elsewhere is no part of its client's record."""

    async def handler(stream: Stream) -> None:
        async with Connection(stream) as connection:
            ours, theirs = trio.testing.memory_stream_pair()
            async with Connection(ours) as upstream, theirs:
                await upstream.send_all(bytes(100))
                raise ProtocolError("of the other one")
            await connection.send_all(b"hello")

    async with served(handler) as (client, _):
        assert await receive_exactly(client, 5) == b"hello"
        await client.aclose()
    [record] = records
    assert (record["how"], record["sent"]) == ("ended", 5)


async def test_nothing_is_worked_out_that_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an access log, the client's name is not worked out either."""

    def peer(accepted: Accepted) -> str:
        raise AssertionError

    monkeypatch.setattr(Accepted, "peer", property(peer))
    async with served(shout) as (client, _):
        await client.aclose()
