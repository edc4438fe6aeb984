"""Standard input and output, past Python's buffers: whatever fails there is a `CommandError`, and nothing is lost.

`sys.stdout` would report a full disk or a reader that has gone only when it is flushed, which may be as late as at
the interpreter's end.
"""

import os
import sys

from trioproto.addresses import failure_reason
from trioproto.cli.arguments import CommandError

STDIN = 0
STDOUT = 1
STDERR = 2
# As much as a pipe holds by default (pipe(7)).
_PIPE_SIZE = 65536
# What replaces the characters of our reports where the terminal's encoding lacks them.
_ASCII = str.maketrans({"µ": "u", "█": "#"})


def reserve_descriptors() -> None:
    """Open something harmless in place of each standard stream that was closed before the program began.

    Otherwise the next socket would get the descriptor of standard output, and an answer be written to that socket.
    The null device is opened the wrong way round, so that using the stream fails, as it should.
    """
    for descriptor, flags in ((STDIN, os.O_WRONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest descriptor that is free: this one


def check_input() -> None:
    """Raise `CommandError` if standard input cannot be read; take nothing from it."""
    _read(0)


def read_input() -> bytes:
    """Wait for input and return some of it; ``b""`` at its end.

    Raises:
        CommandError: if standard input cannot be read.
    """
    return _read(_PIPE_SIZE)


def _read(size: int) -> bytes:
    try:
        return os.read(STDIN, size)
    except OSError as error:
        raise CommandError(f"cannot read standard input: {failure_reason(error)}") from None


def write_output(data: bytes | bytearray) -> None:
    """Write all of ``data`` to standard output.

    Raises:
        CommandError: if not all of it can be written.
    """
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(STDOUT, rest) :]
    except BrokenPipeError:
        raise CommandError("standard output was closed") from None
    except OSError as error:
        raise CommandError(f"cannot write to standard output: {failure_reason(error)}") from None


def write_text(text: str) -> None:
    """Write ``text`` to standard output, as far as possible in the characters that its encoding has.

    Raises:
        CommandError: if not all of it can be written.
    """
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding  # None: it was closed before Python began
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        data = text.translate(_ASCII).encode(encoding, "backslashreplace")
    write_output(data)
