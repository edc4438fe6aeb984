import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trioproto.testing import converse, fragmentations

EXAMPLE = Path(__file__).parents[2] / "examples" / "6_your_own_protocol.py"
example = runpy.run_path(str(EXAMPLE))

REQUESTS = b"S\x00\x01k\x00\x01v" + b"G\x00\x01k"
REPLIES = b"=" + b"=\x00\x01v"


async def test_every_fragmentation() -> None:
    """However a set and a get are cut on their way, the replies are the same."""
    for cuts in fragmentations(len(REQUESTS)):
        assert await converse(functools.partial(example["handler"], {}), REQUESTS, cuts) == REPLIES


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (b"S\xff\xff" + bytes(65535), "a string of 65535 bytes: more than 1000"),
        (b"S\x00\x01k\x03\xe9" + bytes(1001), "a string of 1001 bytes: more than 1000"),
        (b"G\x80\x00", "a string of 32768 bytes: more than 1000"),
        (b"HELO", "command b'H': not S or G"),
        (b"S\x00\x09half", "end of stream after 4 of 9 bytes"),
    ],
)
async def test_hostile_input_ends_the_connection(hostile: bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths beyond the bound, unknown commands and half requests have no reply and end their connection."""
    store: dict[bytes, bytes] = {}

    assert await converse(functools.partial(example["handler"], store), hostile) == b""

    assert capsys.readouterr().out == f"   server  ends the connection: {said}\n"
    assert store == {}


async def test_longest_string_is_taken() -> None:
    """A string of exactly the greatest length is stored and given back."""
    value = example["encode_string"](bytes(1000))

    replies = await converse(functools.partial(example["handler"], {}), b"S\x00\x01k" + value + b"G\x00\x01k")

    assert replies == b"==" + value


async def test_store_is_bounded() -> None:
    """A store that is full takes new values for the keys that it has, but no further key."""
    full = {bytes([high, low]): b"" for high in range(10) for low in range(100)}
    old, new = b"S\x00\x02\x00\x00\x00\x01v", b"S\x00\x03new\x00\x01v"

    assert await converse(functools.partial(example["handler"], full), old + new) == b"="

    assert len(full) == 1000
    assert full[b"\x00\x00"] == b"v"


def test_protocol_has_less_than_40_lines() -> None:
    """The example is as short as it says."""
    protocol = EXAMPLE.read_text(encoding="utf-8").partition("from here …")[2].partition("# … to here")[0]
    assert 20 < len([line for line in protocol.splitlines() if line]) < 40


def test_example_shows_the_wire_and_the_end_of_a_hostile_client() -> None:
    """Run as it stands, it prints requests and replies, and ends the connection that announces too much."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=60)

    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    get = lines.index(["client", r"b'G\x00\x06colour'"])
    assert lines[get + 1] == ["reply", r"b'=\x00\x03red'"]
    assert lines[-2:] == [
        ["server", "ends the connection: a string of 65535 bytes: more than 1000"],
        ["reply", "none: end of stream"],
    ]
