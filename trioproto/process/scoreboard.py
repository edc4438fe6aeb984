"""The statistics of all workers, in memory that they share with their supervisor.

Apache's processes share their state in the same way, and call it a scoreboard. A write takes less than a microsecond
and never blocks, so there can be one for each connection, and a process that hangs cannot delay the others.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import attrs

from trioproto.draining import ENDINGS
from trioproto.server import DURATIONS, ServerStats

# The environment variable in which a supervisor passes to a worker the scoreboard's descriptor and the worker's row.
VARIABLE = "TRIOPROTO_SCOREBOARD"

# How often to give way to a worker that accepts no connection. With the pauses of `trioproto.server.GIVE_WAY_PAUSES`,
# that takes about 40 ms; even a healthy worker may wait that long for a core.
MOST_IN_VAIN = 200

_NUMBER = 8  # bytes; numbers of this size are written and read atomically


def _counters(stats: ServerStats) -> list[int]:
    """Return the statistics that only grow, as integers."""
    return [
        stats.accepted,
        stats.crashed,
        stats.refused,
        stats.accept_errors,
        stats.received,
        stats.sent,
        stats.requests,
        round(stats.seconds * 1e6),
        *(stats.ended[how] for how in ENDINGS),
        *stats.durations,
    ]


_COUNTERS = 8 + len(ENDINGS) + len(DURATIONS) + 1
_COLUMNS = 3 + _COUNTERS


@attrs.frozen
class Scoreboard:
    """Shared memory as columns, each with a number for each worker.

    Attributes:
        fd: the descriptor of the memory, while the block of `new_scoreboard` runs.
        beats: how many heartbeats the worker has sent; 0 if it does not serve.
        active: how many connections it has open.
        most: its limit of connections; 0 for no limit.
        counters: the numbers of its `ServerStats` that only grow, including those of its predecessors.
    """

    fd: int
    beats: "memoryview[int]"
    active: "memoryview[int]"
    most: "memoryview[int]"
    counters: "Sequence[memoryview[int]]"

    def writer(self, row: int) -> Callable[[ServerStats], None]:
        """Return a function that writes a new process's statistics into ``row``.

        The counters continue from those of the previous process, so they never decrease.
        """
        before = [column[row] for column in self.counters]

        def write(stats: ServerStats) -> None:
            self.active[row] = stats.active
            for column, first, number in zip(self.counters, before, _counters(stats), strict=True):
                column[row] = first + number

        return write

    def total(self) -> ServerStats:
        """Return the sum of all rows. Its ``uptime`` is 0."""
        numbers = [sum(column) for column in self.counters]
        accepted, crashed, refused, accept_errors, received, sent, requests, microseconds, *rest = numbers
        return ServerStats(
            accepted=accepted,
            active=sum(self.active),
            crashed=crashed,
            uptime=0.0,
            refused=refused,
            accept_errors=accept_errors,
            received=received,
            sent=sent,
            requests=requests,
            ended=dict(zip(ENDINGS, rest, strict=False)),
            durations=tuple(rest[len(ENDINGS) :]),
            seconds=microseconds / 1e6,
        )


@contextlib.contextmanager
def new_scoreboard(workers: int) -> Iterator[Scoreboard]:
    """Create a scoreboard filled with zeros. Its descriptor is closed when the block ends."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("trioproto-scoreboard")
    else:  # not everywhere
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.truncate(fd, workers * _COLUMNS * _NUMBER)
        yield open_scoreboard(fd)
    finally:
        os.close(fd)


def open_scoreboard(fd: int) -> Scoreboard:
    """Return the scoreboard whose descriptor is ``fd``."""
    numbers = memoryview(mmap.mmap(fd, 0)).cast("q")
    workers = len(numbers) // _COLUMNS
    beats, active, most, *counters = (numbers[column * workers :][:workers] for column in range(_COLUMNS))
    return Scoreboard(fd, beats, active, most, counters)


def own_row() -> tuple[Scoreboard, int] | None:
    """Return the scoreboard inherited from this process's supervisor and this process's row; None without one.

    The environment variable is removed, so that child processes do not use it.
    """
    words = os.environ.pop(VARIABLE, "").split()
    if not words:
        return None
    fd, row = map(int, words)
    try:
        return open_scoreboard(fd), row
    finally:
        os.close(fd)


def give_way_to_others(scoreboard: Scoreboard, row: int) -> Callable[[int], bool]:
    """Return a function that returns whether another serving worker has fewer connections than this one.

    Its argument is this worker's number of connections, which it also writes to the scoreboard. Up to a sixteenth more
    counts as equal, so that workers with thousands of connections rarely wait. A worker that still accepts nothing,
    because it hangs or is out of descriptors, is ignored until its row changes: connections accepted or closed, or
    another heartbeat, in case it was only busy.
    """
    known = [(0, 0)] * len(scoreboard.beats)
    in_vain = [0] * len(scoreboard.beats)

    def others_have_fewer(active: int) -> bool:
        scoreboard.active[row] = active
        for other, news in enumerate(zip(scoreboard.beats, scoreboard.active, strict=True)):
            if news != known[other]:
                known[other] = news
                in_vain[other] = 0
            beats, fewer = news
            if other != row and beats and active > fewer + fewer // 16 and in_vain[other] < MOST_IN_VAIN:
                in_vain[other] += 1
                return True
        return False

    return others_have_fewer
