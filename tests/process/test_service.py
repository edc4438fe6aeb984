"""A server as a process: what `serve_until_signal` promises an app, signals, and the order of things in a stop."""

import contextlib
import functools
import inspect
import logging
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from processes import HANGS, is_refused, receive, receive_all

from trioproto.cli.main import main
from trioproto.draining import current_drain
from trioproto.echo import echo_handler, echo_request
from trioproto.process.listeners import ListenError, tcp_listeners
from trioproto.process.service import HANDSHAKE_SECONDS, run_until_signal, serve_until_signal
from trioproto.server import ServerStats

SIGNALS = [signal.SIGINT, signal.SIGTERM]

# An app as the README has it.
APP = """
import trio
from trioproto import Connection, serve_until_signal


async def read_line(connection):
    return await connection.receive_until(b"\\n", max_bytes=1000)


async def shout(stream):
    async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
        async for line in connection.requests(read_line):
            await connection.send_all(line.upper() + b"\\n")


trio.run(serve_until_signal, shout, 9000)
"""


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """In the end, every signal has the handler that it had."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


# Serving for an app.


class Served:
    """A server in this process.

    Attributes:
        addresses: what it announced.
        stats: what it returned.
        ended: set when it has.
    """

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.stats: ServerStats | None = None
        self.ended = trio.Event()
        self.signals = 0

    @property
    def port(self) -> int:
        """The port of its last address."""
        return int(self.addresses[-1].rpartition(":")[2])

    async def connect(self) -> trio.SocketStream:
        """Connect to its last address."""
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    def send_signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal, as long as that does not end the tests."""
        assert not self.ended.is_set()
        self.signals += 1
        os.kill(os.getpid(), number)


@contextlib.asynccontextmanager
async def served(
    handler: Callable[[Any], Awaitable[object]] = echo_handler, port: int | None = 0, **settings: Any
) -> AsyncIterator[Served]:
    """Serve around a block; in the end, stop the server, unless the block has."""
    server = Served()

    announced = trio.Event()

    def announce(address: str) -> None:
        server.addresses.append(address)
        announced.set()

    async def serve() -> None:
        try:
            server.stats = await serve_until_signal(handler, port, announce=announce, **settings)
        finally:
            server.ended.set()

    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await announced.wait()
            yield server
            if not server.signals:
                server.send_signal()


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives to nobody who asks for any."""
    while True:
        port = random.randrange(20_000, 32_768)
        if is_refused(f"127.0.0.1:{port}"):
            return port


async def test_app(free_port: int, tmp_path: Path) -> None:
    """Ten lines are a server: SIGTERM lets a line that is partly received get its reply, and the exit status is 0."""

    async def connect() -> trio.SocketStream:
        while True:
            try:
                return await trio.open_tcp_stream("127.0.0.1", free_port)
            except OSError:
                assert process.poll() is None, log.read_text()
                await trio.sleep(0.02)  # it has not started yet

    log = tmp_path / "log"
    app = APP.replace("9000", str(free_port))
    with trio.fail_after(HANGS), log.open("wb") as stderr:
        process = await trio.lowlevel.open_process([sys.executable, "-c", app], stderr=stderr)
        try:
            async with await connect() as idle, await connect() as stream:
                await idle.send_all(b"quiet\n")
                assert await receive(idle, 6) == b"QUIET\n"
                await stream.send_all(b"hello\nwor")
                assert await receive(stream, 6) == b"HELLO\n"
                process.send_signal(signal.SIGTERM)
                assert await receive_all(idle) == b""  # the stop has begun
                await stream.send_all(b"ld\n")
                assert await receive_all(stream) == b"WORLD\n"
            assert await process.wait() == 0
            assert log.read_text() == ""
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@pytest.mark.parametrize(
    ("parameter", "option"), [("host", "--host"), ("max_connections", "--max-connections"), ("grace_period", "--grace")]
)
def test_defaults(parameter: str, option: str, capfd: pytest.CaptureFixture[str]) -> None:
    """An app's defaults are the command line's."""
    with pytest.raises(SystemExit):
        main(["echo", "--help"])
    options = " ".join(capfd.readouterr().out.partition("\nlisteners:\n")[2].split())
    found = re.search(rf"{option} [A-Z]+ [^()]*\(default: ([^)]*)\)", options)
    assert found
    assert str(inspect.signature(serve_until_signal).parameters[parameter].default) == found[1]


async def test_defaults_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that says nothing listens on the loopback, has 1,000 connections at most, and stops within 10 seconds."""
    passed: dict[str, Any] = {}

    async def serve_listeners(*_: object, **settings: Any) -> None:
        await trio.lowlevel.checkpoint()
        passed.update(settings)

    monkeypatch.setattr("trioproto.process.service.serve_listeners", serve_listeners)
    addresses: list[str] = []
    await serve_until_signal(echo_handler, 0, announce=addresses.append)
    assert (passed["max_connections"], passed["grace_period"]) == (1000, 10)
    assert [address.rpartition(":")[0] for address in addresses] == ["127.0.0.1"]


@pytest.mark.parametrize("number", SIGNALS)
async def test_stop(number: signal.Signals) -> None:
    """A signal ends idle connections and frees the port; the last statistics are returned."""
    async with served() as server, await server.connect() as stream:
        assert await echo_request(stream, b"hello") == b"hello"
        server.send_signal(number)
        assert await receive_all(stream) == b""
    assert server.stats is not None
    assert (server.stats.accepted, server.stats.active, server.stats.crashed) == (1, 0, 0)
    assert is_refused(server.addresses[-1])


async def test_grace_period(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that takes no part in the stop is cancelled after the grace period."""

    async def handler(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with served(handler, grace_period=0.1) as server, await server.connect() as stream:
        server.send_signal()
        assert await receive_all(stream) == b""
    assert "the grace period of 0.1 s expired: cancelled the rest" in caplog.messages


async def test_second_signal_cancels_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal cancels the handlers at once, and what would have been the last statistics is None."""
    monkeypatch.setattr("trioproto.process.service.SAME_SIGNAL_SECONDS", 0.1)
    cancelled = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        await current_drain().began.wait()
        await stream.send_all(b"!")
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with served(handler, grace_period=10 * HANGS) as server, await server.connect() as stream:
        server.send_signal()
        assert await stream.receive_some(1) == b"!"
        await trio.sleep(0.2)
        assert not cancelled.is_set()
        server.send_signal()
        await server.ended.wait()
    assert cancelled.is_set()
    assert server.stats is None
    assert is_refused(server.addresses[-1])


async def test_cancellation_closes_everything(tmp_path: Path) -> None:
    """On cancellation, handlers are cancelled, listeners closed, and the file of the UNIX socket is removed."""
    path = tmp_path / "op"
    cancelled = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"!")
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    with trio.CancelScope() as scope:
        async with served(handler, unix=str(path)) as server, await server.connect() as stream:
            assert await stream.receive_some(1) == b"!"
            assert path.is_socket()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert cancelled.is_set()
    assert is_refused(server.addresses[-1])
    assert not path.exists()


async def test_max_connections() -> None:
    """As many are served at once as the app says; another one waits until there is room."""
    async with (
        served(max_connections=1) as server,
        await server.connect() as first,
        await server.connect() as second,
    ):
        assert await echo_request(first, b"hello") == b"hello"
        await second.send_all(b"hello")
        with trio.move_on_after(0.1) as too_early:
            await second.receive_some()
        assert too_early.cancelled_caught
        await first.aclose()
        assert await receive(second, 5) == b"hello"
    assert server.stats is not None
    assert server.stats.accepted == 2


async def test_max_connections_per_client() -> None:
    """A client has as many as the app says; one more is reset, and a client with another address is served."""
    async with served(max_connections_per_client=1) as server, await server.connect() as first:
        assert await echo_request(first, b"hello") == b"hello"
        async with await server.connect() as second:
            with pytest.raises(trio.BrokenResourceError):
                await second.receive_some()
        async with await trio.open_tcp_stream("127.0.0.1", server.port, local_address="127.0.0.2") as other:
            assert await echo_request(other, b"hello") == b"hello"
    assert server.stats is not None
    assert (server.stats.accepted, server.stats.refused) == (3, 1)


async def test_ticks() -> None:
    """An app's own function is called that often, with the statistics of that moment."""
    ticked, ticks = trio.Event(), 0

    async def on_tick(stats: ServerStats) -> None:
        nonlocal ticks
        ticks += 1
        if stats.accepted == 1 and ticks > 1:
            ticked.set()
        await trio.lowlevel.checkpoint()

    async with served(tick=0.01, on_tick=on_tick) as server, await server.connect():
        await ticked.wait()


async def test_several_hosts() -> None:
    """An app may listen on several hosts; it is announced at the address of each."""
    hosts = ["127.0.0.1", "127.0.0.2"]
    async with served(host=hosts) as server:
        assert [address.rpartition(":")[0] for address in server.addresses] == hosts
        for address in server.addresses:
            host, _, port = address.rpartition(":")
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                assert await echo_request(stream, b"hello") == b"hello"


async def test_unix_socket(tmp_path: Path) -> None:
    """An app may listen on a UNIX socket, without a port or beside one; the file is removed in the stop."""
    path = tmp_path / "socket"
    for port in (None, 0):
        async with served(port=port, unix=str(path)) as server:
            assert server.addresses[0] == f"unix:{path}"
            assert len(server.addresses) == (1 if port is None else 2)
            async with await trio.open_unix_socket(path) as stream:
                assert await echo_request(stream, b"hello") == b"hello"
        assert not path.exists()


async def test_inherited_descriptors() -> None:
    """An app may be given listening sockets that it inherits, even twice; it closes them in the end."""
    with socket.create_server(("127.0.0.1", 0)) as parents:
        fd = os.dup(parents.fileno())
        async with served(port=None, fds=[fd, fd]) as server, await server.connect() as stream:
            assert server.addresses == [f"127.0.0.1:{parents.getsockname()[1]}"]
            assert await echo_request(stream, b"hello") == b"hello"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("ending", [True, False])
async def test_queue_of_an_inherited_socket(ending: bool, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """Who waits in its queue when the stop begins is left to its next server, unless it ends with the supervisor."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    serving, stopping = trio.Event(), trio.Event()

    async def handler(stream: trio.abc.Stream) -> None:
        serving.set()
        await current_drain().began.wait()
        stopping.set()
        await trio.sleep(0.2)

    with socket.create_server(("127.0.0.1", 0)) as parents:
        fd = os.dup(parents.fileno())
        if ending:
            monkeypatch.setenv("TRIOPROTO_ENDING_FDS", str(fd))
        settings = {"fds": [fd], "max_connections": 1, "ssl_context": context if tls else None}
        async with served(handler, port=None, **settings) as server, await server.connect():
            await serving.wait()
            async with await server.connect():
                server.send_signal()
                await server.ended.wait()
                assert stopping.is_set()
                parents.settimeout(0)
                if ending:
                    with pytest.raises(BlockingIOError):
                        parents.accept()
                else:
                    parents.accept()[0].close()
        assert server.stats is not None
        assert server.stats.accepted == (2 if ending else 1)


async def test_clients_that_come_while_an_inherited_socket_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that comes just then is accepted or left in the queue, and disturbs nothing."""
    monkeypatch.setattr("trioproto.process.service.HANDSHAKE_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as parents:
        for _ in range(20):
            async with served(port=None, fds=[os.dup(parents.fileno())]) as server:
                server.send_signal()
                while not server.ended.is_set():
                    socket.create_connection(parents.getsockname(), HANGS).close()
                    await trio.lowlevel.checkpoint()
            assert server.stats is not None
            parents.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    parents.accept()[0].close()


async def test_tls() -> None:
    """With a TLS context, the server speaks TLS on every listener, and nothing else."""
    authority = trustme.CA()
    server_side, client_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server_side)
    authority.configure_trust(client_side)
    async with served(host=["127.0.0.2", "127.0.0.1"], ssl_context=server_side) as server:
        for address in server.addresses:
            host, _, port = address.rpartition(":")
            tcp = await trio.open_tcp_stream(host, int(port))
            async with trio.SSLStream(tcp, client_side, server_hostname="localhost") as stream:
                assert await echo_request(stream, b"hello") == b"hello"


async def test_standard_input_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``stop_at_eof``, the end of standard input stops the server as a signal does."""
    reading, writing = os.pipe()
    monkeypatch.setattr("trioproto.process.service._STDIN", reading)
    async with served(stop_at_eof=True) as server, await server.connect() as stream:
        os.write(writing, b"not the end")
        assert await echo_request(stream, b"hello") == b"hello"
        server.signals = 1  # in place of which is this:
        os.close(writing)
        assert await receive_all(stream) == b""
    os.close(reading)
    assert server.stats is not None


async def test_standard_input_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nothing is read from standard input, which is the app's."""
    reading, writing = os.pipe()
    monkeypatch.setattr("trioproto.process.service._STDIN", reading)
    os.write(writing, b"for the app")
    os.close(writing)
    async with served() as server, await server.connect() as stream:
        assert await echo_request(stream, b"hello") == b"hello"
    assert os.read(reading, 100) == b"for the app"
    os.close(reading)


async def test_standard_input_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``stop_at_eof``, a standard input that is closed has ended."""
    monkeypatch.setattr("trioproto.process.service._STDIN", -1)
    async with served(stop_at_eof=True) as server:
        server.signals = 1  # in place of which is this
        await server.ended.wait()
    assert server.stats is not None


async def test_addresses_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Without ``announce``, each address is logged, at level INFO."""
    caplog.set_level(logging.INFO, "trioproto")

    async def stop_when_logged() -> None:
        while len(caplog.messages) < 2:  # noqa: ASYNC110 - a log has no event
            await trio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_when_logged)
            await serve_until_signal(echo_handler, 0, host=["127.0.0.1", "127.0.0.2"])
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    for message, host in zip(caplog.messages, ("127.0.0.1", "127.0.0.2"), strict=True):
        assert re.fullmatch(rf"listening on {re.escape(host)}:\d+", message)


async def test_port_in_use(free_port: int) -> None:
    """A port that is taken is an `OSError` that names the address; what was open already is closed."""
    with socket.create_server(("127.0.0.2", free_port)):
        with pytest.raises(OSError, match="Address already in use") as caught:
            await serve_until_signal(echo_handler, free_port, host=["127.0.0.1", "127.0.0.2"])
        assert str(caught.value) == f"cannot listen on 127.0.0.2:{free_port}: Address already in use"
        assert isinstance(caught.value, ListenError)
        assert is_refused(f"127.0.0.1:{free_port}")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"port": -1}, "port must be"),
        ({"port": 65536}, "port must be"),
        ({"port": None}, "there must be a port"),
        ({"host": []}, "there must be a port"),
        ({"max_connections": 0}, "max_connections must be at least 1, not 0"),
        ({"max_connections_per_client": 0}, "max_connections_per_client must be at least 1, not 0"),
        ({"proxy_protocol": ["10.0.0.1/8"]}, "has host bits set"),
        ({"proxy_timeout": 0}, "proxy_timeout must be above 0 seconds, not 0"),
        ({"grace_period": -1}, "grace_period must be at least 0 seconds, not -1"),
        ({"tick": 0}, "tick must be above 0 seconds, not 0"),
        ({"on_tick": print}, "on_tick requires tick"),
    ],
)
async def test_settings_out_of_range(settings: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting out of its range is a `ValueError`, before anything is open or announced."""
    monkeypatch.delattr(trio, "open_tcp_listeners")
    with pytest.raises(ValueError, match=complaint):
        await serve_until_signal(echo_handler, **{"port": 0} | settings)


def test_another_thread(free_port: int) -> None:
    """Outside the main thread, which alone receives signals, it is an error; nothing is left open."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trio.run(serve_until_signal, echo_handler, free_port)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(HANGS)
    [error] = errors
    assert "main thread" in str(error)
    assert is_refused(f"127.0.0.1:{free_port}")


# What a server in one process and the supervisor of several have in common.


class Events:
    """What happened, and when."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.times: list[float] = []

    def note(self, name: str) -> None:
        self.names.append(name)
        self.times.append(trio.current_time())


@pytest.fixture
def events() -> Events:
    """Nothing has happened so far."""
    return Events()


@contextlib.asynccontextmanager
async def listening(events: Events) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen, and note when that ends."""
    try:
        async with tcp_listeners("127.0.0.1", 0) as listeners:
            yield listeners
    finally:
        events.note("not accepting")


async def run(events: Events, stop_takes: float = 2.0, at_the_start: signal.Signals | None = None) -> None:
    """Serve, and note what happens; send ``at_the_start`` to this process when the service is announced."""

    async def serve(listeners: list[trio.SocketListener], shutdown: trio.Event) -> str:
        events.note("serving")
        assert len(listeners) == 1
        try:
            await shutdown.wait()
            events.note("shutdown")
            await trio.sleep(stop_takes)
            events.note("done")
        except trio.Cancelled:
            events.note("cancelled")
            raise
        return "the result"

    def announce(_: str) -> None:
        events.note("announced")
        if at_the_start is not None:
            os.kill(os.getpid(), at_the_start)

    result = await run_until_signal(serve, listening(events), announce=announce)
    assert result == ("the result" if "done" in events.names else None)
    events.note("returned")


async def send(*numbers: signal.Signals, interval: float = 1.5) -> None:
    """Send signals to this process, after 5 seconds and then so many seconds apart."""
    await trio.sleep(5)
    for number in numbers:
        os.kill(os.getpid(), number)
        await trio.sleep(interval)


@pytest.mark.parametrize("number", SIGNALS)
async def test_signal(number: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """At a signal accepting ends first, so that handshakes that had begun are queued before the server stops."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, number)
        await run(events)
    assert events.names == ["announced", "serving", "not accepting", "shutdown", "done", "returned"]
    stopping = 5 + HANDSHAKE_SECONDS
    assert events.times == pytest.approx([0, 0, 5, stopping, stopping + 2, stopping + 2])


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
async def test_second_signal(
    first: signal.Signals,
    second: signal.Signals,
    events: Events,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A second signal, whichever of them, ends the stop at once, and the log says so."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, first, second)
        await run(events, stop_takes=1000)
    assert events.names[-3:] == ["shutdown", "cancelled", "returned"]
    assert events.times[-2:] == pytest.approx([6.5, 6.5])
    assert caplog.messages == ["second signal: cancelled all connections"]


async def test_signals_within_a_second(
    events: Events, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """However many signals come within a second of the first, they are one stop, and cut nothing."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(send, *SIGNALS * 4, interval=0.1))
        await run(events, stop_takes=1000)
    assert events.names[-3:] == ["shutdown", "done", "returned"]
    assert caplog.messages == []


@pytest.mark.parametrize("number", SIGNALS)
async def test_signal_at_the_start(
    number: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    """Who reads the announcement may send a signal: from then on it stops the server, and does not kill it."""
    await run(events, at_the_start=number)
    assert events.names == ["announced", "serving", "not accepting", "shutdown", "done", "returned"]


async def test_no_signal(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """A server that ends by itself ends the service, and its listeners are closed."""
    served: list[trio.SocketListener] = []

    async def serve(listeners: list[trio.SocketListener], shutdown: trio.Event) -> None:
        served.extend(listeners)
        await trio.sleep(3)
        assert not shutdown.is_set()

    await run_until_signal(serve, listening(events))
    assert trio.current_time() == pytest.approx(3)
    assert [listener.socket.fileno() for listener in served] == [-1]


async def test_failure(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """A server that fails ends the service with that error, in the nursery's group, and its listeners are closed."""
    served: list[trio.SocketListener] = []

    async def serve(listeners: list[trio.SocketListener], shutdown: trio.Event) -> None:
        served.extend(listeners)
        await trio.sleep(3)
        raise OSError("failed")

    with pytest.raises(ExceptionGroup) as caught:
        await run_until_signal(serve, listening(events))
    assert caught.group_contains(OSError, match="failed")
    assert [listener.socket.fileno() for listener in served] == [-1]


async def test_announcement_that_fails(events: Events) -> None:
    """If nobody can be told where the service is, there is none; its listeners are closed."""
    addresses: list[str] = []

    async def serve(listeners: list[trio.SocketListener], shutdown: trio.Event) -> None:
        await trio.lowlevel.checkpoint()
        events.note("serving")

    def announce(address: str) -> None:
        addresses.append(address)
        raise OSError("nobody reads this")

    with pytest.raises(OSError, match="nobody reads this"):
        await run_until_signal(serve, listening(events), announce=announce)
    assert events.names == ["not accepting"]
    assert is_refused(*addresses)


async def test_cancellation(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """On cancellation, the server is cancelled."""
    with trio.move_on_after(3) as scope:
        await run(events)
    assert scope.cancelled_caught
    assert events.names == ["announced", "serving", "cancelled", "not accepting"]
    assert trio.current_time() == pytest.approx(3)
