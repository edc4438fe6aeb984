"""Servers as processes of their own, as a user starts them, and what clients and operators do to them."""

import contextlib
import errno
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import trio
from helpers import reply_bytes, request_bytes

from trioproto.tls import TLSStream

# Seconds after which a test hangs, even on a machine that has much else to do.
HANGS = 30.0

# What a good client asks, and what it is told.
QUESTION = request_bytes([40, 2], "+")
ANSWER = reply_bytes([40, 2], "+")

COMMAND = [sys.executable, "-m", "trioproto"]

# How the log names a client.
PEER = r"(127\.0\.0\.1:\d+|unix)"

LOG_LINE = re.compile(r"[-\d]+ [:,\d]+ (?P<level>[A-Z]+) trioproto[.\w]*: (?P<message>.*)")


class Server:
    """A server in a process of its own.

    Attributes:
        process: that process; with ``--workers``, their supervisor.
        address: as the server printed it: ``127.0.0.1:9191`` or ``unix:PATH``.
        log: the lines of its standard error, as far as they have been read.
        stopping: whether it was told to stop.
    """

    def __init__(self, process: trio.Process, protocol: str, tls: ssl.SSLContext | None) -> None:
        self.process = process
        self.address = ""
        self.log: list[str] = []
        self.stopping = False
        self._started_line = b""
        self._question, self._answer = (QUESTION, ANSWER) if protocol == "op" else (b"hello", b"hello")
        self._tls = tls

    async def started(self) -> None:
        """Wait until the server says where it listens."""
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            more = await self.process.stdout.receive_some()
            assert more, f"the server ended: {await self.rest_of_log()}"
            line += more
        self.address = line.decode().split()[-1]

    async def logged(self, pattern: str, times: int = 1) -> None:
        """Wait until so many lines of the log match."""
        while sum(re.search(pattern, line) is not None for line in self.log) < times:
            assert await self._read_log(), f"no {pattern!r} in {self.log}"

    async def rest_of_log(self) -> list[str]:
        """Wait until the server, and its workers, have closed standard error, and return all that they wrote."""
        while await self._read_log():
            pass
        return self.log

    async def _read_log(self) -> bool:
        assert self.process.stderr is not None
        more = await self.process.stderr.receive_some()
        self._started_line += more
        *lines, self._started_line = self._started_line.split(b"\n")
        self.log += [line.decode() for line in lines]
        return more != b""

    async def tcp(self) -> trio.SocketStream:
        """Connect, or raise what connect(2) reports."""
        host, _, port = self.address.rpartition(":")
        family, address = (socket.AF_UNIX, port) if host == "unix" else (socket.AF_INET, (host, int(port)))
        connecting = trio.socket.socket(family)
        try:
            await connecting.connect(address)
        except BaseException:
            connecting.close()
            raise
        return trio.SocketStream(connecting)

    async def connect(self) -> trio.abc.HalfCloseableStream:
        """Connect, and shake hands if TLS is what the server speaks."""
        stream = await self.tcp()
        if self._tls is None:
            return stream
        over_tls = TLSStream(stream, self._tls, server_hostname="localhost")
        await over_tls.handshake()
        return over_tls

    async def answers(self, stream: trio.abc.Stream) -> None:
        """Be a good client: ask once, and insist on the answer."""
        await stream.send_all(self._question)
        assert await receive(stream, len(self._answer)) == self._answer

    async def answers_anew(self) -> None:
        """Be a good client who comes anew."""
        async with await self.connect() as stream:
            await self.answers(stream)

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """Tell the server to stop."""
        self.stopping = True
        self.process.send_signal(sign)

    def memory(self) -> int:
        """Return how much memory the process has, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def limit_descriptors(self, more: int) -> None:
        """Let the process have so many descriptors ``more`` than it has."""
        limit = len(list(Path(f"/proc/{self.process.pid}/fd").iterdir())) + more
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (limit, limit))

    async def workers(self, count: int) -> list[int]:
        """Wait until there are ``count`` workers, and return their process ids."""
        while len(pids := self._children()) < count:  # noqa: ASYNC110 - nobody tells of a new process
            await trio.sleep(0.01)
        return pids

    def _children(self) -> list[int]:
        pids: list[int] = []
        # The kernel keeps them for each thread.
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            pids += map(int, children.read_text().split())
        return pids

    def kill(self) -> None:
        """End everything at once."""
        for pid in [self.process.pid, *self._children()]:
            os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def serving(
    protocol: str,
    *options: str,
    command: Sequence[str] = COMMAND,
    where: Sequence[str] = ("--port", "0"),
    pass_fds: Sequence[int] = (),
    tls: ssl.SSLContext | None = None,
    complaints: Sequence[str] = (),
) -> AsyncIterator[Server]:
    """Run a server around a block.

    After the block it must still answer, and stop with status 0 at SIGTERM, unless the block has stopped it: then it
    must have ended with 0. It must have logged ``complaints``, which are regular expressions, and no other warning
    or error, and nothing that is no log line, such as a traceback.
    """
    with trio.fail_after(HANGS):
        process = await trio.lowlevel.open_process(
            [*command, protocol, *where, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        server = Server(process, protocol, tls)
        try:
            await server.started()
            yield server
            if not server.stopping:
                await server.answers_anew()
                server.stop()
            assert await process.wait() == 0
            check_log(await server.rest_of_log(), complaints)
        finally:
            if process.poll() is None:
                server.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@contextlib.contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Hold processes up around a block: they take nothing in, and lose nothing."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)  # it is about to be
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def check_log(lines: Sequence[str], complaints: Sequence[str]) -> None:
    found = []
    for line in lines:
        match = LOG_LINE.fullmatch(line)
        assert match, f"no log line: {line}"
        if match["level"] != "INFO":
            found.append(match["message"])
        assert "crashed" not in line or "crashed 0" in line
    assert len(found) == len(complaints), found
    for complaint, message in zip(complaints, found, strict=True):
        assert re.fullmatch(complaint, message), message


async def receive(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    """Receive ``count`` bytes, or fewer if the stream ends."""
    received = bytearray()
    while len(received) < count and (more := await stream.receive_some(count - len(received))):
        received += more
    return bytes(received)


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Receive until the stream ends."""
    received = bytearray()
    async for more in stream:
        received += more
    return bytes(received)


def is_refused(address: str) -> bool:
    """Whether nobody listens on ``address``, which is HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.socket() as client:
        client.bind(("127.0.0.9", 0))  # a client that is given the very port that it tries connects to itself
        return client.connect_ex((host, int(port))) == errno.ECONNREFUSED
