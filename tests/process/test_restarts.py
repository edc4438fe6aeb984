"""Stops, restarts and listening, on real server processes. What `serving` checks after each is part of the test."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from helpers import reply_bytes, request_bytes
from processes import ANSWER, COMMAND, HANGS, QUESTION, Server, paused, receive, receive_all, serving

from trioproto.process.service import SAME_SIGNAL_SECONDS

WORKERS = pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
STOPS_BY_FORCE = r"the grace period of 0\.5 s expired: cancelled the rest"
SECOND_SIGNAL = r"second signal: cancelled all connections"

# Runs a command as systemd does: with a listening socket as descriptor 3, and two variables that tell of it.
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid() + int(sys.argv[2]))}
os.execv(sys.executable, [sys.executable, "-m", "trioproto", *sys.argv[3:]])
"""


class Load:
    """Clients that ask as fast as they are answered.

    Attributes:
        answered: how many requests were.
        refused: how many connections were refused.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._wanted = 0
        self._reached = trio.Event()
        self.answered = 0
        self.refused = 0

    async def more(self, count: int) -> None:
        """Wait until ``count`` more requests are answered."""
        self._wanted, self._reached = self.answered + count, trio.Event()
        await self._reached.wait()

    def _count(self, answers: int) -> None:
        self.answered += answers
        if self.answered >= self._wanted:
            self._reached.set()

    async def keep_alive(self, number: int) -> None:
        """Ask batch after batch of pipelined requests until end of stream; that may come between any two replies."""
        operands = [[number, place] for place in range(20)]
        batch = b"".join(request_bytes(pair, "*") for pair in operands)
        replies = b"".join(reply_bytes(pair, "*") for pair in operands)
        async with await self._server.tcp() as stream:
            received = replies
            while len(received) == len(replies):
                await stream.send_all(batch)
                received = await receive(stream, len(replies))
                assert replies.startswith(received)
                assert len(received) % 4 == 0
                self._count(len(received) // 4)

    async def stream(self) -> None:
        """Send requests without a pause, and take replies, until end of stream."""
        async with await self._server.tcp() as stream, trio.open_nursery() as nursery:

            async def ask() -> None:
                while True:
                    await stream.send_all(QUESTION * 1000)

            nursery.start_soon(ask)
            received = 0
            async for replies in stream:
                received += len(replies)
                self._count(len(replies) // 4)
            assert received % 4 == 0
            nursery.cancel_scope.cancel()

    async def one_by_one(self) -> None:
        """Connect, ask and close, again and again, until a connection is refused."""
        while True:
            try:
                stream = await self._server.tcp()
            except ConnectionRefusedError:
                self.refused += 1
                return
            async with stream:
                await self._server.answers(stream)
            self._count(1)


@WORKERS
async def test_stop_under_load_of_those_who_stay(workers: str) -> None:
    """At SIGTERM, clients that keep a connection get whole replies and end of stream, never a reset."""
    async with serving("op", workers) as server, trio.open_nursery() as nursery:
        load = Load(server)
        for number in range(20):
            nursery.start_soon(load.keep_alive, number)
        await load.more(2000)
        server.stop()


async def test_stop_under_load_of_one_who_never_pauses() -> None:
    """At SIGTERM, a client that always has a next request on its way is ended between two replies, without force."""
    async with serving("op") as server, trio.open_nursery() as nursery:
        load = Load(server)
        nursery.start_soon(load.stream)
        await load.more(2000)
        server.stop()


@WORKERS
async def test_stop_under_load_of_those_who_come_and_go(workers: str) -> None:
    """At SIGTERM, clients that connect, ask and close are served until they are refused, and never reset."""
    async with serving("op", workers) as server, trio.open_nursery() as nursery:
        load = Load(server)
        for _ in range(10):
            nursery.start_soon(load.one_by_one)
        await load.more(300)
        server.stop()


async def test_stop_serves_those_who_have_just_connected() -> None:
    """Those who had connected when the stop began, and ask at once, are served."""
    async with serving("op") as server, await server.tcp() as idle, contextlib.AsyncExitStack() as stack:
        await server.answers(idle)
        fresh = [await stack.enter_async_context(await server.tcp()) for _ in range(20)]
        server.stop()
        assert await receive_all(idle) == b""  # the stop has begun
        for stream in fresh:
            await server.answers(stream)
            await stream.aclose()


@WORKERS
async def test_stop_serves_those_who_are_far_away(workers: str) -> None:
    """A client whose handshake has begun, and whose last packet of it arrives 0.2 s later, is served in a stop."""
    async with serving("op", workers) as server:
        await server.answers_anew()
        host, _, port = server.address.rpartition(":")
        connecting = trio.socket.socket()
        # The client's kernel keeps back the last packet of the handshake: for this long, if nothing is sent before.
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        await connecting.connect((host, int(port)))
        server.stop()
        await trio.sleep(0.19)
        async with trio.SocketStream(connecting) as client:
            await client.send_all(QUESTION)
            assert await receive_all(client) == ANSWER


async def test_stop_serves_the_accept_queue() -> None:
    """Those who wait for a place when the stop begins are served when it does."""
    async with serving("op", "--max-connections=2") as server, contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(await server.tcp()) for _ in range(2)]
        for stream in idle:
            await server.answers(stream)
        queued = [await stack.enter_async_context(await server.tcp()) for _ in range(20)]
        server.stop()
        for stream in idle:
            assert await receive_all(stream) == b""
            await stream.aclose()
        for stream in queued:
            await server.answers(stream)
            await stream.aclose()


async def test_stop_serves_the_accept_queue_while_workers_start() -> None:
    """Those who had connected when the stop began are served, even if no worker was ready yet."""
    async with serving("op", "--workers=2") as server, contextlib.AsyncExitStack() as stack:
        queued = [await stack.enter_async_context(await server.tcp()) for _ in range(20)]
        server.stop()
        for stream in queued:
            await server.answers(stream)
            await stream.aclose()


async def test_stop_lets_nobody_in_who_would_not_be_served() -> None:
    """While a server stops, an attempt to connect is served or unanswered, but never accepted and then dropped."""
    async with serving("op", "--workers=2") as server, contextlib.AsyncExitStack() as stack:
        let_in = []
        with paused(*await server.workers(2)):  # they would stop at once, and the server with them
            server.stop()
            while True:
                with trio.move_on_after(0.3) as attempt:
                    let_in.append(await stack.enter_async_context(await server.tcp()))
                if attempt.cancelled_caught:
                    break
                await trio.sleep(0.02)
        for stream in let_in:
            await server.answers(stream)
            await stream.aclose()


async def test_stop_with_half_a_request() -> None:
    """A request that is under way when the stop begins may be finished, and is answered."""
    async with serving("op") as server, await server.tcp() as idle, await server.tcp() as stream:
        await server.answers(idle)
        await stream.send_all(QUESTION + QUESTION[:-1])
        assert await receive(stream, 4) == ANSWER
        server.stop()
        assert await receive_all(idle) == b""  # the stop has begun
        await stream.send_all(QUESTION[-1:])
        assert await receive_all(stream) == ANSWER


async def test_stop_with_idle_clients() -> None:
    """Idle clients are ended at once."""
    async with serving("op", "--grace=60") as server, contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(await server.tcp()) for _ in range(20)]
        for stream in idle[:10]:
            await server.answers(stream)
        server.stop()
        for stream in idle:
            assert await receive_all(stream) == b""
            await stream.aclose()


async def test_stop_with_stuck_clients() -> None:
    """Clients that take no replies, or do not finish a request, cannot stop the stop: the grace period ends it."""
    async with (
        serving("op", "--grace=0.5", complaints=[STOPS_BY_FORCE]) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        never_reads = await stack.enter_async_context(await server.tcp())
        with trio.move_on_after(0.5):
            await never_reads.send_all(QUESTION * 10_000_000)
        never_finishes = await stack.enter_async_context(await server.tcp())
        await never_finishes.send_all(QUESTION + QUESTION[:-1])
        assert await receive(never_finishes, 4) == ANSWER
        server.stop()
        await server.process.wait()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
async def test_second_signal(first: signal.Signals) -> None:
    """A second SIGTERM or SIGINT ends the server at once, with status 0, whoever is in the middle of a request."""
    async with (
        serving("op", "--grace=60", complaints=[SECOND_SIGNAL]) as server,
        await server.tcp() as stream,
        await server.tcp() as idle,
    ):
        await server.answers(idle)
        await stream.send_all(QUESTION + QUESTION[:-1])
        assert await receive(stream, len(ANSWER)) == ANSWER
        server.stop(first)
        assert await receive_all(idle) == b""  # the stop has begun
        await trio.sleep(SAME_SIGNAL_SECONDS)
        server.stop()
        with trio.fail_after(HANGS / 2):
            await server.process.wait()


async def test_second_signal_with_workers() -> None:
    """A second signal ends all workers at once, whoever is in the middle of a request."""
    async with (
        serving("op", "--workers=2", "--grace=60", complaints=[SECOND_SIGNAL]) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        workers = await server.workers(2)
        for worker in workers:
            [stream, idle, *_] = await connect_past(server, stack, worker)
            await stream.send_all(QUESTION + QUESTION[:-1])
            assert await receive(stream, len(ANSWER)) == ANSWER
        server.stop()
        assert await receive_all(idle) == b""  # the stop has begun
        await trio.sleep(SAME_SIGNAL_SECONDS)
        server.stop()
        with trio.fail_after(HANGS / 2):
            await server.process.wait()
        check_gone(workers)


@pytest.mark.parametrize("first", ["supervisor", "workers"])
@pytest.mark.parametrize("times", [1, 5])
async def test_signals_to_all_processes(first: str, times: int) -> None:
    """SIGTERM to supervisor and workers, as systemd and pkill send it, cuts nothing, in whatever order it comes."""
    async with serving("op", "--workers=2", "--grace=60") as server, contextlib.AsyncExitStack() as stack:
        workers = await server.workers(2)
        half = []
        for worker in workers:
            half += await connect_past(server, stack, worker)
        for stream in half:
            await stream.send_all(QUESTION[:-1])
        pids = [server.process.pid, *workers] if first == "supervisor" else [*workers, server.process.pid]
        server.stopping = True
        for _ in range(times):
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            await trio.sleep(0.15)
        for stream in half:
            await stream.send_all(QUESTION[-1:])
            assert await receive_all(stream) == ANSWER
            await stream.aclose()
        await server.process.wait()
        check_gone(workers)


@pytest.mark.parametrize("repeated", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signals_until_the_end(repeated: signal.Signals) -> None:
    """Signals that come within a second change nothing, not even the exit status of a server that has ended already."""
    async with serving("op") as server:
        server.stop(signal.SIGTERM)
        with trio.move_on_after(0.9):
            while server.process.poll() is None:
                server.process.send_signal(repeated)
                await trio.sleep(0.001)


async def test_signals_to_workers_some_time_before() -> None:
    """Until the supervisor is signalled, too, whoever comes is served."""
    async with serving("op", "--workers=2", "--grace=60") as server, await server.tcp() as stream:
        await stream.send_all(QUESTION[:-1])
        for pid in await server.workers(2):
            os.kill(pid, signal.SIGTERM)
        await trio.sleep(0.5)
        async with await server.tcp() as late:
            await late.send_all(QUESTION)
            await trio.sleep(0.2)
            server.stop()
            assert await receive(late, len(ANSWER)) == ANSWER
        await stream.send_all(QUESTION[-1:])
        assert await receive_all(stream) == ANSWER


async def test_signals_to_all_processes_while_workers_start() -> None:
    """Even if no worker can receive a signal yet, those who had connected are served."""
    async with serving("op", "--workers=2") as server, contextlib.AsyncExitStack() as stack:
        queued = [await stack.enter_async_context(await server.tcp()) for _ in range(20)]
        server.stopping = True
        for pid in [*await server.workers(2), server.process.pid]:
            os.kill(pid, signal.SIGTERM)
        for stream in queued:
            await server.answers(stream)
            await stream.aclose()


def check_gone(pids: Sequence[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_ctrl_c_with_workers() -> None:
    """Ctrl-C, which a terminal sends to the whole process group, stops all workers, calmly, with status 0."""
    async with serving("op", "--workers=2") as server, await server.tcp() as stream:
        await server.answers(stream)
        workers = await server.workers(2)
        server.stopping = True
        os.killpg(server.process.pid, signal.SIGINT)
        assert await receive_all(stream) == b""
        await stream.aclose()
        await server.process.wait()
        check_gone(workers)


async def connect_past(server: Server, stack: contextlib.AsyncExitStack, worker: int) -> list[trio.SocketStream]:
    """Connect five clients, all to the worker that is not ``worker``."""
    with paused(worker):
        streams = [await stack.enter_async_context(await server.tcp()) for _ in range(5)]
        for stream in streams:
            await server.answers(stream)
    return streams


async def test_killed_worker() -> None:
    """Of a worker that is killed under load, only its own connections break, and another worker takes its place."""
    killed = r"worker \d was killed by signal 9 \(Killed\); starting another"
    async with serving("op", "--workers=2", complaints=[killed]) as server, contextlib.AsyncExitStack() as stack:
        victim, survivor = await server.workers(2)
        theirs, others = [await connect_past(server, stack, other) for other in (survivor, victim)]

        async def ask_for_ever(stream: trio.SocketStream) -> None:
            while True:
                await server.answers(stream)

        async def ask_until_it_breaks(stream: trio.SocketStream) -> None:
            with pytest.raises((trio.BrokenResourceError, AssertionError)):
                await ask_for_ever(stream)

        async with trio.open_nursery() as untroubled:
            for stream in others:
                untroubled.start_soon(ask_for_ever, stream)
            async with trio.open_nursery() as troubled:
                for stream in theirs:
                    troubled.start_soon(ask_until_it_breaks, stream)
                await server.answers_anew()
                os.kill(victim, signal.SIGKILL)
            await server.logged(killed)
            for _ in range(10):
                await server.answers_anew()
            untroubled.cancel_scope.cancel()
        await server.workers(2)


@WORKERS
async def test_restart_on_an_inherited_socket(workers: str) -> None:
    """A new server takes over the socket of an old one while clients come and go, and not one request fails."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        fd = listening.fileno()
        where = [f"--fd={fd}"]
        async with serving("op", workers, where=where, pass_fds=[fd]) as old, trio.open_nursery() as nursery:
            load = Load(old)
            for _ in range(5):
                nursery.start_soon(load.one_by_one)
            await load.more(100)
            async with serving("op", workers, where=where, pass_fds=[fd]):
                await load.more(100)
                old.stop()
                await old.process.wait()
                await load.more(100)
                nursery.cancel_scope.cancel()
        assert load.refused == 0


@WORKERS
async def test_restart_at_the_limit(workers: str) -> None:
    """So it is where clients wait for a place: they are left in the queue to the new server."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        fd = listening.fileno()
        where, limit = [f"--fd={fd}"], "--max-connections=2"
        async with (
            serving("op", workers, limit, where=where, pass_fds=[fd]) as old,
            contextlib.AsyncExitStack() as ends,
        ):
            nursery = await ends.enter_async_context(trio.open_nursery())
            load = Load(old)
            for _ in range(12):
                nursery.start_soon(load.one_by_one)
            await load.more(100)
            await ends.enter_async_context(serving("op", workers, limit, where=where, pass_fds=[fd]))
            await load.more(100)
            old.stop()
            await old.process.wait()
            await load.more(100)
            nursery.cancel_scope.cancel()
        assert load.refused == 0


async def test_stop_at_the_limit_of_an_inherited_socket() -> None:
    """A server takes nobody from the queue in its stop whom the next server could serve."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        fd = listening.fileno()
        where, limit = [f"--fd={fd}"], "--max-connections=2"
        async with contextlib.AsyncExitStack() as stack:
            async with serving("op", limit, where=where, pass_fds=[fd]) as old:
                idle = [await stack.enter_async_context(await old.tcp()) for _ in range(2)]
                for stream in idle:
                    await old.answers(stream)
                queued = [await stack.enter_async_context(await old.tcp()) for _ in range(6)]
                old.stop()
                for stream in idle:
                    assert await receive_all(stream) == b""
                    await stream.aclose()
                await old.process.wait()
                assert "accepted 2, active 0" in "".join(await old.rest_of_log())
            async with serving("op", limit, where=where, pass_fds=[fd]) as new:
                for stream in queued:
                    await new.answers(stream)
                    await stream.aclose()


async def test_restart_on_a_port() -> None:
    """A port can be listened on again as soon as the old server has stopped, whatever connections it has had."""
    async with serving("op") as old:
        port = old.address.rpartition(":")[2]
        stream = await old.tcp()
        await old.answers(stream)
        old.stop()
        assert await receive_all(stream) == b""  # the server ended it first, so its side is in TIME_WAIT
        await stream.aclose()
        await old.process.wait()
    async with serving("op", where=["--port", port]) as new:
        assert new.address == old.address


@pytest.mark.parametrize("other_pid", [0, 1], ids=["for this process", "for another process"])
async def test_systemds_protocol(other_pid: int) -> None:
    """A server listens on the sockets that LISTEN_FDS tells of, if LISTEN_PID says that they are its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        as_systemd = [sys.executable, "-c", AS_SYSTEMD, str(fd), str(other_pid)]
        async with serving("op", command=as_systemd, pass_fds=[fd]) as server:
            activated = server.address == f"127.0.0.1:{listening.getsockname()[1]}"
            assert activated == (other_pid == 0)


async def test_systemd_socket_activate(tmp_path: Path) -> None:
    """Started by systemd's own tool when the first client comes, a server answers that client."""
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("systemd-socket-activate is not installed")
    path = str(tmp_path / "op")
    with trio.fail_after(HANGS):
        process = await trio.lowlevel.open_process(
            [activate, f"--listen={path}", *COMMAND, "op"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            assert b"Listening on" in await process.stderr.receive_some()
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(QUESTION)
                assert await receive(stream, len(ANSWER)) == ANSWER
            process.terminate()
            assert await process.wait() == 0
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
async def test_systemd_socket_that_is_given_twice(workers: str) -> None:
    """A socket that systemd passes may be named by ``--fd`` as well."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        as_systemd = [sys.executable, "-c", AS_SYSTEMD, str(fd), "0"]
        async with serving("op", workers, command=as_systemd, where=["--fd=3"], pass_fds=[fd]) as server:
            await server.answers_anew()


async def fails(protocol: str, *options: str) -> str:
    """Run a server that cannot start, and return the one line that it leaves."""
    with trio.fail_after(HANGS):
        ended = await trio.run_process(
            [*COMMAND, protocol, *options], capture_stdout=True, capture_stderr=True, check=False
        )
    assert ended.returncode == 1
    assert ended.stdout == b""
    [line] = ended.stderr.decode().splitlines()
    return line


async def test_port_in_use() -> None:
    """A port that another server has is a failure of one line, and the other server does not notice."""
    async with serving("op") as server:
        line = await fails("op", "--port", server.address.rpartition(":")[2])
        assert f"cannot listen on {server.address}: Address already in use" in line


async def test_unix_socket_in_use(tmp_path: Path) -> None:
    """A UNIX socket that another server has is a failure of one line, and the other server does not notice."""
    path = str(tmp_path / "op")
    async with serving("op", where=["--unix", path]) as server:
        assert f"cannot listen on unix:{path}: Address already in use" in await fails("op", "--unix", path)
        assert server.address == f"unix:{path}"


async def test_stale_unix_socket(tmp_path: Path) -> None:
    """A UNIX socket that a killed server left behind is replaced, and removed at the stop."""
    path = tmp_path / "op"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.listen()
    left_behind.close()
    async with serving("op", where=["--unix", str(path)]):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_unix_socket_that_another_has_replaced(tmp_path: Path) -> None:
    """A server removes no file at its stop but its own."""
    path = tmp_path / "op"
    with socket.socket(socket.AF_UNIX) as another:
        async with serving("op", where=["--unix", str(path)]) as server:
            path.unlink()
            another.bind(str(path))
            server.stop()
        assert path.is_socket()


async def test_unix_socket_whose_file_is_gone(tmp_path: Path) -> None:
    """A server whose file somebody has removed stops as calmly as any."""
    path = tmp_path / "op"
    async with serving("op", where=["--unix", str(path)]) as server:
        path.unlink()
        server.stop()


async def test_unix_path_that_is_no_socket(tmp_path: Path) -> None:
    """A file that is no socket is never replaced, and a directory that is not there never made."""
    path = tmp_path / "precious"
    path.write_text("data")
    assert f"unix:{path}: a file that is not a socket is there" in await fails("op", "--unix", str(path))
    assert path.read_text() == "data"
    nowhere = tmp_path / "nowhere"
    assert f"create the directory {nowhere} first" in await fails("op", "--unix", str(nowhere / "op"))


async def test_unix_socket_that_cannot_be_removed(tmp_path: Path) -> None:
    """A server that cannot remove its file finishes what is under way all the same, and ends with status 0."""
    directory = tmp_path / "directory"
    directory.mkdir()
    complaint = rf"cannot remove unix:{directory}/op: Not a directory; the next server there will remove it"
    where = ["--unix", str(directory / "op")]
    async with serving("op", where=where, complaints=[complaint]) as server, await server.tcp() as stream:
        await stream.send_all(QUESTION[:-1])
        directory.rename(tmp_path / "elsewhere")
        directory.write_text("no directory")
        await trio.sleep(0.1)
        server.stop()
        await trio.sleep(0.3)
        await stream.send_all(QUESTION[-1:])
        assert await receive_all(stream) == ANSWER
