"""Restart all servers behind HAProxy, one after the other, under load. No request fails.

This starts three op servers as processes, HAProxy in front of them (haproxy.cfg, beside this file), and clients. Then
it does with each server what an operator or a deployment script would do:

1. drain: HAProxy gives the server no new connections; wait until its existing ones have ended;
2. stop it (SIGTERM) and start it again on its port, in practice with new code;
3. let HAProxy use it again, and wait until its health check, a real op request, has succeeded.

Run it (HAProxy must be installed)::

    python examples/8_haproxy/rolling_restart.py

Note the number of requests that failed. Then try it without draining::

    python examples/8_haproxy/rolling_restart.py --without-drain
    python examples/8_haproxy/rolling_restart.py --without-drain --requests 1

Without step 1, a client that is between two requests when its server stops finds its connection closed: the server
cannot know that another request was to come. A client that sends one request on each connection, like the article's,
loses nothing even then: the server answers all connections that it has accepted, and HAProxy passes the others to
another server.
"""

import argparse
import collections
import contextlib
import csv
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs
import trio

from trioproto import op_request

SERVERS = ["op1", "op2", "op3"]
CLIENTS = 8
PAUSE = 0.05  # seconds between a client's requests
PATIENCE = 5.0  # seconds that a client waits for all its requests on one connection
DRAIN_SECONDS = 10.0  # the server's stop ends the connections that are still open then
HEALTHY = {"status": "UP", "check_status": "L7OK"}
CONFIGURATION = Path(__file__).with_name("haproxy.cfg")


@attrs.define
class Load:
    """What clients have seen so far: the seconds that each answer took, and why connections failed."""

    took: list[float] = attrs.Factory(list)
    failures: list[str] = attrs.Factory(list)


async def ask_continuously(port: int, requests: int, load: Load) -> None:
    """Connect, send ``requests`` requests, close the connection, and again. Failed requests are not retried."""
    for number in itertools.count():
        try:
            with trio.fail_after(PATIENCE):
                asked = trio.current_time()
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    for operand in range(requests):
                        result = await op_request(stream, [number, operand], "+")
                        if result != number + operand:
                            load.failures.append(f"{number} + {operand} is not {result}")
                        load.took.append(trio.current_time() - asked)
                        await trio.sleep(PAUSE)
                        asked = trio.current_time()
        except (OSError, EOFError, trio.BrokenResourceError, trio.TooSlowError) as error:
            load.failures.append(str(error) or type(error).__name__)


class HAProxy:
    """A running HAProxy, through its admin socket (HAProxy's management guide, section 9.3)."""

    def __init__(self, admin_socket: str) -> None:
        self._admin_socket = admin_socket

    async def command(self, command: str) -> str:
        """Send a command, and return the answer."""
        async with await trio.open_unix_socket(self._admin_socket) as stream:
            await stream.send_all(f"{command}\n".encode())
            return b"".join([bytes(data) async for data in stream]).decode()

    async def servers(self) -> dict[str, dict[str, str]]:
        """Return HAProxy's statistics of each server: status, current and total sessions, last check, and more."""
        table = (await self.command("show stat")).removeprefix("# ")
        return {row["svname"]: row for row in csv.DictReader(table.splitlines()) if row["svname"] in SERVERS}

    async def wait_until(self, name: str, **columns: str) -> None:
        """Wait until a server's columns have these values."""
        while True:
            server = (await self.servers())[name]
            # An asterisk means that the next check is under way.
            if all(server[column].removeprefix("* ") == value for column, value in columns.items()):
                return
            await trio.sleep(0.05)


def reserve_port() -> socket.socket:
    """Bind a socket to a free port, without listening on it.

    While it is bound, the kernel assigns this port to no other socket that binds to port 0, even while the server
    restarts. A server that binds to it by number may listen on it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


async def start_server(nursery: trio.Nursery, port: int) -> trio.Process:
    """Start an op server as a process, and return when it listens."""
    command = [sys.executable, "-m", "trioproto", "op", "--port", str(port), "--proxy-protocol", "127.0.0.1"]
    run = functools.partial(trio.run_process, command, stdout=subprocess.PIPE, capture_stderr=True)
    process: trio.Process = await nursery.start(run)
    if process.stdout is not None:  # for the type checker
        await process.stdout.receive_some()  # "... listening on ..."
    return process


async def start_haproxy(nursery: trio.Nursery, environment: dict[str, str]) -> HAProxy:
    """Start HAProxy with these addresses, and return when it accepts commands."""
    command = ["haproxy", "-db", "-f", str(CONFIGURATION)]
    nursery.start_soon(functools.partial(trio.run_process, command, env=os.environ | environment, capture_stderr=True))
    haproxy = HAProxy(environment["OP_ADMIN"])
    while True:
        try:
            await haproxy.command("show info")
        except OSError:
            await trio.sleep(0.05)
        else:
            return haproxy


async def restart(
    nursery: trio.Nursery, haproxy: HAProxy, name: str, process: trio.Process, port: int, *, drain: bool
) -> None:
    """Restart one server, and print the seconds that each step took."""
    began = trio.current_time()
    if drain:
        await haproxy.command(f"set server op/{name} state drain")
        with trio.move_on_after(DRAIN_SECONDS):
            await haproxy.wait_until(name, scur="0")
    drained = trio.current_time()
    process.send_signal(signal.SIGTERM)
    status = await process.wait()
    stopped = trio.current_time()
    await start_server(nursery, port)
    started = trio.current_time()
    if drain:
        await haproxy.command(f"set server op/{name} state ready")
    await haproxy.wait_until(name, **HEALTHY)
    in_use = trio.current_time()
    times = [drained - began, stopped - drained, started - stopped, in_use - started]
    print(f"  {name:6}", *(f"{seconds:8.2f}" for seconds in times), f"{status:12}")


async def rolling_restart(requests: int, *, drain: bool) -> Load:
    """Run servers, HAProxy and clients, restart each server, and return what the clients saw."""
    load = Load()
    with contextlib.ExitStack() as reserved:
        directory = reserved.enter_context(tempfile.TemporaryDirectory())
        ports = {
            name: reserved.enter_context(reserve_port()).getsockname()[1]  # held until the end
            for name in ["op_frontend", *SERVERS]
        }
        environment = {name.upper(): f"127.0.0.1:{port}" for name, port in ports.items()}
        environment["OP_ADMIN"] = f"{directory}/admin.sock"

        async with trio.open_nursery() as nursery:
            processes = {name: await start_server(nursery, ports[name]) for name in SERVERS}
            haproxy = await start_haproxy(nursery, environment)
            for name in SERVERS:
                await haproxy.wait_until(name, **HEALTHY)
            print(f"HAProxy on {environment['OP_FRONTEND']}, and three op servers behind it.")
            print(f"{CLIENTS} clients, {requests} requests on each connection.\n")
            print("  seconds   drain     stop    start   in use  exit status")
            async with trio.open_nursery() as clients:
                for _ in range(CLIENTS):
                    clients.start_soon(ask_continuously, ports["op_frontend"], requests, load)
                    await trio.sleep(PAUSE)  # so that they do not all reconnect at once
                for name, process in processes.items():
                    await restart(nursery, haproxy, name, process, ports[name], drain=drain)
                await trio.sleep(0.5)
                clients.cancel_scope.cancel()
            servers = await haproxy.servers()
            nursery.cancel_scope.cancel()

    print("\nConnections:", ", ".join(f"{name} {server['stot']}" for name, server in servers.items()))
    print(f"Requests answered: {len(load.took)}, the slowest after {max(load.took):.2f} s")
    print(f"Requests failed: {len(load.failures)}")
    for reason, count in collections.Counter(load.failures).most_common():
        print(f"  {count} times: {reason}")
    return load


def main() -> None:
    """Run the restarts, and exit with status 1 if a request failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--without-drain", action="store_true", help="skip step 1")
    parser.add_argument(
        "--requests", type=int, default=10, metavar="N", help="on each connection (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if shutil.which("haproxy") is None:
        sys.exit("rolling_restart.py: HAProxy is not installed: install it from your system's packages")
    run = functools.partial(rolling_restart, arguments.requests, drain=not arguments.without_drain)
    failure = ""
    try:
        load = trio.run(run)
        failure = f"{len(load.failures)} requests failed" if load.failures else ""
    except* subprocess.CalledProcessError as group:
        for error in group.exceptions:
            if isinstance(error, subprocess.CalledProcessError):
                failure = f"{' '.join(error.cmd)} failed: {error.stderr.decode().strip()}"
    except* KeyboardInterrupt:
        failure = "interrupted"
    if failure:
        sys.exit(f"rolling_restart.py: {failure}")


if __name__ == "__main__":
    main()
