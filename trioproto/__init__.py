"""A TCP server on Trio: echo, a binary protocol, and the toolkit that both stand on."""

from trioproto.echo import echo_handler, echo_request
from trioproto.op import calculate, op_handler, op_request
from trioproto.server import ServerStats, serve_listeners, serve_tcp
from trioproto.streams import IncompleteReadError, receive_exactly

__version__ = "0.1.0"

__all__ = [
    "IncompleteReadError",
    "ServerStats",
    "calculate",
    "echo_handler",
    "echo_request",
    "op_handler",
    "op_request",
    "receive_exactly",
    "serve_listeners",
    "serve_tcp",
]
