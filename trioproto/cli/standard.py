"""Standard input and output without Python's buffers, so that every failure is a `CommandError`.

`sys.stdout` reports a full disk or a closed pipe only when it is flushed, which may be as late as interpreter shutdown.
"""

import os
import sys

from trioproto.addresses import failure_reason
from trioproto.cli.arguments import CommandError

STDIN = 0
STDOUT = 1
STDERR = 2
# A pipe's default capacity (pipe(7)).
_PIPE_SIZE = 65536
# Replacements for characters of our reports that are not in the terminal's encoding.
_ASCII = str.maketrans({"µ": "u", "█": "#"})


def reserve_descriptors() -> None:
    """Open the null device in place of each standard stream that was closed when the program started.

    Otherwise the next socket would get the descriptor of standard output, and output would be written to it. The null
    device is opened in the wrong mode, so that using the stream fails, as it should.
    """
    for descriptor, flags in ((STDIN, os.O_WRONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free descriptor: this one


def check_input() -> None:
    """Raise `CommandError` if standard input cannot be read. Reads nothing."""
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
    """Write ``text`` to standard output. Characters that are not in its encoding are replaced.

    Raises:
        CommandError: if not all of it can be written.
    """
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding  # None: it was closed when Python started
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        data = text.translate(_ASCII).encode(encoding, "backslashreplace")
    write_output(data)
