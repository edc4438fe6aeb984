"""A protocol of your own: a key-value server with set and get, in under 40 lines on `trioproto.Connection`.

A message is a letter and strings; a string is its length (2 bytes, big-endian) and then that many bytes::

    set   "S" key value    reply "="
    get   "G" key          reply "=" value, or "?" if there is none

The code follows that table: `read_request` is the grammar, `answer` is what the server does. `Connection` adds
time-outs, the graceful stop, back-pressure, and a close that loses no reply.

Run it::

    python examples/6_your_own_protocol.py

Note the bytes on the wire, and what happens to a client that announces a key that is too long. Its test,
tests/examples/test_6_your_own_protocol.py, sends two requests in each of their 1024 possible fragmentations.
"""

import functools
import logging
import sys

import trio

from trioproto import Connection, ProtocolError, receive_exactly, serve_tcp

# The protocol: from here …
MAX_LENGTH = 1000  # of a string, in bytes
MAX_KEYS = 1000  # of a store; together these bound its memory


async def read_string(connection: Connection) -> bytes:
    """Receive a string, after checking its length."""
    length = int.from_bytes(await connection.receive_exactly(2), "big")
    if length > MAX_LENGTH:
        raise ProtocolError(f"a string of {length} bytes: more than {MAX_LENGTH}")
    return await connection.receive_exactly(length)


def encode_string(string: bytes) -> bytes:
    """Return a string in wire format."""
    return len(string).to_bytes(2, "big") + string


async def read_request(connection: Connection) -> tuple[bytes, bytes | None]:
    """Receive one request: a key and its new value, or a key and None to get its value."""
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
    """Serve one client until it ends or breaks the connection, times out, or violates the protocol."""
    async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
        async for key, value in connection.requests(read_request):
            connection.push(answer(store, key, value))


# … to here.


async def main() -> None:
    """Serve two clients: one that follows the protocol, and one that does not."""
    async with trio.open_nursery() as nursery:
        serve = functools.partial(serve_tcp, functools.partial(handler, {}), 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        address = listener.socket.getsockname()

        print("A client that follows the protocol:")
        async with await trio.open_tcp_stream(*address) as stream:
            await ask(stream, b"S" + encode_string(b"colour") + encode_string(b"red"))
            await ask(stream, b"G" + encode_string(b"colour"))
            await ask(stream, b"G" + encode_string(b"size"))
        print("\nA client that announces a key of 65535 bytes:")
        async with await trio.open_tcp_stream(*address) as stream:
            await ask(stream, b"S\xff\xff")
        nursery.cancel_scope.cancel()


async def ask(stream: trio.abc.Stream, request: bytes) -> None:
    """Send ``request``, and print it and its reply."""
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
