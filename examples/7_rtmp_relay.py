"""A relay for live video: ffmpeg or OBS publish streams to it over RTMP, and any number of players watch them.

Run it, publish to it, and watch; each in a terminal of its own, and the last one as often as you like::

    python examples/7_rtmp_relay.py [PORT]
    ffmpeg -re -f lavfi -i testsrc -c:v libx264 -pix_fmt yuv420p -g 50 -f flv rtmp://127.0.0.1:1935/live/camera
    ffplay rtmp://127.0.0.1:1935/live/camera

For OBS, the server is ``rtmp://127.0.0.1:1935/live``, the stream key ``camera``, and the encoder one for H.264.

Look at a player that joins late: it has a picture at once. Stop one with Ctrl-Z: the others go on; after ``fg`` it goes
on as well, without what it has missed, and with whole pictures. Publish under the same name twice. End the relay with
Ctrl-C.

It reads from top to bottom: handshake, chunks, commands, relay. Section numbers are those of Adobe's RTMP specification
1.0; what is in the messages of audio and video is in its Video File Format Specification 10.1, appendix E.4.
"""

import enum
import functools
import io
import logging
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import trio

from trioproto import Connection, ProtocolError, serve_until_signal

# How many seconds a client may be silent, take nothing of what it is sent, or spend on one message.
TIMEOUT = 30.0

# What a client may make us hold. RTMP itself allows messages of 16 MiB, and any number of them at once.
MAX_MEDIA = 2**20  # bytes of an audio or video message, and of all messages that have begun on one connection
MAX_OTHER = 2**14  # bytes of any other message
MAX_CHUNK_STREAMS = 16
MAX_DEPTH = 4  # of AMF0 objects in objects
MAX_GROUP = 4 * 2**20  # bytes of a group of pictures that are kept for players that join; past that, they wait

# Bytes of audio and video that may wait for a player, and all bytes that may. A player that is behind so far costs its
# own copy of them, and a share in the next as many: no connection takes more than about 10 MiB.
MAX_BEHIND = MAX_GROUP + MAX_MEDIA
MAX_UNSENT = MAX_BEHIND + 2**16
CAUGHT_UP = 2**16  # a player that was too slow goes on when no more bytes than these wait for it

# A push costs the same for one message as for ten. So they are gathered, for so many seconds and up to so many bytes.
BEAT = 0.05
MAX_GATHERED = 2**16


class Kind(enum.IntEnum):
    """Message types (sections 5.4 and 7.1)."""

    SET_CHUNK_SIZE = 1
    ABORT = 2
    ACKNOWLEDGEMENT = 3
    USER_CONTROL = 4
    WINDOW_SIZE = 5
    PEER_BANDWIDTH = 6
    AUDIO = 8
    VIDEO = 9
    DATA = 18
    COMMAND = 20


STREAM_BEGIN, STREAM_EOF, PING_REQUEST, PING_RESPONSE = 0, 1, 6, 7  # events of user control (section 7.1.7)

# What we send has the same form for every client, so that a message is encoded once for all players.
CHUNK_SIZE = 2**16
CHUNK_STREAMS: dict[int, int] = {Kind.COMMAND: 3, Kind.AUDIO: 4, Kind.DATA: 5, Kind.VIDEO: 6}  # for the others, it is 2
STREAM_ID = 1  # of the one message stream that a client may create
WINDOW = 2_500_000  # bytes after which a client is to tell that it has received them


# --- Handshake (section 5.2)


async def shake_hands(connection: Connection) -> None:
    """Exchange C0 C1 C2 and S0 S1 S2: each side has its random bytes sent back to it."""
    (version,) = await connection.receive_exactly(1)
    if version != 3:
        raise ProtocolError(f"no RTMP: C0 is version {version}, not 3")
    c1 = await connection.receive_exactly(1536)
    s1 = bytes(8) + os.urandom(1528)  # time, zero, random
    connection.push(bytes([version]) + s1 + c1)  # the last is S2: C1 back as it came
    await connection.receive_exactly(1536)  # C2 proves nothing, and some clients do not send back what they should


# --- Chunks: messages are cut into pieces, so that a large one does not hold up the others (section 5.3)


class Message(NamedTuple):
    """A message, as it comes out of the chunks."""

    kind: int
    timestamp: int  # milliseconds, modulo 2**32
    body: bytes


@attrs.define
class ChunkStream:
    """What the chunks of one chunk stream said last, for those that leave it out; and the message that is under way."""

    kind: int = 0
    length: int = 0
    timestamp: int = 0
    time_field: int = 0  # as in the header: the timestamp itself, or how much later it is
    extended: bool = False  # the time field is in 4 more bytes
    body: bytearray = attrs.field(factory=bytearray)


class Incoming:
    """What one client sends."""

    def __init__(self) -> None:
        self._chunk_size = 128
        self._chunk_streams: dict[int, ChunkStream] = {}
        self._received = self._acknowledged = 0  # bytes
        self._window = 0  # bytes after which the client wants to be told so, if it does

    async def read_message(self, connection: Connection) -> Message:
        """Receive chunks until a message is whole, and heed it if it is about the connection.

        After a cancellation the chunks do not fit together any more; here, a cancellation ends the connection.
        """
        chunk_stream = await self._read_chunk(connection)
        while len(chunk_stream.body) < chunk_stream.length:
            chunk_stream = await self._read_chunk(connection)
        message = Message(chunk_stream.kind, chunk_stream.timestamp, bytes(chunk_stream.body))
        chunk_stream.body.clear()
        self._heed(connection, message)
        if message.kind == Kind.COMMAND:  # to decode one may take milliseconds, and a client may send many together
            await trio.lowlevel.checkpoint()
        return message

    async def _read_chunk(self, connection: Connection) -> ChunkStream:
        (first,) = await self._receive(connection, 1)
        header_format, number = first >> 6, first & 0x3F
        if number < 2:  # 0: the number is in one more byte; 1: in two more
            number = 64 + int.from_bytes(await self._receive(connection, number + 1), "little")
        chunk_stream = self._chunk_streams.get(number)
        if chunk_stream is None:
            if header_format != 0:
                raise ProtocolError(f"chunk stream {number} begins without a full header")
            if len(self._chunk_streams) == MAX_CHUNK_STREAMS:
                raise ProtocolError(f"more than {MAX_CHUNK_STREAMS} chunk streams")
            chunk_stream = self._chunk_streams[number] = ChunkStream()
        begins = not chunk_stream.body
        if not begins and header_format != 3:  # 3: nothing new, the message goes on
            raise ProtocolError(f"chunk stream {number} begins a message inside another")
        # What is left out of a shorter header is as in the chunk before.
        header = await self._receive(connection, (11, 7, 3, 0)[header_format])
        if header:
            chunk_stream.time_field = int.from_bytes(header[:3], "big")
            chunk_stream.extended = chunk_stream.time_field == 0xFFFFFF
        if header[3:]:
            chunk_stream.length, chunk_stream.kind = int.from_bytes(header[3:6], "big"), header[6]
        if chunk_stream.extended:  # each chunk has it, also those without a header (section 5.3.1.3)
            chunk_stream.time_field = int.from_bytes(await self._receive(connection, 4), "big")
        if begins:
            self._check_length(chunk_stream)
            earlier = 0 if header_format == 0 else chunk_stream.timestamp
            chunk_stream.timestamp = (earlier + chunk_stream.time_field) % 2**32
        missing = chunk_stream.length - len(chunk_stream.body)
        chunk_stream.body += await self._receive(connection, min(missing, self._chunk_size))
        return chunk_stream

    def _check_length(self, beginning: ChunkStream) -> None:
        most = MAX_MEDIA if beginning.kind in (Kind.AUDIO, Kind.VIDEO) else MAX_OTHER
        if beginning.length > most:
            raise ProtocolError(f"a message of {beginning.length} bytes and type {beginning.kind}: more than {most}")
        begun = sum(chunk_stream.length for chunk_stream in self._chunk_streams.values() if chunk_stream.body)
        if begun + beginning.length > MAX_MEDIA:
            raise ProtocolError(f"messages of {begun + beginning.length} bytes at once: more than {MAX_MEDIA}")

    async def _receive(self, connection: Connection, n: int) -> bytes:
        self._received += n
        return await connection.receive_exactly(n)

    def _heed(self, connection: Connection, message: Message) -> None:
        """Carry out what a message says about the connection itself (sections 5.4 and 7.1.7)."""
        number = int.from_bytes(message.body[:4], "big")
        match message.kind:
            case Kind.SET_CHUNK_SIZE:
                if not 128 <= number < 2**31:  # 1 is the least that RTMP allows, and 128 the least that it wants
                    raise ProtocolError(f"set chunk size {number}: not 128 to {2**31 - 1}")
                self._chunk_size = number
            case Kind.ABORT if number in self._chunk_streams:
                self._chunk_streams[number].body.clear()
            case Kind.WINDOW_SIZE:
                self._window = number
            case Kind.USER_CONTROL if message.body[:2] == PING_REQUEST.to_bytes(2, "big"):
                connection.push(encode_user_control(PING_RESPONSE, message.body[2:6]))
        if 0 < self._window <= self._received - self._acknowledged:
            self._acknowledged = self._received
            connection.push(encode_control(Kind.ACKNOWLEDGEMENT, self._received % 2**32))


def encode_message(kind: int, body: bytes, *, timestamp: int = 0, stream_id: int = STREAM_ID) -> bytes:
    """Return a message as its chunks: the first with a full header, the others with none."""
    number = CHUNK_STREAMS.get(kind, 2)
    extended = timestamp.to_bytes(4, "big") if timestamp >= 0xFFFFFF else b""
    time_field = min(timestamp, 0xFFFFFF).to_bytes(3, "big")
    header = time_field + len(body).to_bytes(3, "big") + bytes([kind]) + stream_id.to_bytes(4, "little") + extended
    pieces = [body[start : start + CHUNK_SIZE] for start in range(0, len(body), CHUNK_SIZE)]
    return bytes([number]) + header + (bytes([0xC0 | number]) + extended).join(pieces)


def encode_control(kind: int, number: int, rest: bytes = b"") -> bytes:
    """Return a message of protocol control, which is about the connection and so on message stream 0."""
    return encode_message(kind, number.to_bytes(4, "big") + rest, stream_id=0)


def encode_user_control(event: int, data: bytes = STREAM_ID.to_bytes(4, "big")) -> bytes:
    """Return a message of user control: most events are about a stream."""
    return encode_message(Kind.USER_CONTROL, event.to_bytes(2, "big") + data, stream_id=0)


# --- Commands: values in the Action Message Format 0 (its specification is one of its own), and what they ask for (7.2)


def encode_amf0(value: object) -> bytes:
    """Return a number, a string, an object or null."""
    match value:
        case float():
            return b"\x00" + struct.pack(">d", value)
        case str():
            return b"\x02" + len(value.encode()).to_bytes(2, "big") + value.encode()
        case dict():  # a name is a string without its type
            return b"\x03" + b"".join(encode_amf0(k)[1:] + encode_amf0(v) for k, v in value.items()) + b"\0\0\x09"
        case _:
            return b"\x05"


def decode_amf0(body: io.BytesIO, depth: int = 0) -> Any:
    """Take one value from ``body``."""
    if depth > MAX_DEPTH:
        raise ProtocolError(f"AMF0 objects nested more than {MAX_DEPTH} deep")
    match _take(body, 1)[0]:
        case 0:
            return struct.unpack(">d", _take(body, 8))[0]
        case 1:
            return _take(body, 1) != b"\0"
        case 2:
            return _take_string(body)
        case 3 | 8 as kind:
            _take(body, 4 if kind == 8 else 0)  # an array has a count in front that nobody needs
            values = {}
            while name := _take_string(body):
                values[name] = decode_amf0(body, depth + 1)
            if _take(body, 1) != b"\x09":
                raise ProtocolError("an AMF0 object without its end")
            return values
        case 5 | 6:
            return None
        case 10:
            count = int.from_bytes(_take(body, 4), "big")
            return [decode_amf0(body, depth + 1) for _ in range(count)]
        case kind:
            raise ProtocolError(f"AMF0 type {kind}: not one that commands need")


def _take(body: io.BytesIO, n: int) -> bytes:
    data = body.read(n)
    if len(data) < n:
        raise ProtocolError("an AMF0 value is cut short")
    return data


def _take_string(body: io.BytesIO) -> str:
    return _take(body, int.from_bytes(_take(body, 2), "big")).decode(errors="replace")


def decode_command(message: Message) -> list[Any]:
    """Return the values that a command consists of: its name, its transaction, and more; none for other messages."""
    body, values = io.BytesIO(message.body), []
    while message.kind == Kind.COMMAND and body.tell() < len(message.body):
        values.append(decode_amf0(body))
    return values


def encode_command(*values: object, stream_id: int = 0) -> bytes:
    """Return a command."""
    return encode_message(Kind.COMMAND, b"".join(map(encode_amf0, values)), stream_id=stream_id)


def encode_status(level: str, code: str, description: str) -> bytes:
    """Return what tells a client how its stream is: ``level`` is "status" or "error" (section 7.2.2)."""
    status = {"level": level, "code": code, "description": description}
    return encode_command("onStatus", 0.0, None, status, stream_id=STREAM_ID)


async def negotiate(connection: Connection, incoming: Incoming) -> tuple[str, str] | None:
    """Answer a client's commands until one is "publish" or "play"; return that, and the name of the stream."""
    app = ""
    async for message in connection.requests(incoming.read_message):
        match decode_command(message):
            case ["connect", float(transaction), {"app": str(app)}, *_]:
                connection.push(encode_control(Kind.WINDOW_SIZE, WINDOW))
                connection.push(encode_control(Kind.PEER_BANDWIDTH, WINDOW, b"\x02"))  # 2: as it is, or less
                connection.push(encode_control(Kind.SET_CHUNK_SIZE, CHUNK_SIZE))
                server = {"fmsVer": "FMS/3,0,1,123", "capabilities": 31.0}  # what clients are used to
                status = {"level": "status", "code": "NetConnection.Connect.Success", "objectEncoding": 0.0}
                connection.push(encode_command("_result", transaction, server, status))
            case ["createStream", float(transaction), *_]:
                connection.push(encode_command("_result", transaction, None, float(STREAM_ID)))
            case ["publish" | "play" as action, float(), _, str(name), *_] if app:
                return action, f"{app}/{name}"
            case ["getStreamLength", float(transaction), *_]:
                connection.push(encode_command("_result", transaction, None, 0.0))  # it is live
            case ["releaseStream" | "FCPublish" | "FCSubscribe", float(transaction), *_]:
                connection.push(encode_command("_result", transaction, None, None))  # nothing that we would have to do
            case [str(), float(transaction), *_] if transaction != 0:  # 0: it wants no answer
                status = {"level": "error", "code": "NetConnection.Call.Failed", "description": "not known here"}
                connection.push(encode_command("_error", transaction, None, status))
    return None


def ends_stream(message: Message) -> bool:
    """Whether a client is done with its stream."""
    return decode_command(message)[:1] in (["FCUnpublish"], ["closeStream"], ["deleteStream"])


# --- Relay: one publisher, and its players


@attrs.define(eq=False)
class Stream:
    """What is published under one name.

    Its messages form groups of pictures: a key frame, and what can be decoded after it. So a player that has missed a
    message has to miss the rest of its group. Without video, each message of audio is a group.
    """

    has_video: bool = False
    settings: dict[int, bytes] = attrs.field(factory=dict)  # metadata, and what decoders need to begin; by kind
    group: bytearray | None = None  # the latest, as sent; None if there is none, or it is too long
    gathered: bytearray = attrs.field(factory=bytearray)  # what is to be pushed on the next beat
    players: dict[Connection, trio.CancelScope] = attrs.field(factory=dict)  # with what ends them
    watching: set[Connection] = attrs.field(factory=set)  # those that have the latest group up to here


def is_settings(message: Message) -> bool:
    """Whether this is metadata, an AVC sequence header, or one of AAC."""
    match message.kind:
        case Kind.DATA:
            return message.body.startswith(encode_amf0("onMetaData"))
        case Kind.VIDEO:
            return message.body[0] & 0x0F == 7 and message.body[1] == 0
        case _:
            return message.body[0] >> 4 == 10 and message.body[1] == 0


def begins_group(stream: Stream, message: Message) -> bool:
    """Whether a decoder that has the settings can begin with this message."""
    match message.kind:
        case Kind.VIDEO:  # a key frame; of AVC, settings (0) and the end of all pictures (2) are called so as well
            frame, codec = divmod(message.body[0], 16)
            return frame == 1 and (codec != 7 or message.body[1] == 1)
        case Kind.AUDIO:
            return not stream.has_video and not is_settings(message)
        case _:
            return False


def pass_on(stream: Stream, message: Message) -> None:
    """Have a message sent to the players that can use it. Waits for nobody."""
    kind, timestamp, body = message
    if kind == Kind.VIDEO and body[0] & 0x8F > 7:  # of HEVC or AV1, we would find neither settings nor key frames
        raise ProtocolError(f"video of type {body[0]:#04x}: AVC (H.264) is the latest codec that is relayed")
    if kind == Kind.VIDEO and not stream.has_video:  # whoever watches has only listened so far
        push_gathered(stream)
        stream.has_video = True
        stream.group = None
        stream.watching.clear()
    if is_settings(message):
        if len(body) > MAX_OTHER:
            raise ProtocolError(f"decoder settings of {len(body)} bytes: more than {MAX_OTHER}")
        stream.settings[kind] = body
        if kind == Kind.DATA:
            timestamp = 0  # ffmpeg takes metadata of any other time for a subtitle
    if begins_group(stream, message):
        open_group(stream, timestamp)
    data = encode_message(kind, body, timestamp=timestamp)
    stream.gathered += data
    if len(stream.gathered) >= MAX_GATHERED:
        push_gathered(stream)
    if stream.group is not None:
        stream.group += data
        if len(stream.group) > MAX_GROUP:
            stream.group = None


def open_group(stream: Stream, timestamp: int) -> None:
    """Let a group begin, for players that wait for one as well: with the settings, and on its own clock."""
    stream.group = bytearray()
    for kind, when in (Kind.DATA, 0), (Kind.VIDEO, timestamp), (Kind.AUDIO, timestamp):
        if kind in stream.settings:
            stream.group += encode_message(kind, stream.settings[kind], timestamp=when)
    for player in stream.players.keys() - stream.watching:
        if player.unsent <= CAUGHT_UP:
            begin(stream, player)
            print(f"{player.peer} begins at a key frame, now that it can", flush=True)


def begin(stream: Stream, player: Connection) -> None:
    """Have a player begin with the latest group, if there is one."""
    if stream.group is not None:
        push_gathered(stream)
        player.push(stream.group)
        stream.watching.add(player)


def push_gathered(stream: Stream) -> None:
    """Push what was gathered to all who watch; one that has no room for it misses the rest of a group."""
    data = bytes(stream.gathered)
    stream.gathered.clear()
    for player in stream.watching.copy() if data else ():
        if player.unsent + len(data) <= MAX_BEHIND:
            player.push(data)
        else:
            stream.watching.remove(player)
            print(f"{player.peer} is too slow: it misses pictures up to the next key frame", flush=True)


def ping(stream: Stream) -> None:
    """Have the players answer: one that has to wait long for a key frame would be let go as idle."""
    for player in stream.players:
        player.push(encode_user_control(PING_REQUEST, bytes(4)))


async def regularly(seconds: float, do: Callable[[Stream], None], stream: Stream) -> None:
    """Do something for a stream again and again, with so many seconds in between."""
    while True:
        await trio.sleep(seconds)
        do(stream)


async def publish(streams: dict[str, Stream], name: str, connection: Connection, incoming: Incoming) -> None:
    """Pass on what a publisher sends, until it is done, breaks off, or the server stops; then end its players."""
    if name in streams:
        connection.push(encode_status("error", "NetStream.Publish.BadName", "somebody publishes under this name"))
        return
    print(f"{connection.peer} publishes {name!r:.60}", flush=True)
    connection.push(encode_user_control(STREAM_BEGIN))
    connection.push(encode_status("status", "NetStream.Publish.Start", "go ahead"))
    stream = streams[name] = Stream()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(regularly, BEAT, push_gathered, stream)
            nursery.start_soon(regularly, TIMEOUT / 3, ping, stream)
            async for message in connection.requests(incoming.read_message):
                if ends_stream(message):
                    break
                match message.kind:
                    case Kind.AUDIO | Kind.VIDEO if len(message.body) > 1:  # else it is a header of nothing
                        pass_on(stream, message)
                    case Kind.DATA:  # "@setDataFrame" is for us; what follows is for the players
                        pass_on(stream, message._replace(body=message.body.removeprefix(encode_amf0("@setDataFrame"))))
            nursery.cancel_scope.cancel()
    finally:
        del streams[name]
        push_gathered(stream)
        for scope in stream.players.values():
            scope.cancel()
        print(f"{connection.peer} publishes no more", flush=True)
    connection.push(encode_status("status", "NetStream.Unpublish.Success", "done"))


async def play(streams: dict[str, Stream], name: str, connection: Connection, incoming: Incoming) -> None:
    """Let a player watch until it is done, or breaks off, its stream ends, or the server stops."""
    stream = streams.get(name)
    if stream is None:
        connection.push(encode_status("error", "NetStream.Play.StreamNotFound", "nobody publishes under this name"))
        return
    print(f"{connection.peer} plays {name!r:.60}", flush=True)
    connection.push(encode_user_control(STREAM_BEGIN))
    connection.push(encode_status("status", "NetStream.Play.Start", "here it comes"))
    begin(stream, connection)
    with trio.CancelScope() as stream.players[connection]:
        try:
            async for message in connection.requests(incoming.read_message):
                if ends_stream(message):
                    break
        finally:
            del stream.players[connection]
            stream.watching.discard(connection)
    connection.push(encode_user_control(STREAM_EOF))
    connection.push(encode_status("status", "NetStream.Play.UnpublishNotify", "the stream has ended"))


async def relay(streams: dict[str, Stream], stream: trio.abc.Stream) -> None:
    """Serve one client; ``streams`` is what all of them share."""
    async with Connection(stream, idle_timeout=TIMEOUT, request_timeout=TIMEOUT, max_unsent=MAX_UNSENT) as connection:
        await shake_hands(connection)
        incoming = Incoming()
        match await negotiate(connection, incoming):
            case "publish", name:
                await publish(streams, name, connection, incoming)
            case "play", name:
                await play(streams, name, connection, incoming)


def announce(address: str) -> None:
    """Say where the server listens."""
    print(f"listening on rtmp://{address}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        port = int(sys.argv[1]) if sys.argv[1:] else 1935
        trio.run(functools.partial(serve_until_signal, functools.partial(relay, {}), port, announce=announce))
    except OSError as error:
        sys.exit(f"7_rtmp_relay.py: {error}: choose another port")
