"""What the client commands do between standard input, a server, and standard output.

The prompts and answers are those of the article's C programs, word for word. Each function raises `trio.TooSlowError`
if the server does not reply within ``reply_timeout`` seconds, and `CommandError` if standard input or output fails.
"""

import contextlib
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence

import trio

from trioproto.cli.standard import STDIN, read_input, write_output
from trioproto.echo import echo_request
from trioproto.op import MAX_OPERANDS, Request, op_request


async def echo_messages(stream: trio.abc.Stream, messages: Sequence[bytes], reply_timeout: float) -> None:
    """Have each of ``messages`` echoed, and print what comes back, a line each."""
    for message in messages:
        with trio.fail_after(reply_timeout):
            reply = await echo_request(stream, message)
        await _write(reply + b"\n")


async def echo_dialogue(stream: trio.abc.Stream, reply_timeout: float) -> None:
    """Ask for messages and print their echoes, until one is ``q`` or ``Q`` or the input ends."""
    lines = _Input()
    while True:
        await _write(b"Input message(Q to quit): ")
        line = await lines.line()
        if line in (b"", b"q\n", b"Q\n", b"q", b"Q"):
            return
        with trio.fail_after(reply_timeout):
            reply = await echo_request(stream, line)
        await _write(b"Message from server: " + reply + (b"" if reply.endswith(b"\n") else b"\n"))


async def echo_pipe(stream: trio.abc.HalfCloseableStream, reply_timeout: float) -> None:
    """Send standard input to an echo server and write what comes back to standard output, both at once.

    Done when the input has ended and as many bytes have come back: before TLS 1.3, a server cannot see the first alone.
    ``reply_timeout`` bounds the time between two pieces of the echo, as long as some of it is due. Input and output may
    take any time.

    Raises:
        EOFError: if the server ended the connection before the input had ended and all of it been echoed.
    """
    sent = received = 0
    input_ended = False
    receiving = trio.CancelScope()
    with _progress_bar() as advance:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                nonlocal sent, input_ended
                while chunk := await _read():
                    if received == sent:  # nothing was due until now
                        receiving.deadline = trio.current_time() + reply_timeout
                    sent += len(chunk)
                    await stream.send_all(chunk)
                input_ended = True
                await stream.send_eof()
                if received == sent:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(send)
            while True:
                with trio.fail_after(reply_timeout if received < sent else math.inf) as receiving:
                    chunk = await stream.receive_some()
                if not chunk:
                    break
                await _write(chunk)
                advance(len(chunk))
                received += len(chunk)
                if input_ended and received >= sent:
                    break
            # Input that is still to come has nowhere to go.
            nursery.cancel_scope.cancel()
    if received < sent or not input_ended:
        raise EOFError(f"end of stream after {received} of {sent} bytes" + ("" if input_ended else " and more"))


async def op_answer(stream: trio.abc.Stream, request: Request, reply_timeout: float) -> None:
    """Have ``request`` answered, and print the bare result."""
    with trio.fail_after(reply_timeout):
        result = await op_request(stream, request.operands, request.operator)
    await _write(f"{result}\n".encode())


async def op_dialogue(stream: trio.abc.Stream, reply_timeout: float) -> None:
    """Ask for one request's operands and operator, and print the result.

    Raises:
        ValueError: if what is typed is no number, or no request, or ends before it is one; the message says what is
            wrong.
    """
    words = _Input()
    await _write(b"Operand count: ")
    count = await words.integer()
    if not 1 <= count <= MAX_OPERANDS:
        raise ValueError(f"operand count must be from 1 to {MAX_OPERANDS}, not {count}")
    operands = []
    for number in range(1, count + 1):
        await _write(f"Operand {number}: ".encode())
        operands.append(await words.integer())
    await _write(b"Operator: ")
    operator = (await words.word()).decode(errors="backslashreplace")
    with trio.fail_after(reply_timeout):
        result = await op_request(stream, operands, operator)
    await _write(f"Operation result: {result}\n".encode())


class _Input:
    """Standard input by lines, and by words as C's ``scanf`` takes them.

    Read in a thread that a cancellation can leave behind, because a read from a terminal may last for ever, and
    past `sys.stdin`, whose lock such a thread would hold until the end.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._words: list[bytes] = []

    async def line(self) -> bytes:
        """Return the next line with its line end, if it has one; ``b""`` at the end."""
        while b"\n" not in self._buffer:
            if not (chunk := await _read()):
                line, self._buffer = self._buffer, b""
                return line
            self._buffer += chunk
        line, newline, self._buffer = self._buffer.partition(b"\n")
        return line + newline

    async def word(self) -> bytes:
        """Return the next run of characters that are no white space."""
        while not self._words:
            line = await self.line()
            if not line:
                raise ValueError("end of input before the request was complete")
            self._words = line.split()
        return self._words.pop(0)

    async def integer(self) -> int:
        word = (await self.word()).decode(errors="backslashreplace")
        try:
            return int(word)
        except ValueError:
            raise ValueError(f"must be an integer, not {word!r}") from None


# A terminal or pipe may keep a read or a write waiting for ever. A cancellation, above all by Ctrl-C, leaves the
# thread behind then.
async def _read() -> bytes:
    return await trio.to_thread.run_sync(read_input, abandon_on_cancel=True)


async def _write(data: bytes | bytearray) -> None:
    await trio.to_thread.run_sync(write_output, data, abandon_on_cancel=True)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int], object]]:
    """Show a bar on standard error while the block runs, if that is a terminal and tqdm is installed.

    Yields:
        A function to call with the number of bytes by which to advance.
    """
    try:
        from tqdm import tqdm  # noqa: PLC0415 - an extra
    except ImportError:
        yield lambda _: None
        return
    status = os.fstat(STDIN)
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    disable = sys.stderr is None or not sys.stderr.isatty()  # None: it was closed before Python began
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=disable) as bar:
        yield bar.update
