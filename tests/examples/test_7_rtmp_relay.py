import contextlib
import functools
import logging
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trioproto import Connection, receive_exactly
from trioproto.testing import Cuts, converse, fragmented_stream_pair, random_cuts

EXAMPLE = Path(__file__).parents[2] / "examples" / "7_rtmp_relay.py"
example = runpy.run_path(str(EXAMPLE))

encode_amf0 = example["encode_amf0"]
encode_message = example["encode_message"]
AUDIO, VIDEO, DATA, COMMAND = 8, 9, 18, 20

Clock = trio.testing.MockClock  # seconds of the relay's take no real time
Medium = tuple[int, int, bytes]  # kind, timestamp, body


def chunk(number: int, kind: int, body: bytes, length: int | None = None) -> bytes:
    """Return a chunk with a full header; ``length`` is the message's, if it has more chunks."""
    return bytes([number, 0, 0, 0]) + (length or len(body)).to_bytes(3, "big") + bytes([kind]) + bytes(4) + body


def command(*values: object) -> bytes:
    return chunk(3, COMMAND, b"".join(map(encode_amf0, values)))


CONNECT = command("connect", 1.0, {"app": "live", "flashVer": "test"})
CREATE_STREAM = command("createStream", 2.0, None)
PUBLISH = command("publish", 3.0, None, "camera", "live")
PLAY = command("play", 3.0, None, "camera")
CHUNK_SIZE = chunk(2, 1, example["CHUNK_SIZE"].to_bytes(4, "big"))

METADATA = encode_amf0("onMetaData") + encode_amf0({"width": 320.0})
AVC_SETTINGS = b"\x17\0\0\0\0 AVC"
AAC_SETTINGS = b"\xaf\0 AAC"
AVC_END = b"\x17\x02\0\0\0"


def key(text: str, size: int = 0) -> bytes:
    return b"\x17\x01\0\0\0" + text.encode().ljust(size)


def picture(text: str, size: int = 0) -> bytes:
    return b"\x27\x01\0\0\0" + text.encode().ljust(size)


def sound(text: str) -> bytes:
    return b"\xaf\x01" + text.encode()


SETTINGS = [(DATA, 0, METADATA), (VIDEO, 0, AVC_SETTINGS), (AUDIO, 0, AAC_SETTINGS)]


def settings_at(time: int) -> list[Medium]:
    """Return the settings that a player gets before a key frame; metadata has timestamp 0."""
    return [SETTINGS[0], *((kind, time, body) for kind, _, body in SETTINGS[1:])]


class Room:
    """A relay in memory, and its clients."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.streams: dict[str, Any] = {}

    async def connect(self, asked: bytes, *, slow: bool = False) -> trio.abc.HalfCloseableStream:
        """Connect a client, and send ``asked``; if ``slow``, a send to the client waits until it receives."""
        pair = trio.testing.lockstep_stream_pair if slow else trio.testing.memory_stream_pair
        client, served = pair()
        self._nursery.start_soon(example["relay"], self.streams, served)
        await client.send_all(b"\x03" + bytes(1536))
        answer = await receive_exactly(client, 1 + 2 * 1536)
        await client.send_all(answer[1:1537])
        await client.send_all(CHUNK_SIZE + CONNECT + CREATE_STREAM + asked)
        await self.settle()
        return client

    async def send(self, publisher: trio.abc.SendStream, *media: Medium) -> None:
        """Publish messages, and wait until they have been pushed to the players."""
        await publisher.send_all(b"".join(encode_message(kind, body, timestamp=time) for kind, time, body in media))
        await self.settle()

    async def settle(self) -> None:
        """Wait until all tasks are blocked and a beat has passed."""
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(example["BEAT"])
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    """A relay without clients."""
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            yield Room(nursery)
            nursery.cancel_scope.cancel()


async def messages(client: trio.abc.Stream) -> list[tuple[int, int, bytes]]:
    """Receive what a client is sent from now on, until the relay ends the connection."""
    # `read_message` pushes acknowledgements, so this connection must be able to push.
    async with Connection(client, max_unsent=2**16) as connection:
        return [tuple(message) async for message in connection.requests(example["Incoming"]().read_message)]
    raise AssertionError("the relay broke the connection")


async def watched(player: trio.abc.Stream) -> list[Medium]:
    """Receive the audio, video and data that a player is sent, and check that its stream ends properly."""
    received = await messages(player)
    assert received[-2][2] == b"\0\1\0\0\0\1", "no Stream EOF"
    assert b"NetStream.Play.UnpublishNotify" in received[-1][2]
    return [message for message in received if message[0] in (AUDIO, VIDEO, DATA)]


async def test_player_that_joins_late_begins_with_settings_and_a_key_frame(autojump_clock: Clock, room: Room) -> None:
    """A late player gets the settings and the current group at once, with its timestamps, then new messages."""
    publisher = await room.connect(PUBLISH)
    await room.send(publisher, *SETTINGS, (VIDEO, 0, key("1")), (VIDEO, 40, picture("2")), (AUDIO, 41, sound("2")))
    await room.send(publisher, (VIDEO, 80, key("3")), (AUDIO, 90, sound("3")), (VIDEO, 120, picture("4")))
    player = await room.connect(PLAY)
    await room.send(publisher, (VIDEO, 160, picture("5")), (VIDEO, 200, key("6")), (VIDEO, 240, AVC_END))
    await publisher.send_eof()

    assert await watched(player) == [
        (DATA, 0, METADATA),
        (VIDEO, 80, AVC_SETTINGS),
        (AUDIO, 80, AAC_SETTINGS),
        (VIDEO, 80, key("3")),
        (AUDIO, 90, sound("3")),
        (VIDEO, 120, picture("4")),
        (VIDEO, 160, picture("5")),
        (VIDEO, 200, key("6")),
        (VIDEO, 240, AVC_END),
    ]


async def test_player_that_joins_before_the_first_key_frame_waits_for_it(autojump_clock: Clock, room: Room) -> None:
    """A player gets nothing that it cannot decode: no video or audio before a key frame, and no end of sequence."""
    publisher = await room.connect(PUBLISH)
    player = await room.connect(PLAY)
    set_data = encode_amf0("@setDataFrame")
    await room.send(publisher, (DATA, 0, set_data + METADATA), *SETTINGS[1:], (VIDEO, 0, picture("1")))
    await room.send(publisher, (AUDIO, 9, sound("1")), (VIDEO, 10, AVC_END), (VIDEO, 40, key("2")))
    await publisher.send_eof()

    assert await watched(player) == [*settings_at(40), (VIDEO, 40, key("2"))]


async def test_player_gets_settings_that_changed(autojump_clock: Clock, room: Room) -> None:
    """A watching player gets new settings as they arrive; one that joins gets those that its group began with."""
    publisher = await room.connect(PUBLISH)
    await room.send(publisher, (VIDEO, 0, AVC_SETTINGS), (VIDEO, 0, key("1")))
    early = await room.connect(PLAY)
    await room.send(publisher, (VIDEO, 40, AVC_SETTINGS + b" 2"), (VIDEO, 80, key("2")))
    late = await room.connect(PLAY)
    await publisher.send_eof()

    assert await watched(early) == [
        (VIDEO, 0, AVC_SETTINGS),
        (VIDEO, 0, key("1")),
        (VIDEO, 40, AVC_SETTINGS + b" 2"),
        (VIDEO, 80, key("2")),
    ]
    assert await watched(late) == [(VIDEO, 80, AVC_SETTINGS + b" 2"), (VIDEO, 80, key("2"))]


async def test_audio_alone_is_played_from_any_message(autojump_clock: Clock, room: Room) -> None:
    """Without video, a player begins with the latest audio; once video arrives, with its first key frame."""
    publisher = await room.connect(PUBLISH)
    await room.send(publisher, (AUDIO, 0, AAC_SETTINGS), (AUDIO, 0, sound("1")), (AUDIO, 23, sound("2")))
    player = await room.connect(PLAY)
    await room.send(publisher, (AUDIO, 46, sound("3")), (VIDEO, 50, AVC_SETTINGS), (VIDEO, 50, picture("4")))
    await room.send(publisher, (AUDIO, 69, sound("4")), (VIDEO, 90, key("5")))
    await publisher.send_eof()

    assert await watched(player) == [
        (AUDIO, 23, AAC_SETTINGS),
        (AUDIO, 23, sound("2")),
        (AUDIO, 46, sound("3")),
        (VIDEO, 90, AVC_SETTINGS),
        (AUDIO, 90, AAC_SETTINGS),
        (VIDEO, 90, key("5")),
    ]


async def test_group_that_is_too_long_is_not_kept(autojump_clock: Clock, room: Room) -> None:
    """Players that watch get a group of any length; one that joins after MAX_GROUP bytes waits for the next group."""
    publisher = await room.connect(PUBLISH)
    early = await room.connect(PLAY)
    pictures = [(VIDEO, 40 * n, picture(f"{n}", 500_000)) for n in range(1, 10)]
    await room.send(publisher, (VIDEO, 0, key("0")), *pictures)
    late = await room.connect(PLAY)
    await room.send(publisher, (VIDEO, 400, picture("10")), (VIDEO, 440, key("11")))
    await publisher.send_eof()

    last = [(VIDEO, 440, key("11"))]
    assert await watched(early) == [(VIDEO, 0, key("0")), *pictures, (VIDEO, 400, picture("10")), *last]
    assert await watched(late) == last


async def test_player_that_waits_long_for_a_key_frame_does_not_time_out(autojump_clock: Clock, room: Room) -> None:
    """A player that joins in a group that is too long stays until the next, however long that takes."""
    publisher = await room.connect(PUBLISH)
    await room.send(publisher, (VIDEO, 0, key("0")), *((VIDEO, n, picture(f"{n}", 1_000_000)) for n in range(5)))
    player = await room.connect(PLAY)
    for second in range(100):
        await trio.sleep(1)
        await room.send(publisher, (VIDEO, 1000 * second, picture("x")))
    await room.send(publisher, (VIDEO, 100_000, key("1")))
    await publisher.send_eof()

    assert await watched(player) == [(VIDEO, 100_000, key("1"))]


def test_key_frame_costs_each_waiting_player_one_push() -> None:
    """When many players begin at once, the work is linear in their number: quadratic, 1000 would take a second."""

    class Player:
        peer, unsent, pushed = "a player", 0, 0

        def push(self, data: bytes) -> None:
            Player.pushed += 1

    stream = example["Stream"](players={Player(): trio.CancelScope() for _ in range(50)})
    example["pass_on"](stream, example["Message"](VIDEO, 0, key("1")))

    assert Player.pushed == 50


async def test_slow_player_misses_groups_and_delays_no_other(
    autojump_clock: Clock, room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    """A player without room for a message misses the rest of the group, and continues at a key frame, with settings.

    It never has more than MAX_UNSENT unsent bytes, and the others get everything.
    """
    publisher = await room.connect(PUBLISH)
    await room.send(publisher, *SETTINGS)
    slow = await room.connect(PLAY, slow=True)
    fast = await room.connect(PLAY)
    (stream,) = room.streams.values()
    sent: list[Medium] = []
    most = 0
    for group in range(20):
        media = [(VIDEO, 1000 * group, key(f"{group}", 200_000))]
        media += [(VIDEO, 1000 * group + 100 * n, picture(f"{group}.{n}", 100_000)) for n in range(1, 10)]
        await room.send(publisher, *media)
        sent += media
        most = max([most, *(player.unsent for player in stream.players)])
    assert 4_000_000 < most <= example["MAX_UNSENT"]
    received: list[Medium] = []

    async def receive() -> None:
        received.extend(await watched(slow))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await room.settle()  # it catches up
        await room.send(publisher, (VIDEO, 20_000, picture("not decodable")), (VIDEO, 20_040, key("last")))
        await publisher.send_eof()

    assert received[-4:] == [*settings_at(20_040), (VIDEO, 20_040, key("last"))]
    pictures = received[3:-4]
    assert pictures == sent[: len(pictures)]
    assert 40 < len(pictures) < 60
    last = [(VIDEO, 20_000, picture("not decodable")), (VIDEO, 20_040, key("last"))]
    assert (await watched(fast))[3:] == sent + last
    assert capsys.readouterr().out.count("is too slow") == 1


async def test_player_that_receives_nothing_is_disconnected(
    autojump_clock: Clock, room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    """A player that receives nothing for 30 seconds is disconnected, and one line is logged."""
    publisher = await room.connect(PUBLISH)
    await room.connect(PLAY, slow=True)
    (stream,) = room.streams.values()
    for second in range(40):
        await room.send(publisher, (VIDEO, 1000 * second, key("x", 1000)))
        await trio.sleep(1)

    assert not stream.players
    assert [record.message for record in caplog.records] == ["StapledStream: timed out waiting for room for a reply"]


async def test_name_in_use_is_refused_until_its_publisher_leaves(autojump_clock: Clock, room: Room) -> None:
    """A second publisher gets BadName; when the first leaves, its players' streams end, and the name is free."""
    first = await room.connect(PUBLISH)
    player = await room.connect(PLAY)
    second = await room.connect(PUBLISH)
    assert b"NetStream.Publish.BadName" in (await messages(second))[-1][2]

    await first.send_all(command("deleteStream", 4.0, None, 1.0))
    assert b"NetStream.Unpublish.Success" in (await messages(first))[-1][2]
    assert await watched(player) == []
    assert not room.streams

    third = await room.connect(PUBLISH)
    await third.send_all(command("FCUnpublish", 4.0, None, "camera"))
    received = await messages(third)
    assert any(b"NetStream.Publish.Start" in body for _, _, body in received)
    assert b"NetStream.Play.StreamNotFound" in (await messages(await room.connect(PLAY)))[-1][2]


async def test_player_that_ends_its_stream_does_not_affect_others(autojump_clock: Clock, room: Room) -> None:
    """A player that ends its stream is removed, and the stream goes on for the others."""
    publisher = await room.connect(PUBLISH)
    player, other = await room.connect(PLAY), await room.connect(PLAY)
    await player.send_all(command("pause", 0.0, None) + command("closeStream", 0.0, None))
    assert await watched(player) == []

    await room.send(publisher, (VIDEO, 0, key("1")))
    await publisher.send_eof()
    assert await watched(other) == [(VIDEO, 0, key("1"))]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (AVC_SETTINGS + bytes(20_000), "decoder settings of 20009 bytes: more than 16384"),
        (b"\x90hvc1", "video of type 0x90: codecs newer than AVC (H.264) are not supported"),  # as OBS sends HEVC
        (b"\x1c\0\0\0\0", "video of type 0x1c: codecs newer than AVC (H.264) are not supported"),
    ],
)
async def test_publisher_that_violates_the_protocol_ends_its_players_properly(
    autojump_clock: Clock, room: Room, caplog: pytest.LogCaptureFixture, body: bytes, said: str
) -> None:
    """When a publisher violates the protocol, one line is logged, and its players' streams end as usual.

    An unknown codec counts as a violation: players would wait for a key frame forever.
    """
    publisher = await room.connect(PUBLISH)
    player = await room.connect(PLAY)
    await room.send(publisher, (VIDEO, 0, key("1")), (VIDEO, 0, body))

    assert await watched(player) == [(VIDEO, 0, key("1"))]
    assert [record.message for record in caplog.records] == [f"StapledStream: protocol error: {said}"]


async def test_empty_media_is_ignored(autojump_clock: Clock, room: Room) -> None:
    """Messages that are too short for audio or video are not relayed, and are not an error."""
    publisher = await room.connect(PUBLISH)
    player = await room.connect(PLAY)
    await room.send(publisher, (VIDEO, 0, b""), (VIDEO, 0, b"\x17"), (AUDIO, 0, b"\xaf"), (DATA, 0, b""))
    await room.send(publisher, (VIDEO, 0, key("1")))
    await publisher.send_eof()

    assert await watched(player) == [(VIDEO, 0, key("1"))]


async def converse_after_handshake(sent: bytes, cuts: Cuts = ()) -> bytes:
    """Shake hands with the relay, send ``sent`` and end of stream, and return what comes back."""
    client, served = fragmented_stream_pair(to_second=cuts)
    received = bytearray()

    async def serve() -> None:
        async with served:
            await example["relay"]({}, served)

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
async def test_conversation_is_understood_in_every_fragmentation(
    cuts: int | functools.partial[Iterator[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Handshake, connect, createStream and publish are understood and answered in every fragmentation."""
    received = await converse_after_handshake(
        CONNECT + CREATE_STREAM + PUBLISH, cuts if isinstance(cuts, int) else cuts()
    )

    assert "publishes 'live/camera'" in capsys.readouterr().out
    assert encode_amf0("_result") + encode_amf0(1.0) in received
    assert encode_amf0("_result") + encode_amf0(2.0) + encode_amf0(None) + encode_amf0(1.0) in received
    assert b"NetStream.Publish.Start" in received


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (["releaseStream", 2.0, None, "camera"], ["_result", 2.0, None, None]),
        (["FCPublish", 3.0, None, "camera"], ["_result", 3.0, None, None]),
        (["getStreamLength", 3.0, None, "camera"], ["_result", 3.0, None, 0.0]),
        (["teapot", 4.0, {"hot": "yes"}], ["_error", 4.0, None]),
    ],
)
async def test_other_commands_are_answered(asked: list[object], answer: list[object]) -> None:
    """Other commands of clients are answered; an unknown one gets an error, and the connection goes on."""
    received = await converse_after_handshake(CONNECT + command(*asked) + CREATE_STREAM)

    assert b"".join(map(encode_amf0, answer)) in received
    assert encode_amf0("_result") + encode_amf0(2.0) in received


async def test_command_that_expects_no_answer_gets_none() -> None:
    """A transaction of 0 means that the client expects no answer (section 7.2.1)."""
    assert await converse_after_handshake(command("teapot", 0.0, None) + command() + command("teapot")) == b""


@pytest.mark.parametrize("asked", [{}, {"app": 1.0}, {"app": None}, {"app": {}}])
async def test_connect_has_to_name_an_app(asked: dict[str, object]) -> None:
    """Without an app's name, publishing is refused: otherwise all such clients would share one app."""
    received = await converse_after_handshake(command("connect", 1.0, asked) + PUBLISH)

    assert encode_amf0("_error") + encode_amf0(1.0) in received
    assert encode_amf0("_error") + encode_amf0(3.0) in received
    assert b"NetStream.Publish.Start" not in received


async def test_connect_may_contain_lists_and_booleans() -> None:
    """Lists and booleans are decoded: OBS sends a list of its codecs."""
    codecs = b"\x0a\0\0\0\2" + encode_amf0("av01") + encode_amf0("hvc1")
    asked = b"\x03\0\3app" + encode_amf0("live") + b"\0\4list" + codecs + b"\0\4fpad\1\0" + b"\0\0\x09"
    received = await converse_after_handshake(
        chunk(3, COMMAND, encode_amf0("connect") + encode_amf0(1.0) + asked) + PUBLISH
    )

    assert b"NetStream.Publish.Start" in received


async def test_other_tasks_run_before_each_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commands that arrived together, and take long to decode, do not block other tasks all at once."""
    turn, turns = 0, []

    def note(message: Any) -> list[Any]:
        turns.append(turn)
        return []

    async def take_turns() -> None:
        nonlocal turn
        while True:
            await trio.lowlevel.checkpoint()
            turn += 1

    monkeypatch.setitem(example["negotiate"].__globals__, "decode_command", note)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await converse_after_handshake(10 * command("teapot", 0.0, None))
        nursery.cancel_scope.cancel()

    assert turns[-1] - turns[0] >= 8  # of the 9 in between, Trio's scheduling may omit one


async def test_ping_is_answered() -> None:
    """The answer to a ping has the ping's timestamp (section 7.1.7)."""
    received = await converse_after_handshake(chunk(2, 4, b"\0\6time") + chunk(2, 4, b"\0\3\0\0\0\1\0\0\1\0"))

    assert received == chunk(2, 4, b"\0\7time")


async def test_receipt_is_acknowledged_after_each_window() -> None:
    """A client that sets a window gets an acknowledgement for each window of bytes (section 5.4.3)."""
    sent = chunk(2, 5, (100).to_bytes(4, "big")) + 3 * chunk(4, AUDIO, bytes(60))

    received = await converse_after_handshake(sent)

    assert received == chunk(2, 3, (16 + 2 * 72).to_bytes(4, "big"))


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "protocol error: not RTMP: C0 has version 71, not 3"),
        (b"\x03" + bytes(1535), "end of stream in the middle of a request"),
    ],
)
async def test_garbage_instead_of_a_handshake_ends_in_one_line(
    hostile: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that does not speak RTMP is disconnected, and one log line says what was wrong."""
    await converse(functools.partial(example["relay"], {}), hostile)

    assert [record.message for record in caplog.records] == [f"StapledStream: {said}"]


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (chunk(3, 20, b"", length=16385), "a message of 16385 bytes and type 20: more than 16384"),
        (chunk(3, 9, b"", length=2**20 + 1), "a message of 1048577 bytes and type 9: more than 1048576"),
        (
            chunk(3, 9, bytes(128), length=2**20) + chunk(4, 8, b"", length=2),
            "messages of 1048578 bytes at once: more than 1048576",
        ),
        (b"".join(chunk(3 + number, 9, b"x") for number in range(17)), "more than 16 chunk streams"),
        (b"\x44", "chunk stream 4 begins without a full header"),
        (chunk(3, 20, bytes(128), length=200) + CONNECT, "chunk stream 3 begins a message inside another"),
        (chunk(2, 1, bytes(4)), "set chunk size 0: not 128 to 2147483647"),
        (chunk(2, 1, b"\xff\xff\xff\xff"), "set chunk size 4294967295: not 128 to 2147483647"),
        (chunk(2, 1, b""), "set chunk size 0: not 128 to 2147483647"),
        (chunk(3, 20, b"\x02\xff\xffconnect"), "truncated AMF0 value"),
        (chunk(3, 20, b"\x03\x00\x01a" * 6), "AMF0 objects nested more than 4 deep"),
        (chunk(3, 20, b"\x0a\x00\x00\x00\x01" * 6), "AMF0 objects nested more than 4 deep"),
        (chunk(3, 20, b"\x0a\xff\xff\xff\xff\x05"), "truncated AMF0 value"),
        (chunk(3, 20, b"\x03\x00\x00\x05"), "an AMF0 object without an end marker"),
        (chunk(3, 20, b"\x10"), "unsupported AMF0 type 16"),
    ],
)
async def test_hostile_messages_end_in_one_line(hostile: bytes, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """What exceeds a limit or violates the protocol ends the connection, and one log line says what was wrong.

    Earlier commands are answered.
    """
    received = await converse_after_handshake(CREATE_STREAM + hostile)

    assert encode_amf0("_result") + encode_amf0(2.0) in received
    assert [record.message for record in caplog.records] == [f"StapledStream: protocol error: {said}"]


@given(st.binary(max_size=3000), st.booleans())
def test_no_input_crashes_the_relay(garbage: bytes, publishing: bool) -> None:  # noqa: FBT001
    """Whatever a client sends after the handshake, or while publishing, its connection ends without a crash."""
    start = CONNECT + CREATE_STREAM + PUBLISH if publishing else b""
    trio.run(converse_after_handshake, start + garbage)


async def test_end_inside_a_message_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """A client that ends the connection in the middle of a message is logged."""
    await converse_after_handshake(CONNECT[:-1])

    assert [record.message for record in caplog.records] == ["StapledStream: end of stream in the middle of a request"]


async def test_silent_client_times_out(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A client that sends nothing is disconnected after 30 seconds."""
    caplog.set_level(logging.DEBUG, "trioproto")
    client, served = fragmented_stream_pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["relay"], {}, served)
            assert await client.receive_some() == b""
            assert trio.current_time() == 30
            await client.aclose()

    assert [record.message for record in caplog.records] == ["StapledStream: timed out waiting for a request"]


async def test_slow_message_times_out(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A message that is not complete after 30 seconds ends the connection, even if bytes of it still arrive."""
    client, served = fragmented_stream_pair()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["relay"], {}, served)
            await client.send_all(b"\x03" + bytes(1536))
            answer = await receive_exactly(client, 1 + 2 * 1536)
            await client.send_all(answer[1:1537])
            for byte in CONNECT[:40]:
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.send_all(bytes([byte]))
                await trio.sleep(0.9)
            assert await client.receive_some() == b""
            await client.aclose()

    assert [record.message for record in caplog.records] == [
        "StapledStream: timed out waiting for the rest of a request"
    ]


async def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names that a client chose are printed escaped and shortened to one line."""
    await converse_after_handshake(CONNECT + command("publish", 1.0, None, "\x1b[2J" + 80 * "x"))

    said = capsys.readouterr().out
    assert r"'live/\x1b[2Jxx" in said
    assert "\x1b" not in said
    assert 61 * "x" not in said


async def receive_all(sent: bytes) -> list[tuple[int, int, bytes]]:
    """Return the kind, timestamp and body of each message in ``sent``."""
    client, served = fragmented_stream_pair()
    await client.send_all(sent)
    await client.send_eof()
    return await messages(served)


@given(st.sampled_from([AUDIO, VIDEO]), st.integers(0, 2**32 - 1), st.integers(0, 200_000))
def test_encoded_messages_are_decoded_unchanged(kind: int, timestamp: int, size: int) -> None:
    """Messages of any size and timestamp are decoded as they were encoded, in one chunk or in several."""
    sent = bytes(size)
    set_chunk_size = example["encode_control"](1, example["CHUNK_SIZE"])

    received = trio.run(receive_all, set_chunk_size + 2 * encode_message(kind, sent, timestamp=timestamp))

    assert received[1:] == 2 * [(kind, timestamp, sent)]


async def test_messages_of_several_chunk_streams_may_interleave() -> None:
    """A message on one chunk stream may come between the chunks of a message on another (section 5.3)."""
    long = bytes(range(200))
    sent = chunk(3, 20, long[:128], length=200) + chunk(4, 9, b"video") + b"\xc3" + long[128:]

    assert await receive_all(sent) == [(9, 0, b"video"), (20, 0, long)]


async def test_message_may_be_aborted() -> None:
    """After Abort Message, a chunk stream begins with a new message (section 5.4.2)."""
    abort = chunk(2, 2, (3).to_bytes(4, "big"))
    sent = chunk(3, 9, bytes(128), length=200) + abort + chunk(3, 9, b"video") + chunk(2, 2, b"\0\0\0\x09")

    assert (9, 0, b"video") in await receive_all(sent)


async def test_set_chunk_size_holds_from_the_next_chunk() -> None:
    """After Set Chunk Size, chunks have the new size (section 5.4.1)."""
    sent = chunk(2, 1, (130).to_bytes(4, "big")) + chunk(3, 20, bytes(130), length=150) + b"\xc3" + bytes(20)

    assert await receive_all(sent) == [(1, 0, b"\0\0\0\x82"), (20, 0, bytes(150))]


@pytest.mark.parametrize("basic_header", [b"\x3f", b"\x00\x00", b"\x00\xff", b"\x01\x00\x00", b"\x01\xff\xff"])
async def test_chunk_stream_numbers_of_each_length(basic_header: bytes) -> None:
    """Chunk stream numbers take one, two or three bytes (section 5.3.1.1)."""
    again = bytes([basic_header[0] | 0xC0]) + basic_header[1:]
    sent = basic_header + chunk(0, 9, b"video")[1:] + again + b"more!"

    assert await receive_all(sent) == [(9, 0, b"video"), (9, 0, b"more!")]


async def test_shorter_headers_omit_what_stays_the_same() -> None:
    """Header formats 1 and 2 have a new length and kind, or only a time, and 3 has nothing (section 5.3.1.2).

    In formats other than 0, the time is a delta.
    """
    sent = (
        b"\x04\0\0\x09" + chunk(4, 9, b"video")[4:]
        + b"\x44\0\0\x28\0\0\x03\x08" + b"aud"
        + b"\x84\0\0\x14" + b"io!"
        + b"\xc4" + b"..."
    )  # fmt: skip

    assert await receive_all(sent) == [(9, 9, b"video"), (8, 49, b"aud"), (8, 69, b"io!"), (8, 89, b"...")]


async def test_extended_timestamps_are_in_each_chunk_and_wrap() -> None:
    """A timestamp of 0xFFFFFF is followed by the actual one in 4 bytes, in each chunk (section 5.3.1.3)."""
    header = b"\x04\xff\xff\xff" + chunk(4, 9, b"", length=130)[4:]
    late = b"\xff\xff\xff\xf0"
    sent = header + late + 128 * b"v" + b"\xc4" + late + b"vv" + b"\x84\0\0\x14" + 128 * b"w" + b"\xc4ww"

    assert await receive_all(sent) == [(9, 0xFFFFFFF0, 130 * b"v"), (9, 4, 130 * b"w")]


# With real clients, and the example as a process.

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None, reason="ffmpeg is not installed"
)
needs_rtmpdump = pytest.mark.skipif(shutil.which("rtmpdump") is None, reason="rtmpdump is not installed")

LIMIT = 60  # seconds


class Relay:
    """The example as a process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.process = process
        self.address = process.stdout.readline().split()[-1]
        self.lines: list[str] = []

    def wait_for(self, what: str, times: int = 1) -> None:
        """Wait until ``times`` lines that the relay has printed contain ``what``."""
        assert self.process.stdout is not None
        while sum(what in line for line in self.lines) < times:
            line = self.process.stdout.readline()
            assert line, self.lines
            self.lines.append(line)


@contextlib.contextmanager
def running() -> Iterator[Relay]:
    """Run the example; at the end, check that it stops with status 0 and an empty standard error."""
    with subprocess.Popen(
        [sys.executable, EXAMPLE, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Relay(process)
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=LIMIT)
        assert err == ""
        assert process.returncode == 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute of video and audio, with B-frames and two key frames a second: long enough for a busy machine."""
    path = tmp_path_factory.mktemp("clip") / "clip.flv"
    source = ["-f", "lavfi", "-i", "testsrc=size=128x96:rate=20", "-f", "lavfi", "-i", "sine", "-t", "60"]
    codecs = ["-c:v", "libx264", "-preset", "veryfast", "-bf", "2", "-pix_fmt", "yuv420p", "-g", "10", "-c:a", "aac"]
    subprocess.run(["ffmpeg", "-v", "error", *source, *codecs, path], check=True, timeout=LIMIT)
    return path


@contextlib.contextmanager
def publishing(relay: Relay, clip: Path, *options: str, offset: float = 0) -> "Iterator[subprocess.Popen[str]]":
    """Publish ``clip`` in real time, until the end of the block."""
    source = ["-nostdin", "-re", *options, "-i", str(clip), "-c", "copy", "-output_ts_offset", str(offset)]
    target = ["-f", "flv", f"{relay.address}/live/camera"]
    begun = sum("publishes 'live/camera'" in line for line in relay.lines)
    with subprocess.Popen(["ffmpeg", "-v", "error", *source, *target], stderr=subprocess.PIPE, text=True) as publisher:
        try:
            relay.wait_for("publishes 'live/camera'", times=begun + 1)
            yield publisher
        finally:
            publisher.terminate()
            publisher.communicate(timeout=LIMIT)


def probe(source: object) -> "subprocess.Popen[str]":
    """Play and decode until the stream ends."""
    shown = ["-count_frames", "-show_entries", "stream=codec_name,start_time,nb_read_frames", "-of", "compact"]
    command = ["ffprobe", "-v", "warning", *shown, str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def decoded(probing: "subprocess.Popen[str]") -> tuple[float, int]:
    """Return when a stream began, in seconds, and its number of pictures; check that all decoded without an error."""
    out, err = probing.communicate(timeout=LIMIT)
    assert err == ""
    assert probing.returncode == 0
    assert "codec_name=text" not in out, "ffmpeg took the metadata for a subtitle"
    found = re.search(r"codec_name=h264\|start_time=([\d.]+)\|nb_read_frames=(\d+)", out)
    assert found is not None, out
    return float(found[1]), int(found[2])


@needs_ffmpeg
def test_twenty_players_see_intact_pictures_from_a_key_frame_on(clip: Path) -> None:
    """Each player, whenever it joined, decodes all pictures from a key frame to the end without an error."""
    with running() as relay, publishing(relay, clip):
        players = []
        for number in range(1, 21):
            players.append(probe(f"{relay.address}/live/camera"))
            relay.wait_for("plays 'live/camera'", times=number)
        time.sleep(0.5)
        late = probe(f"{relay.address}/live/camera")
        relay.wait_for("plays 'live/camera'", times=21)
    results = [decoded(player) for player in [*players, late]]

    first, _ = results[0]
    frames_until_end = {round(20 * start) + frames for start, frames in results}
    assert len(frames_until_end) == 1
    assert all(round(20 * (start - first)) % 10 == 0 for start, _ in results)
    assert results[-1][0] > first


@needs_ffmpeg
@needs_rtmpdump
def test_player_that_is_suspended_continues_with_intact_pictures(tmp_path: Path) -> None:
    """A suspended player misses groups and delays no other; once it continues, it sees no broken picture."""
    clip, slow_file, fast_file = tmp_path / "noise.flv", tmp_path / "slow.flv", tmp_path / "fast.flv"
    noise = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", "480x270", "-r", "20", "-i", "/dev/urandom", "-t", "1"]
    codec = ["-c:v", "libx264", "-preset", "ultrafast", "-qp", "1", "-g", "5"]  # 7 MB
    subprocess.run(["ffmpeg", "-v", "error", *noise, *codec, clip], check=True, timeout=LIMIT)
    with running() as relay, publishing(relay, clip, "-stream_loop", "-1"):
        rtmpdump = ["rtmpdump", "-q", "-r", f"{relay.address}/live/camera", "-o"]
        with subprocess.Popen([*rtmpdump, slow_file]) as slow, subprocess.Popen([*rtmpdump, fast_file]) as fast:
            relay.wait_for("plays 'live/camera'", times=2)
            while not slow_file.exists() or slow_file.stat().st_size < 2**20:
                time.sleep(0.05)
            slow.send_signal(signal.SIGSTOP)
            relay.wait_for("is too slow")
            slow.send_signal(signal.SIGCONT)
            relay.wait_for("starts at a key frame")
            relay.process.send_signal(signal.SIGTERM)  # the stop delivers what is under way
            assert [slow.wait(LIMIT), fast.wait(LIMIT), relay.process.wait(LIMIT)] == [0, 0, 0]
    (_, few), (_, all_) = decoded(probe(slow_file)), decoded(probe(fast_file))

    assert few < all_
    assert last_time(slow_file) == last_time(fast_file)


def last_time(file: Path) -> str:
    """Return the time of the last picture."""
    shown = ["-select_streams", "v", "-show_entries", "packet=pts_time", "-of", "csv"]
    command = ["ffprobe", "-v", "error", *shown, str(file)]
    return subprocess.check_output(command, text=True, timeout=LIMIT).split()[-1]


@needs_ffmpeg
def test_second_publisher_is_refused_until_the_first_has_left(clip: Path) -> None:
    """Real publishers understand BadName; the name is free as soon as its publisher has gone, even if it was killed."""
    with running() as relay:
        with publishing(relay, clip) as first:
            again = ["ffmpeg", "-v", "error", "-nostdin", "-i", str(clip), "-c", "copy", "-f", "flv"]
            second = subprocess.run(
                [*again, f"{relay.address}/live/camera"], capture_output=True, text=True, timeout=LIMIT, check=False
            )
            assert second.returncode != 0
            assert "this name is in use" in second.stderr
            player = probe(f"{relay.address}/live/camera")
            relay.wait_for("plays 'live/camera'")
            first.kill()
            decoded(player)
            relay.wait_for("has stopped publishing")
        with publishing(relay, clip):
            pass


@needs_ffmpeg
@needs_rtmpdump
def test_stop_ends_players_and_publishers_properly(clip: Path, tmp_path: Path) -> None:
    """On SIGTERM, players are notified that their stream has ended, and the relay exits."""
    file = tmp_path / "video.flv"
    with running() as relay, publishing(relay, clip):
        rtmpdump = ["rtmpdump", "-q", "-r", f"{relay.address}/live/camera", "-o", str(file)]
        with subprocess.Popen(rtmpdump) as dumping:
            player = probe(f"{relay.address}/live/camera")
            relay.wait_for("plays 'live/camera'", times=2)
            relay.process.send_signal(signal.SIGTERM)
            assert dumping.wait(LIMIT) == 0
            decoded(player)
            assert relay.process.wait(LIMIT) == 0
    decoded(probe(file))


@needs_ffmpeg
def test_timestamps_go_on_past_24_bits(clip: Path) -> None:
    """After four hours and a half, timestamps need a longer header (section 5.3.1.3), and no picture is lost."""
    with running() as relay, publishing(relay, clip, "-t", "2", offset=16776.2) as publisher:
        player = probe(f"{relay.address}/live/camera")
        relay.wait_for("plays 'live/camera'")
        publisher.wait(LIMIT)
        start, frames = decoded(player)

    assert 16776 < start < 16777
    assert round(20 * (start - 16776.2)) + frames in range(40, 44)
