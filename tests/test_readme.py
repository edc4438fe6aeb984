"""The README tells the truth."""

import contextlib
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


SERVER, APP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_server() -> None:
    """The server that the README opens with answers as it says, and SIGTERM stops it (on a port that is free)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = SERVER.replace("9000", str(port))
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) as server:
        for _ in range(300):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"hello\n")
                assert client.makefile("rb").readline() == b"HELLO\n"
                break
            time.sleep(0.1)
        server.terminate()
        _, errors = server.communicate(timeout=30)
    assert (server.returncode, errors) == (0, b"")


def test_app() -> None:
    """The app inside a nursery runs as it stands (on a port that is free)."""
    done = subprocess.run(
        [sys.executable, "-c", APP.replace("9190", "0")],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("6\n", "")


@pytest.mark.parametrize("protocol", ["echo", "op"])
def test_options(protocol: str) -> None:
    """The table for operators lists each option of a server, with its default, and no other."""
    help_ = run(protocol, "--help").stdout.decode()
    table = README.partition("## For operators")[2].partition("\n\nThe log")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == set(re.findall(r"--[a-z][a-z-]+", help_)) - {
        "--help",
        "--verbose",
    }
    defaults = dict(re.findall(r"\| `(--[a-z-]+) [A-Z]+` \| (\d+) \|", table))
    assert defaults.keys() >= {"--max-connections", "--idle-timeout", "--request-timeout", "--grace", "--workers"}
    help_in_one_line = " ".join(help_.split())
    for option, default in defaults.items():
        assert re.search(rf"{option} [A-Z]+ [^-]*?\(default: {default}(\.0)?\)", help_in_one_line), option


def test_files() -> None:
    """Every file that the README links to is there."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
