"""The way to RTMP: the handshake, chunks and first messages of a real publisher, on `trioproto.Connection`.

A server for ffmpeg, rtmpdump and other RTMP clients that prints what the client asks for, up to the name of the stream
that it wants to publish or play, and then declines. Section numbers are those of the RTMP specification 1.0.

Run it, and a client beside it::

    python examples/7_way_to_rtmp.py [PORT]
    ffmpeg -f lavfi -i testsrc -f flv rtmp://127.0.0.1:1935/live/camera
    rtmpdump -r rtmp://127.0.0.1:1935/live/camera -o video.flv

Look for ``connect`` with its app name, and how many chunks it comes in; then for ``publish`` or ``play``.
"""

import functools
import io
import logging
import os
import struct
import sys
from typing import Any

import attrs
import trio

from trioproto import Connection, ProtocolError, serve_until_signal

# What a client may make us hold; the specification allows messages of 16 MiB, any number at once. And for how many
# seconds it may be silent, or take over one message.
MAX_MESSAGE = 64 * 1024
MAX_CHUNK_STREAMS = 16
MAX_DEPTH = 4  # of AMF0 objects in objects
TIMEOUT = 30.0

SET_CHUNK_SIZE, COMMAND = 1, 20  # message types, sections 5.4 and 7.1
KINDS = {SET_CHUNK_SIZE: "set chunk size", 4: "user control", 5: "window acknowledgement size"}


async def handshake(connection: Connection) -> None:
    """Exchange C0 C1 C2 and S0 S1 S2: each side has its random bytes sent back to it (section 5.2)."""
    (version,) = await connection.receive_exactly(1)
    if version != 3:
        raise ProtocolError(f"no RTMP: C0 is version {version}, not 3")
    c1 = await connection.receive_exactly(1536)
    s1 = bytes(8) + os.urandom(1528)  # time, zero, random
    connection.push(bytes([version]) + s1 + c1)  # the last is S2: C1 back as it came
    c2 = await connection.receive_exactly(1536)
    if c2[8:] != s1[8:]:
        raise ProtocolError("no RTMP: C2 does not bring back the random bytes of S1")


@attrs.define
class ChunkStream:
    """The message that is being put together from the chunks of one chunk stream."""

    length: int = 0
    kind: int = 0
    extended: bool = False  # has a timestamp too large for the header
    chunks: int = 0
    body: bytearray = attrs.field(factory=bytearray)


class Messages:
    """Messages out of chunks: cut into pieces, so that a large one does not hold up the others (section 5.3)."""

    def __init__(self) -> None:
        self._chunk_size = 128
        self._chunk_streams: dict[int, ChunkStream] = {}

    async def receive(self, connection: Connection) -> ChunkStream:
        """Receive chunks until a message is whole."""
        chunk_stream = await self._receive_chunk(connection)
        while len(chunk_stream.body) < chunk_stream.length:
            chunk_stream = await self._receive_chunk(connection)
        message = attrs.evolve(chunk_stream)
        chunk_stream.body, chunk_stream.chunks = bytearray(), 0
        if message.kind == SET_CHUNK_SIZE:
            self._chunk_size = int.from_bytes(message.body[:4], "big")
            if not 1 <= self._chunk_size < 2**31:
                raise ProtocolError(f"set chunk size {self._chunk_size}: not 1 to {2**31 - 1}")
        return message

    async def _receive_chunk(self, connection: Connection) -> ChunkStream:
        (first,) = await connection.receive_exactly(1)
        header_format, number = first >> 6, first & 0x3F
        if number < 2:  # 0: the number is in one more byte; 1: in two more
            number = 64 + int.from_bytes(await connection.receive_exactly(number + 1), "little")
        chunk_stream = self._chunk_streams.get(number)
        if chunk_stream is None:
            if header_format != 0:
                raise ProtocolError(f"chunk stream {number} begins without a full header")
            if len(self._chunk_streams) == MAX_CHUNK_STREAMS:
                raise ProtocolError(f"more than {MAX_CHUNK_STREAMS} chunk streams")
            chunk_stream = self._chunk_streams[number] = ChunkStream()
        elif chunk_stream.body and header_format != 3:  # 3: nothing new, the message goes on
            raise ProtocolError(f"chunk stream {number} begins a message inside another")
        # What is left out of a shorter header is as in the chunk before.
        header = await connection.receive_exactly([11, 7, 3, 0][header_format])
        if header:
            chunk_stream.extended = header[:3] == b"\xff\xff\xff"
        if header[3:]:
            chunk_stream.length, chunk_stream.kind = int.from_bytes(header[3:6], "big"), header[6]
        if chunk_stream.length > MAX_MESSAGE:
            raise ProtocolError(f"a message of {chunk_stream.length} bytes: more than {MAX_MESSAGE}")
        if chunk_stream.extended:
            await connection.receive_exactly(4)
        missing = chunk_stream.length - len(chunk_stream.body)
        chunk_stream.body += await connection.receive_exactly(min(missing, self._chunk_size))
        chunk_stream.chunks += 1
        return chunk_stream


def encode_command(*values: object, stream_id: int = 0) -> bytes:
    """Return a command as the chunks of one message, on chunk stream 3."""
    body = b"".join(encode_amf0(value) for value in values)
    header = b"\x03\0\0\0" + len(body).to_bytes(3, "big") + bytes([COMMAND]) + stream_id.to_bytes(4, "little")
    return header + b"\xc3".join(body[start : start + 128] for start in range(0, len(body), 128))


def encode_amf0(value: object) -> bytes:
    """Return a number, a string, an object or null in the Action Message Format."""
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
    """Take one value in the Action Message Format from ``body``."""
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
        case kind:
            raise ProtocolError(f"AMF0 type {kind}: not one that commands need")


def decode_values(data: bytes | bytearray) -> list[Any]:
    """Return the values, one after the other, that a command consists of."""
    body, values = io.BytesIO(data), []
    while body.tell() < len(data):
        values.append(decode_amf0(body))
    return values


def _take(body: io.BytesIO, n: int) -> bytes:
    data = body.read(n)
    if len(data) < n:
        raise ProtocolError("an AMF0 value is cut short")
    return data


def _take_string(body: io.BytesIO) -> str:
    return _take(body, int.from_bytes(_take(body, 2), "big")).decode(errors="replace")


async def handler(stream: trio.abc.Stream) -> None:
    """Serve one client up to the name of its stream, and print what it asks for."""
    async with Connection(stream, idle_timeout=TIMEOUT, request_timeout=TIMEOUT) as connection:
        say = functools.partial(print, connection.peer, flush=True)
        await handshake(connection)
        say("handshake: 1528 random bytes there and back")
        async for message in connection.requests(Messages().receive):
            size = f"({message.length} bytes in {message.chunks} chunk{'s' if message.chunks > 1 else ''})"
            if message.kind != COMMAND:
                say(f"{KINDS.get(message.kind, f'message of type {message.kind}')} {size}")
                continue
            match decode_values(message.body):
                case ["connect", float(transaction), dict(asked), *_]:
                    say(f"connect: app {asked.get('app')!r:.40} {size}")
                    say(f"  from {asked.get('flashVer')!r:.50}")
                    status = {"level": "status", "code": "NetConnection.Connect.Success"}
                    connection.push(encode_command("_result", transaction, None, status))
                case ["createStream", float(transaction), *_]:
                    say(f"createStream: is given stream 1 {size}")
                    connection.push(encode_command("_result", transaction, None, 1.0))
                case ["publish" | "play" as command, float(), None, str(name), *_]:
                    say(f"{command}: stream {name!r:.40} {size}")
                    code = f"NetStream.{command.title()}.Failed"
                    status = {"level": "error", "code": code, "description": "The tour ends here"}
                    connection.push(encode_command("onStatus", 0.0, None, status, stream_id=1))
                    break
                case values:
                    say(f"left without an answer: {values!r:.50} {size}")


def announce(address: str) -> None:
    """Say where the server listens."""
    print(f"listening on rtmp://{address}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        port = int(sys.argv[1]) if sys.argv[1:] else 1935
        trio.run(functools.partial(serve_until_signal, handler, port, announce=announce))
    except OSError as error:
        sys.exit(f"7_way_to_rtmp.py: {error}: choose another port")
