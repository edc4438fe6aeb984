"""TCP servers on Trio: echo, a binary protocol, and the toolkit that both are built on.

A handler is ``async def handler(stream) -> None``. `serve_until_signal`, `serve_tcp` and `serve_listeners` run it for
each connection, and `Connection` gives it time-outs, requests, pushing and a graceful stop.
"""

from trioproto.connection import ClientError, Connection, ProtocolError
from trioproto.echo import echo_handler, echo_request
from trioproto.op import calculate, op_handler, op_request
from trioproto.process.service import serve_until_signal
from trioproto.server import ServerStats, serve_listeners, serve_tcp
from trioproto.streams import IncompleteReadError, receive_exactly

__version__ = "0.2.0"

__all__ = [
    "ClientError",
    "Connection",
    "IncompleteReadError",
    "ProtocolError",
    "ServerStats",
    "calculate",
    "echo_handler",
    "echo_request",
    "op_handler",
    "op_request",
    "receive_exactly",
    "serve_listeners",
    "serve_tcp",
    "serve_until_signal",
]
