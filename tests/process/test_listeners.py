"""Where a server listens: TCP, UNIX sockets, inherited sockets; and how each ceases to listen."""

# ruff: noqa: ASYNC240 - nothing else runs that a look at a file could hold up

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from trioproto.process.listeners import (
    ENDING_FDS,
    ListenError,
    activated_fds,
    close_listeners,
    ending_fds,
    inherited_listener,
    open_listeners,
    tcp_listeners,
    unix_listener,
)

LIMIT = 20  # seconds, for a test that would otherwise hang
ROOT = Path(__file__).parents[2]
NOT_ACCEPTED = 0.3  # seconds: less than it takes until a lost attempt to connect is repeated

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux")


async def echo_once(listener: trio.SocketListener, client: socket.socket) -> None:
    """Check that ``client`` is the next connection that ``listener`` accepts."""
    client.sendall(b"hello")
    with trio.fail_after(LIMIT):
        async with await listener.accept() as stream:
            assert await stream.receive_some() == b"hello"


# TCP.


def has_ipv6() -> bool:
    """Whether this machine has an IPv6 loopback."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


ADDRESSES = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


@pytest.mark.parametrize("host", ADDRESSES)
async def test_tcp(host: str) -> None:
    """A host that is an address is listened on, on a port of the kernel's choice if that is 0."""
    async with tcp_listeners(host, 0) as [listener]:
        address = listener.socket.getsockname()
        assert address[0] == host
        with socket.create_connection(address[:2], LIMIT) as client:
            await echo_once(listener, client)
    await listener.aclose()


async def test_tcp_name() -> None:
    """A host that is a name is listened on at each of its addresses."""
    expected = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    async with tcp_listeners("localhost", 0) as listeners:
        assert {listener.socket.getsockname()[0] for listener in listeners} == expected
    for listener in listeners:
        await listener.aclose()


async def test_tcp_port_in_use() -> None:
    """A port that is taken is an error."""
    async with tcp_listeners("127.0.0.1", 0) as [listener]:
        port = listener.socket.getsockname()[1]
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            await tcp_listeners("127.0.0.1", port).__aenter__()
    await listener.aclose()


@on_linux
@pytest.mark.parametrize("host", ADDRESSES)
async def test_tcp_after_the_block(host: str) -> None:
    """After the block, attempts to connect are lost; connections that are queued are still to be accepted."""
    async with tcp_listeners(host, 0) as [listener]:
        address = listener.socket.getsockname()[:2]
        queued = [socket.create_connection(address, LIMIT) for _ in range(2)]
    with pytest.raises(TimeoutError):
        socket.create_connection(address, NOT_ACCEPTED)
    for client in queued:
        with client:
            await echo_once(listener, client)
    await listener.aclose()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, LIMIT)


@on_linux
async def test_tcp_next_server() -> None:
    """To those who connect after the block, the next server on that port is just a little slow."""
    async with tcp_listeners("127.0.0.1", 0) as [listener]:
        host, port = listener.socket.getsockname()

    async def connect() -> None:
        async with await trio.open_tcp_stream(host, port) as client:
            await client.send_all(b"hello")

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.sleep(NOT_ACCEPTED)
            await listener.aclose()
            [successor] = await trio.open_tcp_listeners(port, host=host)
            async with successor, await successor.accept() as stream:
                assert await stream.receive_some() == b"hello"


@pytest.mark.parametrize("lack", ["another system", "no such filter"])
async def test_tcp_elsewhere(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no such filter, connections come in until the listener is closed."""
    async with tcp_listeners("127.0.0.1", 0) as [listener]:
        if lack == "another system":
            monkeypatch.setattr(sys, "platform", "another")
        else:
            monkeypatch.setattr("trioproto.process.listeners._SO_ATTACH_FILTER", 9999)
    with socket.create_connection(listener.socket.getsockname(), LIMIT) as client:
        await echo_once(listener, client)
    await listener.aclose()


async def test_tcp_closed_in_the_block() -> None:
    """A listener that is closed before the block ends is closed, and that is all."""
    async with tcp_listeners("127.0.0.1", 0) as [listener]:
        address = listener.socket.getsockname()
        await listener.aclose()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, LIMIT)


async def test_tcp_error_in_the_block() -> None:
    """An error in the block passes."""
    with pytest.raises(ValueError, match="bug"):
        async with tcp_listeners("127.0.0.1", 0) as [listener]:
            raise ValueError("bug")
    await listener.aclose()


# UNIX sockets.


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a UNIX socket may be: relative, because its name must be short (unix(7))."""
    monkeypatch.chdir(tmp_path)
    return Path("socket")


def connect(path: Path) -> socket.socket:
    """Connect to the UNIX socket at ``path``."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(str(path))
    except OSError:
        client.close()
        raise
    return client


@pytest.fixture(params=[0, 0o22, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each of these in force; in the end, it still must be."""
    before = os.umask(request.param)
    yield request.param
    assert os.umask(before) == request.param


@pytest.mark.usefixtures("umask")
async def test_unix(path: Path) -> None:
    """While the block lasts there is a socket file that only its owner may connect to, whatever the umask is."""
    with unix_listener(str(path)) as listener:
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        with connect(path) as client:
            await echo_once(listener, client)
    await listener.aclose()


async def test_unix_after_the_block(path: Path) -> None:
    """After the block the file is gone; connections that are queued are still to be accepted."""
    with unix_listener(str(path)) as listener:
        queued = [connect(path) for _ in range(2)]
    assert not path.exists()
    for client in queued:
        with client:
            await echo_once(listener, client)
    await listener.aclose()


async def test_unix_stale(path: Path) -> None:
    """A socket file that nobody listens on any more is replaced."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    with unix_listener(str(path)) as listener, connect(path) as client:
        await echo_once(listener, client)
    await listener.aclose()


@pytest.mark.parametrize("queued", [0, 2], ids=["idle", "with a full queue"])
async def test_unix_in_use(queued: int, path: Path) -> None:
    """A live server is not replaced, not even when its queue is full; it stays reachable."""
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen(1)
        clients = [connect(path) for _ in range(queued)]
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)) as caught, unix_listener(str(path)):
            pass
        assert caught.value.errno == errno.EADDRINUSE
        for client in clients:
            client.close()
            live.accept()[0].close()
        connect(path).close()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
async def test_unix_no_socket(kind: str, path: Path) -> None:
    """What is no socket stays as it is."""
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    before = path.lstat()
    complaint = "a directory is there" if kind == "directory" else "a file that is not a socket is there"
    with pytest.raises(OSError, match=complaint) as caught, unix_listener(str(path)):
        pass
    assert caught.value.errno == errno.EADDRINUSE
    assert os.path.samestat(path.lstat(), before)
    assert list(Path.cwd().iterdir()) == [path.absolute()]


@pytest.mark.usefixtures("umask")
async def test_unix_cannot_bind(path: Path) -> None:
    """What bind(2) reports is raised."""
    with pytest.raises(FileNotFoundError), unix_listener("missing/socket"):
        pass


async def test_unix_replaced(path: Path) -> None:
    """A successor's file at the same path is left alone."""
    with unix_listener(str(path)) as listener:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
            successors = path.stat()
    assert os.path.samestat(path.stat(), successors)
    await listener.aclose()


async def test_unix_removed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that somebody has removed is not missed, nor is its directory."""
    for remove_directory in (False, True):
        directory = Path("directory")
        directory.mkdir()
        with unix_listener("directory/socket") as listener:
            (directory / "socket").unlink()
            if remove_directory:
                directory.rmdir()
        if not remove_directory:
            directory.rmdir()
        await listener.aclose()
    assert caplog.messages == []


async def test_unix_that_cannot_be_removed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that cannot be removed costs one warning."""
    directory = Path("directory")
    directory.mkdir()
    with unix_listener("directory/socket") as listener:
        directory.rename("elsewhere")
        directory.write_text("no directory")
    await listener.aclose()
    [message] = caplog.messages
    assert message == "cannot remove unix:directory/socket: Not a directory; the next server there will remove it"


async def test_unix_in_another_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the same file in the end, wherever the process has gone by then."""
    with unix_listener(str(path)) as listener:
        file = path.absolute()
        monkeypatch.chdir("/")
    assert not file.exists()
    await listener.aclose()


# Listens on a path for each line that it reads, says how that went, and stops with the next line.
RACER = """
import sys
from trioproto.process.listeners import unix_listener
for _ in sys.stdin:
    try:
        with unix_listener(sys.argv[1]):
            print("listening", flush=True)
            sys.stdin.readline()
    except OSError as error:
        print(error.errno, flush=True)
        sys.stdin.readline()
"""


def test_unix_race(path: Path) -> None:
    """Of servers that start at the same time on a stale file, one listens, and it is the one that clients reach."""
    words = [sys.executable, "-c", RACER, str(path.absolute())]
    commands, answers = [], []
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            racer = stack.enter_context(
                subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            stack.callback(racer.kill)
            commands.append(racer.stdin)
            answers.append(racer.stdout)

        def tell_all() -> None:
            for command in commands:
                assert command is not None
                command.write("\n")
                command.flush()

        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
            tell_all()
            assert sorted(answer.readline() for answer in answers if answer is not None) == [
                *[f"{errno.EADDRINUSE}\n"] * 3,
                "listening\n",
            ]
            connect(path).close()
            tell_all()
            while path.exists():
                time.sleep(0.001)
        assert not list(Path.cwd().iterdir())


async def test_unix_lock_that_another_has_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that has been removed meanwhile is none: whoever comes next would make, and lock, another."""
    locked = []

    def flock(fd: int, operation: int) -> None:
        locked.append(os.fstat(fd).st_ino)
        lock_file = path.with_name("socket.lock")
        if len(locked) == 1:
            lock_file.unlink()
        elif len(locked) == 2:
            lock_file.unlink()
            lock_file.touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    with unix_listener(str(path)) as listener, connect(path) as client:
        await echo_once(listener, client)
        assert len(locked) == 3
        assert list(Path.cwd().iterdir()) == [path.absolute()]
    await listener.aclose()


# Inherited sockets.


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_inherited(family: socket.AddressFamily, path: Path) -> None:
    """A listening socket is served, whatever its family is."""
    address = ("127.0.0.1", 0) if family == socket.AF_INET else str(path)
    with socket.socket(family) as parents:
        parents.bind(address)
        parents.listen()
        listener = inherited_listener(os.dup(parents.fileno()))
        with socket.socket(family) as client:
            client.connect(parents.getsockname())
            await echo_once(listener, client)
        await listener.aclose()


async def test_inherited_closed() -> None:
    """A descriptor that is not open is EBADF."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        inherited_listener(fd)


async def test_inherited_no_socket() -> None:
    """A descriptor of something else is ENOTSOCK, and stays open."""
    fd = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTSOCK)):
        inherited_listener(fd)
    os.close(fd)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_inherited_not_listening(kind: socket.SocketKind) -> None:
    """A socket that does not listen for connections is a `ValueError`, and stays open."""
    with socket.socket(socket.AF_INET, kind) as other:
        with pytest.raises(ValueError, match="SocketListener requires"):
            inherited_listener(other.fileno())
        assert other.getsockname()


# All of them together.


async def test_all(path: Path) -> None:
    """Each kind may be given beside the others; when the block ends, they are open, and the caller's to close."""
    with socket.create_server(("127.0.0.1", 0)) as parents:
        address = parents.getsockname()
        fd = os.dup(parents.fileno())
        async with open_listeners(0, host=["127.0.0.1", "127.0.0.2"], unix=str(path), fds=[fd]) as listeners:
            names = [listener.socket.getsockname() for listener in listeners]
            assert names[:2] == [address, str(path)]
            assert [host for host, _ in names[2:]] == ["127.0.0.1", "127.0.0.2"]
        assert not path.exists()
        assert all(listener.socket.fileno() != -1 for listener in listeners)
        close_listeners(listeners)
        close_listeners(listeners)  # does not mind
        assert all(listener.socket.fileno() == -1 for listener in listeners)


async def test_no_port(path: Path) -> None:
    """Without a port, no host is listened on."""
    async with open_listeners(None, host="127.0.0.1", unix=str(path)) as [listener]:
        assert listener.socket.family == socket.AF_UNIX
    close_listeners([listener])


@pytest.mark.parametrize(
    ("settings", "kind", "number", "text"),
    [
        ({"host": "192.0.2.1"}, "tcp", errno.EADDRNOTAVAIL, r"192\.0\.2\.1:0: Cannot assign requested address"),
        ({"host": "a" * 64}, "tcp", None, "a{64}:0: .*label.* too long"),
        (
            {"unix": "missing/socket"},
            "unix",
            errno.ENOENT,
            "unix:missing/socket: .*: create the directory /.*/missing first",
        ),
        ({"unix": "file/socket"}, "unix", errno.ENOTDIR, "unix:file/socket: Not a directory: .*/file must be a .*"),
        ({"unix": "new/"}, "unix", errno.ENOENT, "unix:new/: No such file or directory: .*"),
        ({"unix": "."}, "unix", errno.EADDRINUSE, "unix:.: a directory is there, and is not replaced"),
        ({"unix": ""}, "unix", errno.EADDRINUSE, "unix: a directory is there, and is not replaced"),
        (
            {"unix": "file"},
            "unix",
            errno.EADDRINUSE,
            "unix:file: a file that is not a socket is there, and is not replaced",
        ),
        ({"unix": "live"}, "unix", errno.EADDRINUSE, "unix:live: .* in use: stop the server that listens there"),
        (
            {"unix": "x" * 108},
            "unix",
            errno.ENAMETOOLONG,
            "unix:x+: the path of a UNIX socket has at most 107 bytes: .*",
        ),
        ({"unix": "zero\0"}, "unix", None, r"unix:zero\\x00: embedded null byte"),
        ({"fds": [9999]}, "fd", errno.EBADF, "descriptor 9999: Bad file descriptor"),
        ({"fds": [10**20]}, "fd", errno.EBADF, "descriptor 10{20}: Bad file descriptor"),
        ({"fds": [2**31]}, "fd", errno.EBADF, "descriptor 2147483648: Bad file descriptor"),
        ({"fds": ["not listening"]}, "fd", None, "descriptor [0-9]+: SocketListener requires .*"),
    ],
    ids=str,
)
async def test_listen_error(settings: dict[str, Any], kind: str, number: int | None, text: str, path: Path) -> None:
    """Whatever cannot be listened on, the error is an `OSError` that names it, and the others are closed."""
    Path("file").touch()
    with (
        socket.create_server(("127.0.0.1", 0)) as parents,
        socket.socket() as not_listening,
        socket.socket(socket.AF_UNIX) as live,
    ):
        live.bind("live")
        live.listen()
        inherited = os.dup(parents.fileno())
        fds = [not_listening.fileno() if fd == "not listening" else fd for fd in settings.get("fds", [])]
        given: dict[str, Any] = {
            "port": 0,
            "host": "127.0.0.1",
            "unix": str(path),
            **settings,
            "fds": [inherited, *fds],
        }
        with pytest.raises(ListenError) as caught:
            await open_listeners(**given).__aenter__()
        assert (caught.value.kind, caught.value.errno) == (kind, number)
        assert re.fullmatch(f"cannot listen on {text}", str(caught.value))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(inherited)
        assert not path.exists()


async def test_cancellation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On cancellation, while a name is looked up for example, those that are open are closed."""

    async def look_up(*_: object, **__: object) -> None:
        assert path.exists()
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_listeners", look_up)
    with trio.move_on_after(0.1) as scope:
        await open_listeners(0, host="slow.invalid", unix=str(path)).__aenter__()
    assert scope.cancelled_caught
    assert not path.exists()


@pytest.mark.parametrize(
    ("port", "settings"),
    [(None, {}), (0, {"host": []}), (-1, {}), (65536, {})],
    ids=["nothing", "no host", "-1", "65536"],
)
async def test_nothing_to_listen_on(port: int | None, settings: dict[str, Any]) -> None:
    """No address at all, or a port that is none, is a `ValueError`."""
    with pytest.raises(ValueError, match=r"there must be a port|port must be from 0 to 65535"):
        await open_listeners(port, **{"host": "127.0.0.1"} | settings).__aenter__()


# Socket activation, sd_listen_fds(3).

NAMES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of the protocol's variables is set."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("count", [0, 1, 3])
def test_activated(count: int, environment: pytest.MonkeyPatch) -> None:
    """The descriptors begin with 3, in a row; the variables are for this process only, and are removed."""
    for name, value in zip(NAMES, (os.getpid(), count, "a:b:c"), strict=True):
        environment.setenv(name, str(value))
    assert activated_fds() == [3, 4, 5][:count]
    assert not any(name in os.environ for name in NAMES)
    assert activated_fds() == []


def test_activated_another(environment: pytest.MonkeyPatch) -> None:
    """Variables that are meant for another process say nothing, and are removed."""
    environment.setenv("LISTEN_PID", str(os.getpid() + 1))
    environment.setenv("LISTEN_FDS", "2")
    assert activated_fds() == []
    assert not any(name in os.environ for name in NAMES)


@pytest.mark.usefixtures("environment")
def test_not_activated() -> None:
    """Without the variables there are no descriptors."""
    assert activated_fds() == []


@pytest.mark.parametrize("count", [None, "", "many", "-1"])
def test_activated_without_a_count(count: str | None, environment: pytest.MonkeyPatch) -> None:
    """Without a number there are none, either."""
    environment.setenv("LISTEN_PID", str(os.getpid()))
    if count is not None:
        environment.setenv("LISTEN_FDS", count)
    assert activated_fds() == []


def test_ending(environment: pytest.MonkeyPatch) -> None:
    """What a supervisor tells its worker is not told to the worker's own children."""
    assert ending_fds() == []
    environment.setenv(ENDING_FDS, "5 7")
    assert ending_fds() == [5, 7]
    assert ENDING_FDS not in os.environ
