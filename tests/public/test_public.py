"""What a user of the library sees of it: names, documentation, types."""

import json
import os
import pydoc
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import trioproto
import trioproto.testing

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).parent / "client.py"
# Commands are no library. A worker's file is a program.
NO_LIBRARY = ("trioproto.bench.", "trioproto.cli.", "trioproto.process.worker.")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project, with no settings but that its type checkers are strict."""
    shutil.copy(CLIENT, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return tmp_path


def pyright(project: Path, *options: str) -> Any:
    # With --outputjson, it does not look for a newer version of itself. It finds packages by the Python in PATH.
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", *options],
        cwd=project,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        check=False,
        timeout=100,
    )
    return json.loads(done.stdout)


def test_client_project_uses_every_name() -> None:
    """What follows is checked for all that is public."""
    used = set(re.findall(r"\w+", CLIENT.read_text().partition(")\n\n# A protocol")[2]))
    assert used >= {*trioproto.__all__, *trioproto.testing.__all__}


def test_mypy(project: Path) -> None:
    """A user's project passes mypy's strict mode."""
    # Not the cache of this project's own checks: its settings are others.
    cache = str(ROOT / ".mypy_cache" / "client")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, "client.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_pyright(project: Path) -> None:
    """So it does pyright's."""
    report = pyright(project)
    assert report["summary"]["filesAnalyzed"] == 1
    assert report["generalDiagnostics"] == []


def test_pyright_finds_no_untyped_name(project: Path) -> None:
    """Every public name, of whatever module, says its type; none has to be inferred, or is partially unknown."""
    report = pyright(project, "--verifytypes", "trioproto", "--ignoreexternal")
    symbols = {symbol["name"]: symbol for symbol in report["typeCompleteness"]["symbols"] if symbol["isExported"]}
    assert "trioproto.connection.Connection.requests" in symbols
    unclear = [
        f"{name}: {', '.join(diagnostic['message'] for diagnostic in symbol['diagnostics'])}"
        for name, symbol in symbols.items()
        if not symbol["isTypeKnown"] and not name.startswith(NO_LIBRARY)
    ]
    assert unclear == []


def test_help() -> None:
    """``help(trioproto)`` names all that is public, in the order in which one needs it, and nothing else."""
    assert trioproto.__doc__
    named = [name for name in re.findall(r"`(\w+)`", trioproto.__doc__) if name in trioproto.__all__]
    assert list(dict.fromkeys(named)) == trioproto.__all__
    shown = pydoc.plain(pydoc.render_doc(trioproto))
    assert textwrap.indent(trioproto.__doc__.split("\n\n", 1)[1].rstrip(), "    ").splitlines()[0] in shown
    listed = re.findall(r"^    (?:class |async )?(\w+)\(", shown.partition("\nCLASSES\n")[2], re.MULTILINE)
    assert sorted(listed) == sorted(trioproto.__all__)


def test_example() -> None:
    """The server in the documentation is the one that README opens with."""
    assert trioproto.__doc__
    shown = textwrap.dedent(trioproto.__doc__.partition("::\n\n")[2].partition("\n\nThe contents")[0])
    [readme, *_] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [line for line in shown.splitlines() if line] == [line for line in readme.splitlines() if line]
