"""What a server counts."""

import errno
import functools
from collections.abc import Callable

import pytest
import trio
import trio.testing
from helpers import Handler, MemoryListener, Stream

from trioproto import Connection, ServerStats, echo_handler, serve_listeners
from trioproto.draining import ENDINGS
from trioproto.process.proxy_protocol import behind_proxies
from trioproto.server import DURATIONS


async def read_line(connection: Connection) -> bytes:
    return await connection.receive_until(b"\n", max_bytes=10)


async def shout(stream: Stream) -> None:
    async with Connection(stream, idle_timeout=300) as connection:
        async for line in connection.requests(read_line):
            if line == b"crash":
                raise ValueError
            connection.push(2 * line)


async def started(
    nursery: trio.Nursery, handler: Handler, listener: MemoryListener, shutdown: trio.Event | None = None
) -> Callable[[], ServerStats]:
    """Start a server, and return what gives its statistics."""
    given: list[Callable[[], ServerStats]] = []
    await nursery.start(
        functools.partial(serve_listeners, handler, [listener], shutdown=shutdown, on_start=given.append)
    )
    [stats] = given
    return stats


async def test_bytes_and_requests(nursery: trio.Nursery) -> None:
    """Those of connections that are open count at once, and go on counting when they have ended."""
    listener = MemoryListener()
    stats = await started(nursery, shout, listener)
    clients = [listener.connect() for _ in range(3)]
    for client in clients:
        await client.send_all(b"abc\nde\nf")
    await trio.testing.wait_all_tasks_blocked()
    for ended in range(4):
        now = stats()
        assert (now.accepted, now.active) == (3, 3 - ended)
        assert (now.received, now.sent, now.requests) == (24, 30, 6)
        if ended < 3:
            await clients[ended].aclose()
            await trio.testing.wait_all_tasks_blocked()


async def test_endings(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Each connection that has ended counts by how it did, among those that took as long, with its seconds."""
    listener = MemoryListener()
    stats = await started(nursery, shout, listener)
    before = stats()
    waits = {0.005: b"crash\n", 0.1: b"crash\n", 5: b"far too long a line", 299: None, 400: b""}
    for seconds, last in waits.items():
        async with listener.connect() as client:
            await trio.sleep(seconds)
            if last is None:
                continue
            if last:
                await client.send_all(last)
                await client.send_eof()
                await trio.testing.wait_all_tasks_blocked()
    await trio.testing.wait_all_tasks_blocked()
    now = stats()
    assert now.ended == dict.fromkeys(ENDINGS, 0) | {"crashed": 2, "malformed": 1, "ended": 1, "idle": 1}
    assert now.crashed == 2
    # Up to 10 ms, 100 ms, 1 s, 10 s, 1 min, 10 min, 1 h, 1 day, and more; the bound itself belongs to what is below.
    assert now.durations == (1, 1, 0, 1, 0, 2, 0, 0, 0)
    assert before.ended == dict.fromkeys(ENDINGS, 0)
    assert before.durations == (0,) * (len(DURATIONS) + 1)
    assert now.seconds == pytest.approx(0.005 + 0.1 + 5 + 299 + 301)


async def test_days(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """What takes longer than the last bound counts, too."""
    listener = MemoryListener()
    stats = await started(nursery, echo_handler_without_end, listener)
    async with listener.connect():
        await trio.sleep(2 * DURATIONS[-1])
    await trio.testing.wait_all_tasks_blocked()
    assert stats().durations == (0, 0, 0, 0, 0, 0, 0, 0, 1)


async def echo_handler_without_end(stream: Stream) -> None:
    await echo_handler(stream, idle_timeout=1e9)


async def test_refused(nursery: trio.Nursery) -> None:
    """A connection that was refused has not ended, as it was never served."""
    listener = MemoryListener()
    stats = await started(nursery, behind_proxies(shout, [], 3, None), listener)
    async with listener.connect():
        await trio.testing.wait_all_tasks_blocked()
    now = stats()
    assert (now.accepted, now.active, now.refused) == (1, 0, 1)
    assert set(now.ended.values()) == set(now.durations) == {0}


async def test_accept_errors(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """Each failure to accept counts: a connection that was lost, a shortage each time that it is met."""
    errors = [OSError(code, "") for code in (errno.ECONNABORTED, errno.EMFILE, errno.EMFILE)]
    stats = await started(nursery, shout, MemoryListener(*errors))
    await trio.sleep(1)
    assert stats().accept_errors == 3


async def test_in_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    """The statistics are kept up to date during a stop, too."""
    listener = MemoryListener()
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        stats = await started(nursery, shout, listener, shutdown)
        idle, begun = listener.connect(), listener.connect()
        for client in (idle, begun):
            await client.send_all(b"ab\n")
        await begun.send_all(b"c")
        await trio.testing.wait_all_tasks_blocked()
        shutdown.set()
        await trio.sleep(5)
        assert (stats().active, stats().ended["stopped"]) == (1, 1)
        await begun.send_all(b"d\n")
        await trio.sleep(5)
        assert (stats().active, stats().ended["stopped"], stats().requests) == (0, 2, 3)
