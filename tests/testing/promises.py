# ruff: noqa: T201 - printing a scenario is what it is a program for
"""What the server promises its clients and its operator, as properties that hold on a network in memory.

A seed makes a scenario: a server with its limits, which is stopped at some moment, and 3 to 8 clients, each of a kind
in `KINDS` and on a host of its own. `visit` runs a scenario; `Scenario.broken_promises` says what went wrong. To see
one scenario, with all that happened on the network and in the log::

    python tests/testing/promises.py op 123
"""

import functools
import importlib.util
import itertools
import logging
import math
import operator
import random
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import trio
import trio.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from trioproto import Connection, ServerStats, echo_handler, op_handler, serve_listeners
from trioproto.connection import FIRST_REQUEST_GRACE, LAST_REQUESTS_SECONDS
from trioproto.server import EMPTYING_SECONDS
from trioproto.testing import Network, NetworkStream
from trioproto.transport import LINGER_SECONDS

TRANSFER_SECONDS = 2.0  # for the longest request and its reply, where buffers are small
SLACK = 0.1  # seconds: looks at what has already arrived, and rounding
FOREVER = 1e7  # seconds; a scenario that lasts longer hangs
MAX_UNSENT = 3000  # bytes, in the chat: little, so that an overrun does not take many lines

Handler = Callable[[trio.abc.Stream], Awaitable[object]]
Exchange = tuple[bytes, bytes]  # a request, and the reply that it should have

KINDS = {
    "behaves": "makes requests, one by one or pipelined, and reads at once",
    "dribbles": "sends its requests in small pieces, slowly, but in time",
    "never pauses": "always has its next request on its way",
    "stalls": "stops inside a request, or between two",
    "overstays": "sends its last request in small pieces, too slowly",
    "ends early": "ends its side inside a request",
    "leaves the protocol": "makes requests, then sends what is none",
    "floods": "sends many requests, and reads late",
    "breaks off": "resets the connection, at any byte",
    "vanishes": "is gone without a reset, at any byte",
    "never reads": "sends many requests, and receives nothing while the server is there",
}
IMPROMPT = {"floods", "breaks off", "vanishes", "never reads"}  # all others read at once, and break nothing
WITHIN_REQUESTS = {"never pauses", "overstays", "ends early", "leaves the protocol"}  # an echo has none


def load_example(name: str) -> Any:
    """Import one of the tour's stops, which are no package."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The protocols: what clients say, and what they should be told.


def op_exchanges(rng: random.Random, host: str, longest: int) -> Iterator[Exchange]:
    """Yield op requests, and the replies by the table in the documentation."""
    steps = {b"+": operator.add, b"-": operator.sub, b"*": operator.mul}
    while True:
        operands = [rng.randint(-(2**31), 2**31 - 1) for _ in range(rng.randint(1, min(longest, 255)))]
        sign = rng.choice(list(steps))
        request = struct.pack(f"<B{len(operands)}ic", len(operands), *operands, sign)
        yield request, struct.pack("<I", functools.reduce(steps[sign], operands) & 0xFFFFFFFF)


def echo_exchanges(rng: random.Random, host: str, longest: int) -> Iterator[Exchange]:
    """Yield messages, each as its own reply."""
    while True:
        message = rng.randbytes(rng.randint(1, longest))
        yield message, message


def kv_exchanges(rng: random.Random, host: str, longest: int) -> Iterator[Exchange]:
    """Yield requests to the key-value server, for keys that no other client uses."""
    store: dict[bytes, bytes] = {}

    def string(data: bytes) -> bytes:
        return struct.pack(">H", len(data)) + data

    while True:
        key = f"{host}/{rng.randrange(3)}".encode()
        if rng.random() < 0.5:
            store[key] = rng.randbytes(rng.randint(0, min(longest, 1000)))
            yield b"S" + string(key) + string(store[key]), b"="
        else:
            yield b"G" + string(key), b"=" + string(store[key]) if key in store else b"?"


def chat_exchanges(rng: random.Random, host: str, longest: int) -> Iterator[Exchange]:
    """Yield a name, then lines, and what all members are told of each."""
    yield f"{host}\n".encode(), f"{host} is here.\n".encode()
    number = 0
    while True:
        number += 1
        line = f"{number}{'.' * rng.randint(0, min(longest, 900))}\n"
        yield line.encode(), f"{host}: {line}".encode()


@attrs.frozen
class Protocol:
    """A protocol, and the server for it."""

    exchanges: Callable[[random.Random, str, int], Iterator[Exchange]]
    make_handler: "Callable[[Scenario], Handler]"
    malformed: tuple[bytes, ...] = ()
    idle_timeouts: tuple[float, ...] = (5.0, 60.0, 300.0)
    request_timeouts: tuple[float, ...] = (5.0, 30.0)
    buffer_sizes: tuple[int, ...] = (250, 2001, 65536)
    has_requests: bool = True  # that begin and end, and so may be cut in the middle
    broadcasts: bool = False  # what one client says goes to all

    @property
    def kinds(self) -> list[str]:
        """The kinds of clients that make sense in it."""
        return [kind for kind in KINDS if self.has_requests or kind not in WITHIN_REQUESTS]


def make_op_handler(scenario: "Scenario") -> Handler:
    """Return the op server's handler."""
    return functools.partial(op_handler, idle_timeout=scenario.idle_timeout, request_timeout=scenario.request_timeout)


def make_echo_handler(scenario: "Scenario") -> Handler:
    """Return the echo server's handler."""
    return functools.partial(echo_handler, idle_timeout=scenario.idle_timeout)


def make_kv_handler(scenario: "Scenario") -> Handler:
    """Return the key-value server's handler, or one that does something else at times, also inside a request."""
    store: dict[bytes, bytes] = {}

    async def handle_between_ticks(stream: trio.abc.Stream) -> None:
        async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
            requests = connection.requests(kv.read_request)
            while True:
                with trio.move_on_after(scenario.tick) as tick:
                    request = await anext(requests, None)
                if not tick.cancelled_caught:
                    if request is None:
                        break
                    await connection.send_all(kv.answer(store, *request))

    return functools.partial(kv.handler, store) if scenario.tick == math.inf else handle_between_ticks


def make_chat_handler(scenario: "Scenario") -> Handler:
    """Return the chat's handler; note what it tells to whom, and who is overrun by it."""
    members = scenario.members

    def tell(told: set[Any], text: str) -> None:
        scenario.said.append(text)
        for member in told:
            client = scenario.client(member.peer)
            client.expected += f"{text}\n".encode()
            client.told_at.append(trio.current_time())
        original_tell(told, text)
        for member in told:
            if member.unsent > MAX_UNSENT:
                scenario.client(member.peer).let_go_at = trio.current_time()

    chat.tell = tell
    return functools.partial(chat.chat, members)


kv = load_example("6_your_own_protocol")
chat = load_example("6b_chat")
chat.MAX_UNSENT = MAX_UNSENT
original_tell = chat.tell

PROTOCOLS = {
    "op": Protocol(op_exchanges, make_op_handler, (b"\0", b"\1\0\0\0\0?", b"\2\0\0\0\0\0\0\0\0/rest")),
    "echo": Protocol(echo_exchanges, make_echo_handler, has_requests=False),
    "kv": Protocol(kv_exchanges, make_kv_handler, (b"HELO", b"S\xff\xff", b"G\x80\0key"), (300.0,), (30.0,)),
    "chat": Protocol(
        chat_exchanges, make_chat_handler, (b"x" * 1100,), (3600.0,), (30.0,), (1000, 65536), broadcasts=True
    ),
}


# The clients.


@attrs.define
class Step:
    """Something that a client sends: when, and after which reply."""

    pause: float
    data: bytes = b""
    reply: bytes = b""  # in the chat, it waits until it is told this ...
    received: int = 0  # ... and otherwise for so many bytes in all


@attrs.define
class Client:
    """A client: what it is to do, and what has happened to it. Times are Trio's, and `math.inf` for never."""

    host: str
    kind: str
    starts_at: float
    steps: list[Step] = attrs.field(factory=list)
    ends: list[tuple[int, int]] = attrs.field(factory=list)  # of each whole request, and of its reply, in bytes
    reads_after: float = 0.0
    last: str = "hold"  # in the end: "hold" the connection, "eof", "close", "reset", "crash"

    expected: bytearray = attrs.field(factory=bytearray, repr=False)  # what the server has to send
    received: bytearray = attrs.field(factory=bytearray, repr=False)
    # How much was sent in all, and from when to when.
    sent: list[tuple[int, float, float]] = attrs.field(factory=list, repr=False)
    outcome: str = "no end"  # "refused", "eof", "reset"
    connected_at: float = math.inf
    accepted_at: float = math.inf
    closed_at: float = math.inf  # by the server
    left_at: float = math.inf
    moved_at: float = 0.0  # sent or received something
    received_at: float = 0.0
    told_at: list[float] = attrs.field(factory=list, repr=False)  # when it was pushed something, in the chat
    let_go_at: float = math.inf  # and then it was too much

    @property
    def is_prompt(self) -> bool:
        """Whether it always reads at once, and never breaks the connection."""
        return self.kind not in IMPROMPT

    @property
    def whole(self) -> int:
        """How many bytes its whole requests have."""
        return self.ends[-1][0] if self.ends else 0

    def sent_at(self, offset: int, *, earliest: bool = False) -> float:
        """Return when the byte at ``offset`` was on its way at the latest, or at the earliest."""
        times = next((times for total, *times in self.sent if total > offset), [math.inf, math.inf])
        return times[0 if earliest else 1]

    async def visit(self, network: Network, server_ended: trio.Event) -> None:
        """Do what is planned, until it is done or the server ends the connection."""
        await trio.sleep(self.starts_at)
        try:
            stream = await network.connect("server", 9000, source=self.host)
        except OSError:
            self.outcome = "refused"
            return
        self.connected_at = self.moved_at = trio.current_time()
        news = trio.lowlevel.ParkingLot()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, stream, news, nursery.cancel_scope)
            try:
                for step in self.steps:
                    await self._take(step, stream, news)
                match self.last:
                    case "hold":
                        await server_ended.wait()
                    case "eof":
                        await stream.send_eof()
                        await trio.sleep_forever()
                    case "reset":
                        stream.reset()
                    case "crash":
                        network.crash(self.host)
            except trio.BrokenResourceError:
                self.outcome = "reset"
            nursery.cancel_scope.cancel()
        if self.reads_after == math.inf and self.outcome == "no end":
            self.reads_after = 0.0
            await self._receive(stream, news, trio.CancelScope())
        self.left_at = trio.current_time()
        if self.last != "crash":
            await stream.aclose()

    async def _take(self, step: Step, stream: NetworkStream, news: trio.lowlevel.ParkingLot) -> None:
        while step.reply not in self.received or len(self.received) < step.received:
            await news.park()
        await trio.sleep(step.pause)
        if step.data:
            began_at = trio.current_time()
            await stream.send_all(step.data)
            self.moved_at = trio.current_time()
            self.sent.append(((self.sent[-1][0] if self.sent else 0) + len(step.data), began_at, self.moved_at))

    async def _receive(self, stream: NetworkStream, news: trio.lowlevel.ParkingLot, scope: trio.CancelScope) -> None:
        await trio.sleep(self.reads_after)
        try:
            async for chunk in stream:
                self.received += chunk
                self.received_at = self.moved_at = trio.current_time()
                news.unpark_all()
            self.outcome = "eof"
        except trio.BrokenResourceError:
            self.outcome = "reset"
        except trio.ClosedResourceError:  # this client has reset the connection itself, or crashed
            pass
        scope.cancel()


class Planner:
    """Plans what one client does."""

    def __init__(self, rng: random.Random, protocol: Protocol, host: str, timeouts: tuple[float, float]) -> None:
        self._rng = rng
        self._protocol = protocol
        self._idle_timeout, self._request_timeout = timeouts
        kind = rng.choice([*protocol.kinds, "behaves", "behaves", "dribbles"])
        starts_at = rng.uniform(0, 1) if rng.random() < 0.7 else rng.uniform(0, self._idle_timeout)
        self._client = Client(host, kind, starts_at)
        self._longest = rng.choice([10, 10, 50, 1000])
        if protocol.broadcasts and (host != "client-0" or kind not in ("behaves", "stalls", "leaves the protocol")):
            self._longest = 10  # only one says much, line by line; otherwise those who behave could be overrun, too
        self._exchanges = protocol.exchanges(rng, host, self._longest)
        self._waits = rng.random() < 0.6  # for each reply
        self._total = self._replied = 0
        self._reply = b""

    def plan(self) -> Client:  # noqa: C901 - one case for each kind
        """Return the client."""
        client, rng = self._client, self._rng
        half = next(self._protocol.exchanges(rng, client.host, 10))[0][:-1]
        half = half[: rng.randint(1, len(half))] if self._protocol.has_requests else b""
        if self._protocol.broadcasts:
            client.expected += b"Your name?\n"
        match client.kind:
            case "dribbles":
                for _ in range(rng.randint(2, 4)):
                    self._ask(self._pause(), rng.uniform(0.1, 0.8) * self._request_timeout)
                self._join_some_steps()
                self._end(rng.choice(["eof", "close"]))
                return client
            case "never pauses":
                self._ask_without_a_pause(rng.randint(20, 50))
                self._end("eof")
                return client
            case "floods" | "never reads":
                self._ask_many()
                return client
        self._ask_few()
        match client.kind:
            case "behaves":
                self._end(rng.choice(["eof", "close"]))
            case "stalls":
                self._send(self._pause(), rng.choice([b"", half]))
            case "overstays":
                self._send(self._pause(), half, 2 * self._request_timeout)
            case "ends early":
                self._send(self._pause(), half)
                client.last = "eof"
            case "leaves the protocol":
                self._send(self._pause(), rng.choice(self._protocol.malformed))
            case "breaks off" | "vanishes":
                self._send(self._pause(), rng.choice([b"", half]))
                client.steps.append(Step(self._pause()))
                client.last = "reset" if client.kind == "breaks off" else "crash"
        return client

    def _ask_few(self) -> None:
        count = self._rng.randint(0, 5)
        if self._longest == 1000 and (self._protocol.broadcasts or self._rng.random() < 0.2):
            count = 20
            self._waits = self._protocol.broadcasts
        for _ in range(count):
            self._ask(self._pause())

    def _ask_many(self) -> None:
        client, rng = self._client, self._rng
        self._waits = False
        few = self._protocol.broadcasts or (self._longest == 1000 and rng.random() < 0.8)
        for _ in range(rng.randint(5, 10) if few else rng.randint(10, 60)):
            self._ask(0.0)
        if client.kind == "floods":
            client.reads_after = rng.uniform(0.1, 0.7) * self._idle_timeout
            client.last = "eof"
        else:
            client.reads_after = math.inf

    def _ask_without_a_pause(self, count: int) -> None:
        """Send the end of each request together with the beginning of the next."""
        data = b""
        for _ in range(count):
            request, reply = next(self._exchanges)
            at = self._rng.randint(1, len(request) - 1)
            self._client.steps.append(Step(0.2, data + request[:at]))
            data = request[at:]
            self._note(request, reply)
        self._client.steps.append(Step(0.2, data))

    def _pause(self) -> float:
        """Draw a pause between two requests: none, a short one, or a long one."""
        short = self._rng.uniform(0, 0.5)
        pause = self._rng.choice([0.0, short, short, self._rng.uniform(0, 0.8) * self._idle_timeout])
        if not self._protocol.broadcasts or not self._waits:
            return pause
        return 0.5 + (short if self._longest == 1000 else pause)  # so that nobody is overrun who reads

    def _ask(self, pause: float, seconds: float = 0.0) -> None:
        """Make one request more, within some seconds."""
        request, reply = next(self._exchanges)
        self._send(pause, request, seconds)
        self._note(request, reply)

    def _note(self, request: bytes, reply: bytes) -> None:
        self._total += len(request)
        self._replied += len(reply)
        self._reply = reply
        self._client.ends.append((self._total, self._replied))
        if not self._protocol.broadcasts:
            self._client.expected += reply

    def _send(self, pause: float, data: bytes, seconds: float = 0.0) -> None:
        """Send ``data``; in pieces, over as many seconds, if there are any."""
        cuts = {0, len(data)}
        if seconds:
            cuts |= {self._rng.randrange(len(data)) for _ in range(self._rng.randint(1, 4))}
        pieces = [data[start:end] for start, end in itertools.pairwise(sorted(cuts))]
        self._wait_for_reply(pause)
        for number, piece in enumerate(pieces):
            self._client.steps.append(Step(seconds / (len(pieces) - 1) if number else 0.0, piece))

    def _wait_for_reply(self, pause: float) -> None:
        if self._protocol.broadcasts:
            self._client.steps.append(Step(pause, reply=self._reply if self._waits else b""))
        else:
            self._client.steps.append(Step(pause, received=self._replied if self._waits else 0))

    def _end(self, last: str) -> None:
        self._client.last = last
        self._waits = last == "close"
        self._wait_for_reply(0.0)

    def _join_some_steps(self) -> None:
        """Where nothing is waited for, have some things go out together."""
        steps: list[Step] = []
        for step in self._client.steps:
            if steps and not step.pause and not step.reply and not step.received and self._rng.random() < 0.5:
                steps[-1].data += step.data
            else:
                steps.append(step)
        self._client.steps = steps


# The scenarios.


class Log(logging.Handler):
    """Keeps the lines of a log, with the times on Trio's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[float, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((trio.current_time(), record.levelno, self.format(record)))


class Scenario:
    """A server and its clients, made from a seed; after `run`, also what happened."""

    def __init__(self, name: str, seed: int) -> None:
        rng = random.Random(f"{name} {seed}")
        self.protocol = PROTOCOLS[name]
        self.idle_timeout = rng.choice(self.protocol.idle_timeouts)
        self.request_timeout = rng.choice(self.protocol.request_timeouts)
        self.network = Network(
            seed,
            latency=rng.choice([0.01, 0.1]),
            reset=rng.choice([0.0, 0.0, 0.0, 0.003]),
            buffer_size=rng.choice(self.protocol.buffer_sizes),
        )
        self.clients = [
            Planner(rng, self.protocol, f"client-{number}", (self.idle_timeout, self.request_timeout)).plan()
            for number in range(rng.randint(3, 8))
        ]
        self.max_connections = rng.choice([None, 1, 2, 4])
        both = self.idle_timeout + self.request_timeout
        moments = [1.5, self.request_timeout, 2 * self.idle_timeout, 10 * both]
        self.stops_at = rng.uniform(0.3, 1) * rng.choice(moments)
        self.grace_period = rng.choice([0.0, 0.5, 5.0, both + 20, both + 20, math.inf])
        self.tick = rng.choice([math.inf, 10.0, 40.0])  # of a handler that has other things to do, too
        self.members: set[Any] = set()  # of the chat
        self.said: list[str] = []

        self.log = Log()
        self.streams: list[NetworkStream] = []  # that the server has accepted
        self.open_streams = 0
        self.ended_at = math.inf
        self.stats: ServerStats | None = None
        self.error: Exception | None = None  # that came out of `run`

    def client(self, peer: str) -> Client:
        """Return the client at an address."""
        return self.clients[int(peer.partition(":")[0].removeprefix("client-"))]

    async def run(self) -> None:
        """Let everything happen, until the server and all clients have ended."""
        handler = self.protocol.make_handler(self)
        shutdown = trio.Event()
        server_ended = trio.Event()

        async def recorded_handler(stream: NetworkStream) -> None:
            client = self.client(stream.peer_address[0])
            client.accepted_at = trio.current_time()
            self.streams.append(stream)
            try:
                await handler(stream)
            finally:
                client.closed_at = trio.current_time()

        async def serve() -> None:
            self.stats = await serve_listeners(
                recorded_handler,
                [self.network.listen("server", 9000)],
                max_connections=self.max_connections,
                shutdown=shutdown,
                grace_period=self.grace_period,
            )
            self.ended_at = trio.current_time()
            server_ended.set()

        with trio.move_on_after(FOREVER):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                for client in self.clients:
                    nursery.start_soon(client.visit, self.network, server_ended)
                await trio.sleep_until(self.stops_at)
                shutdown.set()
        for stream in self.streams:
            try:
                with trio.move_on_after(SLACK):
                    await stream.receive_some()
            except trio.ClosedResourceError:
                continue
            self.open_streams += 1

    # The promises.

    def broken_promises(self) -> Iterator[str]:
        """Say which promises the server has not kept."""
        if self.error is not None:
            yield f"the server has raised {self.error!r}"
            return
        yield from self._check_end()
        yield from self._check_places()
        was_reset = {
            end for _, name, event, _ in self.network.trace if event == "network reset" for end in name.split(" > ")
        }
        for client in self.clients:
            if client.accepted_at == math.inf:
                continue
            checks = [self._check_replies(client), self._check_time(client)]
            reset_by_network = any(end.startswith(f"{client.host}:") for end in was_reset)
            if client.is_prompt and self._has_ample_grace and not reset_by_network:
                checks += [self._check_prompt(client), self._check_not_early(client), self._check_log(client)]
            if client.kind == "floods" and client.closed_at < self.stops_at and not reset_by_network:
                checks.append(self._check_flood(client))
            for check in checks:
                for failure in check:
                    yield f"{client.host}, which {KINDS[client.kind]}: {failure}"

    @property
    def _has_ample_grace(self) -> bool:
        """Whether all that a client may take its time for ends before the grace period does."""
        return self.grace_period >= self.request_timeout + self.idle_timeout + 10

    def _check_end(self) -> Iterator[str]:
        """The server ends within its grace period, and nothing is left of it."""
        if self.stats is None:
            yield "the server has not ended"
            return
        if self.ended_at > self.stops_at + self.grace_period + SLACK:
            yield f"the server ended {self.ended_at - self.stops_at} s after its stop began"
        if self.stats.active or self.stats.crashed or self.stats.accepted != len(self.streams):
            yield f"the server has accepted {len(self.streams)}, and says {self.stats}"
        if self.open_streams:
            yield f"{self.open_streams} streams are left open"
        if self.members:
            yield f"{len(self.members)} members are left in the chat"

    def _check_places(self) -> Iterator[str]:
        """The limit is kept, and whoever waits is accepted as soon as there is a place."""
        limit = self.max_connections or math.inf
        times = sorted({client.accepted_at for client in self.clients} | {client.closed_at for client in self.clients})
        for start, end in itertools.pairwise(times):
            active = sum(client.accepted_at <= start and end <= client.closed_at for client in self.clients)
            if active > limit:
                yield f"{active} connections at once, from {start} on"
            for client in self.clients:
                waits_from = max(client.connected_at, start)
                waits_to = min(client.accepted_at, client.left_at, end, self.stops_at + EMPTYING_SECONDS, self.ended_at)
                if active < limit and waits_to > waits_from + SLACK:
                    yield f"{client.host} waited from {waits_from} to {waits_to} though there was a place"

    def _check_replies(self, client: Client) -> Iterator[str]:
        """Replies are right and in order, and what ends without a reset ends whole."""
        if not client.expected.startswith(client.received):
            yield f"was sent {bytes(client.received)!r}, and not {bytes(client.expected)!r}"
        elif client.outcome == "eof" and self.protocol.broadcasts:
            missing = client.expected[len(client.received) :]
            if not client.received.endswith(b"\n") or (missing and self._has_ample_grace):
                yield f"received end of stream in front of {bytes(missing)!r}"
        elif client.outcome == "eof" and self.protocol.has_requests:
            ends = {0, *(reply_end for _, reply_end in client.ends)}
            if len(client.received) not in ends:
                yield f"received end of stream after {len(client.received)} bytes, inside a reply"

    def _check_prompt(self, client: Client) -> Iterator[str]:
        """Who reads at once is never reset, and receives all that it has asked for in time."""
        if client.outcome == "reset":
            yield "was reset"
        answered, owed = self._answered(client), self._owed(client)
        if answered < owed and client.last != "crash":
            yield f"{answered} requests were answered, and {owed} had arrived in time"

    def _check_flood(self, client: Client) -> Iterator[str]:
        """Who reads late, but in time, receives everything. In the chat it may be overrun."""
        if client.received != client.expected and client.let_go_at == math.inf:
            yield f"received {len(client.received)} of {len(client.expected)} bytes, and {client.outcome}"

    def _answered(self, client: Client) -> int:
        if self.protocol.broadcasts:
            said = [f"{line}\n" for line in self.said]
            return sum(line.startswith((f"{client.host}: ", f"{client.host} is here.")) for line in said)
        return sum(reply_end <= len(client.received) for _, reply_end in client.ends)

    def _owed(self, client: Client) -> int:
        """Return how many requests have to be answered: those that had arrived, or begun, before the stop."""
        start = owed = 0
        for end, _ in client.ends:
            began_at = client.sent_at(start) + self.network.latency
            arrived_at = client.sent_at(end - 1) + self.network.latency
            in_time = arrived_at < self.stops_at
            if self.protocol.has_requests and arrived_at < math.inf:
                in_time |= began_at < self.stops_at
                in_time |= start == 0 and began_at < client.accepted_at + FIRST_REQUEST_GRACE
            if not in_time:
                break
            start = end
            owed += 1
        return owed

    def _check_time(self, client: Client) -> Iterator[str]:
        """Nobody keeps a place beyond the time-outs, and a linger."""
        latency = self.network.latency
        closing = 3 * latency if client.is_prompt else LINGER_SECONDS  # who reads at once closes at once, too
        moved_at = max(client.moved_at, client.accepted_at, *client.told_at) + latency
        latest = [client.let_go_at]
        if client.last != "crash":
            latest.append(max(client.left_at, client.accepted_at) + 2 * latency)
        if client.is_prompt:
            unfinished_at = max(client.sent_at(client.whole), client.accepted_at) + latency
            if client.kind in ("leaves the protocol", "ends early"):
                latest.append(unfinished_at + closing)
            if unfinished_at < math.inf:
                # It counts from when what was owed for the requests before has been taken.
                taken_at = unfinished_at if self.protocol.broadcasts else max(unfinished_at, client.received_at)
                latest.append(taken_at + self.request_timeout + closing)
            else:
                within_request = self.request_timeout if client.kind == "dribbles" else 0.0
                latest.append(moved_at + max(self.idle_timeout, within_request) + closing)
            latest.append(self._latest_in_stop(client, unfinished_at) + closing)
        else:
            latest.append(moved_at + max(self.idle_timeout, self.request_timeout) + closing)
        if client.closed_at > min(latest) + SLACK:
            yield f"kept its place until {client.closed_at}, and not only until {min(latest)}"

    def _latest_in_stop(self, client: Client, unfinished_at: float) -> float:
        """Return when the server's stop ends a client that reads at once, at the latest."""
        sent_at = client.sent[-1][2] if client.sent else math.inf
        if unfinished_at < math.inf or client.kind == "dribbles":
            seconds = LAST_REQUESTS_SECONDS + self.request_timeout + TRANSFER_SECONDS
        elif sent_at + self.network.latency < self.stops_at:  # between two requests
            seconds = 0.0
        else:
            seconds = LAST_REQUESTS_SECONDS + TRANSFER_SECONDS
        return max(self.stops_at, client.accepted_at) + seconds

    def _check_not_early(self, client: Client) -> Iterator[str]:
        """Nobody is ended before the time-outs, except by the stop."""
        if client.outcome != "eof" or client.last != "hold" or client.kind == "leaves the protocol":
            return
        earliest = 0.0
        unfinished_at = client.sent_at(client.whole)
        if unfinished_at < math.inf:
            if unfinished_at + self.network.latency < self.stops_at:
                earliest = client.sent_at(client.whole, earliest=True) + self.request_timeout
        elif client.left_at < self.stops_at:
            sent_at = client.sent[-1][1] if client.sent else 0.0
            # What was pushed at the very end did not come in time.
            told_at = [time for time in client.told_at if time < client.left_at - 1]
            replied_at = 0.0 if self.protocol.broadcasts else client.received_at - self.network.latency
            earliest = max(client.accepted_at, sent_at, replied_at, *told_at) + self.idle_timeout
        if client.left_at < earliest - SLACK:
            yield f"was ended at {client.left_at}, and not only at {earliest}"

    def _check_log(self, client: Client) -> Iterator[str]:
        """What an operator should know of a client is logged in one line, and nothing else."""
        start = f"{client.host}:"
        lines = [line for _, level, line in self.log.lines if level >= logging.WARNING and line.startswith(start)]
        unfinished_at = client.sent_at(client.whole) + self.network.latency
        most = int(unfinished_at < math.inf)
        least = int(unfinished_at < self.stops_at)
        if not least <= len(lines) <= most:
            yield f"the log has {lines}, and not {least} to {most} lines"


def visit(name: str, seed: int) -> Scenario:
    """Run a scenario."""
    scenario = Scenario(name, seed)
    logger = logging.getLogger("trioproto")
    logger.addHandler(scenario.log)
    try:
        run_repeatably(scenario)
    finally:
        logger.removeHandler(scenario.log)
    return scenario


@settings(max_examples=1, database=None, deadline=None, phases=[Phase.generate])
@given(st.none())
def run_repeatably(scenario: Scenario, _: None) -> None:
    """Run a scenario with Trio's scheduler seeded, which Hypothesis does.

    Two members of the chat who leave at the same moment are told of each other, or not, by the order of their tasks.
    """
    try:
        trio.run(scenario.run, clock=trio.testing.MockClock(autojump_threshold=0))
    except Exception as error:  # noqa: BLE001 - Hypothesis would run it once more
        scenario.error = error


def check(name: str, seeds: Iterable[int]) -> None:
    """Run scenarios. Raises `AssertionError` for the first in which a promise is broken."""
    for seed in seeds:
        scenario = visit(name, seed)
        failures = list(scenario.broken_promises())
        if failures:
            said = "\n".join(failures)
            command = f"python tests/testing/promises.py {name} {seed}"
            raise AssertionError(f"{name}, seed {seed}:\n{said}\nTo see it: {command}") from scenario.error


def main(name: str, seed: int) -> int:
    """Run one scenario, and print all about it."""
    logging.getLogger("trioproto").setLevel(logging.DEBUG)
    scenario = visit(name, seed)
    for client in scenario.clients:
        print(client)
    events = [(time, f"{where}   {event} {size or ''}") for time, where, event, size in scenario.network.trace]
    for time, what in sorted([*events, *((time, f"log: {line}") for time, _, line in scenario.log.lines)]):
        print(f"{time:12.3f}   {what}")
    if scenario.error is not None:
        traceback.print_exception(scenario.error)
    failures = list(scenario.broken_promises())
    print("\n".join(failures) if failures else "every promise was kept")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
