r"""TCP servers on Trio: echo, a binary protocol, and the toolkit that both are built on.

A handler is ``async def handler(stream) -> None`` and serves one client. This is a complete server, with time-outs,
limits and a graceful stop::

    import trio
    from trioproto import Connection, serve_until_signal

    async def read_line(connection):
        return await connection.receive_until(b"\n", max_bytes=1000)

    async def shout(stream):
        async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
            async for line in connection.requests(read_line):
                await connection.send_all(line.upper() + b"\n")

    trio.run(serve_until_signal, shout, 9000)

The contents, in the order in which a server needs them:

Receiving a fixed number of bytes from any Trio stream:
    `receive_exactly`, which raises `IncompleteReadError` if the stream ends too early.

Talking to one client:
    `Connection`, a stream with time-outs, requests, pushing, and a safe close. Its block ends without an exception, and
    with a log line, on a `ClientError` (the client disconnected or timed out) and on a `ProtocolError` (raised by a
    handler when the client sends invalid data).

The two protocols, each with a handler for servers and a request function for clients:
    `echo_handler` and `echo_request`; `op_handler` and `op_request`, and `calculate`, which computes op's results.

Serving in a nursery of your app:
    `serve_tcp` and `serve_listeners`, like Trio's functions of these names, with limits, regular ticks, and a graceful
    stop.

Serving as a whole program:
    `serve_until_signal`, which runs until SIGTERM or SIGINT. Like the other two, it returns a `ServerStats`, which is
    also passed to ``on_tick``.

`trioproto.testing` has an in-memory network and fake streams, for tests without sockets or real waiting.
`trioproto.draining` lets code without a `Connection` take part in a graceful stop.
"""

from trioproto.connection import ClientError, Connection, ProtocolError
from trioproto.echo import echo_handler, echo_request
from trioproto.op import calculate, op_handler, op_request
from trioproto.process.service import serve_until_signal
from trioproto.server import ServerStats, serve_listeners, serve_tcp
from trioproto.streams import IncompleteReadError, receive_exactly

__version__ = "0.2.0"

# In the order of the documentation above.
__all__ = [  # noqa: RUF022
    "receive_exactly",
    "IncompleteReadError",
    "Connection",
    "ClientError",
    "ProtocolError",
    "echo_handler",
    "echo_request",
    "op_handler",
    "op_request",
    "calculate",
    "serve_tcp",
    "serve_listeners",
    "serve_until_signal",
    "ServerStats",
]
