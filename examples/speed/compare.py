"""Speed: trioproto beside the same servers on other libraries, under the same load, in turn.

Each round starts every server anew, one at a time, and puts the load of ``load.c`` on it, which checks every byte of
the replies. A round gives the ratio of trioproto's rate to each peer's; the result is the median over the rounds. Rates
differ between machines, and from one minute to the next on the same machine; ratios of neighbours in time much less.

Run it on a quiet machine with Linux and a C compiler; it takes about five minutes::

    pip install "trioproto[speed]"
    python examples/speed/compare.py [--write DIRECTORY]

Look for the ratios: 2 means that trioproto answers twice as much as that peer, 0.5 half as much. In the chart, look for
the thin lines, too: they go from the smallest ratio of a round to the greatest. Where they are long, the machine was
not quiet. README.md beside this says what each workload means.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import socket
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
LOG_LINES = 10  # of a server's log, shown when it fails


@attrs.frozen
class Workload:
    """What the load generator does: its arguments, and their meaning in words.

    Attributes:
        title: the words.
        kind: ``"echo"``, ``"op"``, ``"pipe"`` or ``"bulk"``; see ``load.c``.
        connections: how many are open at once.
        size: bytes in a message, or operands in a request.
    """

    title: str
    kind: str
    connections: int
    size: int

    @property
    def protocol(self) -> str:
        """Which server it is for."""
        return "op" if self.kind in ("op", "pipe") else "echo"

    def format_rate(self, rate: float) -> str:
        """Write replies per second; for bulk, as megabytes each way."""
        return f"{rate * self.size / 1e6:,.0f} MB/s" if self.kind == "bulk" else f"{rate:,.0f}/s"


WORKLOADS = {
    "echo-10": Workload("echo: 10 connections, 1 KiB", "echo", 10, 1024),
    "echo-100": Workload("echo: 100 connections, 1 KiB", "echo", 100, 1024),
    "op": Workload("op: a connection for each request, 10 at once", "op", 10, 5),
    "pipe": Workload("op: 32 requests in flight on each of 10 connections", "pipe", 10, 5),
    "bulk": Workload("echo in bulk: 4 connections, 64 KiB", "bulk", 4, 65536),
}


@attrs.frozen
class Run:
    """What the load generator found: the fields of its JSON."""

    rate: float
    failures: int
    reason: str


@attrs.frozen
class Result:
    """One workload's runs: for each server, one in each round."""

    workload: Workload
    runs: dict[str, list[Run]]

    def rate(self, server: str) -> float:
        """Return the median of a server's rates."""
        return statistics.median(run.rate for run in self.runs[server])

    def ratios(self, peer: str) -> list[float]:
        """Return trioproto's rate over a peer's, in each round."""
        return [ours.rate / theirs.rate for ours, theirs in zip(self.runs["trioproto"], self.runs[peer], strict=True)]


class ComparisonError(Exception):
    """What makes a comparison impossible, or void."""


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Pin what the block starts to one core: children inherit what we may run on."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compile_load(compiler: str, directory: Path) -> Path:
    """Compile the load generator into ``directory``."""
    load = directory / "load"
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", load, HERE / "load.c"], check=True)
    return load


def server_command(server: str, protocol: str, host: str) -> list[str]:
    """Return the command that starts a server: trioproto as its users start it, with its limits and time-outs."""
    if server == "trioproto":
        return [sys.executable, "-m", "trioproto", protocol, "--host", host, "--port", "0"]
    return [sys.executable, str(HERE / "peers.py"), server, protocol, host]


def greet(host: str, port: int) -> None:
    """Connect once and leave, as a health check does.

    A server that nobody has ever left would not be at its full rate, if it is asyncio's: for each receive, glibc maps
    and unmaps the 256 KiB that asyncio's transports receive into, until one such buffer has been given back whole, as
    at the end of a stream (mallopt(3), M_MMAP_THRESHOLD). That takes more than half of the rate.
    """
    with contextlib.suppress(OSError):  # the load generator will say what is wrong
        socket.create_connection((host, port)).close()


def measure(command: Sequence[str], workload: Workload, time: float, *, load: Path, cores: tuple[int, int]) -> Run:
    """Start a server, put the load on it, and kill it.

    Args:
        command: starts the server, which prints a line that ends with its HOST:PORT.
        workload: what to do.
        time: seconds.
        load: the load generator.
        cores: the server's and the load generator's.

    Raises:
        ComparisonError: if the server does not start, or gives a wrong reply, or none.
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
    workload: Workload, peers: Sequence[str], rounds: int, time: float, *, load: Path, cores: tuple[int, int]
) -> Result:
    """Run one workload against trioproto and each of ``peers`` in turn, ``rounds`` times."""
    # A connection that a client has closed keeps its two addresses for a minute (TIME_WAIT), and a workload with a
    # connection for each request leaves tens of thousands. Each server has another address, and with it, all of the
    # client's ports again.
    hosts = itertools.cycle(f"127.0.0.{number}" for number in range(2, 255))
    result = Result(workload, {server: [] for server in ["trioproto", *peers]})
    for number in range(1, rounds + 1):
        print(f"{workload.title}: round {number} of {rounds}", file=sys.stderr)
        for server, runs in result.runs.items():
            command = server_command(server, workload.protocol, next(hosts))
            run = measure(command, workload, time, load=load, cores=cores)
            runs.append(run)
            if run.failures:
                print(f"{server}: connections that failed: {run.failures} ({run.reason})", file=sys.stderr)
    return result


def cpu_model() -> str:
    """Return the processor's name, as far as the kernel knows it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def congestion_control() -> str:
    """Return the name of the kernel's algorithm (tcp(7)): one that paces makes bulk slower, even on loopback."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="utf-8").strip()


def describe(results: Sequence[Result], rounds: int, time: float, cores: tuple[int, int]) -> list[str]:
    """Return lines that say under which conditions the results came about, and what went wrong."""
    versions = [f"Python {platform.python_version()}", f"trioproto {trioproto.__version__}", f"trio {trio.__version__}"]
    if any(server.startswith("uvloop") for server in results[0].runs):
        versions.append(f"uvloop {importlib.metadata.version('uvloop')}")
    where = "server and load on the same core" if cores[0] == cores[1] else "server and load on a core each"
    lines = [
        f"The median over the rounds: {rounds}, of {time:g} s each.",
        "Above 1, trioproto answers more than the peer; below 1, less.",
        ", ".join(versions) + ".",
        f"{platform.system()} {platform.release()}, {cpu_model()}, {where}; congestion control {congestion_control()}.",
    ]
    for result in results:
        for server, runs in result.runs.items():
            if failures := sum(run.failures for run in runs):
                lines.append(f"Connections to {server} that failed in “{result.workload.title}”: {failures}.")
    return lines


def table(results: Sequence[Result], notes: Sequence[str]) -> str:
    """Return the ratios as a table in Markdown."""
    peers = list(results[0].runs)[1:]
    rows = [["workload", "trioproto", *(f"over {peer}" for peer in peers)], ["---", *["---:"] * (len(peers) + 1)]]
    for result in results:
        ratios = [f"{statistics.median(result.ratios(peer)):.2f}" for peer in peers]
        rows.append([result.workload.title, result.workload.format_rate(result.rate("trioproto")), *ratios])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


STYLE = """
    text { font: 14px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
    .title { font-size: 17px; font-weight: 600; text-anchor: middle }
    .workload { font-weight: 600 }
    .peer, .ratio { text-anchor: end }
    .tick, .side { font-size: 12px; fill: #59636e; text-anchor: middle }
    .note { font-size: 12px; fill: #59636e }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .grid { stroke: #d1d9e0 }
    .one { stroke: #59636e; stroke-width: 2 }
    .spread { stroke: #1f2328; stroke-width: 1.5 }
    .more { fill: #54aeff }
    .less { fill: #fb8f44 }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      .tick, .side, .note { fill: #9198a1 }
      .card { fill: #0d1117; stroke: #3d444d }
      .grid { stroke: #3d444d }
      .one { stroke: #9198a1 }
      .spread { stroke: #f0f6fc }
      .more { fill: #1f6feb }
      .less { fill: #bd561d }
    }
"""


def chart(results: Sequence[Result], notes: Sequence[str]) -> str:
    """Return the ratios as an SVG, readable on light and on dark pages: bars from 1 on a logarithmic axis."""
    width, left, right, top = 860, 190, 780, 92
    peers = list(results[0].runs)[1:]
    every = [ratio for result in results for peer in peers for ratio in result.ratios(peer)]
    lowest, highest = math.floor(math.log2(min(0.5, *every))), math.ceil(math.log2(max(2, *every)))
    shapes: list[str] = []

    def x_of(ratio: float) -> float:
        return left + (right - left) * (math.log2(ratio) - lowest) / (highest - lowest)

    def write(kind: str, x: float, y: float, text: str) -> None:
        shapes.append(f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text)}</text>')

    def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        shapes.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}"/>')

    y = top
    for result in results:
        write("workload", 20, y + 22, result.workload.title)
        y += 30
        for power in range(lowest, highest + 1):
            line("one" if power == 0 else "grid", x_of(2.0**power), y, x_of(2.0**power), y + 21 * len(peers))
        for peer in peers:
            ratios = result.ratios(peer)
            ratio = statistics.median(ratios)
            start, end = sorted([x_of(1), x_of(ratio)])
            kind = "more" if ratio >= 1 else "less"
            write("peer", left - 12, y + 15, peer)
            shapes.append(f'<rect class="{kind}" x="{start:.1f}" y="{y + 3}" width="{end - start:.1f}" height="15"/>')
            line("spread", x_of(min(ratios)), y + 10.5, x_of(max(ratios)), y + 10.5)
            write("ratio", width - 20, y + 15, f"{ratio:.2f}")
            y += 21
        y += 8
    for power in range(lowest, highest + 1):
        for beside in (top - 6, y + 12):
            write("tick", x_of(2.0**power), beside, f"{2.0**power:g}")
    y += 24
    for note in [*notes, "A thin line goes from the smallest ratio of a round to the greatest."]:
        y += 18
        write("note", 20, y, note)
    height = y + 20
    title = "trioproto's rate over each peer's"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    write("title", width / 2, 36, title)
    write("side", (left + x_of(1)) / 2, 62, "the peer is faster")
    write("side", (x_of(1) + right) / 2, 62, "trioproto is faster")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"  <title>{title}</title>\n  <style>{STYLE}  </style>",
            f'  <rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10"/>',
            *(f"  {shape}" for shape in shapes),
            "</svg>\n",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Compare trioproto's speed with that of other servers.")
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
    parser.add_argument("--rounds", type=count, default=5, help="how often each server is measured (default 5)")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="how long each time (default 1)")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="write comparison.md and comparison.svg there")
    return parser.parse_args()


def main() -> None:
    """Compare, print the table, and write table and chart where that is asked for."""
    args = parse_arguments()
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("compare.py: needs a C compiler, cc")
    if any(peer.startswith("uvloop") for peer in args.peers) and importlib.util.find_spec("uvloop") is None:
        sys.exit('compare.py: needs uvloop: pip install "trioproto[speed]"; or choose other --peers')
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    # The first and the last: neighbours in number may be the two threads of one core.
    cores = available[0], available[-1]
    with tempfile.TemporaryDirectory() as directory:
        load = compile_load(compiler, Path(directory))
        try:
            results = [
                compare(WORKLOADS[name], args.peers, args.rounds, args.seconds, load=load, cores=cores)
                for name in args.workloads
            ]
        except ComparisonError as error:
            sys.exit(f"compare.py: {error}")
    notes = describe(results, args.rounds, args.seconds, cores)
    text = table(results, notes)
    print(text, end="")
    if args.write is not None:
        (args.write / "comparison.md").write_text(text, encoding="utf-8")
        (args.write / "comparison.svg").write_text(chart(results, notes), encoding="utf-8")


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("compare.py: the load generator waits with Linux's epoll: run it there")
    main()
