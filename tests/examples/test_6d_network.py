"""Stop 6d: a bug that the in-memory network finds and fragmentation does not."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent.parent / "examples" / "6d_network.py"


def test_demonstration() -> None:
    """It finds the bug with the same seed each time, and no bug in the correct handler."""
    runs = [
        subprocess.run([sys.executable, PROGRAM], check=True, capture_output=True, text=True, timeout=60).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    naive, correct = runs[0].splitlines()
    assert naive.startswith("add_naively: right in every fragmentation; with seed ")
    assert not naive.endswith(" 642")
    assert correct == "add: right in every fragmentation; right with all of 100 seeds"
