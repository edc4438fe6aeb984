"""What each worker does, in a page of memory that all of them and their supervisor share.

That is how a web server's processes have told each other for a long time what they do (Apache calls it a scoreboard).
To write there costs less than a microsecond, waits for nobody, and needs nobody who reads: so it can be done for each
connection, and a process that hangs can hold up no other.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator

import attrs

# The environment variable by which a supervisor tells its worker of the scoreboard's descriptor, and which row is its.
VARIABLE = "TRIOPROTO_SCOREBOARD"

_COLUMNS = 3
_NUMBER = 8  # bytes; numbers of this size are written and read as a whole


@attrs.frozen
class Scoreboard:
    """The columns, each with a number for each worker.

    Attributes:
        fd: the descriptor of the memory, while `new_scoreboard` lasts.
        beats: how often it has given a sign of life; 0 if it does not serve.
        accepted: how many connections it, and those that were here before it, have accepted.
        active: how many are open now.
    """

    fd: int
    beats: "memoryview[int]"
    accepted: "memoryview[int]"
    active: "memoryview[int]"


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
    return Scoreboard(fd, *(numbers[column * workers : (column + 1) * workers] for column in range(_COLUMNS)))


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


def others_have_fewer(scoreboard: Scoreboard, row: int, active: int) -> bool:
    """Return whether another worker that serves has fewer connections than this one, and note how many it has.

    A sixteenth more is as many, so that with thousands of connections few are waited for.
    """
    scoreboard.active[row] = active
    others = [scoreboard.active[other] for other, beats in enumerate(scoreboard.beats) if beats and other != row]
    fewest = min(others, default=active)
    return active > fewest + fewest // 16
