import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trioproto.testing import fragmentations

EXAMPLE = Path(__file__).parents[2] / "examples" / "1_short_reads.py"
example = runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("cuts", list(fragmentations(6)))
async def test_broken_client_is_wrong_whenever_the_answer_is_cut(cuts: tuple[int, ...]) -> None:
    """One send and one receive give the first delivery for the answer, and the rest of it for the next answer."""
    first, second = await example["ask"](example["broken_client"], [b"abcdef", b"ghi"], cuts)

    assert first == b"abcdef"[: cuts[0]]
    if len(cuts) > 1:
        assert second == b"abcdef"[cuts[0] :][: cuts[1]]


@pytest.mark.parametrize("cuts", list(fragmentations(6)))
async def test_mended_client_is_right_however_the_answer_is_cut(cuts: tuple[int, ...]) -> None:
    """Receiving until all is there gives the answer, whole, and leaves the next answer untouched."""
    assert await example["ask"](example["mended_client"], [b"abcdef", b"ghi"], cuts) == [b"abcdef", b"ghi"]


def test_every_run_shows_the_same_wrong_and_right_answers() -> None:
    """The example prints the broken client's wrong answers beside the mended one's right ones, every time."""
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
