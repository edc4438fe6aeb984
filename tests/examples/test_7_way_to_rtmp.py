import contextlib
import functools
import logging
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from trioproto import Connection, receive_exactly, serve_tcp
from trioproto.testing import Cuts, converse, fragmented_stream_pair, random_cuts

EXAMPLE = Path(__file__).parents[2] / "examples" / "7_way_to_rtmp.py"
example = runpy.run_path(str(EXAMPLE))

encode_amf0 = example["encode_amf0"]


def chunk(number: int, kind: int, body: bytes, length: int | None = None) -> bytes:
    """A chunk with a full header; ``length`` is the message's, if that has more chunks."""
    return bytes([number, 0, 0, 0]) + (length or len(body)).to_bytes(3, "big") + bytes([kind]) + bytes(4) + body


def command(*values: object) -> bytes:
    return chunk(3, 20, b"".join(map(encode_amf0, values)))


CONNECT = command("connect", 1.0, {"app": "live", "flashVer": "test"})
CREATE_STREAM = command("createStream", 2.0, None)
PUBLISH = command("publish", 3.0, None, "camera", "live")


async def converse_after_handshake(sent: bytes, cuts: Cuts = ()) -> bytes:
    """Shake hands with the server, send ``sent`` and end of stream, and return what comes back."""
    client, served = fragmented_stream_pair(to_second=cuts)
    received = bytearray()

    async def serve() -> None:
        async with served:
            await example["handler"](served)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with contextlib.suppress(trio.BrokenResourceError):
                await client.send_all(b"\x03" + bytes(range(256)) * 6)
                answer = await receive_exactly(client, 1 + 2 * 1536)
                assert answer[0] == 3
                assert answer[1537:] == bytes(range(256)) * 6
                await client.send_all(answer[1:1537] + sent)
                await client.send_eof()
            async for data in client:
                received += data
    return bytes(received)


@pytest.mark.parametrize("cuts", [1, 2, 7, *(functools.partial(random_cuts, seed) for seed in range(10))])
async def test_conversation_is_understood_however_it_is_cut(
    cuts: int | functools.partial[Iterator[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Handshake, connect, createStream and publish are understood and answered in every fragmentation."""
    received = await converse_after_handshake(
        CONNECT + CREATE_STREAM + PUBLISH, cuts if isinstance(cuts, int) else cuts()
    )

    said = capsys.readouterr().out
    assert "connect: app 'live' (" in said
    assert "from 'test'" in said
    assert "publish: stream 'camera' (" in said
    assert encode_amf0("_result") + encode_amf0(1.0) in received
    assert encode_amf0("_result") + encode_amf0(2.0) + encode_amf0(None) + encode_amf0(1.0) in received
    assert b"NetStream.Publish.Failed" in received


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "protocol error: no RTMP: C0 is version 71, not 3"),
        (b"\x03" + bytes(1535), "ended in the middle of a request"),
        (b"\x03" + bytes(2 * 1536), "protocol error: no RTMP: C2 does not bring back the random bytes of S1"),
    ],
)
async def test_garbage_instead_of_a_handshake_ends_in_one_line(
    hostile: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who speaks no RTMP is cut off, and one line of the log says what was wrong."""
    await converse(example["handler"], hostile)

    assert [record.message for record in caplog.records] == [f"StapledStream: {said}"]


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (chunk(3, 20, b"", length=65537), "a message of 65537 bytes: more than 65536"),
        (b"".join(chunk(3 + number, 9, b"x") for number in range(17)), "more than 16 chunk streams"),
        (b"\x44", "chunk stream 4 begins without a full header"),
        (chunk(3, 20, bytes(128), length=200) + CONNECT, "chunk stream 3 begins a message inside another"),
        (chunk(2, 1, bytes(4)), "set chunk size 0: not 1 to 2147483647"),
        (chunk(2, 1, b"\xff\xff\xff\xff"), "set chunk size 4294967295: not 1 to 2147483647"),
        (chunk(3, 20, b"\x02\xff\xffconnect"), "an AMF0 value is cut short"),
        (chunk(3, 20, b"\x03\x00\x01a" * 6), "AMF0 objects nested more than 4 deep"),
        (chunk(3, 20, b"\x03\x00\x00\x05"), "an AMF0 object without its end"),
        (chunk(3, 20, b"\x10"), "AMF0 type 16: not one that commands need"),
    ],
)
async def test_hostile_messages_end_in_one_line(hostile: bytes, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever exceeds a bound or breaks the protocol ends the connection, and one line of the log says what it was.

    What the client asked for before is answered.
    """
    received = await converse_after_handshake(CREATE_STREAM + hostile)

    assert encode_amf0("_result") + encode_amf0(2.0) in received
    assert [record.message for record in caplog.records] == [f"StapledStream: protocol error: {said}"]


async def test_end_inside_a_message_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A client that ends in the middle of a message is noted in the log."""
    await converse_after_handshake(CONNECT[:-1])

    assert [record.message for record in caplog.records] == ["StapledStream: ended in the middle of a request"]


async def test_declined_client_gets_the_reason_and_not_a_reset() -> None:
    """A client that goes on sending still gets the answer to its publish, then end of stream."""
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(functools.partial(serve_tcp, example["handler"], 0, host="127.0.0.1"))
            async with await trio.open_tcp_stream(*listener.socket.getsockname()) as client:
                await client.send_all(b"\x03" + bytes(1536))
                answer = await receive_exactly(client, 1 + 2 * 1536)
                await client.send_all(answer[1:1537] + PUBLISH + bytes(10_000_000))
                received = b"".join([bytes(data) async for data in client])
            nursery.cancel_scope.cancel()

    assert b"NetStream.Publish.Failed" in received


async def test_silent_client_is_let_go(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that says nothing is let go after 30 seconds."""
    caplog.set_level(logging.DEBUG, "trioproto")
    client, served = fragmented_stream_pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["handler"], served)
            assert await client.receive_some() == b""
            assert trio.current_time() == 30
            await client.aclose()

    assert [record.message for record in caplog.records] == ["StapledStream: timed out, awaiting a request"]


async def test_client_that_dribbles_is_let_go(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that is not whole after 30 seconds ends the connection, though bytes of it go on arriving."""
    client, served = fragmented_stream_pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["handler"], served)
            await client.send_all(b"\x03" + bytes(1536))
            answer = await receive_exactly(client, 1 + 2 * 1536)
            await client.send_all(answer[1:1537])
            for byte in CONNECT[:40]:
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.send_all(bytes([byte]))
                await trio.sleep(0.9)
            assert await client.receive_some() == b""
            await client.aclose()

    assert [record.message for record in caplog.records] == ["StapledStream: timed out, awaiting the rest of a request"]


async def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names that a client chose are printed quoted and cut to a line."""
    await converse_after_handshake(command("connect", 1.0, {"app": "\x1b[2J" + 60 * "x"}))

    said = capsys.readouterr().out
    assert r"app '\x1b[2Jxx" in said
    assert "\x1b" not in said
    assert 41 * "x" not in said


async def receive_all(sent: bytes) -> list[tuple[int, bytes, int]]:
    """The kind, body and number of chunks of each message in ``sent``."""
    client, served = fragmented_stream_pair()
    await client.send_all(sent)
    await client.send_eof()
    messages = Connection(served).requests(example["Messages"]().receive)
    return [(message.kind, bytes(message.body), message.chunks) async for message in messages]


async def test_messages_of_several_chunk_streams_may_interleave() -> None:
    """A message on one chunk stream may come between the chunks of a message on another (section 5.3)."""
    long = bytes(range(200))
    sent = chunk(3, 20, long[:128], length=200) + chunk(4, 9, b"video") + b"\xc3" + long[128:]

    assert await receive_all(sent) == [(9, b"video", 1), (20, long, 2)]


async def test_set_chunk_size_holds_from_the_next_chunk() -> None:
    """After Set Chunk Size, chunks have the new size (section 5.4.1)."""
    sent = chunk(2, 1, (100).to_bytes(4, "big")) + chunk(3, 20, bytes(100), length=150) + b"\xc3" + bytes(50)

    assert await receive_all(sent) == [(1, b"\0\0\0\x64", 1), (20, bytes(150), 2)]


@pytest.mark.parametrize("basic_header", [b"\x3f", b"\x00\x00", b"\x00\xff", b"\x01\x00\x00", b"\x01\xff\xff"])
async def test_chunk_stream_numbers_of_each_length(basic_header: bytes) -> None:
    """Chunk stream numbers take one, two or three bytes (section 5.3.1.1)."""
    again = bytes([basic_header[0] | 0xC0]) + basic_header[1:]
    sent = basic_header + chunk(0, 9, b"video")[1:] + again + b"more!"

    assert await receive_all(sent) == [(9, b"video", 1), (9, b"more!", 1)]


async def test_shorter_headers_leave_out_what_stays_the_same() -> None:
    """Header formats 1 and 2 bring a new length and kind, or only a new time (section 5.3.1.2)."""
    sent = chunk(4, 9, b"video") + b"\x44\0\0\1\0\0\x03\x08" + b"aud" + b"\x84\0\0\1" + b"io!"

    assert await receive_all(sent) == [(9, b"video", 1), (8, b"aud", 1), (8, b"io!", 1)]


async def test_extended_timestamps_are_not_taken_for_data() -> None:
    """A timestamp of 0xFFFFFF is followed by 4 more bytes, in each chunk of the message (section 5.3.1.3)."""
    header = b"\x04\xff\xff\xff" + chunk(4, 9, b"", length=130)[4:]
    sent = header + b"\1\0\0\0" + 128 * b"v" + b"\xc4" + b"\1\0\0\0" + b"vv"

    assert await receive_all(sent) == [(9, 130 * b"v", 2)]


@contextlib.contextmanager
def running() -> Iterator[tuple[str, list[str]]]:
    """The example as a process: the address that it listens on, and afterwards the lines that it printed."""
    with subprocess.Popen(
        [sys.executable, EXAMPLE, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        lines: list[str] = []
        try:
            address = server.stdout.readline().split()[-1]
            yield address, lines
        finally:
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=10)
        assert err == ""
        assert server.returncode == 0
        lines += [line.split(maxsplit=1)[1] for line in out.splitlines()]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_publishes() -> None:
    """A real publisher gets through the handshake and names its app and its stream."""
    source = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=5", "-t", "1", "-f", "flv"]
    with running() as (address, lines):
        ffmpeg = subprocess.run(
            ["ffmpeg", "-nostdin", *source, f"{address}/studio/camera-1"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    assert "The tour ends here" in ffmpeg.stderr
    assert lines[0] == "handshake: 1528 random bytes there and back"
    assert any(line.startswith("connect: app 'studio' (") and line.endswith(" in 2 chunks)") for line in lines)
    assert lines[-1].startswith("publish: stream 'camera-1' (")


@pytest.mark.skipif(shutil.which("rtmpdump") is None, reason="rtmpdump is not installed")
def test_rtmpdump_plays(tmp_path: Path) -> None:
    """A real player gets through the handshake and names its app and its stream."""
    with running() as (address, lines):
        rtmpdump = subprocess.run(
            ["rtmpdump", "-r", f"{address}/studio/camera-1", "-o", tmp_path / "video.flv"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    assert "NetStream.Play.Failed" in rtmpdump.stderr
    assert lines[0] == "handshake: 1528 random bytes there and back"
    assert any(line.startswith("connect: app 'studio' (") for line in lines)
    assert lines[-1].startswith("play: stream 'camera-1' (")


def test_port_in_use_is_one_line() -> None:
    """A port that is taken is said in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = subprocess.run(
            [sys.executable, EXAMPLE, str(port)], capture_output=True, text=True, timeout=30, check=False
        )

    assert server.returncode == 1
    assert server.stderr == (
        f"7_way_to_rtmp.py: cannot listen on 127.0.0.1:{port}: Address already in use: choose another port\n"
    )
