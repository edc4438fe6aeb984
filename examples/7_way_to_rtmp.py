"""The way to RTMP: the handshake, chunks and first messages of a real publisher, on ``receive_exactly``.

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
import os
import struct
import sys
from typing import Any

import attrs
import trio

from trioproto import IncompleteReadError, receive_exactly, serve_listeners
from trioproto.addresses import format_address, peer_name

# What a client may make us hold, and for how long. The specification allows messages of 16 MiB, any number at once.
MAX_MESSAGE = 64 * 1024
MAX_CHUNK_STREAMS = 16
MAX_DEPTH = 4  # of AMF0 objects in objects
MAX_SECONDS = 30

SET_CHUNK_SIZE, COMMAND = 1, 20  # message types, sections 5.4 and 7.1
KINDS = {SET_CHUNK_SIZE: "set chunk size", 4: "user control", 5: "window acknowledgement size"}


class RTMPError(ValueError):
    """What a client sent is no RTMP, or more of it than we take."""


async def handshake(stream: trio.abc.Stream) -> None:
    """Exchange C0 C1 C2 and S0 S1 S2: each side has its random bytes sent back to it (section 5.2)."""
    (version,) = await receive_exactly(stream, 1)
    if version != 3:
        raise RTMPError(f"no RTMP: C0 is version {version}, not 3")
    c1 = await receive_exactly(stream, 1536)
    s1 = bytes(8) + os.urandom(1528)  # time, zero, random
    await stream.send_all(bytes([version]) + s1 + c1)  # the last is S2: C1 back as it came
    c2 = await receive_exactly(stream, 1536)
    if c2[8:] != s1[8:]:
        raise RTMPError("no RTMP: C2 does not bring back the random bytes of S1")


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

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._chunk_size = 128
        self._chunk_streams: dict[int, ChunkStream] = {}

    async def receive(self) -> ChunkStream:
        """Receive chunks until a message is whole."""
        chunk_stream = await self._receive_chunk()
        while len(chunk_stream.body) < chunk_stream.length:
            chunk_stream = await self._receive_chunk()
        message = attrs.evolve(chunk_stream)
        chunk_stream.body, chunk_stream.chunks = bytearray(), 0
        if message.kind == SET_CHUNK_SIZE:
            self._chunk_size = int.from_bytes(message.body[:4], "big")
            if not 1 <= self._chunk_size < 2**31:
                raise RTMPError(f"set chunk size {self._chunk_size}: not 1 to {2**31 - 1}")
        return message

    async def _receive_chunk(self) -> ChunkStream:
        (first,) = await receive_exactly(self._stream, 1)
        header_format, number = first >> 6, first & 0x3F
        if number < 2:  # 0: the number is in one more byte; 1: in two more
            number = 64 + int.from_bytes(await receive_exactly(self._stream, number + 1), "little")
        chunk_stream = self._chunk_streams.get(number)
        if chunk_stream is None:
            if header_format != 0:
                raise RTMPError(f"chunk stream {number} begins without a full header")
            if len(self._chunk_streams) == MAX_CHUNK_STREAMS:
                raise RTMPError(f"more than {MAX_CHUNK_STREAMS} chunk streams")
            chunk_stream = self._chunk_streams[number] = ChunkStream()
        elif chunk_stream.body and header_format != 3:  # 3: nothing new, the message goes on
            raise RTMPError(f"chunk stream {number} begins a message inside another")
        # What is left out of a shorter header is as in the chunk before.
        header = await receive_exactly(self._stream, [11, 7, 3, 0][header_format])
        if header:
            chunk_stream.extended = header[:3] == b"\xff\xff\xff"
        if header[3:]:
            chunk_stream.length, chunk_stream.kind = int.from_bytes(header[3:6], "big"), header[6]
        if chunk_stream.length > MAX_MESSAGE:
            raise RTMPError(f"a message of {chunk_stream.length} bytes: more than {MAX_MESSAGE}")
        if chunk_stream.extended:
            await receive_exactly(self._stream, 4)
        missing = chunk_stream.length - len(chunk_stream.body)
        chunk_stream.body += await receive_exactly(self._stream, min(missing, self._chunk_size))
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
        raise RTMPError(f"AMF0 objects nested more than {MAX_DEPTH} deep")
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
                raise RTMPError("an AMF0 object without its end")
            return values
        case 5 | 6:
            return None
        case kind:
            raise RTMPError(f"AMF0 type {kind}: not one that commands need")


def decode_values(data: bytes | bytearray) -> list[Any]:
    """Return the values, one after the other, that a command consists of."""
    body, values = io.BytesIO(data), []
    while body.tell() < len(data):
        values.append(decode_amf0(body))
    return values


def _take(body: io.BytesIO, n: int) -> bytes:
    data = body.read(n)
    if len(data) < n:
        raise RTMPError("an AMF0 value is cut short")
    return data


def _take_string(body: io.BytesIO) -> str:
    return _take(body, int.from_bytes(_take(body, 2), "big")).decode(errors="replace")


async def handler(stream: trio.abc.HalfCloseableStream) -> None:
    """Serve one client up to the name of its stream, and print what it asks for."""
    say = functools.partial(print, peer_name(stream), flush=True)
    try:
        with trio.fail_after(MAX_SECONDS):
            await handshake(stream)
            say("handshake: 1528 random bytes there and back")
            messages = Messages(stream)
            while True:
                message = await messages.receive()
                size = f"({message.length} bytes in {message.chunks} chunk{'s' if message.chunks > 1 else ''})"
                if message.kind != COMMAND:
                    say(f"{KINDS.get(message.kind, f'message of type {message.kind}')} {size}")
                    continue
                match decode_values(message.body):
                    case ["connect", float(transaction), dict(asked), *_]:
                        say(f"connect: app {asked.get('app')!r:.40} {size}")
                        say(f"  from {asked.get('flashVer')!r:.50}")
                        status = {"level": "status", "code": "NetConnection.Connect.Success"}
                        await stream.send_all(encode_command("_result", transaction, None, status))
                    case ["createStream", float(transaction), *_]:
                        say(f"createStream: is given stream 1 {size}")
                        await stream.send_all(encode_command("_result", transaction, None, 1.0))
                    case ["publish" | "play" as command, float(), None, str(name), *_]:
                        say(f"{command}: stream {name!r:.40} {size}")
                        code = f"NetStream.{command.title()}.Failed"
                        status = {"level": "error", "code": code, "description": "The tour ends here"}
                        await stream.send_all(encode_command("onStatus", 0.0, None, status, stream_id=1))
                        # Closed with bytes unread, TCP would send a reset. So let the client be the one to close.
                        await stream.send_eof()
                        while await stream.receive_some():
                            pass
                        return
                    case values:
                        say(f"left without an answer: {values!r:.50} {size}")
    except (RTMPError, IncompleteReadError, trio.BrokenResourceError) as end:
        say(f"ended: {end}")
    except trio.TooSlowError:
        say(f"ended: not done in {MAX_SECONDS} seconds")


async def main(port: int) -> None:
    """Listen on 127.0.0.1 until interrupted."""
    try:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    except OSError as error:
        sys.exit(f"7_way_to_rtmp.py: cannot listen on port {port}: {error.strerror}: choose another")
    print(f"listening on rtmp://{format_address(listeners[0].socket.getsockname())}", flush=True)
    await serve_listeners(handler, listeners)


if __name__ == "__main__":
    try:
        trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 1935)
    except* KeyboardInterrupt:
        pass
