"""The command line: parses the arguments, and runs a command in one ``trio.run``."""

import argparse
import contextlib
import functools
import io
import logging
import os
import shlex
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import trio

from trioproto.addresses import failure_reason, format_address
from trioproto.bench.errors import BenchError
from trioproto.cli.arguments import (
    PORTS,
    CommandError,
    address,
    count,
    descriptor,
    host,
    network,
    not_empty,
    port,
    seconds,
)
from trioproto.cli.bench import add_bench
from trioproto.cli.clients import echo_dialogue, echo_messages, echo_pipe, op_answer, op_dialogue
from trioproto.cli.standard import check_input, reserve_descriptors, write_text
from trioproto.connection import IDLE_TIMEOUT, REQUEST_TIMEOUT
from trioproto.echo import echo_handler
from trioproto.op import Request, op_handler
from trioproto.process.listeners import ListenError, activated_fds
from trioproto.process.service import GRACE_PERIOD, HOST, MAX_CONNECTIONS, SIGNALS, serve_until_signal
from trioproto.process.tls import ServerContext, check_readable_again, client_context, server_context
from trioproto.process.workers import supervise_until_signal, worker_program
from trioproto.server import ServerStats
from trioproto.tls import TLSStream

_log = logging.getLogger("trioproto")

_HANDLERS = {"echo": echo_handler, "op": op_handler}
_OPERATOR_NAMES = {"add": "+", "sub": "-", "mul": "*"}

CLIENT_TIMEOUT = 30.0
# A UNIX socket has no host name to compare with the server's certificate, but it is always on this machine.
_UNIX_SERVER_NAME = "localhost"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program's name; None for ``sys.argv``.

    Returns:
        The exit status: 0 done, 1 failed, 130 interrupted. Wrong arguments exit with status 2.
    """
    reserve_descriptors()
    status = 0
    try:
        args = _parse(arguments)
        trio.run(args.run, args)
    except* (CommandError, BenchError) as group:
        # One line is enough, however deep the groups are nested.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if sys.stderr is not None:  # None: it was closed when Python started
            print(f"trioproto: {_escaped(str(error))}", file=sys.stderr)
        status = 1
    except* KeyboardInterrupt:
        # A second Ctrl-C would only make the interpreter print a traceback while it exits.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = 128 + signal.SIGINT
    return status


def _escaped(text: str) -> str:
    """Escape ``text`` so that arguments in it can neither break the line nor control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    help_ = io.StringIO()
    try:
        with contextlib.redirect_stdout(help_):
            args = parser.parse_args(arguments)
    finally:
        # argparse ignores errors when it writes its help.
        write_text(help_.getvalue())
    _check_options(parser, vars(args))
    return args


async def _serve(args: argparse.Namespace) -> None:
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.access_log:
        logging.getLogger("trioproto.access").setLevel(logging.DEBUG)
    context = _server_context(args)
    if args.metrics is not None:
        try:
            import prometheus_client  # noqa: F401, PLC0415 - an extra
        except ImportError as error:
            raise CommandError(
                f"--metrics needs {error.name}, which is not installed; "
                "from a clone of trioproto: pip install '.[metrics]'"
            ) from None
    if args.stop_at_eof:
        check_input()
    fds = [*activated_fds(), *args.fd]
    # Listen on the default host only if there is nothing else to listen on.
    tcp_port = args.port if args.host or (args.unix is None and not fds) else None
    service: dict[str, Any] = {
        "host": args.host or HOST,
        "unix": args.unix,
        "fds": fds,
        "grace_period": args.grace,
        "reload": None
        if context is None
        else functools.partial(context.reload, args.tls_cert, args.tls_key, args.tls_client_ca),
        "stop_at_eof": args.stop_at_eof,
        "metrics": args.metrics,
    }
    with _late_signals_ignored() as listening, _failure_in_one_line():
        try:
            service["announce"] = functools.partial(_print_address, args.protocol, listening)
            if args.workers > 1:
                command = functools.partial(_worker_command, args)
                await supervise_until_signal(command, args.workers, tcp_port, **service)
                return
            stats = await serve_until_signal(
                functools.partial(
                    _HANDLERS[args.protocol], idle_timeout=args.idle_timeout, request_timeout=args.request_timeout
                ),
                tcp_port,
                proxy_protocol=args.proxy_protocol,
                proxy_timeout=args.request_timeout,
                ssl_context=context,
                max_connections=args.max_connections,
                max_connections_per_client=args.max_connections_per_client,
                tick=args.tick,
                on_tick=_log_stats if args.tick else None,
                **service,
            )
        except ListenError as error:
            raise CommandError(f"{error}; {_LISTEN_ADVICE[error.kind]}") from None
    if stats is not None:
        await _log_stats(stats)


def _server_context(args: argparse.Namespace) -> ServerContext | None:
    if args.tls_cert is None:
        return None
    try:
        if args.workers > 1:  # each worker reads the files, and so does its replacement
            check_readable_again(args.tls_cert, args.tls_key, args.tls_client_ca)
        return server_context(args.tls_cert, args.tls_key, args.tls_client_ca)
    except OSError as error:
        raise CommandError(_TLS_ADVICE.format(failure_reason(error))) from None


@contextlib.contextmanager
def _late_signals_ignored() -> Iterator[Callable[[], None]]:
    """Ignore signals after the server in this block has ended.

    Python then takes a while to exit. A signal may well be sent twice, and the second one would kill the process, with
    another exit status.

    Yields:
        A function to call once the server handles signals. Until then, they have the same effect as before.
    """
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    listening = False

    def listens() -> None:
        nonlocal listening
        listening = True

    def handle(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN if listening else before[signal.Signals(number)])
        signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield listens
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if listening else handler)


@contextlib.contextmanager
def _failure_in_one_line() -> Iterator[None]:
    try:
        yield
    except* OSError as group:
        reason = failure_reason(group)
        raise CommandError(
            f"cannot serve: {reason}; a limit of this process, or of the system, may be too low (ulimit -a)"
        ) from None


def _print_address(protocol: str, listening: Callable[[], None], address: str) -> None:
    listening()
    if sys.stdout is not None:  # None: it was closed when Python started
        write_text(f"trioproto {protocol} listening on {address}\n")


def _worker_command(args: argparse.Namespace, fds: Sequence[int]) -> list[str]:
    """Return the command line of a worker: the same program, on inherited sockets."""
    command = [*worker_program(), args.protocol, "--stop-at-eof"]
    command += [f"--fd={fd}" for fd in fds]
    command += [f"--proxy-protocol={network}" for network in args.proxy_protocol]
    for option in (
        "max_connections",
        "max_connections_per_client",
        "idle_timeout",
        "request_timeout",
        "grace",
        "tick",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
    ):
        value = getattr(args, option)
        if value is not None:
            command.append(f"--{option.replace('_', '-')}={value}")
    command += [f"--{option.replace('_', '-')}" for option in ("access_log", "verbose") if getattr(args, option)]
    return command


async def _log_stats(stats: ServerStats) -> None:
    _log.info(
        "accepted %d, active %d, crashed %d, refused %d, up %.1f s",
        stats.accepted,
        stats.active,
        stats.crashed,
        stats.refused,
        stats.uptime,
    )
    await trio.lowlevel.checkpoint()


async def _echo_client(args: argparse.Namespace) -> None:
    async with _connected(args) as stream:
        if args.stdin:
            await echo_pipe(stream, args.timeout)
        elif args.messages:
            await echo_messages(stream, [os.fsencode(message) for message in args.messages], args.timeout)
        else:
            await echo_dialogue(stream, args.timeout)


async def _op_client(args: argparse.Namespace) -> None:
    async with _connected(args) as stream:
        if args.request is None:
            try:
                await op_dialogue(stream, args.timeout)
            except ValueError as error:
                raise CommandError(str(error)) from None
        else:
            await op_answer(stream, args.request, args.timeout)


@contextlib.asynccontextmanager
async def _connected(args: argparse.Namespace) -> AsyncIterator[trio.abc.HalfCloseableStream]:
    """Connect to the server, over TLS if requested. Network errors in the block become a `CommandError`."""
    context = _client_context(args)
    server_name = args.host or HOST
    tcp_port = PORTS[args.protocol] if args.port is None else args.port
    if args.unix is None:
        where = format_address((server_name, tcp_port))
        options = f"--host {shlex.quote(server_name)} --port {tcp_port}"
    else:
        where = format_address(args.unix)
        options = f"--unix {shlex.quote(args.unix)}"
        server_name = _UNIX_SERVER_NAME
    advice = f"if no server runs there, start one: python -m trioproto {args.protocol} {options}"
    in_time = f"within {args.timeout:g} s"
    stream: trio.abc.HalfCloseableStream
    try:
        with _within(args.timeout, f"cannot connect to {where}: no answer {in_time}; {advice}"):
            if args.unix is None:
                stream = await trio.open_tcp_stream(server_name, tcp_port)
            else:
                stream = await trio.open_unix_socket(args.unix)
    except (OSError, UnicodeError) as error:
        raise CommandError(f"cannot connect to {where}: {failure_reason(error)}; {advice}") from None
    try:
        if context is not None:
            stream = tls = TLSStream(stream, context, server_hostname=server_name)
            with _within(args.timeout, f"no TLS handshake with {where} {in_time}; does the server speak TLS?"):
                await tls.handshake()
        yield stream
        with trio.move_on_after(args.timeout):  # TLS sends a last message
            await stream.aclose()
    except* trio.TooSlowError:
        raise CommandError(f"no reply from {where} {in_time}; look at the server's log") from None
    except* EOFError as group:
        raise CommandError(
            f"{where} closed the connection: {failure_reason(group)}; look at the server's log"
        ) from None
    except* trio.BrokenResourceError as group:
        reason = failure_reason(group)
        advice = "look at the server's log"
        if "self-signed" in reason or "local issuer" in reason:  # and not expired, or of another name
            advice = "to trust it, pass --tls-ca with the certificate of its CA"
        raise CommandError(f"the connection to {where} broke: {reason}; {advice}") from None
    finally:
        await trio.aclose_forcefully(stream)


@contextlib.contextmanager
def _within(seconds: float, failure: str) -> Iterator[None]:
    """Raise `CommandError` with ``failure`` if the block takes longer than ``seconds``."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise CommandError(failure) from None


def _client_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not args.tls:
        return None
    try:
        return client_context(args.tls_ca, args.tls_cert, args.tls_key)
    except OSError as error:
        raise CommandError(_TLS_ADVICE.format(failure_reason(error))) from None


_LISTEN_ADVICE = {
    "tcp": "choose another --host or --port, or stop what listens there",
    "unix": "or choose another --unix path",
    "metrics": "choose another --metrics, or stop what listens there",
    "fd": "it must be a listening socket that this process inherits",
}
_TLS_ADVICE = "cannot use the TLS files: {}; they must be readable PEM files, and the key must match the certificate"


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"operands must be integers, not {text!r}") from None


class _VersionAction(argparse.Action):
    """Prints the version. It is looked up only here, because importing `importlib.metadata` takes 30 ms."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - the interface's
        values: object,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        from importlib import metadata  # noqa: PLC0415

        try:
            print(f"trioproto {metadata.version('trioproto')}")
        except metadata.PackageNotFoundError:
            parser.exit(1, "trioproto: the version is unknown; install the package: pip install .\n")
        parser.exit()


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
    parser.add_argument("--version", action=_VersionAction, nargs=0, help="show the program's version and exit")
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
            example=f"trioproto {protocol} --port 0 --tick 10    # a free port; statistics every 10 seconds",
        )
        command.set_defaults(run=_serve)
        _add_server_options(command, protocol)

    echo = _command(
        commands,
        "echo-client",
        "echo",
        "send messages to an echo server",
        example="trioproto echo-client hello 'and again'\n"
        "  trioproto echo-client    # prompts for messages\n"
        "  trioproto echo-client --stdin <FILE >COPY",
    )
    echo.set_defaults(run=_echo_client)
    _add_client_options(echo, "echo")
    what = echo.add_mutually_exclusive_group()
    what.add_argument(
        "messages", nargs="*", default=[], metavar="MESSAGE", help="messages to send; none: prompt for them"
    )
    what.add_argument("--stdin", action="store_true", help="send standard input, write its echo to standard output")

    op = _command(
        commands,
        "op-client",
        "op",
        "send a request to an op server",
        example="trioproto op-client 1 2 3 +\n"
        "  trioproto op-client 10 -4 sub    # 14; add, sub and mul need no quoting in a shell, unlike *\n"
        "  trioproto op-client    # prompts for operands and operator",
    )
    op.set_defaults(run=_op_client)
    _add_client_options(op, "op")
    op.add_argument(
        "request",
        nargs="*",
        action=_RequestAction,
        metavar="OPERAND ... OPERATOR",
        help="1 to 255 operands in int32, then + - * or add sub mul; none: prompt for them",
    )
    add_bench(commands)
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
    return command


def _check_options(parser: argparse.ArgumentParser, options: dict[str, Any]) -> None:
    """Refuse options that would have no effect: without ``--tls``, for example, a client would not use TLS."""
    is_client = "timeout" in options
    if is_client and options["unix"] is not None and (options["host"], options["port"]) != (None, None):
        parser.error("--unix cannot be used with --host or --port")
    if options.get("workers", 1) != 1 and set(range(3)).intersection(options.get("fd", ())):
        parser.error("--fd must be at least 3 with --workers, which have their own standard streams")
    switch = "tls" if "tls" in options else "tls_cert"
    for name in ("tls_ca", "tls_cert", "tls_key", "tls_client_ca"):
        if options.get(name) and not options.get(switch):
            parser.error(f"--{name.replace('_', '-')} needs --{switch.replace('_', '-')}")
    if options.get("tls_key") and not options.get("tls_cert"):
        parser.error("--tls-key needs --tls-cert")


def _add_server_options(command: argparse.ArgumentParser, protocol: str) -> None:
    listeners = command.add_argument_group("listeners")
    listeners.add_argument(
        "--host", type=host, action="append", metavar="HOST", help=f"name or address; may be repeated (default: {HOST})"
    )
    listeners.add_argument(
        "--port", type=port, default=PORTS[protocol], help="0 picks a free one (default: %(default)s)"
    )
    listeners.add_argument(
        "--unix", type=not_empty, metavar="PATH", help="a UNIX socket that only this user may connect to"
    )
    listeners.add_argument(
        "--fd",
        type=descriptor,
        action="append",
        default=[],
        metavar="N",
        help="an inherited listening socket; may be repeated (systemd's are found automatically)",
    )
    listeners.add_argument(
        "--proxy-protocol",
        type=network,
        action="append",
        default=[],
        metavar="NETWORK",
        help="accept connections only from proxies with these addresses (10.0.0.0/8, ::1, unix), with PROXY headers; "
        "may be repeated (default: no proxy)",
    )
    limits = command.add_argument_group("limits")
    limits.add_argument(
        "--max-connections",
        type=count,
        default=MAX_CONNECTIONS,
        metavar="N",
        help="how many are served at once; more wait in the accept queue (default: %(default)s)",
    )
    limits.add_argument(
        "--max-connections-per-client",
        type=count,
        metavar="N",
        help="how many one IPv4 address, or IPv6 /64, may have at once; more are reset (default: no limit)",
    )
    limits.add_argument(
        "--idle-timeout",
        type=seconds,
        default=IDLE_TIMEOUT,
        metavar="SECONDS",
        help="between two requests, or for a client that does not receive (default: %(default)s)",
    )
    limits.add_argument(
        "--request-timeout",
        type=seconds,
        default=REQUEST_TIMEOUT,
        metavar="SECONDS",
        help="from a request's first byte to its last; for a PROXY header; for a TLS handshake (default: %(default)s)",
    )
    limits.add_argument(
        "--grace",
        type=seconds,
        default=GRACE_PERIOD,
        metavar="SECONDS",
        help="after SIGTERM or SIGINT, for requests in progress (default: %(default)s)",
    )
    tls = command.add_argument_group("TLS")
    tls.add_argument("--tls-cert", type=not_empty, metavar="FILE", help="use TLS with this certificate (PEM)")
    tls.add_argument("--tls-key", type=not_empty, metavar="FILE", help="its private key, if not in the same file")
    tls.add_argument(
        "--tls-client-ca", type=not_empty, metavar="FILE", help="serve only clients with a certificate signed by these"
    )
    command.add_argument(
        "--workers", type=count, default=1, metavar="N", help="number of processes that serve (default: %(default)s)"
    )
    command.add_argument(
        "--metrics",
        type=address,
        metavar="[HOST:]PORT",
        help=f"serve metrics for Prometheus (default host: {HOST})",
    )
    command.add_argument("--stop-at-eof", action="store_true", help="also stop when standard input ends")
    command.add_argument("--tick", type=seconds, metavar="SECONDS", help="log a line of statistics this often")
    command.add_argument("--access-log", action="store_true", help="log a record of each connection when it ends")
    command.add_argument("-v", "--verbose", action="store_true", help="also log each connection when it begins")


def _add_client_options(command: argparse.ArgumentParser, protocol: str) -> None:
    command.add_argument("--host", type=host, help=f"name or address (default: {HOST})")
    command.add_argument("--port", type=port, help=f"default: {PORTS[protocol]}")
    command.add_argument(
        "--unix", type=not_empty, metavar="PATH", help="connect to this UNIX socket instead of HOST and PORT"
    )
    command.add_argument(
        "--timeout",
        type=seconds,
        default=CLIENT_TIMEOUT,
        metavar="SECONDS",
        help="maximum time for connecting, for the TLS handshake, and for each reply (default: %(default)s)",
    )
    tls = command.add_argument_group("TLS")
    tls.add_argument(
        "--tls",
        action="store_true",
        help=f"use TLS; the server's certificate must match HOST, or with --unix, {_UNIX_SERVER_NAME}",
    )
    tls.add_argument(
        "--tls-ca", type=not_empty, metavar="FILE", help="trusted CA certificates (PEM; default: the system's)"
    )
    tls.add_argument("--tls-cert", type=not_empty, metavar="FILE", help="this client's own certificate")
    tls.add_argument("--tls-key", type=not_empty, metavar="FILE", help="its private key, if not in the same file")
