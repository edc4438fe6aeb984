"""Stops of the tour that listen on a port report in one line that it is in use."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WHERE, ADVICE = "127.0.0.1:{port}", "choose another port"


@pytest.mark.parametrize(
    ("name", "where", "advice", "more"),
    [
        ("4_game_tick.py", "port {port}", "choose another", []),
        ("6b_chat.py", WHERE, ADVICE, []),
        ("6c_proxy.py", WHERE, ADVICE, ["127.0.0.1", "9"]),
        ("7_rtmp_relay.py", WHERE, ADVICE, []),
    ],
)
def test_port_in_use_is_one_line(name: str, where: str, advice: str, more: list[str]) -> None:
    """The line says where, why, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, str(port), *more], capture_output=True, text=True, timeout=30, check=False
        )

    assert done.returncode == 1
    assert done.stderr == f"{name}: cannot listen on {where.format(port=port)}: Address already in use: {advice}\n"
