"""Workers share the clients: who has more connections than others leaves the next one to them."""

import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from processes import Server, paused, serving

from trioproto.process.scoreboard import MOST_IN_VAIN, give_way_to_others, new_scoreboard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts the sockets that /proc shows")


def sockets(pid: int) -> int:
    """Return how many sockets a process has."""
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += str(fd.readlink()).startswith("socket:")
    return count


@contextlib.asynccontextmanager
async def workers_serving(count: int) -> AsyncIterator[tuple[Server, list[int], list[int]]]:
    """A server with workers that all serve, their process ids, and how many sockets each has without clients."""
    async with serving("op", f"--workers={count}") as server:
        pids = await server.workers(count)
        while True:
            await server.answers_anew()
            before = [sockets(pid) for pid in pids]
            # One that has started waits for its listener with epoll, and has a socket pair for Trio's wake-ups.
            if min(before) == max(before) > 1:
                break
            await trio.sleep(0.05)
        yield server, pids, before


@pytest.mark.parametrize("how", ["one by one", "at once"])
@pytest.mark.parametrize("count", [2, 3])
async def test_long_lived_connections(count: int, how: str) -> None:
    """However they come, the workers' numbers of connections lie within a fifth of each other."""
    async with workers_serving(count) as (server, pids, before), contextlib.AsyncExitStack() as clients:

        async def connect() -> None:
            await server.answers(await clients.enter_async_context(await server.connect()))

        async with trio.open_nursery() as nursery:
            for _ in range(96):
                if how == "at once":
                    nursery.start_soon(connect)
                else:
                    await connect()
        have = [sockets(pid) - none for pid, none in zip(pids, before, strict=True)]
        assert sum(have) == 96
        assert min(have) >= 0.8 * max(have)


async def test_worker_that_does_not_take_its_share() -> None:
    """A worker that has fewer connections, and takes none, holds up nobody."""
    async with workers_serving(2) as (server, [stopped, _other], _), contextlib.AsyncExitStack() as clients:
        with paused(stopped), trio.fail_after(2):
            for _ in range(20):
                await server.answers(await clients.enter_async_context(await server.connect()))


def test_others_that_have_fewer() -> None:
    """Only workers that serve count; a sixteenth more is as many."""
    with new_scoreboard(3) as scoreboard:
        others_have_fewer = give_way_to_others(scoreboard, 1)
        scoreboard.beats[1] = 1
        assert not others_have_fewer(5)
        assert scoreboard.active.tolist() == [0, 5, 0]
        scoreboard.beats[0] = 1
        scoreboard.active[0] = 4
        assert others_have_fewer(5)
        scoreboard.active[0] = 5
        assert not others_have_fewer(5)
        scoreboard.active[0] = 160
        assert not others_have_fewer(170)
        assert others_have_fewer(171)


@pytest.mark.parametrize("news", ["beats", "active"])
def test_others_that_take_none(news: str) -> None:
    """Who takes no connection is given way so many times, and again when there is something new of it."""
    with new_scoreboard(3) as scoreboard:
        others_have_fewer = give_way_to_others(scoreboard, 1)
        for row in range(3):
            scoreboard.beats[row] = 1
        for _ in range(2):
            for _ in range(2 * MOST_IN_VAIN):  # there are two
                assert others_have_fewer(5)
            assert not others_have_fewer(5)
            getattr(scoreboard, news)[0] += 1
            for _ in range(MOST_IN_VAIN):
                assert others_have_fewer(5)
            assert not others_have_fewer(5)
            getattr(scoreboard, news)[2] += 1
            for _ in range(MOST_IN_VAIN):
                assert others_have_fewer(5)
            assert not others_have_fewer(5)
            scoreboard.beats[0] += 1
            scoreboard.beats[2] += 1
