"""Memory that processes share."""

import itertools
import os
import subprocess
import sys

import attrs
import pytest

from trioproto.draining import ENDINGS
from trioproto.process.scoreboard import VARIABLE, new_scoreboard, open_scoreboard, own_row
from trioproto.server import DURATIONS, ServerStats

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")

WORKER = """
from trioproto.process.scoreboard import own_row
scoreboard, row = own_row()
scoreboard.beats[row] += 1
scoreboard.most[row] = scoreboard.most[0] + 2**40
scoreboard.active[row] = 3
assert own_row() is None
"""


@pytest.mark.parametrize("memfd", [True, False])
def test_processes(memfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """What a worker writes in its row, its supervisor sees; where there is no memory with a descriptor, too."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with new_scoreboard(3) as scoreboard:
        assert (scoreboard.beats.tolist(), scoreboard.most.tolist(), scoreboard.active.tolist()) == ([0] * 3,) * 3
        scoreboard.most[0] = 5
        environment = os.environ | {VARIABLE: f"{scoreboard.fd} 1"}
        subprocess.run(
            [sys.executable, "-c", WORKER], env=environment, pass_fds=[scoreboard.fd], timeout=30, check=True
        )
        assert scoreboard.beats.tolist() == [0, 1, 0]
        assert scoreboard.most.tolist() == [5, 5 + 2**40, 0]
        assert scoreboard.active.tolist() == [0, 3, 0]
        fd = scoreboard.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def stats(first: int) -> ServerStats:
    """Return statistics in which every number is another one, from ``first`` on."""
    number = itertools.count(first)
    return ServerStats(
        accepted=next(number),
        active=next(number),
        crashed=next(number),
        uptime=0.0,
        refused=next(number),
        accept_errors=next(number),
        received=next(number),
        sent=next(number),
        requests=next(number),
        ended={how: next(number) for how in ENDINGS},
        durations=tuple(next(number) for _ in range(len(DURATIONS) + 1)),
        seconds=next(number) + 0.25,
    )


def add(one: ServerStats, other: ServerStats) -> ServerStats:
    """Add all numbers of two statistics, one by one."""
    return ServerStats(
        **{
            field.name: getattr(one, field.name) + getattr(other, field.name)
            for field in attrs.fields(ServerStats)
            if field.name not in ("ended", "durations")
        },
        ended={how: one.ended[how] + other.ended[how] for how in ENDINGS},
        durations=tuple(map(sum, zip(one.durations, other.durations, strict=True))),
    )


def test_total() -> None:
    """The total adds up what the workers have written, number by number."""
    with new_scoreboard(3) as scoreboard:
        assert scoreboard.total() == ServerStats(0, 0, 0, 0.0)
        write = scoreboard.writer(0)
        write(stats(1000))
        write(stats(2000))
        scoreboard.writer(2)(stats(100))
        assert scoreboard.total() == add(stats(2000), stats(100))


def test_next_worker() -> None:
    """A worker's counters go on from those of the one before it in the same row; what is open now does not."""
    with new_scoreboard(1) as scoreboard:
        scoreboard.writer(0)(stats(1000))
        scoreboard.writer(0)(stats(1))
        total = scoreboard.total()
        assert total == attrs.evolve(add(stats(1000), stats(1)), active=stats(1).active)


def test_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has opened it needs the descriptor no more; who is no worker has no row."""
    assert own_row() is None
    with new_scoreboard(2) as scoreboard:
        fd = os.dup(scoreboard.fd)
        monkeypatch.setenv(VARIABLE, f"{fd} 1")
        inherited = own_row()
        assert inherited is not None
        board, row = inherited
        board.active[row] = 7
        assert open_scoreboard(scoreboard.fd).active.tolist() == [0, 7]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert own_row() is None
