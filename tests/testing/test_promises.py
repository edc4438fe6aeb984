"""The server's promises hold on a network in memory, whatever its clients do and whenever it is stopped."""

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from promises import PROTOCOLS, check, make_echo_handler, visit

# So many scenarios for each protocol, at 20 ms or so each; .ci/run runs more, which find more.
SEEDS = int(os.environ.get("SCENARIOS", "100"))
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", ["op", "echo", "kv", "chat"])
def test_promises(name: str, part: int) -> None:
    """Every promise is kept in each scenario; a failure names its seed, and the command that shows the scenario."""
    check(name, range(part, SEEDS, PARTS))


@pytest.mark.parametrize("name", ["op", "echo", "kv", "chat"])
def test_repeatable(name: str) -> None:
    """A seed gives the same run twice, of the clients, of the server, and of all that goes between them."""
    for seed in range(5):
        assert visit(name, seed).network.trace == visit(name, seed).network.trace


def test_replay() -> None:
    """The command that a failure names prints the scenario: its clients, what happened and when, and the verdict."""
    program = Path(__file__).parent / "promises.py"
    done = subprocess.run([sys.executable, program, "op", "3"], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "client-0" in done.stdout
    assert done.stdout.endswith("every promise was kept\n")


def test_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken promise is reported with the client's kind, the seed, and the command that shows the scenario."""
    monkeypatch.setitem(PROTOCOLS, "op", attrs.evolve(PROTOCOLS["op"], make_handler=make_echo_handler))
    with pytest.raises(AssertionError, match=r"(?s)op, seed 3:\n.*client-\d, which .*promises.py op 3$"):
        check("op", [3])
