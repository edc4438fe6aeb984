"""Worker processes: kept running, stopped gracefully, and never left behind."""

import contextlib
import functools
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from processes import COMMAND, is_refused, paused, serving

from trioproto.process.listeners import ListenError
from trioproto.process.workers import (
    FIRST_WAIT,
    LONGEST_WAIT,
    SHORT_LIFE,
    supervise_until_signal,
    supervise_workers,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and descriptors of POSIX")

ROOT = Path(__file__).parents[2]
LIMIT = 20  # seconds, for a test that would otherwise hang
UNTIL_EOF = "cat"  # as a worker does that is told to stop
FOREVER = "exec sleep 60"


class Workers:
    """A command line for workers, and what they write to the pipe that they inherit.

    Each writes its process ID first, and then does ``action``, in which ``$pipe`` is the pipe's path.
    """

    def __init__(self, action: str = UNTIL_EOF) -> None:
        reading, self.fd = os.pipe()
        self._reports = trio.lowlevel.FdStream(reading)
        self._text = b""
        self.command = ["sh", "-c", f"pipe=/dev/fd/{self.fd}; echo $$ >$pipe; {action}"]

    async def report(self) -> str:
        """Return the next line that a worker has written."""
        while b"\n" not in self._text:
            self._text += await self._reports.receive_some()
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    async def pid(self) -> int:
        """Return the process ID of the next worker that has begun."""
        return int(await self.report())

    async def aclose(self) -> None:
        """Close the pipe, after checking that no worker is left that holds it, and none has written any more."""
        os.close(self.fd)
        assert self._text + await self._reports.receive_some() == b""
        await self._reports.aclose()


@contextlib.asynccontextmanager
async def supervised(workers: Workers, count: int) -> AsyncIterator[trio.Event]:
    """Supervise ``workers``, and give the event that stops them; in the end, see to it that none is left."""
    shutdown = trio.Event()

    async def supervise() -> None:
        await supervise_workers(workers.command, count, listening_fds=[workers.fd], shutdown=shutdown)

    with trio.fail_after(LIMIT):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervise)
                yield shutdown
        finally:
            with trio.CancelScope(shield=True):
                await workers.aclose()


def is_running(pid: int) -> bool:
    """Whether there is such a process, were it only a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("count", [1, 3])
async def test_stop(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """So many workers run; a stop ends each one's input, waits until all have ended, and starts no others."""
    workers = Workers(f"{UNTIL_EOF}; sleep 0.1; echo stopped >$pipe")
    async with supervised(workers, count) as shutdown:
        pids = {await workers.pid() for _ in range(count)}
        assert len(pids) == count
        shutdown.set()
        assert [await workers.report() for _ in range(count)] == ["stopped"] * count
    assert not any(map(is_running, pids))
    assert caplog.messages == []


async def test_signals_to_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    """Signals to a worker do nothing, not even as it starts: the supervisor alone stops it."""
    workers = Workers(f"exec {UNTIL_EOF}")
    async with supervised(workers, 1) as shutdown:
        pid = await workers.pid()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        await trio.sleep(0.2)
        shutdown.set()
    assert caplog.messages == []  # no other was started


async def test_stop_before_the_start() -> None:
    """If the stop comes first, no worker is started."""
    workers = Workers()
    async with supervised(workers, 2) as shutdown:
        shutdown.set()


async def test_stop_between_two(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A stop does not wait for the time at which a worker would be replaced."""
    monkeypatch.setattr("trioproto.process.workers.FIRST_WAIT", 10 * LIMIT)
    workers = Workers("exit 3")
    async with supervised(workers, 1) as shutdown:
        await workers.pid()
        while not caplog.messages:  # noqa: ASYNC110 - there is no event for a line in the log
            await trio.sleep(0.01)
        shutdown.set()
    assert caplog.messages == ["worker 1 exited with status 3; starting another"]


async def test_killed_worker_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that is killed is replaced, and the others are left alone; the log says so in one line."""
    workers = Workers()
    async with supervised(workers, 2) as shutdown:
        killed, other = await workers.pid(), await workers.pid()
        os.kill(killed, signal.SIGKILL)
        another = await workers.pid()
        assert another not in (killed, other)
        assert is_running(other)
        assert not is_running(killed)
        shutdown.set()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert re.fullmatch(r"worker [12] was killed by signal 9 \(Killed\); starting another", record.getMessage())


@pytest.mark.parametrize("in_a_stop", [False, True], ids=["while they serve", "in a stop"])
async def test_cancellation(in_a_stop: bool) -> None:  # noqa: FBT001
    """On cancellation the workers are killed, even those that do not stop."""
    workers = Workers(FOREVER)
    with trio.CancelScope() as scope:
        async with supervised(workers, 2) as shutdown:
            pids = [await workers.pid() for _ in range(2)]
            if in_a_stop:
                shutdown.set()
                await trio.sleep(0.1)
            assert all(map(is_running, pids))
            scope.cancel()
    assert scope.cancelled_caught
    assert not any(map(is_running, pids))


async def test_command_that_does_not_exist() -> None:
    """A command that cannot be started is an error, in the nursery's group."""
    with pytest.raises(ExceptionGroup) as caught:
        await supervise_workers(["/does/not/exist"], 2, listening_fds=[], shutdown=trio.Event())
    assert caught.group_contains(FileNotFoundError)


async def test_command_that_is_gone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that cannot be started again, but could be once, is tried again, and the others live on."""
    command = tmp_path / "worker"
    command.write_text("#!/bin/sh\nrm $0\n")
    command.chmod(0o700)
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(supervise_workers, [str(command)], 1, listening_fds=[], shutdown=shutdown))
        while "trying again" not in caplog.text:  # noqa: ASYNC110 - a log has no event
            await trio.sleep(FIRST_WAIT)
        shutdown.set()
    assert "worker 1 cannot be started: No such file or directory; trying again" in caplog.messages


async def test_worker_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that does not stop in time is killed, and the log says so."""
    workers = Workers(FOREVER)
    shutdown = trio.Event()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                functools.partial(
                    supervise_workers,
                    workers.command,
                    1,
                    listening_fds=[workers.fd],
                    shutdown=shutdown,
                    patience=0.1,
                )
            )
            pid = await workers.pid()
            shutdown.set()
    assert not is_running(pid)
    assert caplog.messages == ["worker 1 did not stop in time: killed"]
    await workers.aclose()


async def test_descriptors() -> None:
    """A worker inherits the listening descriptors under their numbers, and no others; its standard input is a pipe."""
    workers = Workers(f"readlink /dev/fd/0 >$pipe; echo /dev/fd/* >$pipe; {UNTIL_EOF}")
    other = os.dup(workers.fd)
    os.set_inheritable(other, True)  # noqa: FBT003 - the standard library's
    async with supervised(workers, 1) as shutdown:
        await workers.pid()
        assert (await workers.report()).startswith("pipe:")
        inherited = (await workers.report()).split()
        assert f"/dev/fd/{workers.fd}" in inherited
        assert f"/dev/fd/{other}" not in inherited
        os.close(other)
        shutdown.set()


async def test_process_group() -> None:
    """A worker is in a process group of its own, so that Ctrl-C in a terminal reaches the supervisor alone."""
    workers = Workers()
    async with supervised(workers, 1) as shutdown:
        pid = await workers.pid()
        assert os.getpgid(pid) == pid
        shutdown.set()


# Until a signal.


class Supervised:
    """Workers that are supervised until a signal comes: what is announced, and what they report to a file.

    Each writes its process ID to the file, and then does ``action``.
    """

    def __init__(self, directory: Path, action: str) -> None:
        self._file = directory / "pids"
        self._file.touch()
        self._action = action
        self.addresses: list[str] = []
        self.fds: list[int] = []
        self.ended = trio.Event()

    async def run(self, count: int, **settings: Any) -> None:
        """Supervise ``count`` of them."""
        try:
            await supervise_until_signal(self._command, count, 0, announce=self.addresses.append, **settings)
        finally:
            self.ended.set()

    def _command(self, fds: Sequence[int]) -> list[str]:
        self.fds = list(fds)
        return ["sh", "-c", f"echo $$ >>{self._file}; {self._action}"]

    async def pids(self, count: int) -> list[int]:
        """Wait until ``count`` workers have begun."""
        while len(pids := self._file.read_text().split()) < count:  # noqa: ASYNC110 - nobody tells of a new process
            await trio.sleep(0.01)
        return [int(pid) for pid in pids]

    def send_signal(self) -> None:
        """Send their supervisor SIGTERM."""
        assert not self.ended.is_set()
        os.kill(os.getpid(), signal.SIGTERM)

    def check_gone(self, pids: Sequence[int]) -> None:
        """Check that nothing is left of the workers, and that nobody listens any more."""
        assert not any(map(is_running, pids))
        assert self.addresses
        assert all(map(is_refused, self.addresses))


async def test_signal(tmp_path: Path) -> None:
    """A signal stops each worker; the listeners that they inherit are closed in the end."""
    stopped = tmp_path / "stopped"
    workers = Supervised(tmp_path, f"{UNTIL_EOF}; echo >>{stopped}")
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(workers.run, 2, host=["127.0.0.1", "127.0.0.2"]))
            pids = await workers.pids(2)
            for fd, address, host in zip(workers.fds, workers.addresses, ("127.0.0.1", "127.0.0.2"), strict=True):
                with socket.socket(fileno=os.dup(fd)) as listening:
                    assert "{}:{}".format(*listening.getsockname()) == address
                    assert address.startswith(host)
            workers.send_signal()
    workers.check_gone(pids)
    assert stopped.read_text() == "\n\n"


async def test_signal_and_workers_that_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has not stopped some time after its grace period is killed."""
    monkeypatch.setattr("trioproto.process.workers.STOP_SECONDS", 0.1)
    workers = Supervised(tmp_path, FOREVER)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(workers.run, 2, grace_period=0.5))
            pids = await workers.pids(2)
            told = trio.current_time()
            workers.send_signal()
    assert trio.current_time() - told >= 0.6
    workers.check_gone(pids)


async def test_second_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A second signal, if it comes later, kills the workers, and the log says so."""
    monkeypatch.setattr("trioproto.process.service.SAME_SIGNAL_SECONDS", 0.1)
    workers = Supervised(tmp_path, f"{UNTIL_EOF}; echo $$ >>{tmp_path}/pids; {FOREVER}")
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(workers.run, 2, grace_period=10 * LIMIT))
            await workers.pids(2)
            workers.send_signal()
            pids = await workers.pids(4)  # each has been told to stop
            await trio.sleep(0.2)
            workers.send_signal()
    workers.check_gone(pids)
    assert caplog.messages == ["second signal: cancelled all connections"]


async def test_cancellation_until_a_signal(tmp_path: Path) -> None:
    """On cancellation, the workers are killed and the listeners closed."""
    workers = Supervised(tmp_path, FOREVER)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.run, 2)
            pids = await workers.pids(2)
            nursery.cancel_scope.cancel()
    workers.check_gone(pids)


@pytest.mark.parametrize("inherited", [True, False])
async def test_sockets_that_end_with_the_supervisor(inherited: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Workers are told which sockets have no server after them: those that the supervisor has not inherited itself."""
    told = tmp_path / "told"
    workers = Supervised(tmp_path, f"echo $TRIOPROTO_ENDING_FDS >{told}; {UNTIL_EOF}")
    with socket.create_server(("127.0.0.1", 0)) as parents, trio.fail_after(LIMIT):
        fds = [os.dup(parents.fileno())] if inherited else []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(workers.run, 1, host=["127.0.0.1", "127.0.0.2"], fds=fds))
            await workers.pids(1)
            workers.send_signal()
    assert told.read_text().split() == [str(fd) for fd in workers.fds if fd not in fds]
    assert len(workers.fds) == len(fds) + 2


async def test_nowhere_to_listen(tmp_path: Path) -> None:
    """If the listeners cannot be opened, no worker is started."""
    workers = Supervised(tmp_path, UNTIL_EOF)
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:0: "):  # an address that nobody has, RFC 5737
        await workers.run(2, host="192.0.2.1")
    assert await workers.pids(0) == []


async def test_standard_input_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``stop_at_eof``, the end of standard input stops the workers."""
    reading, writing = os.pipe()
    monkeypatch.setattr("trioproto.process.service._STDIN", reading)
    workers = Supervised(tmp_path, UNTIL_EOF)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(workers.run, 1, stop_at_eof=True))
            pids = await workers.pids(1)
            os.close(writing)
    workers.check_gone(pids)
    os.close(reading)


# Workers that hang.


async def test_worker_that_never_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that sends no heartbeat while it starts is killed and replaced; one line in the log says so."""
    monkeypatch.setattr("trioproto.process.workers.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("trioproto.process.workers.START_SECONDS", 0.5)
    workers = Supervised(tmp_path, FOREVER)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(workers.run, 1, grace_period=0))
            first, _ = await workers.pids(2)
            nursery.cancel_scope.cancel()
    assert not is_running(first)
    assert caplog.messages == ["worker 1 sent no heartbeat for 0.5 s: killed; starting another"]


# A supervisor that takes workers to hang after 6 s already.
IMPATIENT = """
import sys
from trioproto.cli.main import main
from trioproto.process import workers
workers.HANG_SECONDS = 6.0
sys.exit(main())
"""


async def test_worker_that_hangs_while_it_serves() -> None:
    """A worker that is stopped is killed and replaced; meanwhile, the others serve."""
    complaint = "worker [12] sent no heartbeat for 6 s: killed; starting another"
    async with serving(
        "op", "--workers=2", command=[sys.executable, "-c", IMPATIENT], complaints=[complaint]
    ) as server:
        hanging, other = await server.workers(2)
        await server.answers_anew()
        replaced, asking = trio.Event(), trio.Lock()

        async def ask_on() -> None:
            while not replaced.is_set():
                async with asking:
                    await server.answers_anew()
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_on)
            await trio.sleep(2)  # both serve
            async with asking:  # or else this client may be the one with whom the worker hangs
                os.kill(hanging, signal.SIGSTOP)
            await server.logged("no heartbeat")
            pids = await server.workers(2)
            assert hanging not in pids
            assert other in pids
            replaced.set()


async def test_workers_that_were_frozen() -> None:
    """All processes are stopped for a while, as by a container's pause: nobody is taken to hang when they go on."""
    async with serving("op", "--workers=2", command=[sys.executable, "-c", IMPATIENT]) as server:
        await server.answers_anew()
        with paused(server.process.pid, *await server.workers(2)):
            await trio.sleep(7.5)
        await trio.sleep(2)
        await server.answers_anew()


# What a worker runs.

HOSTILE = "open('imported', 'w').close()"


async def command_line(pid: int) -> list[str]:
    """Wait until a worker has become what it is started as, and return its command line."""
    while True:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")  # noqa: ASYNC240 - of the kernel
        if any(word.endswith("worker.py") for word in words):
            return words
        await trio.sleep(0.01)


async def test_directory_in_which_a_server_is_started(tmp_path: Path) -> None:
    """Workers import nothing from there, no more than their supervisor does."""
    for name in ("trio", "trioproto", "argparse", "runpy"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    # In place of an installed command, which has Python's safe path just so.
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from trioproto.cli.main import main; sys.exit(main())"
    in_directory = ["env", "-C", str(tmp_path), sys.executable, "-P", "-c", run]
    async with serving("op", "--workers=2", command=in_directory) as server:
        await server.answers_anew()
        for pid in await server.workers(2):
            assert Path(f"/proc/{pid}/cwd").samefile(tmp_path)  # noqa: ASYNC240
    assert not (tmp_path / "imported").exists()


async def test_package_of_the_supervisor(tmp_path: Path) -> None:
    """Workers run the package that their supervisor runs, even if that is found only where it is started."""
    shutil.copytree(ROOT / "trioproto", tmp_path / "trioproto")
    # The copy is not what coverage is measured of.
    in_directory = ["env", "-u", "COVERAGE_PROCESS_CONFIG", "-C", str(tmp_path), *COMMAND]
    async with serving("op", "--workers=2", command=in_directory) as server:
        await server.answers_anew()
        for pid in await server.workers(2):
            assert f"{tmp_path}/trioproto/process/worker.py" in await command_line(pid)


def test_program_of_a_worker() -> None:
    """What a worker runs is the command line."""
    words = [sys.executable, "-m", "trioproto.process.worker", "--version"]
    assert subprocess.run(words, capture_output=True, check=True).stdout.startswith(b"trioproto ")


async def test_options_of_the_interpreter() -> None:
    """Workers are run by the same interpreter, with the same options."""
    options = ["-OO", "-s", "-Werror::FutureWarning", "-Xdev", "-Xutf8=1"]
    async with serving("op", "--workers=2", command=[sys.executable, *options, *COMMAND[1:]]) as server:
        for pid in await server.workers(2):
            words = await command_line(pid)
            assert words[0] == sys.executable
            given = words[1 : words.index("op")]
            assert given.count("-O") == 2
            assert {"-s", "-P", "-Werror::FutureWarning", "-Xdev", "-Xutf8=1"} <= set(given)


# When a worker is replaced, on a clock that stands still while one runs, and jumps ahead while none does.


async def starts(lives: list[float], clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return when a worker is started, if the first one lives for ``lives[0]`` seconds, and so on."""
    shutdown = trio.Event()
    times: list[float] = []
    open_process = trio.lowlevel.open_process

    async def note_and_open(*args: Any, **kwargs: Any) -> trio.Process:
        process = await open_process(*args, **kwargs)
        times.append(trio.current_time())
        clock.jump(lives[len(times) - 1])
        if len(times) == len(lives):
            shutdown.set()
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", note_and_open)
    await supervise_workers(["true"], 1, listening_fds=[], shutdown=shutdown)
    return times


async def test_short_lives(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that end too soon are replaced after waits that double, up to a bound."""
    times = await starts([0.0] * 13, autojump_clock, monkeypatch)
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert waits == pytest.approx([min(FIRST_WAIT * 2**number, LONGEST_WAIT) for number in range(12)])
    assert waits[-1] == pytest.approx(LONGEST_WAIT)


async def test_long_lives(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has lived for `SHORT_LIFE` seconds is replaced at once, and the waits begin anew."""
    lives = [0, 0, SHORT_LIFE, 1000, 0, 0, 0]
    times = await starts(lives, autojump_clock, monkeypatch)
    waits = [after - before - life for (before, after), life in zip(itertools.pairwise(times), lives, strict=False)]
    assert waits == pytest.approx([FIRST_WAIT, 2 * FIRST_WAIT, 0, 0, FIRST_WAIT, 2 * FIRST_WAIT])
