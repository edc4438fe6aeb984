"""A protocol of your own: a key-value server, set and get, in not even 40 lines on `trioproto.Connection`.

A message is a letter and strings; a string is its length (2 bytes, the high one first) and then as many bytes::

    set   "S" key value    reply "="
    get   "G" key          reply "=" value, or "?" if there is none

The code reads like that table: `read_request` is the grammar, `answer` is what the server does. Time-outs, the graceful
stop, back-pressure and a close that destroys no reply come from the connection.

Run it::

    python examples/6_your_own_protocol.py

Look for the bytes on the wire, and for what becomes of a client that announces more than there may be. Its test,
tests/examples/test_6_your_own_protocol.py, cuts two requests in each of the 1024 ways in which they can arrive.
"""

import functools
import logging
import sys

import trio

from trioproto import Connection, ProtocolError, receive_exactly, serve_tcp

# The protocol: from here …
MAX_LENGTH = 1000  # of a string, in bytes
MAX_KEYS = 1000  # of a store; with both, no client can fill our memory


async def read_string(connection: Connection) -> bytes:
    """Receive a string; trust no length before it is checked."""
    length = int.from_bytes(await connection.receive_exactly(2), "big")
    if length > MAX_LENGTH:
        raise ProtocolError(f"a string of {length} bytes: more than {MAX_LENGTH}")
    return await connection.receive_exactly(length)


def encode_string(string: bytes) -> bytes:
    """Return a string as it goes over the wire."""
    return len(string).to_bytes(2, "big") + string


async def read_request(connection: Connection) -> tuple[bytes, bytes | None]:
    """Receive one request: a key, and the value to set it to; None to get it."""
    command = await connection.receive_exactly(1)
    if command not in (b"S", b"G"):
        raise ProtocolError(f"command {command!r}: not S or G")
    key = await read_string(connection)
    value = await read_string(connection) if command == b"S" else None
    return key, value


def answer(store: dict[bytes, bytes], key: bytes, value: bytes | None) -> bytes:
    """Carry out one request, and return the reply."""
    if value is None:
        return b"=" + encode_string(store[key]) if key in store else b"?"
    if key not in store and len(store) == MAX_KEYS:
        raise ProtocolError(f"more than {MAX_KEYS} keys")
    store[key] = value
    return b"="


async def handler(store: dict[bytes, bytes], stream: trio.abc.Stream) -> None:
    """Serve one client until it ends the connection, breaks it, is late, or leaves the protocol."""
    async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
        async for key, value in connection.requests(read_request):
            connection.push(answer(store, key, value))


# … to here.


async def main() -> None:
    """Serve two clients: one that keeps to the protocol, and one that does not."""
    async with trio.open_nursery() as nursery:
        serve = functools.partial(serve_tcp, functools.partial(handler, {}), 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        address = listener.socket.getsockname()

        print("A client that keeps to the protocol:")
        async with await trio.open_tcp_stream(*address) as stream:
            await ask(stream, b"S" + encode_string(b"colour") + encode_string(b"red"))
            await ask(stream, b"G" + encode_string(b"colour"))
            await ask(stream, b"G" + encode_string(b"size"))
        print("\nA client that announces a key of 65535 bytes:")
        async with await trio.open_tcp_stream(*address) as stream:
            await ask(stream, b"S\xff\xff")
        nursery.cancel_scope.cancel()


async def ask(stream: trio.abc.Stream, request: bytes) -> None:
    """Send ``request``, and print it and its reply, byte by byte."""
    print(f"   client  {request!r}")
    await stream.send_all(request)
    reply = await stream.receive_some(1)
    if reply == b"=" and request.startswith(b"G"):
        length = await receive_exactly(stream, 2)
        reply += length + await receive_exactly(stream, int.from_bytes(length, "big"))
    print(f"   reply   {bytes(reply)!r}" if reply else "   reply   none: end of stream")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="   server  logs: %(message)s")
    trio.run(main)
