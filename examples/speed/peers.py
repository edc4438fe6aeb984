"""The peers: the same echo and op servers, in the style of each library's documentation.

::

    python peers.py PEER echo|op HOST [CERTIFICATE KEY]

PEER is ``trio``, or ``asyncio`` or ``uvloop`` with ``-streams`` or ``-protocol``. With CERTIFICATE and KEY (PEM files),
it serves TLS. The server prints where it listens: on a port that the kernel picks. The op servers answer requests until
the client closes the connection. Unlike trioproto, the peers have no time-outs and no limits.
"""

import asyncio
import functools
import ssl
import struct
import sys
from typing import Any

BACKLOG = 1024  # asyncio's default is 100; trio's is the kernel's maximum


def calculate(count: int, body: bytes) -> bytes:
    """Return the reply to an op request of ``count`` operands: ``body`` is the operands and the operator."""
    values = struct.unpack(f"<{count}i", body[:-1])
    operator = body[-1:]
    if operator == b"+":
        result = sum(values)
    elif operator == b"-":
        result = values[0] - sum(values[1:])
    else:
        result = 1
        for value in values:
            result *= value
    return struct.pack("<I", result & 0xFFFFFFFF)


def announce(address: tuple[str, int]) -> None:
    """Print where the server listens."""
    print(f"listening on {address[0]}:{address[1]}", flush=True)


def run_trio(protocol: str, host: str, tls: ssl.SSLContext | None) -> None:  # noqa: C901 - the import is inside
    """Serve with `trio.serve_tcp`, or `trio.serve_ssl_over_tcp`."""
    import trio  # noqa: PLC0415 - each peer imports only its own library

    async def receive_exactly(stream: trio.abc.Stream, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = await stream.receive_some(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    async def echo(stream: trio.abc.Stream) -> None:
        try:
            async for chunk in stream:
                await stream.send_all(chunk)
        except trio.BrokenResourceError:
            pass

    async def op(stream: trio.abc.Stream) -> None:
        try:
            while True:
                count = (await receive_exactly(stream, 1))[0]
                await stream.send_all(calculate(count, await receive_exactly(stream, 4 * count + 1)))
        except (EOFError, trio.BrokenResourceError):
            pass

    async def main() -> None:
        handler = {"echo": echo, "op": op}[protocol]
        serve: Any = trio.serve_tcp
        if tls is not None:
            # https_compatible: accept end of stream without a close_notify alert, like asyncio.
            serve = functools.partial(trio.serve_ssl_over_tcp, ssl_context=tls, https_compatible=True)
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(functools.partial(serve, handler, 0, host=host))
            announce((listener if tls is None else listener.transport_listener).socket.getsockname())

    trio.run(main)


async def echo_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve an echo connection with asyncio's streams."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()


async def op_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve an op connection with asyncio's streams."""
    try:
        while True:
            count = (await reader.readexactly(1))[0]
            writer.write(calculate(count, await reader.readexactly(4 * count + 1)))
            await writer.drain()
    except (asyncio.IncompleteReadError, OSError):
        pass
    writer.close()


class EchoProtocol(asyncio.Protocol):
    """Serves an echo connection with asyncio's callbacks."""

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Send back what has arrived."""
        self.transport.write(data)


class OpProtocol(asyncio.Protocol):
    """Serves an op connection with asyncio's callbacks."""

    def __init__(self) -> None:
        self.rest = b""

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are complete, and keep the rest."""
        data = self.rest + data
        replies = []
        start = 0
        while start < len(data) and len(data) >= (end := start + 1 + 4 * data[start] + 1):
            replies.append(calculate(data[start], data[start + 1 : end]))
            start = end
        self.rest = data[start:]
        if replies:
            self.transport.write(b"".join(replies))


async def serve_streams(protocol: str, host: str, tls: ssl.SSLContext | None) -> None:
    """Serve with `asyncio.start_server`."""
    handler = {"echo": echo_streams, "op": op_streams}[protocol]
    server = await asyncio.start_server(handler, host, 0, backlog=BACKLOG, ssl=tls)
    announce(server.sockets[0].getsockname())
    await server.serve_forever()


async def serve_protocol(protocol: str, host: str, tls: ssl.SSLContext | None) -> None:
    """Serve with `asyncio.loop.create_server`."""
    factory: type[asyncio.Protocol] = {"echo": EchoProtocol, "op": OpProtocol}[protocol]
    server = await asyncio.get_running_loop().create_server(factory, host, 0, backlog=BACKLOG, ssl=tls)
    announce(server.sockets[0].getsockname())
    await server.serve_forever()


def main() -> None:
    """Run the server that the arguments name."""
    peer, protocol, host, *certificate = sys.argv[1:]
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*certificate)
    if peer == "trio":
        run_trio(protocol, host, tls)
        return
    library, _, style = peer.partition("-")
    serve = {"streams": serve_streams, "protocol": serve_protocol}[style]
    if library == "uvloop":
        import uvloop  # noqa: PLC0415 - see above

        uvloop.run(serve(protocol, host, tls))
    else:
        asyncio.run(serve(protocol, host, tls))


if __name__ == "__main__":
    main()
