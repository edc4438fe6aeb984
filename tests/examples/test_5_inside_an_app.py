import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from trioproto import receive_exactly, serve_tcp
from trioproto.testing import converse, fragmentations

EXAMPLE = Path(__file__).parents[2] / "examples" / "5_inside_an_app.py"
example = runpy.run_path(str(EXAMPLE))

shout_handler = example["shout_handler"]


async def test_lines_come_back_in_capitals_in_every_fragmentation() -> None:
    """The app's own handler answers each line, in every fragmentation, and does not answer an unfinished line."""
    for cuts in fragmentations(10):
        assert await converse(shout_handler, b"ab\n\nc d\nef", cuts) == b"AB\n\nC D\n"


async def test_longest_line_is_answered_and_a_longer_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """A line of 1000 bytes comes back; one of 1001 ends the connection with one warning, however it is fragmented."""
    for cuts in (1, 7, 999, 1000, 1001, ()):
        caplog.clear()
        sent = 1000 * b"a" + b"\n" + 1001 * b"b" + b"\nnever answered\n"
        assert await converse(shout_handler, sent, cuts) == 1000 * b"A" + b"\n"
        (record,) = caplog.records
        assert record.message.endswith("protocol error: more than 1000 bytes before b'\\n'")


async def test_own_handler_ends_between_two_lines_when_the_server_stops() -> None:
    """A stop ends the connection of a client that has its reply and has not begun another line."""
    shutdown = trio.Event()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            serve = functools.partial(serve_tcp, shout_handler, 0, host="127.0.0.1", shutdown=shutdown)
            (listener,) = await nursery.start(serve)
            client = await trio.open_tcp_stream(*listener.socket.getsockname())
            await client.send_all(b"hello\n")
            assert await receive_exactly(client, 6) == b"HELLO\n"
            shutdown.set()
            assert await client.receive_some() == b""
            await client.aclose()


def test_example_shows_what_a_stop_does_to_each_client() -> None:
    """SIGTERM disconnects the idle client, requests under way are answered, and the stuck client is cancelled."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=30)

    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    said = [line[8:].split(maxsplit=1) for line in lines]
    stop = said.index(["app", "receives SIGTERM"])
    assert ["idle", "from echo: hello"] in said[:stop]
    after = {who: [what for other, what in said[stop + 1 :] if other == who] for who, _ in said}
    assert after == {
        "idle": ["end of stream"],
        "busy": [r"to op: b'\x02\x00\x00\x00+', the rest", "from op: 42", "end of stream"],
        "slow": [r"to shout: b'one\n', the rest", "from shout: WELL DONE", "end of stream"],
        "late": ["cannot connect"],
        "stuck": ["end of stream"],
        "app": [
            "logs: the grace period of 1.0 s expired: cancelled the rest",
            "has stopped, and every connection has ended",
        ],
    }
    assert said.index(["idle", "end of stream"]) < said.index(["busy", "end of stream"])
