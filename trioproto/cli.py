"""The command line: arguments in, one ``trio.run`` out."""

import argparse
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence

import trio

from trioproto import __version__
from trioproto.addresses import format_address
from trioproto.clients import echo_dialogue, echo_messages, echo_pipe, op_answer, op_dialogue
from trioproto.echo import echo_handler
from trioproto.op import Request, op_handler
from trioproto.server import ServerStats, serve_listeners

_log = logging.getLogger("trioproto")

_HANDLERS = {"echo": echo_handler, "op": op_handler}
_PORTS = {"echo": 9190, "op": 9191}
_OPERATOR_NAMES = {"add": "+", "sub": "-", "mul": "*"}


class CommandError(Exception):
    """What ends a command with exit status 1: one line that says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program's name; None for those of this process.

    Returns:
        The exit status: 0 done, 1 failed, 130 interrupted. Wrong arguments end the process with 2.
    """
    args = _parser().parse_args(arguments)
    status = 0
    try:
        trio.run(args.run, args)
    except* CommandError as group:
        # However deep the nursery was in which it happened, one line is enough.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"trioproto: {error}", file=sys.stderr)
        status = 1
    except* KeyboardInterrupt:
        status = 128 + signal.SIGINT
    return status


async def _serve(args: argparse.Namespace) -> None:
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        listeners = await trio.open_tcp_listeners(args.port, host=args.host)
    except (OSError, UnicodeError) as error:  # the latter for a host that cannot be a name
        where = format_address((args.host, args.port))
        raise CommandError(
            f"cannot listen on {where}: {_reason(error)}; choose another --host or --port, or stop what listens there"
        ) from None
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:

            async def serve(task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
                await serve_listeners(
                    _HANDLERS[args.protocol],
                    listeners,
                    tick=args.tick,
                    on_tick=_log_stats if args.tick else None,
                    task_status=task_status,
                )

            await nursery.start(serve)
            addresses = [format_address(listener.socket.getsockname()) for listener in listeners]
            try:
                print(
                    *(f"trioproto {args.protocol} listening on {address}" for address in addresses),
                    sep="\n",
                    flush=True,
                )
            except OSError as error:
                raise CommandError(f"cannot write to standard output: {error.strerror}") from None
            await anext(signals)
            nursery.cancel_scope.cancel()


async def _log_stats(stats: ServerStats) -> None:
    _log.info(
        "accepted %d, active %d, crashed %d, up %.1f s",
        stats.accepted,
        stats.active,
        stats.crashed,
        stats.uptime,
    )
    await trio.lowlevel.checkpoint()


async def _echo_client(args: argparse.Namespace) -> None:
    async with _connected(args) as stream:
        if args.stdin:
            await echo_pipe(stream)
        elif args.messages:
            await echo_messages(stream, [os.fsencode(message) for message in args.messages])
        else:
            await echo_dialogue(stream)


async def _op_client(args: argparse.Namespace) -> None:
    async with _connected(args) as stream:
        if args.request is None:
            try:
                await op_dialogue(stream)
            except ValueError as error:
                raise CommandError(str(error)) from None
        else:
            await op_answer(stream, args.request)


@contextlib.asynccontextmanager
async def _connected(args: argparse.Namespace) -> AsyncIterator[trio.SocketStream]:
    where = format_address((args.host, args.port))
    try:
        stream = await trio.open_tcp_stream(args.host, args.port)
    except (OSError, UnicodeError) as error:
        raise CommandError(
            f"cannot connect to {where}: {_reason(error)}; if no server runs there, start one: "
            f"python -m trioproto {args.protocol} --host {args.host} --port {args.port}"
        ) from None
    async with stream:
        try:
            yield stream
        except* EOFError as group:
            raise CommandError(f"{where} ended the connection: {_reason(group)}; look at the server's log") from None
        except* trio.BrokenResourceError:
            raise CommandError(f"the connection to {where} broke; look at the server's log") from None
        except* BrokenPipeError:
            raise CommandError("nobody reads standard output any more") from None
        except* OSError as group:  # The stream raises none (trio.abc.Stream).
            raise CommandError(f"standard input or output failed: {_reason(group)}") from None


def _reason(error: BaseException) -> str:
    """Why it failed: of what Trio grouped, or groups below the error that it raises, the first."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return getattr(cause, "strerror", None) or str(cause)


_MAX_PORT = 0xFFFF


def _port(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= (port := int(text)) <= _MAX_PORT:
            return port
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to {_MAX_PORT}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, above 0")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"operand {text!r} is not an integer") from None


class _RequestAction(argparse.Action):
    """Turns ``OPERAND ... OPERATOR`` into a `Request`; nothing into None."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,  # noqa: ARG002 - the interface's
    ) -> None:
        words = [str(value) for value in values] if isinstance(values, list) else []
        request = None
        if words:
            *operands, operator = words
            try:
                request = Request(map(_integer, operands), _OPERATOR_NAMES.get(operator, operator))
            except ValueError as error:
                parser.error(str(error))
        setattr(namespace, self.dest, request)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trioproto",
        description="An echo server, a calculating server with a binary protocol, and a client for each.",
        epilog="example:\n"
        "  trioproto echo\n"
        "  trioproto echo-client hello    # in another terminal\n\n"
        "'trioproto COMMAND --help' shows a command's options, and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trioproto {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for protocol, help_ in (
        ("echo", "serve echo: send back every byte"),
        ("op", "serve op: calculate with integers"),
    ):
        command = _command(
            commands,
            protocol,
            protocol,
            help_,
            example=f"trioproto {protocol} --port 0 --tick 10    # a port that is free; statistics every 10 seconds",
        )
        command.set_defaults(run=_serve)
        command.add_argument("--tick", type=_seconds, metavar="SECONDS", help="log a line of statistics this often")
        command.add_argument("-v", "--verbose", action="store_true", help="log each connection")

    echo = _command(
        commands,
        "echo-client",
        "echo",
        "ask an echo server",
        example="trioproto echo-client hello 'and again'\n"
        "  trioproto echo-client    # asks for messages\n"
        "  trioproto echo-client --stdin <FILE >COPY",
    )
    echo.set_defaults(run=_echo_client)
    what = echo.add_mutually_exclusive_group()
    what.add_argument(
        "messages", nargs="*", default=[], metavar="MESSAGE", help="sent as it is; none: ask for messages"
    )
    what.add_argument("--stdin", action="store_true", help="send standard input, write its echo to standard output")

    op = _command(
        commands,
        "op-client",
        "op",
        "ask an op server",
        example="trioproto op-client 1 2 3 +\n"
        "  trioproto op-client 10 -4 sub    # 14; add, sub and mul spare you the shell's quoting of *\n"
        "  trioproto op-client    # asks for operands and operator",
    )
    op.set_defaults(run=_op_client)
    op.add_argument(
        "request",
        nargs="*",
        action=_RequestAction,
        metavar="OPERAND ... OPERATOR",
        help="1 to 255 operands in int32, then + - * or add sub mul; none: ask for them",
    )
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    protocol: str,
    help_: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(protocol=protocol)
    command.add_argument("--host", default="127.0.0.1", help="name or address (default: %(default)s)")
    command.add_argument("--port", type=_port, default=_PORTS[protocol], help="default: %(default)s")
    return command
