"""Speed: compare trioproto with the same servers on other libraries, under the same load.

Each round starts every server anew, one at a time, and loads it with ``load.c``, which checks every byte of the
replies. A round gives the ratio of trioproto's rate to each peer's; the result is the median over the rounds. Rates
differ between machines, and over time on the same machine; ratios of rates measured in succession differ much less.

Run it on an otherwise idle Linux machine with a C compiler and OpenSSL (Debian: ``gcc libssl-dev openssl``); it takes
about ten minutes. In a clone of trioproto::

    pip install '.[speed]'
    python examples/speed/compare.py [--write DIRECTORY]

A ratio of 2 means that trioproto answers twice as many requests as that peer, 0.5 half as many. The thin lines in the
chart span the smallest and the greatest ratio of a round: where they are long, the machine was not idle. README.md in
this directory describes the workloads.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import attrs
import trio

import trioproto
from trioproto.cli.arguments import count, seconds

HERE = Path(__file__).parent
PEERS = ["trio", "asyncio-streams", "asyncio-protocol", "uvloop-streams", "uvloop-protocol"]
LOG_LINES = 10  # of a failed server's log
BUSY = 0.95  # share of the time above which the load generator may limit the rate


@attrs.frozen
class Workload:
    """What the load generator does: its arguments, and a description.

    Attributes:
        title: the description.
        kind: ``"echo"``, ``"op"``, ``"pipe"`` or ``"bulk"``; see ``load.c``.
        connections: how many are open at the same time.
        size: bytes in a message, or operands in a request.
        tls: whether it uses TLS.
    """

    title: str
    kind: str
    connections: int
    size: int
    tls: bool = False

    @property
    def protocol(self) -> str:
        """The protocol of the server."""
        return "op" if self.kind in ("op", "pipe") else "echo"

    def format_rate(self, rate: float) -> str:
        """Format replies per second; for bulk, as megabytes per second in each direction."""
        return f"{rate * self.size / 1e6:,.0f} MB/s" if self.kind == "bulk" else f"{rate:,.0f}/s"


WORKLOADS = {
    "echo-10": Workload("echo: 10 connections, 1 KiB", "echo", 10, 1024),
    "echo-100": Workload("echo: 100 connections, 1 KiB", "echo", 100, 1024),
    "op": Workload("op: a connection for each request, 10 at once", "op", 10, 5),
    "pipe": Workload("op: 32 requests in flight on each of 10 connections", "pipe", 10, 5),
    "bulk": Workload("echo in bulk: 4 connections, 64 KiB", "bulk", 4, 65536),
    "tls-echo-10": Workload("TLS, echo: 10 connections, 1 KiB", "echo", 10, 1024, tls=True),
    "tls-echo-100": Workload("TLS, echo: 100 connections, 1 KiB", "echo", 100, 1024, tls=True),
    "tls-echo-large": Workload("TLS, echo: 4 connections, 60,000 bytes", "echo", 4, 60_000, tls=True),
    "tls-op": Workload("TLS, op: a connection and a handshake for each request, 10 at once", "op", 10, 5, tls=True),
}


@attrs.frozen
class Run:
    """The load generator's JSON; ``load.c`` explains the fields."""

    rate: float
    p50: float | None = None
    p99: float | None = None
    busy: float = 0.0
    failures: int = 0
    reason: str = ""


@attrs.frozen
class Result:
    """The runs of one workload: for each server, one run per round."""

    workload: Workload
    runs: dict[str, list[Run]]

    def rate(self, server: str) -> float:
        """Return the median of a server's rates."""
        return statistics.median(run.rate for run in self.runs[server])

    def ratios(self, peer: str) -> list[float]:
        """Return trioproto's rate over a peer's, in each round."""
        return [ours.rate / theirs.rate for ours, theirs in zip(self.runs["trioproto"], self.runs[peer], strict=True)]

    def latencies(self, server: str) -> tuple[float, float] | None:
        """Return a server's latencies in microseconds: the medians of p50 and p99; None if there were none."""
        p50s = [run.p50 for run in self.runs[server] if run.p50 is not None]
        p99s = [run.p99 for run in self.runs[server] if run.p99 is not None]
        return (statistics.median(p50s), statistics.median(p99s)) if p50s else None


class ComparisonError(Exception):
    """Raised when a comparison is impossible or invalid."""


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Pin processes that the block starts to one core: they inherit this process's affinity."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compile_load(compiler: str, directory: Path, *, tls: bool) -> Path:
    """Compile the load generator into ``directory``, for plain TCP or for TLS.

    Raises:
        ComparisonError: if that fails. The compiler has printed why.
    """
    load = directory / ("load-tls" if tls else "load")
    options = ["-DTLS", "-lssl", "-lcrypto"] if tls else []
    done = subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", load, HERE / "load.c", *options], check=False)
    if done.returncode != 0:
        hint = "; for TLS it needs OpenSSL's headers (Debian: libssl-dev), or choose other --workloads" if tls else ""
        raise ComparisonError(f"cannot compile load.c{hint}")
    return load


def make_certificate(directory: Path) -> tuple[str, str]:
    """Make a certificate for the servers, and return the paths of certificate and key.

    It has an RSA key: with an elliptic-curve key, a handshake costs OpenSSL 3.0's client more than its server, and the
    load generator would limit the rate.
    """
    certificate, key = str(directory / "certificate.pem"), str(directory / "key.pem")
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(
        ["openssl", "req", *options, "-keyout", key, "-out", certificate],  # noqa: S607 - from the PATH
        check=True,
        capture_output=True,
    )
    return certificate, key


def server_command(server: str, protocol: str, certificate: tuple[str, str] | None) -> list[str]:
    """Return the command that starts a server, with TLS if there is a certificate.

    trioproto is started as users start it, with its limits and time-outs.
    """
    if server != "trioproto":
        return [sys.executable, str(HERE / "peers.py"), server, protocol, "127.0.0.1", *(certificate or ())]
    tls = ["--tls-cert", certificate[0], "--tls-key", certificate[1]] if certificate else []
    return [sys.executable, "-m", "trioproto", protocol, "--port", "0", *tls]


def greet(host: str, port: int) -> None:
    """Open and close one connection, as a health check does.

    Until a first connection has ended, asyncio does not reach its full rate: for each receive, glibc maps and unmaps
    the 256 KiB that asyncio's transports receive into, until one such buffer has been freed at its full size, as at end
    of stream (mallopt(3), M_MMAP_THRESHOLD). That takes more than half of the rate.
    """
    with contextlib.suppress(OSError):  # the load generator reports the error
        socket.create_connection((host, port)).close()


def measure(command: Sequence[str], workload: Workload, time: float, *, load: Path, cores: tuple[int, int]) -> Run:
    """Start a server, load it, and kill it.

    Args:
        command: starts the server, which prints a line that ends with its HOST:PORT.
        workload: the workload.
        time: seconds.
        load: the load generator.
        cores: the core of the server, and that of the load generator.

    Raises:
        ComparisonError: if the server does not start, sends a wrong reply, or sends none.
    """
    with tempfile.TemporaryFile("w+") as log:
        with on_core(cores[0]):
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        with server:
            try:
                assert server.stdout is not None  # noqa: S101 - for the type checker
                host, _, port = server.stdout.readline().strip().rpartition(" ")[2].rpartition(":")
                options = [host, port, workload.kind, str(workload.connections), str(workload.size), str(time)]
                if port:
                    greet(host, int(port))
                    with on_core(cores[1]):
                        done = subprocess.run([load, *options], capture_output=True, text=True, check=False)
            finally:
                server.kill()
        if port and done.returncode == 0:
            return Run(**json.loads(done.stdout))
        log.seek(0)
        reason = done.stderr.strip() if port else "the server did not start"
        last_words = "".join(log.readlines()[-LOG_LINES:])
        raise ComparisonError(f"{reason}: {shlex.join(command)}\n{last_words}".strip())


def compare(
    workload: Workload,
    peers: Sequence[str],
    rounds: int,
    time: float,
    *,
    load: Path,
    certificate: tuple[str, str] | None,
    cores: tuple[int, int],
) -> Result:
    """Run one workload against trioproto and each of ``peers`` in turn, ``rounds`` times.

    Args:
        workload: the workload.
        peers: the other servers.
        rounds: how many times each server is measured.
        time: seconds for each server in each round.
        load: the load generator, with TLS if the workload uses it.
        certificate: the certificate and key of the servers; None without TLS.
        cores: the core of the server, and that of the load generator.
    """
    result = Result(workload, {server: [] for server in ["trioproto", *peers]})
    for number in range(1, rounds + 1):
        print(f"{workload.title}: round {number} of {rounds}", file=sys.stderr)
        for server, runs in result.runs.items():
            command = server_command(server, workload.protocol, certificate)
            run = measure(command, workload, time, load=load, cores=cores)
            runs.append(run)
            if run.failures:
                print(f"{server}: failed connections: {run.failures} ({run.reason})", file=sys.stderr)
    return result


def cpu_model() -> str:
    """Return the processor's name, or its architecture if the kernel does not know the name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def congestion_control() -> str:
    """Return the kernel's congestion control (tcp(7)): one with pacing slows down bulk, even on loopback."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="utf-8").strip()


def describe(results: Sequence[Result], rounds: int, time: float, cores: tuple[int, int]) -> list[str]:
    """Return notes on the conditions of the measurement, and on what went wrong."""
    versions = [f"Python {platform.python_version()}", f"trioproto {trioproto.__version__}", f"trio {trio.__version__}"]
    if any(server.startswith("uvloop") for server in results[0].runs):
        versions.append(f"uvloop {importlib.metadata.version('uvloop')}")
    where = "server and load on the same core" if cores[0] == cores[1] else "server and load on separate cores"
    lines = [
        f"Medians over the rounds: {rounds}, of {time:g} s each.",
        "Above 1, trioproto is faster than the peer; below 1 (bold, or orange), the peer is faster.",
        "p50 / p99: half of the replies, and 99 % of them, arrived within this time, with the server fully loaded.",
        ", ".join(versions) + ".",
        f"{platform.system()} {platform.release()}, {cpu_model()}, {where}; congestion control {congestion_control()}.",
    ]
    if any(result.workload.tls for result in results):
        lines.insert(-1, f"TLS 1.3 with {ssl.OPENSSL_VERSION}, an RSA-2048 certificate, and no session resumption.")
    for result in results:
        for server, runs in result.runs.items():
            if statistics.median(run.busy for run in runs) > BUSY:
                lines.append(f"In “{result.workload.title}”, {server} may be faster: the load generator was the limit.")
            if failures := sum(run.failures for run in runs):
                lines.append(f"Failed connections to {server} in “{result.workload.title}”: {failures}.")
    return lines


def format_latencies(latencies: tuple[float, float] | None) -> str:
    """Format a median and a 99th percentile, in microseconds."""
    return "" if latencies is None else f"{latencies[0]:,.0f} / {latencies[1]:,.0f}"


def format_ratio(ratio: float) -> str:
    """Format a ratio, in bold Markdown if the peer is faster."""
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def table(results: Sequence[Result], notes: Sequence[str]) -> str:
    """Return ratios and latencies as a Markdown table, with two rows for each workload."""
    servers = list(results[0].runs)
    peers = servers[1:]
    rows = [
        ["workload", "", *servers],
        ["---", "---", *["---:"] * len(servers)],
    ]
    for result in results:
        ratios = [format_ratio(statistics.median(result.ratios(peer))) for peer in peers]
        rate = result.workload.format_rate(result.rate("trioproto"))
        rows.append([result.workload.title, "rate ÷ peer's", rate, *ratios])
        latencies = [format_latencies(result.latencies(server)) for server in servers]
        if any(latencies):
            rows.append(["", "p50 / p99, µs", *latencies])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


STYLE = """
    text { font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
    .title { font-size: 17px; font-weight: 600; text-anchor: middle }
    .panel { font-weight: 600; text-anchor: middle }
    .workload { font-weight: 600 }
    .server, .number { text-anchor: end }
    .tick, .side { font-size: 12px; fill: #59636e; text-anchor: middle }
    .note { font-size: 12px; fill: #59636e }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .grid { stroke: #d1d9e0 }
    .one { stroke: #59636e; stroke-width: 2 }
    .spread { stroke: #1f2328; stroke-width: 1.5 }
    .more { fill: #54aeff }
    .less { fill: #fb8f44 }
    .ours { stroke: #0969da; stroke-width: 3; fill: #0969da }
    .theirs { stroke: #818b98; stroke-width: 3; fill: #818b98 }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      .tick, .side, .note { fill: #9198a1 }
      .card { fill: #0d1117; stroke: #3d444d }
      .grid { stroke: #3d444d }
      .one { stroke: #9198a1 }
      .spread { stroke: #f0f6fc }
      .more { fill: #1f6feb }
      .less { fill: #bd561d }
      .ours { stroke: #4493f8; fill: #4493f8 }
      .theirs { stroke: #9198a1; fill: #9198a1 }
    }
"""


# Positions in the chart, in pixels.
WIDTH, TOP, ROW = 900, 96, 18
RATIOS_LEFT, RATIOS_RIGHT, RATIO_END = 140, 440, 490
LATENCIES_LEFT, LATENCIES_RIGHT, LATENCY_END = 530, 740, WIDTH - 20


@attrs.frozen
class Axis:
    """A logarithmic axis from ``left`` to ``right``, in pixels; its ends are powers of ``base``."""

    base: int
    lowest: int
    highest: int
    left: float
    right: float

    @classmethod
    def around(cls, values: Sequence[float], base: int, left: float, right: float) -> "Axis":
        """Return the shortest axis that contains ``values``."""
        lowest, highest = math.floor(math.log(min(values), base)), math.ceil(math.log(max(values), base))
        return cls(base, lowest, max(highest, lowest + 1), left, right)

    def x_of(self, value: float) -> float:
        """Return the position of a value."""
        share = (math.log(value, self.base) - self.lowest) / (self.highest - self.lowest)
        return self.left + (self.right - self.left) * share

    def ticks(self) -> list[tuple[float, float]]:
        """Return the powers of the base, with their positions."""
        powers = [float(self.base) ** power for power in range(self.lowest, self.highest + 1)]
        return [(power, self.x_of(power)) for power in powers]


def draw_text(kind: str, x: float, y: float, text: str) -> str:
    """Return an SVG text of a class of `STYLE`."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text)}</text>'


def draw_line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an SVG line of a class of `STYLE`."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}"/>'


def draw_ratios(axis: Axis, ratios: Sequence[float], y: float) -> list[str]:
    """Draw a bar from 1 to the median, and a thin line from the smallest ratio to the greatest."""
    ratio = statistics.median(ratios)
    start, end = sorted([axis.x_of(1), axis.x_of(ratio)])
    kind = "more" if ratio >= 1 else "less"
    return [
        f'<rect class="{kind}" x="{start:.1f}" y="{y + 3}" width="{end - start:.1f}" height="12"/>',
        draw_line("spread", axis.x_of(min(ratios)), y + 9, axis.x_of(max(ratios)), y + 9),
        draw_text("number", RATIO_END, y + 13, f"{ratio:.2f}"),
    ]


def draw_latencies(axis: Axis, latencies: tuple[float, float], kind: str, y: float) -> list[str]:
    """Draw a line from p50 (a dot) to p99 (a tick)."""
    p50, p99 = (axis.x_of(latency) for latency in latencies)
    return [
        draw_line(kind, p50, y + 9, p99, y + 9),
        draw_line(kind, p99, y + 4, p99, y + 14),
        f'<circle class="{kind}" cx="{p50:.1f}" cy="{y + 9}" r="2.5"/>',
        draw_text("number", LATENCY_END, y + 13, f"{format_latencies(latencies)} µs"),
    ]


def format_time(microseconds: float) -> str:
    """Format a time on the axis."""
    return f"{microseconds:g} µs" if microseconds < 1000 else f"{microseconds / 1000:g} ms"


def draw_result(result: Result, ratio_axis: Axis, latency_axis: Axis, y: float) -> list[str]:
    """Draw one workload, with a row for each server."""
    shapes = [draw_text("workload", 20, y - 6, result.workload.title)]
    bottom = y + ROW * len(result.runs)
    for axis in (ratio_axis, latency_axis):
        for tick, x in axis.ticks():
            kind = "one" if axis is ratio_axis and tick == 1 else "grid"
            shapes.append(draw_line(kind, x, y, x, bottom))
    for server in result.runs:
        shapes.append(draw_text("server", RATIOS_LEFT - 12, y + 13, server))
        if server == "trioproto":
            kind = "ours"
            shapes.append(draw_text("number", RATIO_END, y + 13, result.workload.format_rate(result.rate(server))))
        else:
            kind = "theirs"
            shapes += draw_ratios(ratio_axis, result.ratios(server), y)
        if latencies := result.latencies(server):
            shapes += draw_latencies(latency_axis, latencies, kind, y)
        y += ROW
    return shapes


def chart(results: Sequence[Result], notes: Sequence[str]) -> str:
    """Return the comparison as an SVG, for light and dark pages: ratios of rates beside latencies."""
    servers = list(results[0].runs)
    ratios = [ratio for result in results for peer in servers[1:] for ratio in result.ratios(peer)]
    latencies = [
        latency for result in results for server in servers for latency in result.latencies(server) or (100, 1000)
    ]
    ratio_axis = Axis.around([0.5, 2, *ratios], 2, RATIOS_LEFT, RATIOS_RIGHT)
    latency_axis = Axis.around(latencies, 10, LATENCIES_LEFT, LATENCIES_RIGHT)
    shapes: list[str] = []
    y = TOP
    for result in results:
        shapes += draw_result(result, ratio_axis, latency_axis, y + 24)
        y += 24 + ROW * len(servers) + 8
    for beside in (TOP - 6, y + 12):
        shapes += [draw_text("tick", x, beside, f"{tick:g}") for tick, x in ratio_axis.ticks()]
        shapes += [draw_text("tick", x, beside, format_time(tick)) for tick, x in latency_axis.ticks()]
    y += 24
    for note in [
        *notes,
        "Thin lines span the smallest and the greatest ratio of a round; thick lines span p50 and p99.",
    ]:
        y += 17
        shapes.append(draw_text("note", 20, y, note))
    height = y + 20
    title = "trioproto and its peers"
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    shapes += [
        draw_text("title", WIDTH / 2, 32, title),
        draw_text("panel", (RATIOS_LEFT + RATIOS_RIGHT) / 2, 56, "trioproto's rate ÷ the peer's"),
        draw_text("side", (RATIOS_LEFT + ratio_axis.x_of(1)) / 2, 73, "peer is faster"),
        draw_text("side", (ratio_axis.x_of(1) + RATIOS_RIGHT) / 2, 73, "trioproto is faster"),
        draw_text("panel", (LATENCIES_LEFT + LATENCIES_RIGHT) / 2, 56, "latency, p50 to p99"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"  <title>{title}</title>\n  <style>{STYLE}  </style>",
            f'  <rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
            *(f"  {shape}" for shape in shapes),
            "</svg>\n",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Compare the speed of trioproto with other servers.")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="WORKLOAD",
        help=f"some of {', '.join(WORKLOADS)}",
    )
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help=f"some of {', '.join(PEERS)}"
    )
    parser.add_argument("--rounds", type=count, default=5, help="measurements of each server (default 5)")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="duration of each measurement (default 1)")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="write comparison.md and comparison.svg to it")
    return parser.parse_args()


def main() -> None:
    """Compare, print the table, and write table and chart if requested."""
    args = parse_arguments()
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("compare.py: needs a C compiler, cc")
    if any(peer.startswith("uvloop") for peer in args.peers) and importlib.util.find_spec("uvloop") is None:
        sys.exit("compare.py: needs uvloop; from a clone of trioproto: pip install '.[speed]'; or choose other --peers")
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    # The first and the last: adjacent numbers may be two threads of one core.
    cores = available[0], available[-1]
    workloads = [WORKLOADS[name] for name in args.workloads]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            loads = {tls: compile_load(compiler, directory, tls=tls) for tls in {each.tls for each in workloads}}
            certificate = make_certificate(directory) if True in loads else None
            results = [
                compare(
                    workload,
                    args.peers,
                    args.rounds,
                    args.seconds,
                    load=loads[workload.tls],
                    certificate=certificate if workload.tls else None,
                    cores=cores,
                )
                for workload in workloads
            ]
            notes = describe(results, args.rounds, args.seconds, cores)
            text = table(results, notes)
            print(text, end="")
            if args.write is not None:
                (args.write / "comparison.md").write_text(text, encoding="utf-8")
                (args.write / "comparison.svg").write_text(chart(results, notes), encoding="utf-8")
        except ComparisonError as error:
            sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("compare.py: the load generator needs epoll: run it on Linux")
    main()
