# ruff: noqa: SLF001 - the classes of this module use each other's internals
r"""An in-memory TCP-like network, on Trio's clock, for tests of servers and clients.

A test of a server, with pytest-trio::

    async def test_shout(autojump_clock: trio.testing.MockClock) -> None:
        network = Network(seed=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trioproto.serve_listeners, shout, [network.listen("server", 9000)])
            async with await network.connect("server", 9000) as stream:
                await stream.send_all(b"hello\n")
                assert await trioproto.receive_exactly(stream, 6) == b"HELLO\n"
            nursery.cancel_scope.cancel()

There are no background tasks, and nothing has to be closed: each segment has a time of arrival, and a receive sleeps
until then. With ``MockClock(autojump_threshold=0)``, as in ``autojump_clock``, hours take milliseconds.

Bytes arrive in order. A segment that overtakes another one waits for it, and both arrive together, so one receive may
return part of a message or several messages. A sender may have ``buffer_size`` bytes in flight or unread; then it waits
for a window update, which is sent when half of that has been read (RFC 9293, section 3.8.6.2.2) and takes half the
maximum latency. Connections do not time out: real systems wait for a silent peer for minutes (RFC 1122, section
4.2.3.5) or forever, so a program needs its own time-outs.

Each direction of each connection has its own random source, derived from the seed, both addresses, and the number of
earlier connections from the one host to the other. So Trio's task order does not matter, except for which of two
simultaneous connections between the same hosts is first: give each client its own host. Trio's order is random, too,
but Hypothesis seeds it, through a plugin in Trio; pytest-trio does the same. In a test under ``@given`` that calls
``trio.run(..., clock=MockClock(autojump_threshold=0))``, it is the same in each example, unless the test has an
argument ``st.random_module()``.
"""

import bisect
import collections
import errno
import math
import operator
import random
from collections.abc import Callable

import attrs
import trio
from attrs.validators import ge, le

MAX_SEGMENT = 1460  # bytes: Ethernet's MTU of 1500 minus 40 bytes of headers (RFC 9293, section 3.7.1)
MAX_STALL = 60.0  # seconds
CONNECT_TIMEOUT = 127.0  # seconds, as on Linux (tcp(7), tcp_syn_retries)
DYNAMIC_PORTS = range(49152, 65536)  # ephemeral ports (RFC 6335, section 6)


@attrs.define(eq=False)
class Network:
    """A network of hosts, identified by name. Raises `ValueError` for an argument out of range.

    Args:
        seed: the same seed gives the same latencies, sizes, resets and stalls.
        latency: the maximum latency of a segment in seconds, 0 or more. With 0, data is not split.
        reset: the probability, 0 to 1, that a segment is lost, and its connection reset for both ends when it is due.
        stall: the probability, 0 to 1, that a segment, and all that follow it, are delayed by up to a minute
            (`MAX_STALL`).
        buffer_size: how many bytes, 1 or more, one direction of a connection may have in flight and unread.
    """

    seed: int = 0
    latency: float = attrs.field(default=0.1, kw_only=True, validator=ge(0.0))
    reset: float = attrs.field(default=0.0, kw_only=True, validator=[ge(0.0), le(1.0)])
    stall: float = attrs.field(default=0.0, kw_only=True, validator=[ge(0.0), le(1.0)])
    buffer_size: int = attrs.field(default=65536, kw_only=True, validator=ge(1))
    _listeners: "dict[tuple[str, int], NetworkListener]" = attrs.field(factory=dict, init=False)
    _streams: "set[NetworkStream]" = attrs.field(factory=set, init=False)  # of connections that are not over
    _partitions: set[frozenset[str]] = attrs.field(factory=set, init=False)
    _crashed: set[str] = attrs.field(factory=set, init=False)
    _connected: collections.Counter[tuple[str, str]] = attrs.field(factory=collections.Counter, init=False)
    _trace: collections.Counter[tuple[float, str, str]] = attrs.field(factory=collections.Counter, init=False)

    @property
    def trace(self) -> list[tuple[float, str, str, int]]:
        """All events so far: ``(time, where, event, bytes)``, sorted; equal simultaneous events are added up.

        Of one end, such as ``client:1234 > server:9000``: ``connect``, ``send``, ``receive``, ``eof``, ``close``,
        ``reset``; of segments that it sent: ``network reset``, ``stall``; of hosts: ``partition``, ``repair``,
        ``crash``, ``start``.
        """
        return sorted((*event, size) for event, size in self._trace.items())

    def listen(self, host: str, port: int, *, backlog: int = 128) -> "NetworkListener":
        """Listen on ``host``, which is up again if it had crashed.

        ``port`` is from 1 to 65535, or 0 for a free one. While ``backlog`` connections, 1 or more, wait to be accepted,
        further ones are retried each second, as when a SYN is dropped. Raises `OSError`: ``EADDRINUSE``, if the port is
        in use.
        """
        address = (host, port or next(free for free in DYNAMIC_PORTS if (host, free) not in self._listeners))
        if address in self._listeners:
            raise OSError(errno.EADDRINUSE, f"{host} already listens on port {address[1]}")
        self._start(host)
        self._listeners[address] = NetworkListener(address, self, backlog)
        return self._listeners[address]

    async def connect(self, host: str, port: int, *, source: str = "client") -> "NetworkStream":
        """Connect to a port of ``host`` from the host ``source``, which is up again if it had crashed.

        Raises `OSError`: ``ECONNREFUSED``, if ``host`` does not listen there; ``ETIMEDOUT`` after 127 seconds, if it
        has crashed, is partitioned from ``source``, or its backlog stays full. On cancellation, the server sees nothing
        or a reset.
        """
        self._start(source)
        number = self._connected[source, host]
        self._connected[source, host] += 1
        here, there = (source, DYNAMIC_PORTS[number % len(DYNAMIC_PORTS)]), (host, port)
        client, server = NetworkStream(here, there, self, number), NetworkStream(there, here, self, number)
        client._peer, server._peer = server, client
        syn_latency, answer_latency = client._draw_latency(), server._draw_latency()
        with trio.move_on_after(CONNECT_TIMEOUT):
            try:
                await trio.sleep(syn_latency)
                while True:
                    listener = self._listeners.get(there)
                    if not self._are_cut_off(source, host) and (listener is None or listener._add(server)):
                        break
                    await trio.sleep(1)
                await trio.sleep(answer_latency)
                while self._are_cut_off(source, host):  # noqa: ASYNC110 - the answer is retransmitted
                    await trio.sleep(1)
            except trio.Cancelled:
                client.reset()
                raise
            if listener is None:
                raise OSError(errno.ECONNREFUSED, f"{host} does not listen on port {port}")
            self._record(client._name, "connect")
            return client
        raise OSError(errno.ETIMEDOUT, f"{host} does not answer on port {port}")

    def partition(self, first: str, second: str) -> None:
        """Disconnect two hosts from each other: data in flight between them, and what they send later, is held."""
        self._partitions.add(frozenset({first, second}))
        self._change(f"{first} | {second}", "partition")

    def repair(self, first: str, second: str) -> None:
        """End a `partition`: data that was held and is due by now arrives."""
        self._partitions.discard(frozenset({first, second}))
        self._change(f"{first} | {second}", "repair")

    def crash(self, host: str, *, reset: bool = False) -> None:
        """Close the listeners and streams of ``host``, and drop what it has sent and is still in flight.

        With ``reset``, as when a process is killed, peers see a reset, and new connections are refused. Without, as
        when a machine loses power, peers see nothing, and new connections time out, until the host listens or connects
        again; from then on, sending on an old connection leads to a reset. The host's tasks are not cancelled.
        """
        if not reset:
            self._crashed.add(host)
        self._change(host, "crash")
        for stream in [stream for stream in self._streams if stream.local_address[0] == host]:
            stream._peer._incoming.clear()
            (stream.reset if reset else stream._close)()
        for listener in [listener for listener in self._listeners.values() if listener.address[0] == host]:
            listener._close()

    def _start(self, host: str) -> None:
        if host in self._crashed:
            self._crashed.remove(host)
            self._change(host, "start")

    def _are_cut_off(self, first: str, second: str) -> bool:
        return first in self._crashed or second in self._crashed or frozenset({first, second}) in self._partitions

    def _change(self, where: str, event: str) -> None:
        """Update which streams are held, after a change of which hosts are cut off."""
        self._record(where, event)
        for stream in self._streams:
            stream._settle()
            stream._held = self._are_cut_off(stream.local_address[0], stream.peer_address[0])
            stream._wake()

    def _record(self, where: str, event: str, size: int = 0) -> None:
        self._trace[trio.current_time(), where, event] += size


class NetworkStream(trio.abc.HalfCloseableStream):
    """One end of a connection; ``local_address`` and ``peer_address`` are hosts and ports.

    Once a reset has arrived, sending and receiving raise `trio.BrokenResourceError`, and unread data is lost (RFC 9293,
    section 3.10.7.4). They raise `trio.ClosedResourceError` if this end is closed, also while they wait, or when
    sending after `send_eof`; and `trio.BusyResourceError` if another task is doing the same.
    """

    def __init__(self, local: tuple[str, int], peer: tuple[str, int], network: Network, number: int) -> None:
        self.local_address: tuple[str, int] = local
        self.peer_address: tuple[str, int] = peer
        self._peer: NetworkStream  # set by `Network.connect`
        self._name = f"{local[0]}:{local[1]} > {peer[0]}:{peer[1]}"
        self._network = network
        self._random = random.Random(repr((network.seed, local, peer, number)))  # noqa: S311 - repeatable
        # What is in flight to this end: time of arrival, data, window update in bytes. Neither: end of stream.
        self._incoming: list[tuple[float, bytes, int]] = []
        self._last_due, self._reset_due = -math.inf, math.inf  # when the last segment, and a reset, arrive
        self._unread = bytearray()
        self._read, self._room = 0, network.buffer_size  # bytes read since the last window update; send window
        self._at_end = self._eof_sent = self._broken = self._closed = self._held = False
        self._receiving, self._sending = _Turn(self._next_due), _Turn(self._next_due)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for data, and return what has arrived: at most ``max_bytes``, 1 or more; ``b""`` at end of stream.

        Raises `ValueError` if ``max_bytes`` is less than 1. On cancellation, no data is lost.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        await self._receiving.wait(lambda: self._check() and (bool(self._unread) or self._at_end))
        data = bytes(self._unread[:max_bytes])
        del self._unread[: len(data)]
        self._network._record(self._name, "receive", len(data))
        self._read += len(data)
        if self._read * 2 >= self._network.buffer_size:
            # Not with a random latency, because it would depend on the order of this and a simultaneous send.
            self._peer._expect(trio.current_time() + self._network.latency / 2, b"", self._read)
            self._read = 0
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Wait until all of ``data`` is in flight. On cancellation, part of it may have been sent."""
        rest = memoryview(data)
        while True:
            await self._sending.wait(self._can_send)
            now, rest = rest[: self._room], rest[self._room :]
            self._room -= len(now)
            while now:
                size = int((MAX_SEGMENT + 1) ** self._random.random())  # mostly small, to split short messages, too
                self._transmit(bytes(now[:size]))
                now = now[size:]
            if not rest:
                return

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the send window is open. Raises what `send_all` raises."""
        await self._sending.wait(self._can_send)

    async def send_eof(self) -> None:
        """Send end of stream (FIN), unless that was done before. On cancellation, nothing is sent."""
        await self._sending.wait(self._check)
        self._transmit(b"")

    async def aclose(self) -> None:
        """Close this end, like close(2): what was sent still arrives, then end of stream.

        The peer sees a reset instead if there is unread data here, or once further data arrives (RFC 1122, section
        4.2.2.13). On cancellation, this end is still closed. Does nothing if it was closed before.
        """
        self._settle()
        if self._unread:
            self.reset()
        elif not self._closed:
            self._network._record(self._name, "close")
            self._transmit(b"")
            self._close()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """Close this end and reset the connection (RST): data in flight is lost. Does nothing if it was closed."""
        if not self._closed:
            self._network._record(self._name, "reset")
            self._peer._settle()
            self._peer._incoming.clear()
            self._peer._reset_at(trio.current_time() + self._draw_latency())
            self._close()

    def _check(self) -> bool:
        self._settle()
        if self._closed:
            raise trio.ClosedResourceError("this end was closed")
        if self._broken:
            raise trio.BrokenResourceError("the connection was reset")
        return True

    def _can_send(self) -> bool:
        if self._check() and self._eof_sent:
            raise trio.ClosedResourceError("the end of the stream was already sent")
        return self._room > 0

    def _settle(self) -> None:
        """Process what has arrived by now."""
        now = -math.inf if self._held else trio.current_time()
        self._broken = self._broken or self._reset_due <= now
        while self._incoming and self._incoming[0][0] <= now:
            _, data, room = self._incoming.pop(0)
            self._unread += data
            self._room += room
            self._at_end = self._at_end or not (data or room)

    def _next_due(self) -> float:
        if self._closed or self._held:
            return -math.inf if self._closed else math.inf
        return min(self._reset_due, self._incoming[0][0]) if self._incoming else self._reset_due

    def _wake(self) -> None:
        self._receiving.update()
        self._sending.update()

    def _draw_latency(self) -> float:
        return self._network.latency * self._random.random()

    def _transmit(self, data: bytes) -> None:
        """Send a segment, or end of stream once, and draw when it arrives and whether it is lost or stalls."""
        if self._eof_sent:
            return
        self._eof_sent = not data
        self._network._record(self._name, "send" if data else "eof", len(data))
        peer = self._peer
        due = max(peer._last_due, trio.current_time() + self._draw_latency())
        fate = self._random.random()
        if fate < self._network.reset:
            self._network._record(self._name, "network reset", len(data))
            self._reset_at(due)
            peer._reset_at(due)
        elif fate < self._network.reset + self._network.stall:
            self._network._record(self._name, "stall", len(data))
            due += MAX_STALL * self._random.random()
        peer._last_due = due
        peer._expect(due, data, 0)

    def _expect(self, due: float, data: bytes, room: int) -> None:
        bisect.insort(self._incoming, (due, data, room), key=operator.itemgetter(0))
        self._wake()
        if self._closed and data:
            self._peer._reset_at(due + self._draw_latency())

    def _reset_at(self, due: float) -> None:
        self._reset_due = min(self._reset_due, due)
        self._wake()

    def _close(self) -> None:
        self._settle()
        self._closed = True
        self._wake()
        for due in [due for due, data, _ in self._incoming if data]:
            self._peer._reset_at(due + self._draw_latency())
        if self._peer._closed:
            self._network._streams -= {self, self._peer}


class NetworkListener(trio.abc.Listener[NetworkStream]):
    """A listening port of a host; ``address`` is the host's name and the port."""

    def __init__(self, address: tuple[str, int], network: Network, backlog: int) -> None:
        self.address = address
        self._network = network
        self._queue: collections.deque[NetworkStream] = collections.deque(maxlen=backlog)
        self._closed = False
        self._accepting = _Turn(lambda: -math.inf if self._queue or self._closed else math.inf)

    async def accept(self) -> NetworkStream:
        """Wait for a connection, and return the server's end of it. On cancellation, no connection is lost.

        Raises `trio.BusyResourceError` if another task is accepting, `trio.ClosedResourceError` if this is closed.
        """
        await self._accepting.wait(lambda: self._closed or len(self._queue) > 0)
        if self._closed:
            raise trio.ClosedResourceError("this listener was closed")
        return self._queue.popleft()

    async def aclose(self) -> None:
        """Stop listening, and reset the queued connections; also on cancellation."""
        self._close()
        await trio.lowlevel.checkpoint()

    def _add(self, stream: NetworkStream) -> bool:
        if len(self._queue) == self._queue.maxlen:
            return False
        self._queue.append(stream)
        self._network._streams |= {stream, stream._peer}
        self._accepting.update()
        return True

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            del self._network._listeners[self.address]
            for stream in self._queue:
                stream.reset()
            self._accepting.update()


class _Turn:
    """Lets one task at a time wait until ``ready()``, which it checks at the time ``due()``."""

    def __init__(self, due: Callable[[], float]) -> None:
        self._due = due
        self._waiting: trio.CancelScope | None = None

    async def wait(self, ready: Callable[[], bool]) -> None:
        if self._waiting is not None:
            raise trio.BusyResourceError("another task is already doing this")
        self._waiting = trio.CancelScope()
        try:
            await trio.lowlevel.checkpoint()
            while not ready():
                with trio.CancelScope(deadline=self._due()) as self._waiting:
                    await trio.sleep_forever()
        finally:
            self._waiting = None

    def update(self) -> None:
        if self._waiting is not None and self._waiting.deadline != (due := self._due()):
            self._waiting.deadline = due
