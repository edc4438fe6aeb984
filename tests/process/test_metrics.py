"""Metrics: one answer for all workers, as Prometheus reads it."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from helpers import reset
from processes import HANGS, LOG_LINE, Server, is_refused, receive_all, serving
from prometheus_client.parser import text_string_to_metric_families

from trioproto.cli.arguments import address as parse_address
from trioproto.cli.main import main
from trioproto.echo import echo_handler
from trioproto.process.listeners import ListenError
from trioproto.process.metrics import MAX_SCRAPES
from trioproto.process.service import serve_until_signal
from trioproto.server import DURATIONS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers of POSIX")

Numbers = dict[str, float]


def address_in(line: str) -> str:
    """Return the HOST:PORT that the log names."""
    match = re.search(r"metrics on http://(.*)/metrics$", line)
    assert match
    return match[1]


async def where(server: Server) -> str:
    """Wait until the server says where its metrics are."""
    await server.logged("metrics on")
    return address_in(next(line for line in server.log if "metrics on" in line))


async def get(address: str, request: str = "GET /metrics HTTP/1.1") -> str:
    """Ask over HTTP, and return all of the answer."""
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as stream:
        await stream.send_all(f"{request}\r\nHost: {address}\r\n\r\n".encode())
        return (await receive_all(stream)).decode()


async def scrape(address: str) -> Numbers:
    """Return the samples: their values by what Prometheus writes before them."""
    head, _, body = (await get(address)).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n")
    assert f"Content-Length: {len(body)}\r\n" in head
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


async def scraped(address: str, **expected: float) -> Numbers:
    """Scrape until these numbers are there, which takes a second and a bit, and return all of them."""
    while True:
        numbers = await scrape(address)
        if expected.items() <= {name.removeprefix("trioproto_"): number for name, number in numbers.items()}.items():
            return numbers
        await trio.sleep(0.1)


async def test_numbers() -> None:
    """Each metric says what the server has done, and is at most a second old; open connections count, too."""
    complaint = r".*: protocol error: operand count is 0"
    async with serving("op", "--metrics", "0", "--max-connections", "7", complaints=[complaint]) as server:
        address = await where(server)
        assert address.startswith("127.0.0.1:")
        numbers = await scrape(address)
        assert numbers.pop("trioproto_connections_max") == 7
        assert set(numbers.values()) == {0}

        async with await server.connect() as open_one, await server.connect() as malformed:
            await server.answers(open_one)
            await server.answers(open_one)
            await malformed.send_all(b"\0")
            assert await receive_all(malformed) == b""
            numbers = await scraped(address, connections_accepted_total=2, connections_active=1)
        assert {name: number for name, number in numbers.items() if number and "_bucket" not in name} == {
            "trioproto_connections_max": 7,
            "trioproto_connections_accepted_total": 2,
            "trioproto_connections_active": 1,
            "trioproto_connections_ended_total{how=malformed}": 1,
            "trioproto_connection_duration_seconds_count": 1,
            "trioproto_connection_duration_seconds_sum": pytest.approx(0.1, abs=5),
            "trioproto_received_bytes_total": 21,
            "trioproto_sent_bytes_total": 8,
            "trioproto_requests_total": 2,
        }
        name = "trioproto_connection_duration_seconds_bucket"
        buckets = [numbers[f"{name}{{le={bound}}}"] for bound in (*DURATIONS, "+Inf")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == 1

        await scraped(address, **{"connections_ended_total{how=ended}": 1, "connections_active": 0})


async def test_accept_errors() -> None:
    """Failures to accept show once there are descriptors again, for the metrics as well."""
    complaint = r".*: cannot accept: Too many open files; new connections wait"
    async with serving("op", "--metrics", "0", complaints=[complaint]) as server:
        address = await where(server)
        server.limit_descriptors(4)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(await server.connect())
            await server.logged("cannot accept")
        await server.answers_anew()
        while (await scrape(address))["trioproto_accept_errors_total"] < 1:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.1)


async def test_workers() -> None:
    """The numbers are those of all workers together, and never go back, not even when a worker is killed."""
    killed = r"worker \d was killed by signal 9 \(Killed\); starting another"
    async with serving("op", "--metrics", "0", "--workers", "2", complaints=[killed]) as server:
        address = await where(server)
        pids = await server.workers(2)
        await scraped(address, connections_max=2000)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                stream = await stack.enter_async_context(await server.connect())
                await server.answers(stream)
            await scraped(address, connections_active=20, connections_accepted_total=20, requests_total=20)
        await scraped(address, connections_active=0)
        before = await scraped(address, **{"connections_ended_total{how=ended}": 20})
        assert before["trioproto_received_bytes_total"] == 200

        os.kill(pids[0], signal.SIGKILL)
        await server.logged("starting another")
        for _ in range(20):
            numbers = await scrape(address)
            assert all(numbers[name] >= number for name, number in before.items())
            before = numbers
            await trio.sleep(0.1)
        for _ in range(5):
            await server.answers_anew()
        numbers = await scraped(address, connections_accepted_total=25, sent_bytes_total=100)
        assert numbers["trioproto_connections_max"] == 2000


async def test_stop() -> None:
    """A stop shows in the metrics until the last connection has ended; then the port is closed."""
    async with serving("op", "--metrics", "0", "--grace", "30") as server:
        address = await where(server)
        idle, begun = await server.tcp(), await server.tcp()
        async with idle, begun:
            await server.answers(idle)
            await begun.send_all(b"\1\0\0")
            await scraped(address, connections_active=2)
            server.stop()
            await scraped(address, **{"connections_active": 1, "connections_ended_total{how=stopped}": 1})
            await begun.send_all(b"\0\0+")
            assert await receive_all(begun) == bytes(4)
        await server.process.wait()
        assert is_refused(address)


async def test_strangers() -> None:
    """What is no scrape gets a short answer or none, in time, and at most one line of the log; scrapes go on."""
    complaint = r"127.0.0.1:\d+ to 127.0.0.1:\d+: .*"
    async with serving("op", "--metrics", "0", complaints=[complaint] * 2) as server:
        address = await where(server)
        host, _, port = address.rpartition(":")
        for request in ("GET /secret HTTP/1.1", "POST /metrics HTTP/1.1", "GET /metrics", "hello", "", " ", "\0"):
            assert (await get(address, request)).startswith("HTTP/1.1 404 Not Found\r\n")
        for request in ("GET / HTTP/1.0", "GET /metrics?name[]=x HTTP/1.1"):
            assert (await get(address, request)).startswith("HTTP/1.1 200 OK\r\n")
        async with await trio.open_tcp_stream(host, int(port)) as stream:  # too much
            await stream.send_all(b"x" * 8196)
            assert await receive_all(stream) == b""
        async with await trio.open_tcp_stream(host, int(port)) as stream:  # too little
            await stream.send_all(b"GET")
            await stream.send_eof()
            assert await receive_all(stream) == b""
        for _ in range(3):
            reset(await trio.open_tcp_stream(host, int(port)))
        async with contextlib.AsyncExitStack() as stack:  # too many: those wait that come after them
            for _ in range(MAX_SCRAPES):
                await stack.enter_async_context(await trio.open_tcp_stream(host, int(port)))
            await trio.sleep(0.1)
            with trio.move_on_after(0.3) as waiting:
                await scrape(address)
            assert waiting.cancelled_caught
            await server.answers_anew()
        await scrape(address)


async def test_ipv6() -> None:
    """An IPv6 address may be named, in brackets, as the log names it."""
    async with serving("echo", "--metrics", "[::1]:0") as server:
        address = await where(server)
        assert address.startswith("[::1]:")
        await scrape(address)


# Mistakes.


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    """A port in use is one line that says what to do, before the server listens anywhere."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        advice = "choose another --metrics, or stop what listens there"
        complaint = f"trioproto: cannot listen on {address}: Address already in use; {advice}"
        for workers in ("1", "2"):
            assert main(["op", "--port", "0", "--metrics", address, "--workers", workers]) == 1
            out, err = capsys.readouterr()
            assert (out, [line for line in err.splitlines() if not LOG_LINE.fullmatch(line)]) == (
                "",
                [complaint],
            )


def test_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where prometheus_client is not installed, one line says how to get it."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["op", "--port", "0", "--metrics", "0"]) == 1
    assert capsys.readouterr().err == (
        "trioproto: --metrics needs prometheus_client, which is not installed; "
        "from a clone of trioproto: pip install '.[metrics]'\n"
    )


@pytest.mark.parametrize("wrong", ["", "x", "70000", ":9000", "::1:9000", "host:", "host:x"])
def test_wrong_address(wrong: str) -> None:
    """What is no address is a wrong argument."""
    with pytest.raises(argparse.ArgumentTypeError, match="must "):
        parse_address(wrong)


# In an app, and with Prometheus itself.


async def test_app(caplog: pytest.LogCaptureFixture) -> None:
    """An app's server has the same by a parameter; without a limit of connections, there is none to show."""
    caplog.set_level("INFO", "trioproto.process.metrics")
    announced = trio.Event()
    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await serve_until_signal(
                    echo_handler,
                    0,
                    max_connections=None,
                    metrics=("127.0.0.1", 0),
                    announce=lambda _: announced.set(),
                )

            nursery.start_soon(serve)
            await announced.wait()
            while not caplog.messages:  # noqa: ASYNC110 - a log has no event
                await trio.sleep(0.01)
            address = address_in(caplog.messages[0])
            assert "trioproto_connections_max" not in await scrape(address)
            nursery.cancel_scope.cancel()
    assert is_refused(address)


async def test_app_with_a_port_in_use() -> None:
    """An app gets the error as it is."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError) as caught:
        await serve_until_signal(echo_handler, 0, metrics=taken.getsockname())
    assert caught.value.kind == "metrics"


async def test_nothing_is_left_open() -> None:
    """If the server itself cannot listen, the port for metrics is closed again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError) as caught:
        await serve_until_signal(echo_handler, taken.getsockname()[1], metrics=address)
    assert caught.value.kind == "tcp"
    assert is_refused("{}:{}".format(*address))


@contextlib.asynccontextmanager
async def prometheus(target: str, directory: Path) -> AsyncIterator[str]:
    """Run a Prometheus that scrapes ``target`` five times a second, and give its address."""
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
        "scrape_configs": [{"job_name": "trioproto", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))  # which is YAML, too
    process = await trio.lowlevel.open_process(
        [
            "prometheus",
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        log = ""
        while not (found := re.search(r'msg="Listening on" address=(\S+)', log)) or "Server is ready" not in log:
            more = await process.stderr.receive_some()
            assert more, log
            log += more.decode()
        yield found[1]
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def query(address: str, expression: str) -> float:
    """Ask Prometheus for the value of an expression; 0 as long as it has none."""
    answer = await get(address, f"GET /api/v1/query?query={urllib.parse.quote(expression)} HTTP/1.0")
    series = json.loads(answer.partition("\r\n\r\n")[2])["data"]["result"]
    return float(series[0]["value"][1]) if series else 0.0


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus")
async def test_prometheus(tmp_path: Path) -> None:
    """Prometheus itself scrapes two workers, and answers a query for the rate of their connections."""
    async with serving("op", "--metrics", "0", "--workers", "2") as server:
        target = await where(server)
        async with prometheus(target, tmp_path) as address:
            rate, asked = 0.0, 0
            while rate < 5:
                for _ in range(20):
                    await server.answers_anew()
                asked += 20
                await trio.sleep(0.2)
                rate = await query(address, "rate(trioproto_connections_accepted_total[2s])")
            for expression, expected in (
                ("trioproto_connections_accepted_total", asked),
                ('trioproto_connections_ended_total{how="ended"}', asked),
                ('trioproto_connection_duration_seconds_bucket{le="+Inf"}', asked),
                ("trioproto_connections_max", 2000),
            ):
                while await query(address, expression) != expected:  # noqa: ASYNC110 - nobody tells
                    await trio.sleep(0.1)
