import os
import re
import runpy
import shutil
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
TITLES = [workload.title for workload in example["WORKLOADS"].values()]

ECHO = Workload("echo", "echo", 2, 100)
OP = Workload("op", "op", 2, 1)  # the sum of one operand is that operand: the server below need not add
PIPE = Workload("pipe", "pipe", 2, 1)
BULK = Workload("bulk", "bulk", 2, 1000)

# A server that takes `size` bytes for a request and replies with those from `start` to `end`. What `mistake` says is
# done to its 50th reply.
SERVER = """
import asyncio, itertools

async def serve(reader, writer):
    try:
        while request := await reader.readexactly({size}):
            reply = request[{start}:{end}]
            if next(numbers) == 50:
                {mistake}
            writer.write(reply)
            await writer.drain()
    except (asyncio.IncompleteReadError, OSError):
        pass
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
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
    print("somebody came and left", file=sys.stderr, flush=True)
signal.pause()
"""

SILENT = """
import signal, socket
listener = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % listener.getsockname()[1], flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The load generator, compiled without a warning."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("load") / "load"
    source = EXAMPLE.with_name("load.c")
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", path, source], check=True, timeout=60)
    return path


def measure(load: Path, workload: Any, mistake: str = "pass") -> Any:
    """Put a short load on a server that makes one mistake."""
    size, start, end = (6, 1, 5) if workload.protocol == "op" else (workload.size, 0, workload.size)
    server = SERVER.format(size=size, start=start, end=end, mistake=mistake)
    return measure_program(load, workload, server)


def measure_program(load: Path, workload: Any, program: str) -> Any:
    core = min(os.sched_getaffinity(0))
    return example["measure"]([sys.executable, "-c", program], workload, 0.05, load=load, cores=(core, core))


@pytest.mark.usefixtures("load")
def test_comparison_prints_the_table_and_writes_it_with_the_chart(tmp_path: Path) -> None:
    """One command runs every kind of load on trioproto and a peer, and gives the ratios as a table and a chart."""
    directory = tmp_path / "new" / "directory"
    arguments = ["--workloads", "echo-100", "op", "pipe", "bulk", "--peers", "asyncio-streams", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments, "--seconds", "0.05", "--write", directory],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    assert (directory / "comparison.md").read_text(encoding="utf-8") == done.stdout
    header, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert header == ["workload", "trioproto", "over asyncio-streams"]
    assert [title for title, _, _ in rows] == TITLES[1:]
    ratios = [ratio for _, _, ratio in rows]
    assert all(float(ratio) > 0 for ratio in ratios)
    for versions in ("Python 3", "trioproto 0", "trio 0", "Linux ", "congestion control "):
        assert versions in done.stdout
    texts = texts_of((directory / "comparison.svg").read_text(encoding="utf-8"))
    assert {*TITLES[1:], *ratios, "asyncio-streams"} <= set(texts)


@pytest.mark.parametrize("workload", [ECHO, OP, PIPE, BULK])
def test_honest_server_is_measured(load: Path, workload: Any) -> None:
    """A server that is right has a rate and no failures."""
    run = measure(load, workload)
    assert run.rate > 50
    assert run.failures == 0


@pytest.mark.parametrize("mistake", [FLIP, REPEAT])
@pytest.mark.parametrize("workload", [ECHO, OP, PIPE, BULK])
def test_wrong_reply_is_found_out(load: Path, workload: Any, mistake: str) -> None:
    """One wrong bit, or one reply too many, in one reply among many, voids the comparison."""
    with pytest.raises(example["ComparisonError"], match="wrong reply"):
        measure(load, workload, mistake)


@pytest.mark.parametrize("workload", [ECHO, OP, PIPE, BULK])
def test_broken_connection_is_counted(load: Path, workload: Any) -> None:
    """A connection that ends before its reply is counted, with the reason, and the load goes on."""
    run = measure(load, workload, CLOSE)
    assert run.failures == 1
    assert run.reason in ("end of stream", "Connection reset by peer", "Broken pipe")
    assert run.rate > 50


def test_silent_server_is_no_result(load: Path) -> None:
    """A server that accepts and never replies has no rate to compare with."""
    with pytest.raises(example["ComparisonError"], match="no reply"):
        measure_program(load, ECHO, SILENT)


def test_first_connection_is_none_of_the_load(load: Path) -> None:
    """Before the load begins, somebody connects and leaves: asyncio is at its full rate only from then on."""
    with pytest.raises(example["ComparisonError"], match=r"(?m)^somebody came and left$"):
        measure_program(load, ECHO, GREETED)


def test_server_that_does_not_start_is_shown_with_its_last_words(load: Path) -> None:
    """The message gives the command and the end of what the server said."""
    with pytest.raises(example["ComparisonError"], match=r"did not start: .*\nno such peer"):
        measure_program(load, ECHO, "raise SystemExit('no such peer')")


def result(*rates: tuple[str, Sequence[float]], failures: int = 0) -> Any:
    return Result(ECHO, {server: [Run(rate, failures, "") for rate in runs] for server, runs in rates})


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_ratio_is_the_median_of_the_rounds() -> None:
    """Each round is compared within itself: a machine that is slow in one round changes no ratio of another."""
    slow_round = result(("trioproto", [200.0, 20.0, 30.0]), ("trio", [100.0, 10.0, 10.0]))

    table = example["table"]([slow_round], ["a note"])

    assert "| echo | 30/s | 2.00 |" in table.splitlines()
    assert table.endswith("\n- a note\n")


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


def test_failures_stand_under_the_table() -> None:
    """Connections that failed are named with the result, so that nobody takes it for a clean one."""
    failed = result(("trioproto", [1.0, 1.0]), ("trio", [1.0, 1.0]), failures=3)

    notes = example["describe"]([failed], 2, 0.05, (0, 1))

    assert "Connections to trio that failed in “echo”: 6." in notes
    assert not re.search("failed", " ".join(example["describe"]([result(("trioproto", [1.0]))], 1, 1.0, (0, 1))))
