"""The README tells the truth."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_app() -> None:
    """The app in the README runs as it stands (on a port that is free)."""
    [app] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", app.replace("9190", "0")],
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
    help_ = subprocess.run(
        [sys.executable, "-m", "trioproto", protocol, "--help"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout
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
