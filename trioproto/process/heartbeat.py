"""Heartbeats from a server's accept loop: they show that it, and the event loop, are running."""

import math
from collections.abc import Callable

import trio

from trioproto.server import OnTick, ServerStats

_ROUNDING = 1e-6  # of a tick


def add_heartbeat(
    tick: float | None, on_tick: OnTick | None, interval: float, beat: Callable[[ServerStats], object]
) -> tuple[float | None, OnTick | None]:
    """Return a ``tick`` and ``on_tick`` that also call ``beat`` about every ``interval`` seconds.

    The time between two calls is between 0.5 and 1.5 times ``interval``. ``on_tick`` keeps its schedule: if necessary,
    ``tick`` is divided into shorter ticks.

    Args:
        tick: as for `trioproto.serve_listeners`.
        on_tick: see there.
        interval: seconds; infinity for no heartbeat.
        beat: called with the current statistics.
    """
    if interval == math.inf:
        return tick, on_tick
    last_beat = -math.inf
    ticks = 0

    async def beat_and_tick(stats: ServerStats) -> None:
        nonlocal last_beat, ticks
        if stats.uptime - last_beat >= interval / 2:
            last_beat = stats.uptime
            beat(stats)
        if tick is not None and on_tick is not None and stats.uptime / tick + _ROUNDING >= ticks + 1:
            began = trio.current_time() - stats.uptime
            await on_tick(stats)
            # Ticks that were missed because it took too long are skipped.
            ticks = math.floor((trio.current_time() - began) / tick + _ROUNDING)

    if tick is None or on_tick is None:
        return interval, beat_and_tick
    return tick / math.ceil(tick / interval), beat_and_tick
