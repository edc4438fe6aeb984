"""The operators' manual agrees with the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from trioproto.draining import ENDINGS
from trioproto.process.metrics import registry_of
from trioproto.process.scoreboard import new_scoreboard

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "examples" / "operating"
MANUAL = (DIRECTORY / "README.md").read_text()
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def section(name: str) -> str:
    """Return a section of the manual."""
    return re.split(r"^## ", MANUAL.split(f"\n## {name}\n")[1], flags=re.MULTILINE)[0]


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the table that begins with ``header``."""
    table = text.split(f"\n{header}\n")[1].split("\n\n", maxsplit=1)[0]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table.splitlines()[1:]]


def events(source: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the logger, level and message of each call (or partial call) of a logger's method in a file."""
    tree = ast.parse(source.read_text())
    module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    loggers: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id="logging"), attr="getLogger"), args=[argument]),
            ):
                loggers[name] = str(argument.value) if isinstance(argument, ast.Constant) else module
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for part in (node.func, *node.args):
            match part:
                case ast.Attribute(value=ast.Name(id=name), attr=level) if name in loggers and level in LEVELS:
                    [message, *_] = [
                        argument.value
                        for argument in node.args
                        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                    ]
                    yield loggers[name], "DEBUG or WARNING" if level == "log" else level.upper(), message


@pytest.mark.parametrize("protocol", ["echo", "op"])
def test_options(protocol: str) -> None:
    """The manual lists exactly the options of a server, with their defaults."""
    command = [sys.executable, "-m", "trioproto", protocol, "--help"]
    help_ = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout
    table = section("Options").partition("\n\nA failure")[0]
    options = set(re.findall(r"--[a-z][a-z-]+", help_)) - {"--help", "--verbose"}
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == options
    defaults = dict(re.findall(r"\| `(--[a-z-]+) [A-Z]+` \| (\d+) \|", table))
    assert defaults.keys() >= {"--max-connections", "--idle-timeout", "--request-timeout", "--grace", "--workers"}
    help_in_one_line = " ".join(help_.split())
    for option, default in defaults.items():
        assert re.search(rf"{option} [A-Z]+ [^-]*?\(default: {default}(\.0)?\)", help_in_one_line), option


def test_links() -> None:
    """Every file that the manual links to exists."""
    links = re.findall(r"\]\(([^)#:]+)[)#]", MANUAL)
    assert links
    assert [link for link in links if not (DIRECTORY / link).exists()] == []


def test_events() -> None:
    """The table of events lists exactly the messages that the code logs; a level that varies is given as both."""
    found = [event for source in sorted((ROOT / "trioproto").rglob("*.py")) for event in events(source)]
    listed = [
        tuple(row[:3]) for row in rows(section("Events"), "| logger | level | message | fields | what it means |")
    ]
    assert sorted(listed) == sorted(found)
    assert len(found) > 15


def test_endings() -> None:
    """The manual explains each word for how a connection ended."""
    listed = [how for how, _ in rows(section("Events"), "| how | what ended the connection |")]
    assert listed == list(ENDINGS)


def test_metrics() -> None:
    """The table lists exactly the metrics that Prometheus sees, with their types."""
    with new_scoreboard(1) as scoreboard:
        scoreboard.most[0] = 1
        found = re.findall(r"^# TYPE (\w+) (\w+)$", generate_latest(registry_of(scoreboard)).decode(), re.MULTILINE)
    listed = [tuple(row[:2]) for row in rows(section("Metrics"), "| metric | type | what it counts |")]
    assert sorted(listed) == sorted(found)
