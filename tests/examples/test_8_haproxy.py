import contextlib
import functools
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from trioproto import op_handler, op_request, receive_exactly, serve_tcp
from trioproto.addresses import format_address
from trioproto.process.proxy_protocol import behind_proxies, trusted_network

EXAMPLE = Path(__file__).parents[2] / "examples" / "8_haproxy" / "rolling_restart.py"
example = runpy.run_path(str(EXAMPLE))

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def answered(output: str) -> int:
    (count,) = re.findall(r"^Requests answered: (\d+)", output, re.MULTILINE)
    return int(count)


@needs_haproxy
@pytest.mark.parametrize("arguments", [[], ["--without-drain", "--requests", "1"]])
def test_rolling_restart_loses_no_request(arguments: list[str]) -> None:
    """When all servers are restarted under load, every request is answered correctly, on its own connection."""
    done = run(*arguments)

    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  (op\d) .* (\S+)$", done.stdout, re.MULTILINE) == [("op1", "0"), ("op2", "0"), ("op3", "0")]
    assert "Requests failed: 0\n" in done.stdout
    assert answered(done.stdout) > 100
    assert max(map(len, done.stdout.splitlines())) <= 80


@needs_haproxy
def test_restart_without_drain_fails_requests_and_counts_them() -> None:
    """Without draining, connections with several requests fail, and the failures are counted."""
    done = run("--without-drain")

    assert done.returncode == 1
    (failed,) = re.findall(r"^Requests failed: (\d+)$", done.stdout, re.MULTILINE)
    assert int(failed) > 0
    assert done.stderr == f"rolling_restart.py: {failed} requests failed\n"


def run_with_programs_of(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the example with a PATH of just ``directory``."""
    return subprocess.run(
        [sys.executable, EXAMPLE],
        env=os.environ | {"PATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_haproxy_it_says_so_in_one_line(tmp_path: Path) -> None:
    """Without HAProxy, it says in one line to install it."""
    done = run_with_programs_of(tmp_path)

    assert done.returncode == 1
    assert done.stderr == "rolling_restart.py: HAProxy is not installed: install it from your system's packages\n"


def test_haproxy_that_fails_is_quoted(tmp_path: Path) -> None:
    """When HAProxy does not start, its error message is printed."""
    failing = tmp_path / "haproxy"
    failing.write_text("#!/bin/sh\necho 'no such keyword' >&2\nexit 1\n")
    failing.chmod(0o755)
    done = run_with_programs_of(tmp_path)

    assert done.returncode == 1
    assert done.stderr.endswith("haproxy.cfg failed: no such keyword\n")


# The tests below run the real HAProxy with the example's configuration, and servers in this process.


async def wrong_handler(stream: trio.SocketStream) -> None:
    """Answer every request of two operands with 41."""
    with contextlib.suppress(EOFError, trio.BrokenResourceError):
        while True:
            await receive_exactly(stream, 10)
            await stream.send_all(b"\x29\0\0\0")


@contextlib.asynccontextmanager
async def balanced(
    directory: Path, **other_handlers: Callable[[trio.SocketStream], Awaitable[None]]
) -> AsyncIterator[tuple[Any, int, dict[str, trio.Event]]]:
    """Run HAProxy in front of op servers; yield it, its port, and for each server the event that stops it."""
    environment = {"OP_ADMIN": str(directory / "admin.sock")}
    shutdowns = {name: trio.Event() for name in ("op1", "op2", "op3")}
    with trio.fail_after(20), example["reserve_port"]() as reserved:
        async with trio.open_nursery() as nursery:
            for name, shutdown in shutdowns.items():
                handler = other_handlers.get(name, op_handler)
                behind = behind_proxies(handler, [trusted_network("127.0.0.1")], 30, None)
                serve = functools.partial(serve_tcp, behind, 0, host="127.0.0.1", shutdown=shutdown)
                (listener,) = await nursery.start(serve)
                environment[name.upper()] = format_address(listener.socket.getsockname())
            environment["OP_FRONTEND"] = format_address(reserved.getsockname())
            haproxy = await example["start_haproxy"](nursery, environment)
            for name in shutdowns.keys() - other_handlers.keys():
                await haproxy.wait_until(name, **example["HEALTHY"])
            yield haproxy, reserved.getsockname()[1], shutdowns
            nursery.cancel_scope.cancel()


async def connect(port: int, source: str | None = None) -> trio.SocketStream:
    """Connect, and return when a server has answered a request."""
    stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=source)
    assert await op_request(stream, [40, 2], "+") == 42
    return stream


async def connections(haproxy: Any, total: int) -> list[int]:
    """Wait until HAProxy counts ``total`` connections, and return how many of them each server has."""
    while True:
        counts = [int(server["scur"]) for server in (await haproxy.servers()).values()]
        if sum(counts) == total:
            return counts
        await trio.sleep(0.01)


@needs_haproxy
async def test_new_connection_goes_to_the_server_with_the_fewest(tmp_path: Path) -> None:
    """New connections restore the balance after any connections have ended."""
    async with balanced(tmp_path) as (haproxy, port, _shutdowns):
        streams = [await connect(port) for _ in range(3)]
        assert await connections(haproxy, 3) == [1, 1, 1]
        for stays in (0, 1, 2, 0):
            for number, stream in enumerate(streams):
                if number != stays:
                    await stream.aclose()
            await connections(haproxy, 1)
            streams = [streams[stays], await connect(port), await connect(port)]
            assert await connections(haproxy, 3) == [1, 1, 1]
        for stream in streams:
            await stream.aclose()


@needs_haproxy
async def test_server_that_answers_wrong_is_taken_out(tmp_path: Path) -> None:
    """A server that accepts connections but answers 40 + 2 with 41 gets no connections."""
    async with balanced(tmp_path, op2=wrong_handler) as (haproxy, port, _shutdowns):
        await haproxy.wait_until("op2", status="DOWN")
        streams = [await connect(port) for _ in range(6)]
        assert await connections(haproxy, 6) == [3, 0, 3]
        for stream in streams:
            await stream.aclose()


@needs_haproxy
async def test_server_that_refuses_connections_costs_no_request(tmp_path: Path) -> None:
    """Until HAProxy has detected that a server is down, connections that it refuses go to another."""
    async with balanced(tmp_path) as (haproxy, port, shutdowns):
        shutdowns["op2"].set()
        await trio.sleep(0.05)
        assert (await haproxy.servers())["op2"]["status"].startswith("UP")
        for _ in range(6):
            await (await connect(port)).aclose()
        await haproxy.wait_until("op2", status="DOWN")


@needs_haproxy
async def test_server_that_stops_may_finish_its_requests(tmp_path: Path) -> None:
    """A request under way on a stopping server is answered, even after HAProxy has marked the server down."""
    async with balanced(tmp_path) as (haproxy, port, shutdowns):
        stream = await connect(port)
        await stream.send_all(b"\x02\x28\0\0\0")
        (name,) = [name for name, server in (await haproxy.servers()).items() if server["scur"] == "1"]
        await trio.sleep(0.05)
        shutdowns[name].set()
        await haproxy.wait_until(name, status="DOWN")
        await stream.send_all(b"\x02\0\0\0+")
        assert await receive_exactly(stream, 4) == b"\x2a\0\0\0"
        assert await stream.receive_some() == b""
        await stream.aclose()


@needs_haproxy
async def test_servers_see_the_clients(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server's log has the client's address, not HAProxy's; a health check has HAProxy's, and is no warning."""
    caplog.set_level(logging.DEBUG, "trioproto")
    async with balanced(tmp_path) as (_haproxy, port, _shutdowns), await connect(port, "127.0.0.77") as stream:
        client = format_address(stream.socket.getsockname())
        await stream.send_all(b"\0")
        assert await stream.receive_some() == b""
    [warning] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.fullmatch(re.escape(client) + r" to 127\.0\.0\.1:\d+: protocol error: .*", warning)
    assert any(re.fullmatch(r"(127\.0\.0\.1:\d+) to .*: a PROXY header names \1", line) for line in caplog.messages)
