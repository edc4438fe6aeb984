"""The ``bench`` command: parses its arguments, measures, and reports."""

import argparse
import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import trio

from trioproto.cli.arguments import PORTS, CommandError, host, port, positive, seconds, whole
from trioproto.cli.standard import write_text
from trioproto.op import MAX_OPERANDS
from trioproto.process.service import HOST

_MAX_CONNECTIONS = 10_000
_MAX_DEPTH = 65_536
_MAX_SIZE = 2**20
_MAX_IN_FLIGHT = 2**26
_MAX_PROCESSES = 64
_MAX_RATE = 1e9
# Longer bars are not easier to compare.
_MAX_WIDTH = 100


async def _bench(args: argparse.Namespace) -> None:
    _check_load(args)
    try:
        from trioproto.bench import load, report  # noqa: PLC0415 - an extra

        if args.plot:
            from trioproto.bench import plot  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            f"bench needs {error.name}, which is not installed; from a clone of trioproto: pip install '.[bench]'"
        ) from None

    server: contextlib.AbstractAsyncContextManager[tuple[str, int]]
    if args.host is None and args.port is None:
        server = load.local_server(args.protocol, args.connections)
    else:
        server = contextlib.nullcontext((args.host or HOST, PORTS[args.protocol] if args.port is None else args.port))
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def interrupt() -> None:
                await anext(signals)
                stop.set()
                await anext(signals)
                raise KeyboardInterrupt

            nursery.start_soon(interrupt)
            async with server as address:
                asked = load.Load(
                    args.protocol,
                    *address,
                    connections=args.connections,
                    size=args.size,
                    depth=args.depth,
                    duration=args.duration,
                    rate=args.rate,
                    processes=args.processes,
                )
                with report.progress(asked) as on_progress:
                    measurement = await load.measure(asked, stop, on_progress)
            nursery.cancel_scope.cancel()

    width = min(_MAX_WIDTH, shutil.get_terminal_size().columns)
    write_text(f"{report.table(asked, measurement)}\n\n{report.terminal_plot(measurement.latencies, width)}\n")
    if args.json:
        with _writing(args.json):
            report.write_json(args.json, asked, measurement, interrupted=stop.is_set())
    if args.plot:
        with _writing(args.plot):
            plot.write_plot(args.plot, asked, measurement)
    if stop.is_set():
        raise KeyboardInterrupt
    if failure := report.failure(asked, measurement):
        raise CommandError(failure)


def _check_load(args: argparse.Namespace) -> None:
    if args.processes > args.connections:
        args.error(f"--processes {args.processes} is more than --connections {args.connections}")
    if args.depth * args.size > _MAX_IN_FLIGHT:
        args.error(f"--depth times --size is more than {_MAX_IN_FLIGHT} bytes")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def _plot_file(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"must end in .svg or .png, not {text!r}")
    return _output_file(text)


def _output_file(text: str) -> Path:
    """Refuse a file that cannot be written, before minutes are spent on measuring."""
    path = Path(text)
    # os.path, because Path's methods raise if a name is too long or a directory is not accessible.
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else path.parent, os.W_OK):  # noqa: PTH110, PTH112
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}")
    return path


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``bench`` to the commands."""
    bench = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Measure a server under load: its rate, errors and latencies.",
        epilog="'trioproto bench echo --help' shows the options.",
    )
    protocols = bench.add_subparsers(required=True, metavar="PROTOCOL")
    for protocol in PORTS:
        _add_bench_protocol(protocols, protocol)


def _add_bench_protocol(protocols: "argparse._SubParsersAction[argparse.ArgumentParser]", protocol: str) -> None:
    command = protocols.add_parser(
        protocol,
        help=f"measure an {protocol} server",
        description=f"Put load on an {protocol} server, check every reply, and report the rate, errors\n"
        "and latencies. Without --host and --port, a server is started for this. The\n"
        "measurement begins when all connections are open. Ctrl-C ends it early and\n"
        "reports the results so far, with exit status 130.",
        epilog="examples:\n"
        f"  trioproto bench {protocol}    # the maximum rate of a server on this machine\n"
        f"  trioproto bench {protocol} --port {PORTS[protocol]} --rate 2000 --duration 60 --plot latency.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_bench, protocol=protocol, error=command.error)
    command.add_argument(
        "--host", type=host, help=f"name or address of the server (default: {HOST} if --port is given)"
    )
    command.add_argument("--port", type=port, help=f"the server's port (default: {PORTS[protocol]} if --host is given)")
    command.add_argument(
        "--connections",
        type=whole(1, _MAX_CONNECTIONS),
        default=50,
        metavar="N",
        help="number of connections (default: %(default)s)",
    )
    if protocol == "echo":
        command.add_argument(
            "--size",
            type=whole(1, _MAX_SIZE),
            default=64,
            metavar="BYTES",
            help="size of a message (default: %(default)s)",
        )
    else:
        command.add_argument(
            "--operands",
            dest="size",
            type=whole(1, MAX_OPERANDS),
            default=3,
            metavar="N",
            help="number of operands in a request (default: %(default)s)",
        )
    command.add_argument(
        "--depth",
        type=whole(1, _MAX_DEPTH),
        default=1,
        metavar="N",
        help="maximum number of requests in flight on each connection (default: %(default)s)",
    )
    command.add_argument(
        "--duration", type=seconds, default=10.0, metavar="SECONDS", help="duration of the load (default: %(default)s)"
    )
    command.add_argument(
        "--rate",
        type=positive(_MAX_RATE),
        metavar="N",
        help="open loop: send this many requests a second over all connections, even if the server does not keep up; "
        "latencies are measured from when a request was due (default: closed loop, which waits for replies)",
    )
    command.add_argument(
        "--processes",
        type=whole(1, _MAX_PROCESSES),
        default=1,
        metavar="N",
        help="number of processes that generate the load (default: %(default)s)",
    )
    command.add_argument(
        "--json",
        type=_output_file,
        metavar="FILE",
        help="write the report as JSON: times in seconds, and the latencies as an encoded HdrHistogram",
    )
    command.add_argument(
        "--plot", type=_plot_file, metavar="FILE", help="plot the latencies; FILE must end in .svg or .png"
    )
