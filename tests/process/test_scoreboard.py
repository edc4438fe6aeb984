"""Memory that processes share."""

import os
import subprocess
import sys

import pytest

from trioproto.process.scoreboard import VARIABLE, new_scoreboard, open_scoreboard, own_row

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")

WORKER = """
from trioproto.process.scoreboard import own_row
scoreboard, row = own_row()
scoreboard.beats[row] += 1
scoreboard.accepted[row] = scoreboard.accepted[0] + 2**40
scoreboard.active[row] = 3
assert own_row() is None
"""


@pytest.mark.parametrize("memfd", [True, False])
def test_processes(memfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """What a worker writes in its row, its supervisor sees; where there is no memory with a descriptor, too."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with new_scoreboard(3) as scoreboard:
        assert (scoreboard.beats.tolist(), scoreboard.accepted.tolist(), scoreboard.active.tolist()) == ([0] * 3,) * 3
        scoreboard.accepted[0] = 5
        environment = os.environ | {VARIABLE: f"{scoreboard.fd} 1"}
        subprocess.run(
            [sys.executable, "-c", WORKER], env=environment, pass_fds=[scoreboard.fd], timeout=30, check=True
        )
        assert scoreboard.beats.tolist() == [0, 1, 0]
        assert scoreboard.accepted.tolist() == [5, 5 + 2**40, 0]
        assert scoreboard.active.tolist() == [0, 3, 0]
        fd = scoreboard.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


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
