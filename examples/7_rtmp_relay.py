"""A relay for live video: ffmpeg or OBS publish streams to it over RTMP, and any number of players watch them.

Run the relay, a publisher, and one or more players, each in a terminal of its own::

    python examples/7_rtmp_relay.py [PORT]
    ffmpeg -re -f lavfi -i testsrc -c:v libx264 -pix_fmt yuv420p -g 50 -f flv rtmp://127.0.0.1:1935/live/camera
    ffplay rtmp://127.0.0.1:1935/live/camera

For OBS, the server is ``rtmp://127.0.0.1:1935/live``, the stream key ``camera``, and the encoder one for H.264.

Note that a player that joins late has a picture at once. Suspend a player with Ctrl-Z: the others are not affected, and
after ``fg`` it continues at a later key frame, with intact pictures. Publish a second stream under the same name: it is
refused. Ctrl-C stops the relay.

The code is in this order: handshake, chunks, commands, relay. Section numbers refer to Adobe's RTMP specification 1.0;
audio and video messages are specified in Adobe's Video File Format Specification 10.1, appendix E.4.
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

# How many seconds a client may send nothing, receive nothing of what it is sent, or take for one message.
TIMEOUT = 30.0

# Bounds on memory for each connection. RTMP itself allows messages of 16 MiB, and any number of them at once.
MAX_MEDIA = 2**20  # bytes of an audio or video message, and of all incomplete messages on one connection
MAX_OTHER = 2**14  # bytes of any other message
MAX_CHUNK_STREAMS = 16
MAX_DEPTH = 4  # of nested AMF0 objects
MAX_GROUP = 4 * 2**20  # bytes of a group of pictures that is kept for players that join; if it is longer, they wait

# Unsent bytes of audio and video that a player may have, and all its unsent bytes. A player that is this far behind
# takes its own copy of them, and a share of the next ones: no connection takes more than about 10 MiB.
MAX_BEHIND = MAX_GROUP + MAX_MEDIA
MAX_UNSENT = MAX_BEHIND + 2**16
CAUGHT_UP = 2**16  # a player that was too slow continues when it has at most this many unsent bytes

# Pushing one message costs as much as pushing ten together, so messages are gathered for this many seconds or bytes.
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

# These are the same for every client, so that a message is encoded once for all players.
CHUNK_SIZE = 2**16
CHUNK_STREAMS: dict[int, int] = {Kind.COMMAND: 3, Kind.AUDIO: 4, Kind.DATA: 5, Kind.VIDEO: 6}  # 2 for the others
STREAM_ID = 1  # the one message stream that a client may create
WINDOW = 2_500_000  # bytes after which a client has to acknowledge them


# --- Handshake (section 5.2)


async def shake_hands(connection: Connection) -> None:
    """Exchange C0 C1 C2 and S0 S1 S2: each side sends the other's random bytes back."""
    (version,) = await connection.receive_exactly(1)
    if version != 3:
        raise ProtocolError(f"not RTMP: C0 has version {version}, not 3")
    c1 = await connection.receive_exactly(1536)
    s1 = bytes(8) + os.urandom(1528)  # time, zero, random
    connection.push(bytes([version]) + s1 + c1)  # S2 is a copy of C1
    await connection.receive_exactly(1536)  # C2, unchecked: some clients send other bytes


# --- Chunks: messages are sent in pieces, so that a large one does not delay others (section 5.3)


class Message(NamedTuple):
    """A message, assembled from its chunks."""

    kind: int
    timestamp: int  # milliseconds, modulo 2**32
    body: bytes


@attrs.define
class ChunkStream:
    """The last header fields of one chunk stream, for headers that omit them, and its incomplete message."""

    kind: int = 0
    length: int = 0
    timestamp: int = 0
    time_field: int = 0  # as in the header: absolute, or a delta
    extended: bool = False  # the time field is in 4 extra bytes
    body: bytearray = attrs.field(factory=bytearray)


class Incoming:
    """Decodes what one client sends."""

    def __init__(self) -> None:
        self._chunk_size = 128
        self._chunk_streams: dict[int, ChunkStream] = {}
        self._received = self._acknowledged = 0  # bytes
        self._window = 0  # bytes after which the client expects an acknowledgement; 0: none

    async def read_message(self, connection: Connection) -> Message:
        """Receive chunks until a message is complete, and carry it out if it controls the connection.

        After a cancellation, bytes of incomplete messages would be received twice. Here it always ends the connection.
        """
        chunk_stream = await self._read_chunk(connection)
        while len(chunk_stream.body) < chunk_stream.length:
            chunk_stream = await self._read_chunk(connection)
        message = Message(chunk_stream.kind, chunk_stream.timestamp, bytes(chunk_stream.body))
        chunk_stream.body.clear()
        self._control(connection, message)
        if message.kind == Kind.COMMAND:  # one may take milliseconds to decode, and many may arrive together
            await trio.lowlevel.checkpoint()
        return message

    async def _read_chunk(self, connection: Connection) -> ChunkStream:
        (first,) = await self._receive(connection, 1)
        header_format, number = first >> 6, first & 0x3F
        if number < 2:  # 0: the number is in the next byte; 1: in the next two
            number = 64 + int.from_bytes(await self._receive(connection, number + 1), "little")
        chunk_stream = self._chunk_streams.get(number)
        if chunk_stream is None:
            if header_format != 0:
                raise ProtocolError(f"chunk stream {number} begins without a full header")
            if len(self._chunk_streams) == MAX_CHUNK_STREAMS:
                raise ProtocolError(f"more than {MAX_CHUNK_STREAMS} chunk streams")
            chunk_stream = self._chunk_streams[number] = ChunkStream()
        begins = not chunk_stream.body
        if not begins and header_format != 3:  # 3: no header, a continuation
            raise ProtocolError(f"chunk stream {number} begins a message inside another")
        # Fields that a shorter header omits are as in the previous chunk.
        header = await self._receive(connection, (11, 7, 3, 0)[header_format])
        if header:
            chunk_stream.time_field = int.from_bytes(header[:3], "big")
            chunk_stream.extended = chunk_stream.time_field == 0xFFFFFF
        if header[3:]:
            chunk_stream.length, chunk_stream.kind = int.from_bytes(header[3:6], "big"), header[6]
        if chunk_stream.extended:  # also in chunks without a header (section 5.3.1.3)
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

    def _control(self, connection: Connection, message: Message) -> None:
        """Carry out a message that controls the connection itself (sections 5.4 and 7.1.7)."""
        number = int.from_bytes(message.body[:4], "big")
        match message.kind:
            case Kind.SET_CHUNK_SIZE:
                if not 128 <= number < 2**31:  # RTMP allows 1, but recommends at least 128
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
    """Return a message in chunks: the first with a full header, the others without one."""
    number = CHUNK_STREAMS.get(kind, 2)
    extended = timestamp.to_bytes(4, "big") if timestamp >= 0xFFFFFF else b""
    time_field = min(timestamp, 0xFFFFFF).to_bytes(3, "big")
    header = time_field + len(body).to_bytes(3, "big") + bytes([kind]) + stream_id.to_bytes(4, "little") + extended
    pieces = [body[start : start + CHUNK_SIZE] for start in range(0, len(body), CHUNK_SIZE)]
    return bytes([number]) + header + (bytes([0xC0 | number]) + extended).join(pieces)


def encode_control(kind: int, number: int, rest: bytes = b"") -> bytes:
    """Return a protocol control message, which is always on message stream 0."""
    return encode_message(kind, number.to_bytes(4, "big") + rest, stream_id=0)


def encode_user_control(event: int, data: bytes = STREAM_ID.to_bytes(4, "big")) -> bytes:
    """Return a user control message; most events are about a stream."""
    return encode_message(Kind.USER_CONTROL, event.to_bytes(2, "big") + data, stream_id=0)


# --- Commands: values in Action Message Format 0 (which has its own specification), and their meaning (section 7.2)


def encode_amf0(value: object) -> bytes:
    """Return a number, a string, an object or null."""
    match value:
        case float():
            return b"\x00" + struct.pack(">d", value)
        case str():
            return b"\x02" + len(value.encode()).to_bytes(2, "big") + value.encode()
        case dict():  # a key is a string without its type
            return b"\x03" + b"".join(encode_amf0(k)[1:] + encode_amf0(v) for k, v in value.items()) + b"\0\0\x09"
        case _:
            return b"\x05"


def decode_amf0(body: io.BytesIO, depth: int = 0) -> Any:
    """Read one value from ``body``."""
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
            _take(body, 4 if kind == 8 else 0)  # an array begins with a count, which is redundant
            values = {}
            while name := _take_string(body):
                values[name] = decode_amf0(body, depth + 1)
            if _take(body, 1) != b"\x09":
                raise ProtocolError("an AMF0 object without an end marker")
            return values
        case 5 | 6:
            return None
        case 10:
            count = int.from_bytes(_take(body, 4), "big")
            return [decode_amf0(body, depth + 1) for _ in range(count)]
        case kind:
            raise ProtocolError(f"unsupported AMF0 type {kind}")


def _take(body: io.BytesIO, n: int) -> bytes:
    data = body.read(n)
    if len(data) < n:
        raise ProtocolError("truncated AMF0 value")
    return data


def _take_string(body: io.BytesIO) -> str:
    return _take(body, int.from_bytes(_take(body, 2), "big")).decode(errors="replace")


def decode_command(message: Message) -> list[Any]:
    """Return a command's values: its name, its transaction, and its arguments; [] for other messages."""
    body, values = io.BytesIO(message.body), []
    while message.kind == Kind.COMMAND and body.tell() < len(message.body):
        values.append(decode_amf0(body))
    return values


def encode_command(*values: object, stream_id: int = 0) -> bytes:
    """Return a command."""
    return encode_message(Kind.COMMAND, b"".join(map(encode_amf0, values)), stream_id=stream_id)


def encode_status(level: str, code: str, description: str) -> bytes:
    """Return a notification about a client's stream; ``level`` is "status" or "error" (section 7.2.2)."""
    status = {"level": level, "code": code, "description": description}
    return encode_command("onStatus", 0.0, None, status, stream_id=STREAM_ID)


async def negotiate(connection: Connection, incoming: Incoming) -> tuple[str, str] | None:
    """Answer commands until one is "publish" or "play"; return it and the stream's name, or None at end of stream."""
    app = ""
    async for message in connection.requests(incoming.read_message):
        match decode_command(message):
            case ["connect", float(transaction), {"app": str(app)}, *_]:
                connection.push(encode_control(Kind.WINDOW_SIZE, WINDOW))
                connection.push(encode_control(Kind.PEER_BANDWIDTH, WINDOW, b"\x02"))  # 2: at most this
                connection.push(encode_control(Kind.SET_CHUNK_SIZE, CHUNK_SIZE))
                server = {"fmsVer": "FMS/3,0,1,123", "capabilities": 31.0}  # what clients expect
                status = {"level": "status", "code": "NetConnection.Connect.Success", "objectEncoding": 0.0}
                connection.push(encode_command("_result", transaction, server, status))
            case ["createStream", float(transaction), *_]:
                connection.push(encode_command("_result", transaction, None, float(STREAM_ID)))
            case ["publish" | "play" as action, float(), _, str(name), *_] if app:
                return action, f"{app}/{name}"
            case ["getStreamLength", float(transaction), *_]:
                connection.push(encode_command("_result", transaction, None, 0.0))  # live
            case ["releaseStream" | "FCPublish" | "FCSubscribe", float(transaction), *_]:
                connection.push(encode_command("_result", transaction, None, None))  # nothing to do
            case [str(), float(transaction), *_] if transaction != 0:  # 0: no answer expected
                status = {"level": "error", "code": "NetConnection.Call.Failed", "description": "unknown command"}
                connection.push(encode_command("_error", transaction, None, status))
    return None


def ends_stream(message: Message) -> bool:
    """Return whether a command ends the client's stream."""
    return decode_command(message)[:1] in (["FCUnpublish"], ["closeStream"], ["deleteStream"])


# --- Relay: one publisher, and its players


@attrs.define(eq=False)
class Stream:
    """What is published under one name.

    Its messages form groups of pictures: a key frame, and the frames that depend on it. A player that has missed a
    message cannot decode the rest of its group. Without video, each audio message is a group.
    """

    has_video: bool = False
    settings: dict[int, bytes] = attrs.field(factory=dict)  # metadata and decoder configuration, by kind
    group: bytearray | None = None  # the latest, encoded; None if there is none, or it is too long
    gathered: bytearray = attrs.field(factory=bytearray)  # to be pushed on the next beat
    players: dict[Connection, trio.CancelScope] = attrs.field(factory=dict)  # each with the scope that ends it
    watching: set[Connection] = attrs.field(factory=set)  # players that have been sent all of the latest group


def is_settings(message: Message) -> bool:
    """Return whether this is metadata, or a sequence header of AVC or AAC."""
    match message.kind:
        case Kind.DATA:
            return message.body.startswith(encode_amf0("onMetaData"))
        case Kind.VIDEO:
            return message.body[0] & 0x0F == 7 and message.body[1] == 0
        case _:
            return message.body[0] >> 4 == 10 and message.body[1] == 0


def begins_group(stream: Stream, message: Message) -> bool:
    """Return whether a decoder that has the settings can begin with this message."""
    match message.kind:
        case Kind.VIDEO:  # a key frame; AVC also marks sequence header (0) and end of sequence (2) as one
            frame, codec = divmod(message.body[0], 16)
            return frame == 1 and (codec != 7 or message.body[1] == 1)
        case Kind.AUDIO:
            return not stream.has_video and not is_settings(message)
        case _:
            return False


def pass_on(stream: Stream, message: Message) -> None:
    """Queue a message for the players that can use it. This never waits for a client."""
    kind, timestamp, body = message
    if kind == Kind.VIDEO and body[0] & 0x8F > 7:  # we cannot find settings and key frames of HEVC or AV1
        raise ProtocolError(f"video of type {body[0]:#04x}: codecs newer than AVC (H.264) are not supported")
    if kind == Kind.VIDEO and not stream.has_video:  # all players must wait for its key frame
        push_gathered(stream)
        stream.has_video = True
        stream.group = None
        stream.watching.clear()
    if is_settings(message):
        if len(body) > MAX_OTHER:
            raise ProtocolError(f"decoder settings of {len(body)} bytes: more than {MAX_OTHER}")
        stream.settings[kind] = body
        if kind == Kind.DATA:
            timestamp = 0  # with another timestamp, ffmpeg treats metadata as a subtitle
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
    """Begin a group with the settings, at its own timestamp, and push it to players that wait for one."""
    stream.group = bytearray()
    for kind, when in (Kind.DATA, 0), (Kind.VIDEO, timestamp), (Kind.AUDIO, timestamp):
        if kind in stream.settings:
            stream.group += encode_message(kind, stream.settings[kind], timestamp=when)
    for player in stream.players.keys() - stream.watching:
        if player.unsent <= CAUGHT_UP:
            begin(stream, player)
            print(f"{player.peer} starts at a key frame", flush=True)


def begin(stream: Stream, player: Connection) -> None:
    """Push the latest group to a player, if there is one, and add it to those that watch."""
    if stream.group is not None:
        push_gathered(stream)
        player.push(stream.group)
        stream.watching.add(player)


def push_gathered(stream: Stream) -> None:
    """Push what was gathered to the players that watch; one without room for it misses the rest of the group."""
    data = bytes(stream.gathered)
    stream.gathered.clear()
    for player in stream.watching.copy() if data else ():
        if player.unsent + len(data) <= MAX_BEHIND:
            player.push(data)
        else:
            stream.watching.remove(player)
            print(f"{player.peer} is too slow: it skips to a later key frame", flush=True)


def ping(stream: Stream) -> None:
    """Ping the players: without answers, one that waits long for a key frame would time out as idle."""
    for player in stream.players:
        player.push(encode_user_control(PING_REQUEST, bytes(4)))


async def regularly(seconds: float, do: Callable[[Stream], None], stream: Stream) -> None:
    """Call ``do(stream)`` again and again, with this many seconds in between."""
    while True:
        await trio.sleep(seconds)
        do(stream)


async def publish(streams: dict[str, Stream], name: str, connection: Connection, incoming: Incoming) -> None:
    """Relay a publisher's messages until it ends, disconnects, or the server stops; then end its players."""
    if name in streams:
        connection.push(encode_status("error", "NetStream.Publish.BadName", "this name is in use"))
        return
    print(f"{connection.peer} publishes {name!r:.60}", flush=True)
    connection.push(encode_user_control(STREAM_BEGIN))
    connection.push(encode_status("status", "NetStream.Publish.Start", "publishing"))
    stream = streams[name] = Stream()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(regularly, BEAT, push_gathered, stream)
            nursery.start_soon(regularly, TIMEOUT / 3, ping, stream)
            async for message in connection.requests(incoming.read_message):
                if ends_stream(message):
                    break
                match message.kind:
                    case Kind.AUDIO | Kind.VIDEO if len(message.body) > 1:  # else it is empty
                        pass_on(stream, message)
                    case Kind.DATA:  # "@setDataFrame" is for the server, the rest for players
                        pass_on(stream, message._replace(body=message.body.removeprefix(encode_amf0("@setDataFrame"))))
            nursery.cancel_scope.cancel()
    finally:
        del streams[name]
        push_gathered(stream)
        for scope in stream.players.values():
            scope.cancel()
        print(f"{connection.peer} has stopped publishing", flush=True)
    connection.push(encode_status("status", "NetStream.Unpublish.Success", "unpublished"))


async def play(streams: dict[str, Stream], name: str, connection: Connection, incoming: Incoming) -> None:
    """Serve a player until it ends, disconnects, its stream ends, or the server stops."""
    stream = streams.get(name)
    if stream is None:
        connection.push(encode_status("error", "NetStream.Play.StreamNotFound", "no stream has this name"))
        return
    print(f"{connection.peer} plays {name!r:.60}", flush=True)
    connection.push(encode_user_control(STREAM_BEGIN))
    connection.push(encode_status("status", "NetStream.Play.Start", "playing"))
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
    """Serve one client; ``streams`` is shared by all clients."""
    async with Connection(stream, idle_timeout=TIMEOUT, request_timeout=TIMEOUT, max_unsent=MAX_UNSENT) as connection:
        await shake_hands(connection)
        incoming = Incoming()
        match await negotiate(connection, incoming):
            case "publish", name:
                await publish(streams, name, connection, incoming)
            case "play", name:
                await play(streams, name, connection, incoming)


def announce(address: str) -> None:
    """Print where the server listens."""
    print(f"listening on rtmp://{address}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        port = int(sys.argv[1]) if sys.argv[1:] else 1935
        trio.run(functools.partial(serve_until_signal, functools.partial(relay, {}), port, announce=announce))
    except OSError as error:
        sys.exit(f"7_rtmp_relay.py: {error}: choose another port")
