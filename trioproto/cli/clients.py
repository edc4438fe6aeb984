"""The client commands, between standard input, a server, and standard output.

The prompts and output are identical to those of the article's C programs. Each function raises `trio.TooSlowError`
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
    """Send each of ``messages`` and print its echo, one line for each."""
    for message in messages:
        with trio.fail_after(reply_timeout):
            reply = await echo_request(stream, message)
        await _write(reply + b"\n")


async def echo_dialogue(stream: trio.abc.Stream, reply_timeout: float) -> None:
    """Prompt for messages and print their echoes, until one is ``q`` or ``Q`` or the input ends."""
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
    """Send standard input to an echo server and write the echo to standard output, both concurrently.

    Returns when the input has ended and all of it has been echoed: before TLS 1.3, there is no half-close.
    ``reply_timeout`` limits the time between two parts of the echo while some of it is missing. Input and output may
    take any time.

    Raises:
        EOFError: if the server closed the connection before the input had ended and all of it was echoed.
    """
    sent = received = 0
    input_ended = False
    receiving = trio.CancelScope()
    with _progress_bar() as advance:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                nonlocal sent, input_ended
                while chunk := await _read():
                    if received == sent:  # no echo was missing until now
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
            # The rest of the input cannot be sent.
            nursery.cancel_scope.cancel()
    if received < sent or not input_ended:
        raise EOFError(f"end of stream after {received} of {sent} bytes" + ("" if input_ended else " and more"))


async def op_answer(stream: trio.abc.Stream, request: Request, reply_timeout: float) -> None:
    """Send ``request`` and print only the result."""
    with trio.fail_after(reply_timeout):
        result = await op_request(stream, request.operands, request.operator)
    await _write(f"{result}\n".encode())


async def op_dialogue(stream: trio.abc.Stream, reply_timeout: float) -> None:
    """Prompt for the operands and operator of one request, and print the result.

    Raises:
        ValueError: if the input is not a valid request, or ends too early. The message says what is wrong.
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
    """Reads standard input by lines, or by words like C's ``scanf``.

    It reads in a thread that is abandoned on cancellation, because a read from a terminal may block forever, and not
    from `sys.stdin`, whose lock such a thread would hold until the end.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._words: list[bytes] = []

    async def line(self) -> bytes:
        """Return the next line, including its newline if it has one; ``b""`` at the end."""
        while b"\n" not in self._buffer:
            if not (chunk := await _read()):
                line, self._buffer = self._buffer, b""
                return line
            self._buffer += chunk
        line, newline, self._buffer = self._buffer.partition(b"\n")
        return line + newline

    async def word(self) -> bytes:
        """Return the next word, up to white space."""
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


# A read from or a write to a terminal or pipe may block forever. On cancellation, such as by Ctrl-C, its thread is
# abandoned.
async def _read() -> bytes:
    return await trio.to_thread.run_sync(read_input, abandon_on_cancel=True)


async def _write(data: bytes | bytearray) -> None:
    await trio.to_thread.run_sync(write_output, data, abandon_on_cancel=True)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int], object]]:
    """Show a bar on standard error while the block runs, if that is a terminal and tqdm is installed.

    Yields:
        A function that advances the bar by a number of bytes.
    """
    try:
        from tqdm import tqdm  # noqa: PLC0415 - an extra
    except ImportError:
        yield lambda _: None
        return
    status = os.fstat(STDIN)
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    disable = sys.stderr is None or not sys.stderr.isatty()  # None: it was closed when Python started
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=disable) as bar:
        yield bar.update
