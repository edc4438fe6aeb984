import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trioproto.testing import fragmentations

EXAMPLE = Path(__file__).parents[2] / "examples" / "1_short_reads.py"
example = runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("cuts", list(fragmentations(6)))
async def test_broken_client_is_wrong_whenever_the_answer_is_fragmented(cuts: tuple[int, ...]) -> None:
    """With one send and one receive, the first fragment passes for the answer, and the second for the next answer."""
    first, second = await example["ask"](example["broken_client"], [b"abcdef", b"ghi"], cuts)

    assert first == b"abcdef"[: cuts[0]]
    if len(cuts) > 1:
        assert second == b"abcdef"[cuts[0] :][: cuts[1]]


@pytest.mark.parametrize("cuts", list(fragmentations(6)))
async def test_correct_client_is_right_in_every_fragmentation(cuts: tuple[int, ...]) -> None:
    """Receiving until the answer is complete returns all of it, and nothing of the next answer."""
    assert await example["ask"](example["correct_client"], [b"abcdef", b"ghi"], cuts) == [b"abcdef", b"ghi"]


def test_every_run_shows_the_same_wrong_and_right_answers() -> None:
    """The example prints the broken client's wrong answers beside the correct client's right ones, every time."""
    outputs = [
        subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=60).stdout
        for _ in range(2)
    ]

    assert outputs[0] == outputs[1]
    lines = [line.split() for line in outputs[0].splitlines()]
    assert ["How", "are", "you?", "How", "a", "WRONG", "How", "are", "you?", "right"] in lines
    assert outputs[0].count("WRONG") == 3
    assert "right in   1 of 512" in outputs[0]
    assert "right in 512 of 512" in outputs[0]
