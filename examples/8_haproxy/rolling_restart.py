"""Restarts all servers behind an HAProxy, one after the other, while clients ask all the time. No request fails.

Starts three op servers in processes of their own, an HAProxy in front of them (haproxy.cfg, beside this file), and
clients. For each server it then does what an operator, or a deployment script, would do with a machine:

1. drain: tell HAProxy to give the server no new connections, and wait until those that it has are over;
2. stop it (SIGTERM) and start it again on its port, in real life with new code;
3. tell HAProxy to use it again, and wait until its health check, a real op request, has succeeded.

Run it (HAProxy must be installed)::

    python examples/8_haproxy/rolling_restart.py

Look for the number of requests that failed. Then see what each part is good for::

    python examples/8_haproxy/rolling_restart.py --without-drain
    python examples/8_haproxy/rolling_restart.py --without-drain --requests 1

Without step 1, a client that is between two requests when its server stops finds its connection ended: the server
cannot know that it was to ask again. A client that asks once on each connection, as the article's does, loses nothing
even so: the server answers all whom it has accepted, and HAProxy takes to another server whom it does not accept.
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
PATIENCE = 5.0  # seconds that a client waits for a conversation's end
DRAIN_SECONDS = 10.0  # connections that are still there then are ended by the server's stop
HEALTHY = {"status": "UP", "check_status": "L7OK"}
CONFIGURATION = Path(__file__).with_name("haproxy.cfg")


@attrs.define
class Load:
    """What clients have seen so far: the seconds that each answer took, and why conversations failed."""

    took: list[float] = attrs.Factory(list)
    failures: list[str] = attrs.Factory(list)


async def ask_all_the_time(port: int, requests: int, load: Load) -> None:
    """Connect, ask so many times, end the connection, and again. A client that never tries anything twice."""
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
    """A running HAProxy, as its admin socket shows it (HAProxy's management guide, section 9.3)."""

    def __init__(self, admin_socket: str) -> None:
        self._admin_socket = admin_socket

    async def tell(self, command: str) -> str:
        """Give a command, and return the answer to it."""
        async with await trio.open_unix_socket(self._admin_socket) as stream:
            await stream.send_all(f"{command}\n".encode())
            return b"".join([bytes(data) async for data in stream]).decode()

    async def servers(self) -> dict[str, dict[str, str]]:
        """Return what HAProxy knows of each server: status, current and total sessions, last check, and more."""
        table = (await self.tell("show stat")).removeprefix("# ")
        return {row["svname"]: row for row in csv.DictReader(table.splitlines()) if row["svname"] in SERVERS}

    async def wait_until(self, name: str, **columns: str) -> None:
        """Wait until a server's columns have these values."""
        while True:
            server = (await self.servers())[name]
            # An asterisk says that the next check is under way.
            if all(server[column].removeprefix("* ") == value for column, value in columns.items()):
                return
            await trio.sleep(0.05)


def reserve_port() -> socket.socket:
    """Bind a socket to a port that is free, and do not listen on it.

    While it is bound, the kernel gives the port to nobody who asks for just any, not even when its server is down for a
    moment. Who asks for it by number may listen on it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


async def start_server(nursery: trio.Nursery, port: int) -> trio.Process:
    """Start an op server in a process of its own, and return when it listens."""
    command = [sys.executable, "-m", "trioproto", "op", "--port", str(port), "--proxy-protocol", "127.0.0.1"]
    run = functools.partial(trio.run_process, command, stdout=subprocess.PIPE, capture_stderr=True)
    process: trio.Process = await nursery.start(run)
    if process.stdout is not None:  # it is a pipe
        await process.stdout.receive_some()  # "... listening on ..."
    return process


async def start_haproxy(nursery: trio.Nursery, environment: dict[str, str]) -> HAProxy:
    """Start HAProxy with these addresses, and return when it takes commands."""
    command = ["haproxy", "-db", "-f", str(CONFIGURATION)]
    nursery.start_soon(functools.partial(trio.run_process, command, env=os.environ | environment, capture_stderr=True))
    haproxy = HAProxy(environment["OP_ADMIN"])
    while True:
        try:
            await haproxy.tell("show info")
        except OSError:
            await trio.sleep(0.05)
        else:
            return haproxy


async def restart(
    nursery: trio.Nursery, haproxy: HAProxy, name: str, process: trio.Process, port: int, *, drain: bool
) -> None:
    """Restart one server, and print how many seconds each step took."""
    began = trio.current_time()
    if drain:
        await haproxy.tell(f"set server op/{name} state drain")
        with trio.move_on_after(DRAIN_SECONDS):
            await haproxy.wait_until(name, scur="0")
    drained = trio.current_time()
    process.send_signal(signal.SIGTERM)
    status = await process.wait()
    stopped = trio.current_time()
    await start_server(nursery, port)
    started = trio.current_time()
    if drain:
        await haproxy.tell(f"set server op/{name} state ready")
    await haproxy.wait_until(name, **HEALTHY)
    in_use = trio.current_time()
    times = [drained - began, stopped - drained, started - stopped, in_use - started]
    print(f"  {name:6}", *(f"{seconds:8.2f}" for seconds in times), f"{status:12}")


async def rolling_restart(requests: int, *, drain: bool) -> Load:
    """Run servers, HAProxy and clients, restart each server, and return what the clients have seen."""
    load = Load()
    with contextlib.ExitStack() as reserved:
        directory = reserved.enter_context(tempfile.TemporaryDirectory())
        ports = {
            name: reserved.enter_context(reserve_port()).getsockname()[1]  # held until all is over
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
            print(f"{CLIENTS} clients ask all the time: {requests} on each connection.\n")
            print("  seconds   drain     stop    start   in use  exit status")
            async with trio.open_nursery() as clients:
                for _ in range(CLIENTS):
                    clients.start_soon(ask_all_the_time, ports["op_frontend"], requests, load)
                    await trio.sleep(PAUSE)  # so that they do not all change connections at once
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
    """Take the arguments, and end with status 1 if a request failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--without-drain", action="store_true", help="leave out step 1")
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
