r"""TCP servers on Trio: echo, a binary protocol, and the toolkit that both are built on.

A handler is ``async def handler(stream) -> None``, and serves one client. This is a whole server, with time-outs,
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

What there is, in the order in which a server needs it:

Bytes from any stream of Trio's, by count:
    `receive_exactly`, which raises `IncompleteReadError` if the stream ends too early.

One client's conversation:
    `Connection`, a stream with time-outs, requests, pushing, and a safe end. It ends quietly, and with a line in the
    log, on a `ClientError`, when the client breaks off or is too late, and on a `ProtocolError`, which a handler raises
    when the client sends what it must not.

The two protocols, each with the handler of its server, and its client's request:
    `echo_handler` and `echo_request`; `op_handler` and `op_request`, and `calculate`, which is what op computes.

Serving, in a nursery of your app:
    `serve_tcp` and `serve_listeners`, as Trio's functions of these names, and with limits, regular ticks, and a
    graceful stop.

Serving, as all that a program does:
    `serve_until_signal`, until SIGTERM or SIGINT comes. It returns a `ServerStats`, as the other two do, and as each
    tick is told.

In `trioproto.testing` are a network in memory and fakes of streams, for tests without a socket or a second of waiting.
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
