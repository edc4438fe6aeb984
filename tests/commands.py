"""Commands that need no process of their own: the command line, called where the test runs.

Starting Python and importing Trio takes a hundred times as long as what most commands do.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from trioproto.cli.main import main
from trioproto.process.service import SIGNALS

# What a pipe holds at least (pipe(7)), so that writing to it does not wait.
_PIPE_SIZE = 65536


def run(*arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, on standard streams of its own: a pipe that holds ``stdin``, and two files."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        with _standard_streams(stdin, stdout, stderr), _signals_restored():
            status: Any
            try:
                status = main([os.fsdecode(argument) for argument in arguments])
            except SystemExit as ended:
                status = ended.code
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, status, stdout.read(), stderr.read())


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _standard_streams(stdin: bytes, stdout: IO[bytes], stderr: IO[bytes]) -> Iterator[None]:
    assert len(stdin) <= _PIPE_SIZE
    reader, writer = os.pipe()
    os.write(writer, stdin)
    os.close(writer)
    with contextlib.ExitStack() as restoring:
        for number, descriptor in enumerate((reader, stdout.fileno(), stderr.fileno())):
            saved = os.dup(number)
            restoring.callback(os.close, saved)
            restoring.callback(os.dup2, saved, number)
            os.dup2(descriptor, number)
        os.close(reader)
        with (
            open(1, "w", closefd=False) as out,
            open(2, "w", closefd=False) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield
