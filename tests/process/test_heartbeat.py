"""Signs of life from an accept loop, beside an app's own ticks."""

import itertools
import math
from collections.abc import Callable

import pytest
import trio
import trio.testing
from helpers import MemoryListener

from trioproto import echo_handler, serve_listeners
from trioproto.process.heartbeat import add_heartbeat
from trioproto.server import ServerStats


async def ticks(
    tick: float | None, interval: float, duration: float, takes: Callable[[int], float] = lambda _: 0
) -> tuple[list[float], list[float]]:
    """Serve for so many seconds, and return when an app's ticks and the heartbeats came; nth tick takes a while."""
    ticked: list[float] = []
    beaten: list[float] = []

    async def on_tick(stats: ServerStats) -> None:
        ticked.append(stats.uptime)
        await trio.sleep(takes(len(ticked)))

    def beat(stats: ServerStats) -> None:
        beaten.append(stats.uptime)

    new_tick, new_on_tick = add_heartbeat(tick, None if tick is None else on_tick, interval, beat)
    with trio.move_on_after(duration):
        await serve_listeners(echo_handler, [MemoryListener()], tick=new_tick, on_tick=new_on_tick)
    return ticked, beaten


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("tick", [0.016, 0.3, 0.7, 1, 1.3, 2, 10, 33.3])
async def test_schedule(tick: float, slow: bool, autojump_clock: trio.testing.MockClock) -> None:  # noqa: FBT001
    """An app's ticks come when they would come without a heartbeat, even if some take longer than a tick."""

    def takes(number: int) -> float:
        return 2.4 * tick if slow and number in (2, 5, 6) else 0

    without, beaten = await ticks(tick, math.inf, 20.5 * tick, takes)
    assert len(without) == (14 if slow else 20)
    assert beaten == []
    with_beats, _ = await ticks(tick, 1, 20.5 * tick, takes)
    assert with_beats == pytest.approx(without)


@pytest.mark.parametrize("tick", [None, 0.016, 0.3, 0.7, 1, 1.3, 2, 10, 33.3])
async def test_heartbeat(tick: float | None, autojump_clock: trio.testing.MockClock) -> None:
    """A sign of life comes from every half of its interval to one and a half, whatever an app's ticks are."""
    _, beaten = await ticks(tick, 1, 100)
    for before, after in itertools.pairwise([0, *beaten, 100]):
        assert after - before <= 1.5
    for before, after in itertools.pairwise(beaten):
        assert after - before >= 0.5


async def test_tick_without_a_function(autojump_clock: trio.testing.MockClock) -> None:
    """An app may have a tick and nothing to do on it."""
    beats: list[ServerStats] = []
    tick, on_tick = add_heartbeat(0.1, None, 1, beats.append)
    with trio.move_on_after(10.5):
        await serve_listeners(echo_handler, [MemoryListener()], tick=tick, on_tick=on_tick)
    assert len(beats) == 10
