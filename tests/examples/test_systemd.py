import functools
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from trioproto import op_request, receive_exactly

EXAMPLES = Path(__file__).parents[2] / "examples"
UNITS = EXAMPLES / "operating"
reserve_port = runpy.run_path(str(EXAMPLES / "8_haproxy" / "rolling_restart.py"))["reserve_port"]

PYTHON = "/opt/trioproto/bin/python"

# How systemd starts a service with a socket: it becomes descriptor 3, and LISTEN_PID names the process that it is for.
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""


def command() -> list[str]:
    """Return the command that the service runs, with this Python instead of the installed one."""
    (line,) = re.findall(r"^ExecStart=(.*)$", (UNITS / "trioproto-op.service").read_text(), re.MULTILINE)
    python, *arguments = shlex.split(line)
    assert python == PYTHON
    return [sys.executable, *arguments]


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """The units, installed with a Python that exists here."""
    for unit in UNITS.glob("*.s*"):
        (tmp_path / unit.name).write_text(
            unit.read_text().replace(f"ExecStart={PYTHON}", f"ExecStart={sys.executable}")
        )
    return tmp_path / "trioproto-op.service"


def environment_options() -> list[str]:
    """Return options that pass PYTHONPATH on: systemd-socket-activate starts its program with a clean environment."""
    return ["--setenv=PYTHONPATH"] if "PYTHONPATH" in os.environ else []


async def connect(host: str, port: int) -> trio.SocketStream:
    """Connect as soon as a server listens."""
    while True:
        try:
            return await trio.open_tcp_stream(host, port)
        except OSError:
            await trio.sleep(0.05)


async def ask_continuously(port: int, answers: list[bytes]) -> None:
    """Connect, request 40 + 2 in two halves, and again. Most of the time, a request is under way."""
    while True:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"\x02\x28\0\0\0")
            await trio.sleep(0.02)
            await stream.send_all(b"\x02\0\0\0+")
            answers.append(await receive_exactly(stream, 4))


async def more(answers: list[bytes]) -> None:
    """Wait for 20 more answers."""
    enough = len(answers) + 20
    while True:
        if len(answers) >= enough:
            return
        await trio.sleep(0.01)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(service: Path) -> None:
    """systemd-analyze finds no errors in the service and its socket."""
    done = subprocess.run(
        ["systemd-analyze", "verify", service, service.with_suffix(".socket")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert "trioproto-op" not in done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_service_is_hardened(service: Path) -> None:
    """systemd-analyze rates the service's exposure, from 0 to 10, at most 1."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=10", service],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot analyze a unit that is not installed")

    assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed")
async def test_first_connection_starts_the_service() -> None:
    """With socket activation by systemd's own tool, the server answers the connection that started it."""
    with trio.fail_after(20), reserve_port() as reserved:
        host, port = reserved.getsockname()
        activate = ["systemd-socket-activate", f"--listen={host}:{port}", *environment_options(), *command()]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(trio.run_process, activate, capture_stdout=True, capture_stderr=True))
            async with await connect(host, port) as stream:
                assert await op_request(stream, [40, 2], "+") == 42
            nursery.cancel_scope.cancel()


async def test_restarts_lose_no_request() -> None:
    """While the socket stays open, as systemd keeps it, restarts of the service under load lose no request."""
    answers: list[bytes] = []
    with trio.fail_after(20), socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        async def start() -> trio.Process:
            return await trio.lowlevel.open_process(
                [sys.executable, "-c", START, str(listening.fileno()), *command()],
                pass_fds=[listening.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        process = await start()
        try:
            async with trio.open_nursery() as clients:
                for _ in range(4):
                    clients.start_soon(ask_continuously, port, answers)
                for _ in range(3):
                    await more(answers)
                    process.send_signal(signal.SIGTERM)
                    assert await process.wait() == 0
                    process = await start()
                await more(answers)
                clients.cancel_scope.cancel()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    assert set(answers) == {b"\x2a\0\0\0"}
