"""Servers that stop when standard input ends, and workers that do not outlive their supervisor."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT = 30.0


def start(*options: str) -> tuple[subprocess.Popen[str], int]:
    """Start an op server, and return it with its port."""
    server = subprocess.Popen(
        [sys.executable, "-m", "trioproto", "op", "--port", "0", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    return server, int(server.stdout.readline().strip().rpartition(":")[2])


def test_end_of_standard_input() -> None:
    """With ``--stop-at-eof``, the end of standard input is a stop like SIGTERM; what comes before that is not."""
    server, _ = start("--stop-at-eof")
    with server:
        assert server.stdin is not None
        server.stdin.write("not the end")
        server.stdin.flush()
        assert server.poll() is None
        try:
            _, log = server.communicate(timeout=TIMEOUT)
        finally:
            server.kill()
    assert server.returncode == 0
    assert "accepted 0, active 0, crashed 0" in log


def test_supervisor_that_is_killed() -> None:
    """When their supervisor is killed, workers stop too, and do not go on to hold its port."""
    server, port = start("--workers", "2")
    end = time.monotonic() + TIMEOUT
    with server:
        threads = Path(f"/proc/{server.pid}/task")  # the kernel keeps the children of each
        while sum(len(children.read_text().split()) for children in threads.glob("*/children")) < 2:
            assert time.monotonic() < end
        server.send_signal(signal.SIGKILL)
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
                assert time.monotonic() < end
                time.sleep(0.05)
