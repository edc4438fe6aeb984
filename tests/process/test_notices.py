"""What systemd is told: on a datagram socket like its own, and by real processes."""

import contextlib
import itertools
import math
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from processes import COMMAND, HANGS, paused, serving

from trioproto.process.notices import STATUS_SECONDS, notice_interval, notify, notify_alive
from trioproto.process.scoreboard import new_scoreboard
from trioproto.process.workers import HANG_SECONDS, _notify_systemd

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no UNIX sockets")

WORKERS = pytest.mark.parametrize("workers", [1, 2])
ABSTRACT = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract addresses")
ADDRESSES = pytest.mark.parametrize("manager", ["path", pytest.param("abstract", marks=ABSTRACT)], indirect=True)
ALIVE = r"WATCHDOG=1\nSTATUS=accepted \d+, active \d+"

# An app whose handler holds up the event loop. It notes when that begins and ends in between what systemd is told.
STUCK = """
import functools, time
import trio
from trioproto import serve_until_signal
from trioproto.process.notices import notify

async def handler(stream):
    await stream.receive_some()
    notify("X_STUCK=1")
    time.sleep(1)
    notify("X_STUCK=0")
    await stream.send_all(b"!")

def announce(address):
    notify("X_PORT=" + address.rpartition(":")[2])

trio.run(functools.partial(serve_until_signal, handler, 0, announce=announce))
"""


class Manager:
    """Receives notices as systemd does.

    Attributes:
        address: what NOTIFY_SOCKET is.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    async def notice(self) -> str:
        """Return the next notice."""
        await trio.lowlevel.wait_readable(self._socket)
        return self._socket.recv(4096).decode()

    async def until(self, pattern: str) -> list[str]:
        """Return the notices up to one that matches ``pattern``, without it."""
        before: list[str] = []
        while not re.fullmatch(pattern, notice := await self.notice()):
            before.append(notice)
        return before

    def close(self) -> None:
        """Be there no more."""
        self._socket.close()


_numbers = itertools.count()


@pytest.fixture
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """One with a file, or, where the test wants it, with an abstract address."""
    abstract = getattr(request, "param", "path") == "abstract"
    address = f"@trioproto-{os.getpid()}-{next(_numbers)}" if abstract else str(tmp_path / "notify")
    with contextlib.closing(Manager(address)) as manager:
        yield manager


# Notices.


@ADDRESSES
async def test_notice(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notice is one datagram, with an assignment in each line."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    notify("A=1", "B=two words")
    assert await manager.notice() == "A=1\nB=two words"
    notify_alive(5, 3)
    assert await manager.notice() == "WATCHDOG=1\nSTATUS=accepted 5, active 3"


@pytest.mark.parametrize("address", [None, ""])
def test_nobody(address: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where systemd has not started the service, nothing happens."""
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.delattr(socket, "socket")
    notify("READY=1")
    assert notice_interval() == math.inf
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody", "No such file or directory"),
        ("n" * 200, "AF_UNIX path too long"),
        ("directory", "Connection refused"),
    ],
)
def test_wrong_socket(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If systemd cannot be told, that is one line in the log, however often it is tried."""
    (tmp_path / "directory").mkdir()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / name))
    for _ in range(3):
        notify("READY=1")
    assert caplog.messages == [f"cannot notify systemd at {tmp_path / name}: {reason}"]


@ADDRESSES
def test_busy_manager(manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A systemd that takes no notices in holds up nobody."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    for _ in range(100_000):
        notify("WATCHDOG=1")
        if caplog.messages:
            break
    assert caplog.messages == [f"cannot notify systemd at {manager.address}: Resource temporarily unavailable"]


@pytest.mark.parametrize(
    ("microseconds", "pid", "interval"),
    [
        (None, None, STATUS_SECONDS),
        ("3000000", None, 1.5),
        ("3000000", "this", 1.5),
        ("3000000", "another", STATUS_SECONDS),
        ("600000000", None, STATUS_SECONDS),
        ("0", None, STATUS_SECONDS),
        ("-1", None, STATUS_SECONDS),
        ("soon", None, STATUS_SECONDS),
    ],
)
def test_interval(microseconds: str | None, pid: str | None, interval: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life comes twice as often as systemd wants one, if it wants one of this process and says how often."""
    pids = {"this": os.getpid(), "another": os.getpid() + 1}
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid and pids[pid])):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    assert notice_interval() == interval


# What servers tell.


def under(manager: Manager, *variables: str) -> list[str]:
    """The command of a server that ``manager`` starts."""
    return ["env", f"NOTIFY_SOCKET={manager.address}", *variables, *COMMAND]


@pytest.mark.parametrize(
    ("workers", "manager"), [(1, "path"), pytest.param(2, "abstract", marks=ABSTRACT)], indirect=["manager"]
)
async def test_life_of_a_service(workers: int, manager: Manager) -> None:
    """It is ready, alive with its numbers, reloads, is alive again, and stops."""
    command = under(manager, "WATCHDOG_USEC=400000")
    async with serving("op", f"--workers={workers}", command=command) as server:
        assert await manager.until("READY=1") == ([] if workers > 1 else ["WATCHDOG=1\nSTATUS=accepted 0, active 0"])
        async with await server.connect() as stream:
            await server.answers(stream)
            await manager.until(r"WATCHDOG=1\nSTATUS=accepted 1, active 1")
        await manager.until(r"WATCHDOG=1\nSTATUS=accepted 1, active 0")
        server.process.send_signal(signal.SIGHUP)
        await manager.until(r"RELOADING=1\nMONOTONIC_USEC=\d+")
        assert all(re.fullmatch(ALIVE, notice) for notice in await manager.until("READY=1"))
        await manager.until(ALIVE)
        server.stop()
        assert all(re.fullmatch(ALIVE, notice) for notice in await manager.until("STOPPING=1"))


async def test_ready_when_every_worker_serves(manager: Manager) -> None:
    """A service with workers is not ready before, and they tell systemd nothing themselves."""
    async with serving("op", "--workers=2", command=under(manager)) as server:
        await manager.until("READY=1")
        for pid in await server.workers(2):
            with paused(pid):  # so the other one serves
                await server.answers_anew()
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()  # noqa: ASYNC240


async def test_reload_while_workers_start(manager: Manager) -> None:
    """SIGHUP before every worker serves does not make the service ready."""
    async with serving("op", "--workers=2", command=under(manager)) as server:
        [worker, _] = await server.workers(2)
        with paused(worker):
            server.process.send_signal(signal.SIGHUP)
            await server.logged("SIGHUP: nothing to reload")
            with trio.move_on_after(0.2):
                pytest.fail(f"systemd was told {await manager.notice()}")
        assert await manager.until("READY=1") == []


async def test_numbers_outlive_a_worker(manager: Manager) -> None:
    """What a worker had accepted counts on when another has replaced it; what was open has ended."""
    command = under(manager, "WATCHDOG_USEC=400000")
    complaint = r"worker [12] was killed by signal 9 \(Killed\); starting another"
    async with serving("op", "--workers=2", command=command, complaints=[complaint] * 2) as server:
        async with await server.connect() as stream:
            await server.answers(stream)
            await manager.until(r"WATCHDOG=1\nSTATUS=accepted 1, active 1")
            for pid in await server.workers(2):
                os.kill(pid, signal.SIGKILL)
            await manager.until(r"WATCHDOG=1\nSTATUS=accepted 1, active 0")
        await server.answers_anew()
        await manager.until(r"WATCHDOG=1\nSTATUS=accepted 2, active 0")


@WORKERS
async def test_socket_that_does_not_exist(workers: int, tmp_path: Path) -> None:
    """A service serves all the same, with one line in the log."""
    command = ["env", f"NOTIFY_SOCKET={tmp_path}/notify", "WATCHDOG_USEC=100000", *COMMAND]
    complaint = f"cannot notify systemd at {tmp_path}/notify: No such file or directory"
    async with serving("op", f"--workers={workers}", command=command, complaints=[complaint]) as server:
        await server.logged("cannot notify")
        await server.answers_anew()
        await trio.sleep(0.5)


async def test_event_loop_that_is_stuck(manager: Manager, tmp_path: Path) -> None:
    """As long as a handler holds up the event loop, no heartbeat is sent."""
    log = tmp_path / "log"
    app = ["env", f"NOTIFY_SOCKET={manager.address}", "WATCHDOG_USEC=200000", sys.executable, "-c", STUCK]
    with trio.fail_after(HANGS), log.open("wb") as stderr:
        process = await trio.lowlevel.open_process(app, stderr=stderr)
        try:
            port = int((await manager.notice()).removeprefix("X_PORT="))
            await manager.until("READY=1")
            await manager.until(ALIVE)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"?")
                await manager.until("X_STUCK=1")
                assert await manager.until("X_STUCK=0") == []
                await manager.until(ALIVE)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_workers_that_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A supervisor gives signs of life as long as any of its workers does, and a little longer."""
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager, new_scoreboard(2) as scoreboard:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("WATCHDOG_USEC", "4000000")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_notify_systemd, scoreboard, trio.Event())
            await trio.sleep(5)
            scoreboard.beats[0] = 1
            await trio.sleep(5)  # worker 2 has not started yet
            scoreboard.beats[1] = 1
            scoreboard.active[0] = 3
            scoreboard.active[1] = 4
            await trio.sleep(1)
            assert await manager.notice() == "READY=1"
            for _ in range(100):
                scoreboard.beats[1] += 1
                assert await manager.notice() == "WATCHDOG=1\nSTATUS=accepted 0, active 7"
                await trio.sleep(2)
            silent_from = trio.current_time()
            while True:
                with trio.move_on_after(100) as silence:
                    await manager.notice()
                    last = trio.current_time()
                if silence.cancelled_caught:
                    break
            assert last - silent_from <= HANG_SECONDS
            scoreboard.beats[0] += 1
            assert await manager.notice() == "WATCHDOG=1\nSTATUS=accepted 0, active 7"
            nursery.cancel_scope.cancel()
