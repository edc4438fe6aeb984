import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "speed" / "compare.py"
example = runpy.run_path(str(EXAMPLE))
Result, Run, Workload = example["Result"], example["Run"], example["Workload"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the load generator waits with Linux's epoll")

SVG = "{http://www.w3.org/2000/svg}"

ECHO = Workload("echo", "echo", 2, 100)
OP = Workload("op", "op", 2, 1)  # the sum of one operand is that operand: the server below need not add
PIPE = Workload("pipe", "pipe", 2, 1)
BULK = Workload("bulk", "bulk", 2, 1000)
TLS_ECHO = Workload("echo over TLS", "echo", 2, 40_000, tls=True)  # more than the 16 KiB of a TLS record
TLS_OP = Workload("op over TLS", "op", 2, 1, tls=True)
ALL_KINDS = [ECHO, OP, PIPE, BULK, TLS_ECHO, TLS_OP]

# A server whose requests have `size` bytes, and which replies with those from `start` to `end`. `tls` is None, or the
# paths of a certificate and its key. `mistake` is a statement that runs before the third reply.
SERVER = """
import asyncio, itertools, ssl

async def serve(reader, writer):
    try:
        while request := await reader.readexactly({size}):
            reply = request[{start}:{end}]
            if next(numbers) == 3:
                {mistake}
            writer.write(reply)
            await writer.drain()
    except (asyncio.IncompleteReadError, OSError):
        pass
    writer.close()

async def main():
    context = None
    if {tls}:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*{tls})
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    print("listening on 127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

numbers = itertools.count(1)
asyncio.run(main())
"""
FLIP = "reply = reply[:-1] + bytes([reply[-1] ^ 1])"
REPEAT = "reply += reply"
CLOSE = "break"

GREETED = """
import signal, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % listener.getsockname()[1], flush=True)
if listener.accept()[0].recv(1) == b"":
    print("connection opened and closed", file=sys.stderr, flush=True)
signal.pause()
"""

SILENT = """
import signal, socket
listener = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % listener.getsockname()[1], flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The load generator, compiled without warnings: without TLS, and with it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    directory = tmp_path_factory.mktemp("load")
    compile_load = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", str(EXAMPLE.with_name("load.c"))]
    subprocess.run([*compile_load, "-o", directory / "load"], check=True, timeout=60)
    subprocess.run([*compile_load, "-DTLS", "-o", directory / "load-tls", "-lssl", "-lcrypto"], check=True, timeout=60)
    return {False: directory / "load", True: directory / "load-tls"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The paths of a certificate and its key."""
    return example["make_certificate"](tmp_path_factory.mktemp("certificate"))


def measure(loads: dict[bool, Path], certificate: Any, workload: Any, mistake: str = "pass") -> Any:
    """Put a short load on a server that makes ``mistake`` once."""
    size, start, end = (6, 1, 5) if workload.protocol == "op" else (workload.size, 0, workload.size)
    tls = certificate if workload.tls else None
    server = SERVER.format(size=size, start=start, end=end, mistake=mistake, tls=tls)
    return measure_program(loads, workload, server)


def measure_program(loads: dict[bool, Path], workload: Any, program: str) -> Any:
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", program]
    return example["measure"](command, workload, 0.05, load=loads[workload.tls], cores=(core, core))


@pytest.mark.usefixtures("loads")
def test_comparison_prints_the_table_and_writes_it_with_the_chart(tmp_path: Path) -> None:
    """One command runs every kind of load on trioproto and a peer, and writes the results as a table and a chart."""
    directory = tmp_path / "new" / "directory"
    workloads = ["echo-100", "op", "pipe", "bulk", "tls-echo-10", "tls-op"]
    arguments = ["--workloads", *workloads, "--peers", "asyncio-streams", "--rounds", "1", "--seconds", "0.05"]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments, "--write", directory],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    assert (directory / "comparison.md").read_text(encoding="utf-8") == done.stdout
    header, _, *rows = cells_of(done.stdout)
    assert header == ["workload", "", "trioproto", "asyncio-streams"]
    titles = [example["WORKLOADS"][workload].title for workload in workloads]
    assert [title for title, *_ in rows if title] == titles
    ratios = [ratio.strip("*") for _, what, _, ratio in rows if what == "rate ÷ peer's"]
    assert len(ratios) == len(workloads)
    assert all(float(ratio) > 0 for ratio in ratios)
    latencies = [latency for _, what, *both in rows if what == "p50 / p99, µs" for latency in both]
    assert len(latencies) == 2 * (len(workloads) - 1)  # bulk has none
    for pair in latencies:
        p50, p99 = (float(latency.replace(",", "")) for latency in pair.split(" / "))
        assert 0 < p50 <= p99
    for versions in ("Python 3", "trioproto 0", "trio 0", "OpenSSL ", "Linux ", "congestion control "):
        assert versions in done.stdout
    texts = texts_of((directory / "comparison.svg").read_text(encoding="utf-8"))
    assert {*titles, *ratios, *(f"{pair} µs" for pair in latencies), "asyncio-streams"} <= set(texts)


@pytest.mark.parametrize("workload", ALL_KINDS)
def test_honest_server_is_measured(loads: dict[bool, Path], certificate: Any, workload: Any) -> None:
    """A correct server has a rate, latencies (except in bulk), and no failures."""
    run = measure(loads, certificate, workload)
    assert run.rate > 0
    assert run.failures == 0
    if workload is BULK:
        assert (run.p50, run.p99) == (None, None)
    else:
        assert 0 < run.p50 <= run.p99


@pytest.mark.parametrize("peer", example["PEERS"])
@pytest.mark.parametrize("workload", [TLS_ECHO, TLS_OP])
def test_peers_speak_tls(loads: dict[bool, Path], certificate: Any, peer: str, workload: Any) -> None:
    """Each peer serves the TLS workloads."""
    core = min(os.sched_getaffinity(0))
    command = example["server_command"](peer, workload.protocol, certificate)
    run = example["measure"](command, workload, 0.05, load=loads[True], cores=(core, core))
    assert run.failures == 0


def test_each_connection_comes_from_another_address(loads: dict[bool, Path]) -> None:
    """Each connection has another source address: one address would run out of ports in the op workload."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        port = listener.getsockname()[1]
        with subprocess.Popen([loads[False], "127.0.0.1", str(port), "op", "3", "1", "0.05"], stderr=subprocess.PIPE):
            clients = [listener.accept() for _ in range(3)]
            assert len({address for _, (address, _) in clients}) == 3
            for connection, _ in clients:
                connection.close()


@pytest.mark.parametrize("mistake", [FLIP, REPEAT])
@pytest.mark.parametrize("workload", ALL_KINDS)
def test_wrong_reply_is_detected(loads: dict[bool, Path], certificate: Any, workload: Any, mistake: str) -> None:
    """One wrong bit, or one extra reply, ends the comparison with an error."""
    with pytest.raises(example["ComparisonError"], match="wrong reply"):
        measure(loads, certificate, workload, mistake)


@pytest.mark.parametrize("workload", ALL_KINDS)
def test_broken_connection_is_counted(loads: dict[bool, Path], certificate: Any, workload: Any) -> None:
    """A connection that ends before its reply is counted as a failure, with the reason, and the load continues."""
    run = measure(loads, certificate, workload, CLOSE)
    assert run.failures == 1
    assert run.reason in ("end of stream", "Connection reset by peer", "Broken pipe")
    assert run.rate > 0


def test_silent_server_is_an_error(loads: dict[bool, Path]) -> None:
    """A server that accepts connections and never replies is an error, not a rate of 0."""
    with pytest.raises(example["ComparisonError"], match="no reply"):
        measure_program(loads, ECHO, SILENT)


def test_first_connection_is_closed_before_the_load(loads: dict[bool, Path]) -> None:
    """Before the load, one connection is opened and closed: asyncio reaches its full rate only after that."""
    with pytest.raises(example["ComparisonError"], match=r"(?m)^connection opened and closed$"):
        measure_program(loads, ECHO, GREETED)


def test_server_that_does_not_start_is_reported_with_its_log(loads: dict[bool, Path]) -> None:
    """The message has the command and the end of the server's log."""
    with pytest.raises(example["ComparisonError"], match=r"did not start: .*\nno such peer"):
        measure_program(loads, ECHO, "raise SystemExit('no such peer')")


def result(*rates: tuple[str, Sequence[float]], **fields: Any) -> Any:
    return Result(ECHO, {server: [Run(rate, **fields) for rate in runs] for server, runs in rates})


def cells_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_ratio_is_the_median_of_the_rounds() -> None:
    """Ratios are computed within each round: a slow round does not affect the ratios of others."""
    slow_round = result(("trioproto", [200.0, 20.0, 30.0]), ("trio", [100.0, 10.0, 10.0]))

    table = example["table"]([slow_round], ["a note"])

    assert ["echo", "rate ÷ peer's", "30/s", "2.00"] in cells_of(table)
    assert table.endswith("\n- a note\n")


def test_latencies_are_medians_of_the_rounds() -> None:
    """Each percentile is the median of that percentile over the rounds."""
    runs = [Run(1.0, p50=p50, p99=p99) for p50, p99 in ((90.0, 2000.0), (100.0, 1000.0), (300.0, 1500.0))]

    table = example["table"]([Result(ECHO, {"trioproto": runs})], [])

    assert ["", "p50 / p99, µs", "100 / 1,500"] in cells_of(table)


def test_faster_peer_is_bold() -> None:
    """The table has the ratio of a peer that is faster than trioproto in bold."""
    table = example["table"]([result(("trioproto", [70.0]), ("trio", [35.0]), ("uvloop", [100.0]))], [])

    assert cells_of(table)[-1] == ["echo", "rate ÷ peer's", "70/s", "2.00", "**0.70**"]


def test_chart_draws_bars_from_1_on_a_logarithmic_axis() -> None:
    """Twice the rate and half the rate are bars of the same length, on opposite sides of the line at 1."""
    svg = example["chart"]([result(("trioproto", [200.0]), ("trio", [100.0]), ("<&>", [400.0]))], ["a note"])

    root = ET.fromstring(svg)
    more, less = (
        next(bar for bar in root.iter(f"{SVG}rect") if bar.get("class") == kind).attrib for kind in ("more", "less")
    )
    (one,) = (float(line.attrib["x1"]) for line in root.iter(f"{SVG}line") if line.get("class") == "one")
    assert float(more["x"]) == one
    assert float(less["x"]) + float(less["width"]) == pytest.approx(one, abs=0.2)
    assert float(more["width"]) == pytest.approx(float(less["width"]), abs=0.2)
    assert float(more["width"]) > 50
    assert {"trio", "2.00", "<&>", "0.50", "a note"} <= set(texts_of(svg))


def test_chart_draws_latencies_from_p50_to_p99() -> None:
    """Each server's latencies are a line on a logarithmic axis, with both ends inside it, and in numbers."""
    runs = {
        "trioproto": [Run(1.0, p50=100.0, p99=1000.0)],
        "trio": [Run(1.0, p50=1000.0, p99=10_000.0)],
    }

    root = ET.fromstring(example["chart"]([Result(ECHO, runs)], []))

    ours, theirs = (
        next(line for line in root.iter(f"{SVG}line") if line.get("class") == kind).attrib
        for kind in ("ours", "theirs")
    )
    assert float(ours["x2"]) == float(theirs["x1"])  # both are 1 ms
    assert float(ours["x2"]) - float(ours["x1"]) == float(theirs["x2"]) - float(theirs["x1"]) > 50
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"100 µs", "1 ms", "10 ms", "100 / 1,000 µs", "1,000 / 10,000 µs"} <= set(texts)


def test_failures_are_listed_under_the_table() -> None:
    """Failed connections are listed with the result, so that it is not mistaken for a clean one."""
    failed = result(("trioproto", [1.0, 1.0]), ("trio", [1.0, 1.0]), failures=3)

    notes = example["describe"]([failed], 2, 0.05, (0, 1))

    assert "Failed connections to trio in “echo”: 6." in notes
    assert not re.search("(?i)failed", " ".join(example["describe"]([result(("trioproto", [1.0]))], 1, 1.0, (0, 1))))


def test_limit_of_the_load_is_listed_under_the_table() -> None:
    """A server that the load generator could not saturate is listed: it may be faster than measured."""
    limited = result(("trioproto", [1.0]), ("trio", [1.0]), busy=0.99)

    notes = example["describe"]([limited], 1, 0.05, (0, 1))

    assert "In “echo”, trio may be faster: the load generator was the limit." in notes
