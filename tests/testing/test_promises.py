"""The server's promises hold on a network in memory, whatever its clients do and whenever it is stopped."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from promises import check, visit

# With this many scenarios for each protocol, 2,000 in all; more would find more, at 20 ms or so each.
SEEDS = 500
PARTS = 5


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", ["op", "echo", "kv", "chat"])
def test_promises(name: str, part: int) -> None:
    """Every promise is kept in each scenario; a failure names its seed, and the command that shows the scenario."""
    check(name, range(part, SEEDS, PARTS))


# In the chat, handlers meet: who leaves at the very moment at which another is told is up to the order of Trio's tasks.
@pytest.mark.parametrize("name", ["op", "echo", "kv"])
def test_repeatable(name: str) -> None:
    """A seed gives the same run twice, of the clients, of the server, and of all that goes between them."""
    for seed in range(10):
        assert visit(name, seed).network.trace == visit(name, seed).network.trace


def test_replay() -> None:
    """The command that a failure names prints the scenario: its clients, what happened and when, and the verdict."""
    program = Path(__file__).parent / "promises.py"
    done = subprocess.run([sys.executable, program, "op", "3"], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "client-0" in done.stdout
    assert done.stdout.endswith("every promise was kept\n")
