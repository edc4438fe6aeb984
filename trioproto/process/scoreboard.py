"""What each worker does, in a page of memory that all of them and their supervisor share.

That is how a web server's processes have told each other for a long time what they do (Apache calls it a scoreboard).
To write there costs less than a microsecond, waits for nobody, and needs nobody who reads: so it can be done for each
connection, and a process that hangs can hold up no other.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import attrs

from trioproto.draining import ENDINGS
from trioproto.server import DURATIONS, ServerStats

# The environment variable by which a supervisor tells its worker of the scoreboard's descriptor, and which row is its.
VARIABLE = "TRIOPROTO_SCOREBOARD"

# How often a worker that takes no connection is asked about. With the pauses of `trioproto.server.GIVE_WAY_PAUSES` in
# between, that takes about 40 ms, for which one that serves may well have to wait for a core.
MOST_IN_VAIN = 200

_NUMBER = 8  # bytes; numbers of this size are written and read as a whole


def _counters(stats: ServerStats) -> list[int]:
    """Return what only ever grows, as whole numbers."""
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
    """The columns, each with a number for each worker.

    Attributes:
        fd: the descriptor of the memory, while `new_scoreboard` lasts.
        beats: how often it has given a sign of life; 0 if it does not serve.
        active: how many connections it has open now.
        most: how many it may have; 0 if that is not limited.
        counters: the numbers of its `ServerStats` that only grow, each with those of who was here before it.
    """

    fd: int
    beats: "memoryview[int]"
    active: "memoryview[int]"
    most: "memoryview[int]"
    counters: "Sequence[memoryview[int]]"

    def writer(self, row: int) -> Callable[[ServerStats], None]:
        """Return a function that writes what a new process does into ``row``.

        The counters go on where those of who was here before have ended, so they never go back.
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
    """Make a scoreboard with zeros; its descriptor is closed when the block ends."""
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
    """Return the scoreboard that this process inherited from its supervisor, and which row is its; None without one.

    The environment variable that tells of it is removed, so that no child takes it for its own.
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
    """Return a function that tells whether another worker that serves has fewer connections than this one.

    It is called with how many this one has, and notes that. A sixteenth more is as many, so that with thousands of
    connections few are waited for. Who takes none, however often it is given way, because it hangs or is short of
    descriptors, is not waited for any more, until there is something new of it: connections taken or ended, or another
    sign of life, in case it was just busy.
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
