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
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import trio
import trio.testing

from trioproto import Connection, ServerStats, echo_handler, op_handler, serve_listeners
from trioproto.connection import FIRST_REQUEST_GRACE, LAST_REQUESTS_SECONDS
from trioproto.server import EMPTYING_SECONDS
from trioproto.testing import Network, NetworkStream
from trioproto.transport import LINGER_SECONDS

SLACK = 0.1  # seconds: looks at what has already arrived, and rounding
FOREVER = 1e7  # seconds; a scenario that lasts longer hangs
MAX_UNSENT = 4000  # bytes, in the chat: little, so that an overrun does not take many lines

Handler = Callable[[trio.abc.Stream], Awaitable[object]]
Exchange = tuple[bytes, bytes]  # a request, and the reply that it should have

KINDS = {
    "behaves": "makes its requests, one by one or pipelined, and reads at once",
    "dribbles": "sends its requests in small pieces, slowly, but in time",
    "stalls": "stops in the middle of a request, or between two",
    "overstays": "sends the last request in small pieces, too slowly",
    "floods": "sends many requests, and reads late",
    "leaves the protocol": "makes some requests, then sends what is none",
    "breaks off": "resets the connection, at any byte",
    "vanishes": "is gone without a reset, at any byte",
    "never reads": "sends many requests, and takes no reply",
}
PROMPT = ("behaves", "dribbles", "stalls", "overstays", "leaves the protocol")  # always read, and never break


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
    buffer_sizes: tuple[int, ...] = (256, 2048, 65536)
    has_requests: bool = True  # that begin and end, and so may be cut in the middle
    broadcasts: bool = False  # what one client says goes to all

    @property
    def kinds(self) -> list[str]:
        """The kinds of clients that make sense in it."""
        without = set() if self.has_requests else {"overstays", "leaves the protocol"}
        return [kind for kind in KINDS if kind not in without]


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
        chat_exchanges, make_chat_handler, (b"x" * 1100,), (3600.0,), (30.0,), (1024, 65536), broadcasts=True
    ),
}


# The clients.


@attrs.define
class Step:
    """Something that a client sends: when, and after which reply."""

    pause: float
    data: bytes
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
        return self.kind in PROMPT

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
        total = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, stream, news, nursery.cancel_scope)
            try:
                for step in self.steps:
                    await self._wait_for_reply(step, news)
                    await trio.sleep(step.pause)
                    if step.data:
                        began_at = trio.current_time()
                        await stream.send_all(step.data)
                        self.moved_at = trio.current_time()
                        total += len(step.data)
                        self.sent.append((total, began_at, self.moved_at))
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
        self.left_at = trio.current_time()
        if self.last != "crash":
            await stream.aclose()

    async def _wait_for_reply(self, step: Step, news: trio.lowlevel.ParkingLot) -> None:
        while step.reply not in self.received or len(self.received) < step.received:
            await news.park()

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


def plan(  # noqa: C901, PLR0912, PLR0915 - a list of decisions
    rng: random.Random, protocol: Protocol, host: str, idle_timeout: float, request_timeout: float
) -> Client:
    """Make a client."""
    kind = rng.choice([*protocol.kinds, "behaves", "behaves"])
    client = Client(host, kind, rng.uniform(0, 1) if rng.random() < 0.7 else rng.uniform(0, idle_timeout))
    longest = rng.choice([10, 10, 50, 1000])
    many = kind in ("floods", "never reads")
    pipelined = many or rng.random() < 0.4
    if protocol.broadcasts and (pipelined or host != "client-0"):
        longest = 10
    exchanges = protocol.exchanges(rng, host, longest)
    total = replies = 0
    told = b""

    def pause() -> float:
        """Draw a pause between two requests. In the chat, nobody says so much in a moment that others are overrun."""
        if many:
            return 0.0
        if protocol.broadcasts and not pipelined:
            return 0.5 + pause_up_to(rng, 0.8 * idle_timeout)
        return pause_up_to(rng, 0.8 * idle_timeout)

    if many:
        count = rng.randint(10, 80 if longest < 1000 or rng.random() < 0.2 else 20)
    else:
        count = 15 if protocol.broadcasts and longest == 1000 else rng.randint(0, 5)
    for _ in range(count):
        request, reply = next(exchanges)
        if protocol.broadcasts and pipelined and total > 200:
            break
        awaited = Step(pause(), b"") if pipelined else Step(pause(), b"", told, replies)
        if kind == "dribbles":
            _dribble(rng, client, awaited, request, rng.uniform(0.1, 0.8) * request_timeout)
        else:
            client.steps.append(attrs.evolve(awaited, data=request))
        total += len(request)
        replies += len(reply)
        told = reply if protocol.broadcasts else b""
        client.ends.append((total, replies))
        if not protocol.broadcasts:
            client.expected += reply
    request, _ = next(exchanges)
    half = request[: rng.randrange(len(request))] if protocol.has_requests else b""
    match kind:
        case "behaves" | "dribbles":
            client.last = rng.choice(["eof", "close"])
            if client.last == "close":
                client.steps.append(Step(0.0, b"", told, 0 if protocol.broadcasts else replies))
            _join_some(rng, client)
        case "stalls":
            client.steps.append(Step(pause(), half))
        case "overstays":
            _dribble(rng, client, Step(pause(), b""), request[:-1], 2 * request_timeout)
        case "floods":
            client.reads_after = rng.uniform(0.1, 0.7) * idle_timeout
            client.last = "eof"
        case "leaves the protocol":
            client.steps.append(Step(pause(), rng.choice(protocol.malformed)))
        case "breaks off" | "vanishes":
            client.steps.append(Step(pause(), half))
            client.steps.append(Step(pause_up_to(rng, 0.8 * idle_timeout), b""))
            client.last = "reset" if kind == "breaks off" else "crash"
        case "never reads":
            client.reads_after = math.inf
            client.steps.append(Step(0.0, rng.choice([b"", half])))
    if protocol.broadcasts:
        client.expected += b"Your name?\n"
    return client


def pause_up_to(rng: random.Random, longest: float) -> float:
    """Draw a pause: none, a short one, or a long one."""
    return rng.choice([0.0, rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.uniform(0, longest)])


def _dribble(rng: random.Random, client: Client, first: Step, request: bytes, seconds: float) -> None:
    """Have ``client`` send a request in pieces, over so many seconds."""
    cuts = sorted({0, len(request), *(rng.randint(1, max(1, len(request) - 1)) for _ in range(rng.randint(1, 4)))})
    pieces = [request[start:end] for start, end in itertools.pairwise(cuts)]
    client.steps.append(attrs.evolve(first, data=pieces[0]))
    client.steps += [Step(seconds / max(1, len(pieces) - 1), piece) for piece in pieces[1:]]


def _join_some(rng: random.Random, client: Client) -> None:
    """Have the end of one request and the beginning of the next go out together, where no reply is waited for."""
    steps: list[Step] = []
    for step in client.steps:
        if steps and not step.pause and not step.reply and not step.received and rng.random() < 0.5:
            steps[-1].data += step.data
        else:
            steps.append(step)
    client.steps = steps


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
            plan(rng, self.protocol, f"client-{number}", self.idle_timeout, self.request_timeout)
            for number in range(rng.randint(3, 8))
        ]
        self.max_connections = rng.choice([None, 1, 2, 4])
        both = self.idle_timeout + self.request_timeout
        moments = [1.5, self.request_timeout, 2 * self.idle_timeout, 10 * both]
        self.stops_at = rng.uniform(0.3, 1) * rng.choice(moments)
        self.grace_period = rng.choice([0.0, 0.5, 5.0, both + 20, math.inf, math.inf])
        self.tick = rng.choice([math.inf, 3.0, 40.0])  # of a handler that has other things to do, too
        self.members: set[Any] = set()  # of the chat
        self.said: list[str] = []

        self.log = Log()
        self.streams: list[NetworkStream] = []  # that the server has accepted
        self.open_streams = 0
        self.ended_at = math.inf
        self.stats: ServerStats | None = None

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
        """Nobody keeps a place beyond the time-outs and the linger."""
        latest = max(client.left_at, client.accepted_at) + 2 * self.network.latency
        if client.last == "crash":
            latest = math.inf
        moved_at = max(client.moved_at, client.accepted_at, *client.told_at) + self.network.latency
        stop_began = max(self.stops_at, client.accepted_at)
        if client.let_go_at < math.inf:
            latest = min(latest, client.let_go_at)
        if client.kind in ("stalls", "overstays"):
            unfinished_at = client.sent_at(client.whole)
            if unfinished_at < math.inf:
                begun_at = max(unfinished_at, client.accepted_at) + self.network.latency
                latest = min(latest, begun_at + self.request_timeout + LINGER_SECONDS)
            else:
                latest = min(latest, moved_at + self.idle_timeout + LINGER_SECONDS)
                latest = min(latest, stop_began + LAST_REQUESTS_SECONDS + LINGER_SECONDS)
        elif client.kind == "leaves the protocol":
            latest = min(latest, moved_at + (LINGER_SECONDS if client.sent_at(client.whole) < math.inf else math.inf))
        elif not client.is_prompt:
            latest = min(latest, moved_at + max(self.idle_timeout, self.request_timeout) + LINGER_SECONDS)
        if client.kind in ("behaves", "leaves the protocol"):
            latest = min(latest, stop_began + LAST_REQUESTS_SECONDS + LINGER_SECONDS)
        if client.closed_at > latest + SLACK:
            yield f"kept its place until {client.closed_at}, and not only until {latest}"

    def _check_not_early(self, client: Client) -> Iterator[str]:
        """Nobody is ended before the time-outs, except by the stop."""
        if client.outcome != "eof" or client.kind == "leaves the protocol":
            return
        earliest = 0.0
        unfinished_at = client.sent_at(client.whole)
        if client.kind in ("stalls", "overstays") and unfinished_at < math.inf:
            if unfinished_at + self.network.latency < self.stops_at:
                earliest = client.sent_at(client.whole, earliest=True) + self.request_timeout
        elif client.left_at < self.stops_at and client.last == "hold":
            sent_at = client.sent[-1][1] if client.sent else 0.0
            # What was pushed at the very end did not come in time.
            told_at = [time for time in client.told_at if time < client.left_at - 1]
            replied_at = 0.0 if self.protocol.broadcasts else client.received_at - self.network.latency
            earliest = max(client.accepted_at, sent_at, replied_at, *told_at) + self.idle_timeout
        if client.left_at < earliest - SLACK:
            yield f"was ended at {client.left_at}, and not only at {earliest}"

    def _check_log(self, client: Client) -> Iterator[str]:
        """What an operator should know of a client is logged in one line, and nothing else."""
        lines = [
            line for _, level, line in self.log.lines if level >= logging.WARNING and line.startswith(f"{client.host}:")
        ]
        if len(lines) > (client.kind in ("stalls", "overstays", "leaves the protocol")):
            yield f"the log has {lines}"


def visit(name: str, seed: int) -> Scenario:
    """Run a scenario."""
    scenario = Scenario(name, seed)
    logger = logging.getLogger("trioproto")
    logger.addHandler(scenario.log)
    try:
        trio.run(scenario.run, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        logger.removeHandler(scenario.log)
    return scenario


def check(name: str, seeds: Iterable[int]) -> None:
    """Run scenarios. Raises `AssertionError` for the first in which a promise is broken."""
    for seed in seeds:
        failures = list(visit(name, seed).broken_promises())
        if failures:
            said = "\n".join(failures)
            command = f"python tests/testing/promises.py {name} {seed}"
            raise AssertionError(f"{name}, seed {seed}:\n{said}\nTo see it: {command}")


def main(name: str, seed: int) -> int:
    """Run one scenario, and print all about it."""
    logging.getLogger("trioproto").setLevel(logging.DEBUG)
    scenario = visit(name, seed)
    for client in scenario.clients:
        print(client)
    events = [(time, f"{where}   {event} {size or ''}") for time, where, event, size in scenario.network.trace]
    for time, what in sorted([*events, *((time, f"log: {line}") for time, _, line in scenario.log.lines)]):
        print(f"{time:12.3f}   {what}")
    failures = list(scenario.broken_promises())
    print("\n".join(failures) if failures else "every promise was kept")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
