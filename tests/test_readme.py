"""The README tells the truth."""

import contextlib
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SERVER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
ASK, RUN, _TEST = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)

PYTHON = Path(sys.executable)


def test_server() -> None:
    """The server that the README opens with answers as it says, and SIGTERM stops it (on a port that is free)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code = SERVER.replace("9000", port)
    ask = ASK.replace("9000", port).replace("python3", str(PYTHON))
    with subprocess.Popen([PYTHON, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) as server:
        for _ in range(300):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.1)
        done = subprocess.run(ask, shell=True, check=False, capture_output=True, text=True, timeout=30)
        server.terminate()
        _, errors = server.communicate(timeout=30)
    assert (server.returncode, errors) == (0, b"")
    assert (done.stdout, done.stderr) == ("b'HELLO\\n'\n", "")


def test_main_job() -> None:
    """The first command prints the result, and nothing else (here, in this environment and on a free port).

    `.ci/run` runs the other one, which is the tests.
    """
    command = RUN.partition("pip install -q -e . && ")[2].replace(".venv/bin/trioproto", f"{PYTHON} -m trioproto")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = re.sub(r"trioproto op(-client)?\b", rf"\g<0> --port {port}", command).replace("sleep 2", "sleep 5")
    done = subprocess.run(["bash", "-c", command], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("6\n", "")


def test_length() -> None:
    """A stranger reads it to the end."""
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1000


def test_files() -> None:
    """Every file that the README links to is there."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_patterns() -> None:
    """Every name in the table of patterns is defined in the file that it is said to be in."""
    patterns = re.findall(r"\]\(([^)]+)\): `(\w+)`", README)
    assert patterns
    for file, name in patterns:
        assert re.search(rf"(?m)(def|class) {name}\b|^{name} =", (ROOT / file).read_text()), name
