"""The command line, as its user meets it, on pipes and on terminals.

Servers, and what a signal, a terminal or a closed stream does, are processes of their own.
"""

import contextlib
import errno
import os
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import trio
from commands import run

from trioproto.cli.main import main
from trioproto.process.listeners import ListenError
from trioproto.process.service import SIGNALS

# Seconds after which a command hangs, even on a machine that has much else to do.
TIMEOUT = 30.0

# More than all the buffers on the way from standard input to standard output hold, and every byte in it.
MUCH = random.Random(1).randbytes(4 * 2**20)

# What runs when tqdm is not installed: importing it fails.
WITHOUT_TQDM = "import sys; sys.modules['tqdm'] = None; from trioproto.cli.main import main; sys.exit(main())"

# What runs when a host has two addresses, here without a name server.
WITH_TWO_ADDRESSES = """
import socket, sys
lookup = socket.getaddrinfo
def lookup_both(host, *rest):
    return lookup("127.0.0.1", *rest) + lookup("127.0.0.2", *rest)
socket.getaddrinfo = lookup_both
from trioproto.cli.main import main
sys.exit(main())
"""

# What runs on a disk that is full after all but 1 byte of 1 MiB.
WITH_SMALL_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 - 1, 2**20 - 1))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

# As a user's environment is: Python writes what it has buffered when it ends.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

# A terminal sends its Ctrl-C to the processes that it controls: that takes a session of one's own.
LOG_IN = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def command(*arguments: str | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "trioproto", *arguments]


def run_process(*arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=TIMEOUT, check=False)


@contextlib.contextmanager
def running(words: list[str | bytes], **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, with pipes where ``streams`` does not say otherwise; leave none behind."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, bufsize=0, **(pipes | streams)) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[bytes]) -> subprocess.CompletedProcess[bytes]:
    """Wait until ``process`` has ended by itself, with its standard input still open."""
    process.wait(TIMEOUT)
    stdout, stderr = (
        b"" if stream is None or stream.closed else stream.read() for stream in (process.stdout, process.stderr)
    )
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server: its process, and its port as it prints it. It has to end with 0."""
    with running(command(*arguments, "--port", "0")) as server:
        assert server.stdout is not None
        port = read_until(server.stdout.fileno(), b"\n").decode().split("\n")[0].rpartition(":")[2]
        yield server, port
        server.terminate()
        assert server.wait(TIMEOUT) == 0


@contextlib.contextmanager
def at_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command at a terminal: its process, and the person's end of the terminal."""
    person, terminal = pty.openpty()
    words: list[str | bytes] = [sys.executable, "-c", LOG_IN, "-m", "trioproto", *arguments]
    try:
        with running(words, stdin=terminal, stdout=terminal, stderr=terminal) as process:
            os.close(terminal)
            yield process, person
    finally:
        os.close(person)


def read_some(fd: int) -> bytes:
    ready, _, _ = select.select([fd], [], [], TIMEOUT)
    assert ready, "nothing comes"
    try:
        return os.read(fd, 65536)
    except OSError:  # how Linux says that nobody has the terminal open any more
        return b""


def read_until(fd: int, expected: bytes) -> bytes:
    received = b""
    while expected not in received:
        chunk = read_some(fd)
        assert chunk, f"{expected!r} did not come, but {received!r}"
        received += chunk
    return received


def read_to_end(fd: int) -> bytes:
    received = b""
    while chunk := read_some(fd):
        received += chunk
    return received


def failure(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return what a command says that failed as it should: with status 1, and one line on standard error."""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("trioproto: ")
    assert done.returncode == 1
    return line


def listen() -> socket.socket:
    """Stand in for a server, to do what no server should."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(TIMEOUT)
    return listener


def accept(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    connection.settimeout(TIMEOUT)
    return connection


def without(redirection: str, *words: str | bytes) -> list[str | bytes]:
    """Return ``words`` as a command line that a shell runs with a redirection such as ``>&-``."""
    return ["sh", "-c", f'exec "$@" {redirection}', "sh", *words]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """Give the end of a pipe to write to, with nobody at the other end."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def port_of(listener: socket.socket) -> str:
    return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def echo_port() -> Iterator[str]:
    with serving("echo") as (_, port):
        yield port


@pytest.fixture(scope="module")
def op_port() -> Iterator[str]:
    with serving("op") as (_, port):
        yield port


@pytest.fixture
def much(tmp_path: Path) -> Path:
    path = tmp_path / "much"
    path.write_bytes(MUCH)
    return path


# Help, and arguments that are wrong


def test_version() -> None:
    """``--version`` prints the program's name and version."""
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"trioproto {metadata.version('trioproto')}\n".encode())


def test_version_unknown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the package is not installed, ``--version`` fails with what to do."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 1
    assert "install the package" in capsys.readouterr().err


def test_version_costs_no_start() -> None:
    """Other commands do not import what looks up the version, which takes longer than much else of a start."""
    program = "import sys, trioproto.cli.main; sys.exit('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=TIMEOUT, check=False).returncode == 0


@pytest.mark.parametrize("words", [[], ["echo"], ["op"], ["echo-client"], ["op-client"]])
def test_help(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Every ``--help`` shows an example, in ASCII, which every terminal knows."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    help_ = capfd.readouterr().out
    assert ended.value.code == 0
    assert f"\nexample:\n  {' '.join(['trioproto', *words])}" in help_
    assert help_.isascii()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "required: COMMAND"),
        ("echo --port nine", "argument --port: must be an integer, not 'nine'"),
        ("op --port 65536", "argument --port: must be between 0 and 65535, not '65536'"),
        ("op-client --port -1", "argument --port: must be between 0 and 65535, not '-1'"),
        ("echo --fd 99999999999", "argument --fd: must be between 0 and 2147483647, not '99999999999'"),
        ("echo --workers 0", "argument --workers: must be at least 1, not '0'"),
        ("op --max-connections-per-client 0", "argument --max-connections-per-client: must be at least 1, not '0'"),
        (
            "op --proxy-protocol 10.0.0.1/8",
            "argument --proxy-protocol: must be an address, a network, or 'unix': 10.0.0.1/8 has host bits set",
        ),
        ("echo --tick often", "argument --tick: must be a number, not 'often'"),
        ("op --tick 0", "argument --tick: must be above 0, not '0'"),
        ("op --tick inf", "argument --tick: must be a number, not 'inf'"),
        ("op-client --timeout nan", "argument --timeout: must be a number, not 'nan'"),
        ("op --host=", "argument --host: must not be empty"),
        ("echo-client --unix=", "argument --unix: must not be empty"),
        ("echo-client --tls --tls-ca= hello", "argument --tls-ca: must not be empty"),
        ("op-client --unix socket --port 1 1 +", "--unix cannot be used with --host or --port"),
        ("echo-client --host ::1 --unix socket", "--unix cannot be used with --host or --port"),
        ("op --fd 5 --fd 2 --workers 3", "--fd must be at least 3 with --workers"),
        ("echo-client --stdin hello", "not allowed with argument"),
        ("op-client +", "a request has 1 to 255 operands, not 0"),
        ("op-client " + "1 " * 256 + "+", "a request has 1 to 255 operands, not 256"),
        ("op-client 1 two +", "operands must be integers, not 'two'"),
        ("op-client 1 2147483648 +", "operand 2 must be in int32, -2147483648 to 2147483647, not 2147483648"),
        ("op-client 1 2 /", "operator must be one of + - *, not '/'"),
    ],
)
def test_wrong_arguments(words: str, complaint: str) -> None:
    """Wrong arguments end a command with status 2, after a line that names what is wrong."""
    done = run(*words.split())
    assert (done.returncode, done.stdout) == (2, b"")
    assert complaint in done.stderr.decode().splitlines()[-1]


# Servers


def test_server_says_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as a server accepts connections it says so, also into a pipe: ``--port 0`` with the real port."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # would flush for it
    with running(command("echo", "--port", "0")) as server:
        assert server.stdout is not None
        line = read_until(server.stdout.fileno(), b"\n").decode()
        said = re.fullmatch(r"trioproto echo listening on 127\.0\.0\.1:([1-9]\d*)\n", line)
        assert said
        socket.create_connection(("127.0.0.1", int(said[1])), TIMEOUT).close()
        server.terminate()
        assert finish(server).stdout == b""


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(host: str) -> None:
    """A server on an IPv6 address prints it in brackets, and a client reaches it there; both take it either way."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with running(command("op", "--host", host, "--port", "0")) as server:
        assert server.stdout is not None
        line = read_until(server.stdout.fileno(), b"\n").decode()
        assert line.startswith("trioproto op listening on [::1]:")
        port = line.strip().rpartition(":")[2]
        assert run("op-client", "--host", host, "--port", port, "1", "2", "+").stdout == b"3\n"
        server.terminate()
        assert server.wait(TIMEOUT) == 0


def test_localhost() -> None:
    """A name does for ``--host``, to listen on and to connect to."""
    with serving("op", "--host", "localhost") as (_, port):
        assert run("op-client", "--host", "localhost", "--port", port, "1", "2", "+").stdout == b"3\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_ends_on_signal(number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C end a server, and the connections it has, with status 0 and a last line of statistics."""
    with serving("echo") as (server, port), socket.create_connection(("127.0.0.1", int(port)), TIMEOUT) as client:
        client.sendall(b"hello")
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"
        server.send_signal(number)
        done = finish(server)
        assert (done.returncode, done.stdout) == (0, b"")
        [line] = done.stderr.splitlines()
        assert b"accepted 1, active 0, crashed 0" in line
        assert client.recv(1) == b""


def test_second_signal_ends_a_server_at_once() -> None:
    """A server that waits for a request under way ends at a second signal, with status 0."""
    with (
        running(command("op", "--port", "0", "--grace", "3600")) as server,
        socket.socket() as client,
    ):
        assert server.stdout is not None
        client.connect(("127.0.0.1", int(read_until(server.stdout.fileno(), b"\n").rpartition(b":")[2])))
        client.sendall(b"\x01")
        server.terminate()
        time.sleep(1.1)  # signals within a second are one
        assert server.poll() is None
        server.terminate()
        assert finish(server).returncode == 0


def test_port_in_use() -> None:
    """A server that finds its port taken fails with what to do."""
    with listen() as taken:
        port = port_of(taken)
        line = failure(run("echo", "--port", port))
    assert line.startswith(f"trioproto: cannot listen on 127.0.0.1:{port}: ")
    assert "choose another --host or --port" in line


def test_unix_socket_in_use(tmp_path: Path) -> None:
    """So does one whose UNIX socket is taken."""
    path = tmp_path / "taken"
    path.write_text("not a socket")
    line = failure(run("echo", "--unix", str(path)))
    assert line.startswith(f"trioproto: cannot listen on unix:{path}: ")
    assert "choose another --unix path" in line


def test_descriptor_that_is_no_socket() -> None:
    """So does one that does not inherit what it is told that it does."""
    line = failure(run("echo", "--fd", "99"))
    assert line.startswith("trioproto: cannot listen on descriptor 99: Bad file descriptor; ")
    assert "it must be a listening socket" in line


@pytest.mark.parametrize("workers", ["1", "2"])
def test_socket_and_host(workers: str, tmp_path: Path) -> None:
    """A server with a UNIX socket listens on a host, too, only if it is told one; it prints a line for each address."""
    path = tmp_path / "socket"
    for options, expected in (([], 1), (["--host", "127.0.0.1", "--host", "127.0.0.2"], 3)):
        words = command("op", "--unix", str(path), "--port", "0", "--workers", workers, *options)
        with running(words) as server:
            assert server.stdout is not None
            lines = b""
            while lines.count(b"\n") < expected:
                lines += read_until(server.stdout.fileno(), b"\n")
            server.terminate()
            assert finish(server).returncode == 0
        assert len(lines.splitlines()) == expected
        assert lines.startswith(f"trioproto op listening on unix:{path}\n".encode())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it is about workers")
def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not allowed as many processes, or descriptors, as it needs fails with one line."""

    async def open_process(*_args: object, **_options: object) -> None:
        await trio.lowlevel.checkpoint()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
    line = failure(run("echo", "--port", "0", "--workers", "2"))
    assert line.startswith("trioproto: cannot serve: Resource temporarily unavailable; ")
    assert "ulimit -a" in line


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_a_server_listens(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a server listens, signals do what they do without one."""
    heeded: list[int] = []

    def handle(number: int, _frame: object) -> None:
        heeded.append(number)

    async def serve(*_args: object, **_options: object) -> None:
        await trio.lowlevel.checkpoint()
        signal.raise_signal(number)
        raise ListenError("tcp", "nowhere", OSError("that is enough"))

    monkeypatch.setattr("trioproto.cli.main.serve_until_signal", serve)
    before = signal.signal(number, handle)
    try:
        assert "that is enough" in failure(run("echo"))
    finally:
        signal.signal(number, before)
    assert heeded == [number]


def test_server_nobody_listens_to() -> None:
    """A server that cannot say where it listens fails."""
    with closed_pipe() as stdout, running(command("echo", "--port", "0"), stdout=stdout) as server:
        assert failure(finish(server)) == "trioproto: standard output was closed"


def test_server_whose_output_is_closed(tmp_path: Path) -> None:
    """A server whose standard output was closed on purpose serves all the same."""
    path = tmp_path / "socket"
    with running(without(">&-", *command("echo", "--unix", str(path)))) as server:
        wait_for(path.exists)
        assert run("echo-client", "--unix", str(path), "hello").stdout == b"hello\n"
        server.terminate()
        assert finish(server).returncode == 0


def test_server_whose_input_is_closed() -> None:
    """A server that is to stop at the end of standard input fails if that was closed before it began."""
    with running(without("<&-", *command("echo", "--port", "0", "--stop-at-eof"))) as server:
        assert failure(finish(server)) == "trioproto: cannot read standard input: Bad file descriptor"


def test_tick() -> None:
    """``--tick`` logs the statistics that often, on standard error."""
    with serving("echo", "--tick", "0.05") as (server, port):
        assert server.stderr is not None
        read_until(server.stderr.fileno(), b"accepted 0, active 0, crashed 0, refused 0, up ")
        with socket.create_connection(("127.0.0.1", int(port)), TIMEOUT):
            read_until(server.stderr.fileno(), b"accepted 1, active 1, crashed 0, refused 0, up ")
        read_until(server.stderr.fileno(), b"accepted 1, active 0, crashed 0, refused 0, up ")


def test_verbose() -> None:
    """``-v`` logs each connection with its number, its peer and the server's address, and its end."""
    with serving("echo", "-v") as (server, port):
        assert server.stderr is not None
        for number in (1, 2):
            with socket.create_connection(("127.0.0.1", int(port)), TIMEOUT) as client:
                peer = f"127.0.0.1:{client.getsockname()[1]}"
                read_until(server.stderr.fileno(), f"connection {number} from {peer} to 127.0.0.1:{port}\n".encode())
            read_until(server.stderr.fileno(), f"connection {number} from {peer} to 127.0.0.1:{port}: ended".encode())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_access_log(workers: str) -> None:
    """``--access-log`` logs a record of each connection when it ends, and nothing else that ``-v`` does."""
    with serving("op", "--access-log", "--workers", workers) as (server, port):
        assert server.stderr is not None
        assert run("op-client", "--port", port, "1", "2", "+").stdout == b"3\n"
        log = read_until(server.stderr.fileno(), b" requests\n").decode()
    assert re.fullmatch(
        rf"[-\d]+ [:,\d]+ DEBUG trioproto\.access: connection 1 from 127\.0\.0\.1:\d+ to 127\.0\.0\.1:{port}: "
        r"ended after \d\.\d{3} s, 10 bytes received, 4 sent, 1 requests\n",
        log,
    )


def test_verbose_workers() -> None:
    """Workers log as their supervisor was told to."""
    with (
        serving("op", "--workers", "1", "-v") as (server, port),
        serving("op", "--workers", "2", "-v", "--max-connections", "5") as (others, other_port),
    ):
        for process, number in ((server, port), (others, other_port)):
            assert process.stderr is not None
            assert run("op-client", "--port", number, "1", "2", "+").stdout == b"3\n"
            read_until(process.stderr.fileno(), f" to 127.0.0.1:{number}: ended after ".encode())


# Clients with arguments


def test_echo_client(echo_port: str) -> None:
    """Each message comes back on a line of its own: an empty one, one with blanks, bytes that are no UTF-8."""
    done = run("echo-client", "--port", echo_port, "hello", "", "and again", b"\xff\xfe\x80")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n\nand again\n\xff\xfe\x80\n", b"")


@pytest.mark.parametrize(
    ("words", "result"),
    [
        ("10 -4 sub", 14),
        ("-2147483648 1 -", 2147483647),
        ("2147483647 1 add", -2147483648),
        ("-3 4 *", -12),
        ("65536 65537 mul", 65536),
        ("1 " * 255 + "+", 255),
    ],
)
def test_op_client(words: str, result: int, op_port: str) -> None:
    """The bare result, wrapped into int32; each operator by its sign or its name."""
    done = run("op-client", *words.split(), "--port", op_port)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{result}\n".encode(), b"")


# Dialogues


@pytest.mark.parametrize(
    ("typed", "answered"),
    [
        (b"hello\nQ\nunread\n", b"Message from server: hello\nInput message(Q to quit): "),
        (b"q\n", b""),
        (b"Q", b""),
        (b"", b""),
        (
            b"\n\xff",
            b"Message from server: \nInput message(Q to quit): Message from server: \xff\nInput message(Q to quit): ",
        ),
    ],
)
def test_echo_dialogue(typed: bytes, answered: bytes, echo_port: str) -> None:
    """Without a message the client asks for some, until one is Q or the input ends; the words are the article's."""
    done = run("echo-client", "--port", echo_port, stdin=typed)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Input message(Q to quit): " + answered, b"")


def test_echo_dialogue_with_a_long_line(echo_port: str) -> None:
    """A line may be longer than what a pipe holds."""
    line = b"x" * 200_000
    done = run_process("echo-client", "--port", echo_port, stdin=line + b"\n")
    assert b"Message from server: " + line + b"\n" in done.stdout


@pytest.mark.parametrize("typed", [b"3\n1\n2\n3\n+\n", b"3 1\n\n2 3 +"])
def test_op_dialogue(typed: bytes, op_port: str) -> None:
    """Without a request the client asks for one, number by number, in the article's words."""
    done = run("op-client", "--port", op_port, stdin=typed)
    prompts = b"Operand count: Operand 1: Operand 2: Operand 3: Operator: "
    assert (done.returncode, done.stdout, done.stderr) == (0, prompts + b"Operation result: 6\n", b"")


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        (b"256\n", "operand count must be from 1 to 255, not 256"),
        (b"1\ntwo\n", "must be an integer, not 'two'"),
        (b"1\n1\n\xff\n", r"operator must be one of + - *, not '\\xff'"),
        (b"2\n1\n", "end of input before the request was complete"),
    ],
)
def test_op_dialogue_with_wrong_answers(typed: bytes, complaint: str, op_port: str) -> None:
    """A number that is none, or an input that ends too early, is named."""
    assert complaint in failure(run("op-client", "--port", op_port, stdin=typed))


def test_echo_dialogue_at_terminal(echo_port: str) -> None:
    """What a person sees: each prompt before there is an answer, each echo before the next prompt."""
    with at_terminal("echo-client", "--port", echo_port) as (client, person):
        seen = read_until(person, b"quit): ")
        os.write(person, b"hello\n")
        seen += read_until(person, b"quit): ")
        os.write(person, b"Q\n")
        seen += read_to_end(person)
        assert client.wait(TIMEOUT) == 0
    assert seen.decode().splitlines() == [
        "Input message(Q to quit): hello",
        "Message from server: hello",
        "Input message(Q to quit): Q",
    ]


def test_op_dialogue_at_terminal(op_port: str) -> None:
    """What a person sees: the article's dialogue, word for word."""
    with at_terminal("op-client", "--port", op_port) as (client, person):
        seen = b""
        for prompt, answer in (
            (b"Operand count: ", b"3\n"),
            (b"Operand 1: ", b"1\n"),
            (b"Operand 2: ", b"2\n"),
            (b"Operand 3: ", b"3\n"),
            (b"Operator: ", b"+\n"),
        ):
            seen += read_until(person, prompt)
            os.write(person, answer)
        seen += read_to_end(person)
        assert client.wait(TIMEOUT) == 0
    assert seen.decode().splitlines() == [
        "Operand count: 3",
        "Operand 1: 1",
        "Operand 2: 2",
        "Operand 3: 3",
        "Operator: +",
        "Operation result: 6",
    ]


# Pipes


def test_pipe(echo_port: str) -> None:
    """``--stdin`` sends its input and writes the echo at once, each byte as it was, and nothing else anywhere."""
    done = run_process("echo-client", "--port", echo_port, "--stdin", stdin=MUCH)
    assert done.stdout == MUCH
    assert (done.returncode, done.stderr) == (0, b"")


def test_pipe_does_not_wait_for_the_end(echo_port: str) -> None:
    """``--stdin`` sends what it has before its input ends."""
    with running(command("echo-client", "--port", echo_port, "--stdin")) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for chunk in (b"one", b"two"):
            client.stdin.write(chunk)
            assert read_until(client.stdout.fileno(), chunk) == chunk
        client.stdin.close()
        assert client.wait(TIMEOUT) == 0


def test_progress_bar(echo_port: str, much: Path) -> None:
    """A terminal on standard error shows how much of the file has come back, up to all of it."""
    assert b"100%" in bar_of(command("echo-client", "--port", echo_port, "--stdin"), much)


def test_no_progress_bar_without_tqdm(echo_port: str, much: Path) -> None:
    """Without tqdm, ``--stdin`` does the same without the bar."""
    words: list[str | bytes] = [sys.executable, "-c", WITHOUT_TQDM, "echo-client", "--port", echo_port, "--stdin"]
    assert bar_of(words, much) == b""


def bar_of(words: list[str | bytes], file: Path) -> bytes:
    """Copy ``file`` through a client, and return what the terminal on standard error shows meanwhile."""
    copy = file.with_name("copy")
    person, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 80))  # a new one has no columns, and there is no bar in none
    try:
        with (
            file.open("rb") as stdin,
            copy.open("wb") as stdout,
            running(words, stdin=stdin, stdout=stdout, stderr=terminal) as client,
        ):
            os.close(terminal)
            seen = read_to_end(person)
            assert client.wait(TIMEOUT) == 0
    finally:
        os.close(person)
    assert copy.read_bytes() == file.read_bytes()
    return seen


def test_standard_error_closed(echo_port: str) -> None:
    """``--stdin`` needs no standard error."""
    words = without("2>&-", *command("echo-client", "--port", echo_port, "--stdin"))
    done = subprocess.run(words, input=b"hello", stdout=subprocess.PIPE, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (0, b"hello")


def test_standard_output_closed_early(echo_port: str, much: Path) -> None:
    """``| head -c 10`` gets its bytes, and the client then fails."""
    with (
        much.open("rb") as stdin,
        running(command("echo-client", "--port", echo_port, "--stdin"), stdin=stdin) as client,
    ):
        assert client.stdout is not None
        assert client.stdout.read(10) == MUCH[:10]
        client.stdout.close()
        assert failure(finish(client)) == "trioproto: standard output was closed"


def test_standard_output_nobody_reads(op_port: str) -> None:
    """A result that nobody reads is a failure."""
    with closed_pipe() as stdout, running(command("op-client", "--port", op_port, "1", "+"), stdout=stdout) as client:
        assert failure(finish(client)) == "trioproto: standard output was closed"


def test_disk_full(echo_port: str, much: Path) -> None:
    """Standard output that takes all but the last byte is a failure."""
    os.truncate(much, 2**20)
    words = [sys.executable, "-c", WITH_SMALL_FILES, *command("echo-client", "--port", echo_port, "--stdin")[1:]]
    copy = much.with_name("copy")
    with (
        much.open("rb") as stdin,
        copy.open("wb") as stdout,
        running(words, stdin=stdin, stdout=stdout) as client,
    ):
        assert "File too large" in failure(finish(client))
    assert copy.read_bytes() == MUCH[: 2**20 - 1]


def test_standard_input_that_cannot_be_read(echo_port: str) -> None:
    """Input that cannot be read is a failure that says so."""
    with (
        Path(os.devnull).open("wb") as stdin,
        running(command("echo-client", "--port", echo_port, "--stdin"), stdin=stdin) as client,
    ):
        assert failure(finish(client)) == "trioproto: cannot read standard input: Bad file descriptor"


def test_standard_output_that_cannot_be_written(echo_port: str, op_port: str) -> None:
    """An answer that cannot be written is a failure, and so are help and version: nothing vanishes."""
    for redirection, words in (
        (">/dev/full", ["echo-client", "--port", echo_port, "hello"]),
        (">/dev/full", ["echo-client", "--port", echo_port]),
        (">/dev/full", ["op-client", "--port", op_port, "1", "+"]),
        (">/dev/full", ["op-client", "--port", op_port]),
        (">/dev/full", ["--version"]),
        (">&-", ["op-client", "--port", op_port, "1", "+"]),
        (">&-", ["op", "--help"]),
    ):
        done = subprocess.run(
            without(redirection, *command(*words)), env=BUFFERED, capture_output=True, timeout=TIMEOUT, check=False
        )
        assert failure(done).startswith("trioproto: cannot write to standard output: ")


def test_full_disk_for_a_server() -> None:
    """A server that cannot say where it listens has one failure to report, and not a second one as it exits."""
    words = without(">/dev/full", *command("echo", "--port", "0"))
    done = subprocess.run(words, env=BUFFERED, capture_output=True, timeout=TIMEOUT, check=False)
    assert failure(done) == "trioproto: cannot write to standard output: No space left on device"


@pytest.mark.parametrize("words", ["echo-client hello", "echo-client", "op-client", "op-client 1 +"])
def test_standard_input_closed(words: str, echo_port: str, op_port: str) -> None:
    """Clients that need no input do without it; the others fail."""
    port = echo_port if words.startswith("echo") else op_port
    with running(without("<&-", *command(*words.split(), "--port", port))) as client:
        done = finish(client)
    if words.endswith("client"):
        assert failure(done) == "trioproto: cannot read standard input: Bad file descriptor"
    else:
        assert (done.returncode, done.stderr) == (0, b"")


def test_failure_without_standard_error() -> None:
    """A failure that cannot be reported is an exit status: standard output is not for it."""
    done = subprocess.run(
        without("2>&-", *command("op-client", "--port", "1", "1", "+")),
        stdout=subprocess.PIPE,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")


# Servers that are not there, or not for long


@pytest.mark.parametrize(("client", "server"), [("echo-client", "echo"), ("op-client", "op")])
def test_nobody_listens(client: str, server: str) -> None:
    """A client that finds nobody at its port fails with the command that starts a server there."""
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = port_of(bound)
        line = failure(run(client, "--port", port))
    assert line.startswith(f"trioproto: cannot connect to 127.0.0.1:{port}: Connection refused; ")
    assert line.endswith(f" python -m trioproto {server} --host 127.0.0.1 --port {port}")


def test_nobody_listens_at_any_address() -> None:
    """A host may have many addresses: the failure is still one line, with a reason."""
    with socket.socket() as bound:
        bound.bind(("0.0.0.0", 0))
        words = [sys.executable, "-c", WITH_TWO_ADDRESSES, "op-client", "--port", port_of(bound), "1", "+"]
        done = subprocess.run(words, capture_output=True, timeout=TIMEOUT, check=False)
    assert ": Connection refused; " in failure(done)


@pytest.mark.parametrize("words", ["echo-client hello", "echo"])
def test_host_that_is_no_name(words: str) -> None:
    """A ``--host`` that no host could have is a failure like any other."""
    line = failure(run(*words.split(), "--host", "a" * 64))
    assert "label too long" in line
    assert "--host" in line


@pytest.mark.parametrize(("words", "expected"), [("op-client 1 2 +", 4), ("echo-client hello", 5)])
def test_reply_ends_too_early(words: str, expected: int) -> None:
    """A server that ends a connection in the middle of a reply is a failure that says how far it got."""
    with listen() as listener, running(command(*words.split(), "--port", port_of(listener))) as client:
        with accept(listener) as connection:
            connection.sendall(b"he")
            connection.shutdown(socket.SHUT_WR)
            read_to_end(connection.fileno())
        reason = f"127.0.0.1:{port_of(listener)} closed the connection: end of stream after 2 of {expected} bytes"
        assert failure(finish(client)) == f"trioproto: {reason}; look at the server's log"


def test_pipe_ends_too_early() -> None:
    """``--stdin`` fails when less comes back than was sent."""
    with listen() as listener, running(command("echo-client", "--stdin", "--port", port_of(listener))) as client:
        assert client.stdin is not None
        client.stdin.write(b"hello")
        client.stdin.close()
        with accept(listener) as connection:
            assert read_to_end(connection.fileno()) == b"hello"
            connection.sendall(b"he")
        assert "end of stream after 2 of 5 bytes;" in failure(finish(client))


def test_server_stops_while_input_is_open() -> None:
    """``--stdin`` fails when its server stops, even if all that was sent came back and more is yet to come."""
    with serving("echo") as (server, port), running(command("echo-client", "--port", port, "--stdin")) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"hello")
        assert read_until(client.stdout.fileno(), b"hello") == b"hello"
        server.terminate()
        assert server.wait(TIMEOUT) == 0  # before `serving` sends it a second signal, which is not that patient
        assert "end of stream after 5 of 5 bytes and more" in failure(finish(client))


def test_server_stops_during_a_dialogue() -> None:
    """A dialogue whose server has stopped fails at the next message."""
    with serving("echo") as (server, port), running(command("echo-client", "--port", port)) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        read_until(client.stdout.fileno(), b"quit): ")
        server.terminate()
        assert server.wait(TIMEOUT) == 0
        client.stdin.write(b"hello\n")
        assert f"127.0.0.1:{port}" in failure(finish(client))


def test_connection_breaks() -> None:
    """A connection that is reset while the client waits for a reply is a failure that says where to look."""
    with listen() as listener, running(command("op-client", "--port", port_of(listener), "1", "+")) as client:
        with accept(listener) as connection:
            assert len(connection.recv(6, socket.MSG_WAITALL)) == 6
            # To close at once, with nothing to linger for, is to reset (socket(7)).
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line = failure(finish(client))
        assert line.startswith(f"trioproto: the connection to 127.0.0.1:{port_of(listener)} broke: Connection reset")
        assert line.endswith("look at the server's log")


def test_argument_with_a_line_end() -> None:
    """A failure is one line, and no terminal's command, whatever is in an argument that it repeats."""
    line = failure(run("op-client", "--host", "two\nlines\x1b[31m", "1", "+"))
    assert line.startswith(r"trioproto: cannot connect to two\nlines\x1b[31m:9191: ")


# Servers that do not answer


@pytest.mark.parametrize(
    "words", ["echo-client hello", "op-client 1 +", "echo-client", "op-client", "echo-client --stdin"]
)
def test_no_reply(words: str) -> None:
    """A client waits for a reply no longer than it is told to, and says for what it has waited."""
    with listen() as listener:
        port = port_of(listener)
        line = failure(run(*words.split(), "--port", port, "--timeout", "0.2", stdin=b"1 1 +\n"))
    assert line == f"trioproto: no reply from 127.0.0.1:{port} within 0.2 s; look at the server's log"


def test_no_reply_to_a_later_message() -> None:
    """Each reply has the whole time."""
    words = command("echo-client", "--timeout", "1", "one", "two", "six")
    with (
        listen() as listener,
        running([*words, "--port", port_of(listener)]) as client,
        accept(listener) as connection,
    ):
        for _ in range(2):
            message = connection.recv(3, socket.MSG_WAITALL)
            time.sleep(0.6)
            connection.sendall(message)
        assert connection.recv(3, socket.MSG_WAITALL) == b"six"
        done = finish(client)
    assert "no reply" in failure(done)
    assert done.stdout == b"one\ntwo\n"


def test_pipe_times_replies_not_input() -> None:
    """``--stdin`` may wait for its input for any time, and the echo may come slowly, as long as it comes."""
    words = command("echo-client", "--stdin", "--timeout", "1")
    with listen() as listener, running([*words, "--port", port_of(listener)]) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        with accept(listener) as connection:
            time.sleep(1.2)
            client.stdin.write(b"abc")
            assert connection.recv(3, socket.MSG_WAITALL) == b"abc"
            for byte in (b"a", b"b", b"c"):
                time.sleep(0.5)
                connection.sendall(byte)
                assert read_until(client.stdout.fileno(), byte) == byte
            time.sleep(1.2)
            client.stdin.write(b"d")
            assert connection.recv(1) == b"d"
            assert "no reply" in failure(finish(client))


def test_no_connection() -> None:
    """A client waits for a connection no longer than it is told to, and says so."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = port_of(full)
        waiting = [socket.socket() for _ in range(4)]  # more than the queue has room for: the kernel drops the others
        for client in waiting:
            client.settimeout(0)
            client.connect_ex(("127.0.0.1", int(port)))
        line = failure(run("op-client", "--port", port, "--timeout", "0.3", "1", "+"))
        for client in waiting:
            client.close()
    assert line.startswith(f"trioproto: cannot connect to 127.0.0.1:{port}: no answer within 0.3 s; ")


def test_no_handshake() -> None:
    """A client waits for a TLS handshake no longer than it is told to, and says so."""
    with listen() as listener:
        port = port_of(listener)
        line = failure(run("echo-client", "--port", port, "--tls", "--timeout", "0.3", "hello"))
    assert line.startswith(f"trioproto: no TLS handshake with 127.0.0.1:{port} within 0.3 s; ")


# UNIX sockets


@pytest.mark.parametrize(
    ("server", "words", "answer"), [("echo", "echo-client hello", b"hello\n"), ("op", "op-client 1 2 +", b"3\n")]
)
def test_unix_socket(server: str, words: str, answer: bytes, tmp_path: Path) -> None:
    """``--unix`` takes a client to a server's UNIX socket; where nobody listens, it says how to start one."""
    path = str(tmp_path / "a socket")
    line = failure(run(*words.split(), "--unix", path))
    assert line.startswith(f"trioproto: cannot connect to unix:{path}: No such file or directory; ")
    assert line.endswith(f" python -m trioproto {server} --unix '{path}'")
    with running(command(server, "--unix", path)) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b"\n")
        assert run(*words.split(), "--unix", path).stdout == answer
        process.terminate()
        assert finish(process).returncode == 0


# Ctrl-C


def test_second_interrupt() -> None:
    """A Ctrl-C that comes when the first one has ended the command already is too late to say anything about."""
    program = (
        "import atexit, os, signal, sys\n"
        "from trioproto.cli.main import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.exit(main())"
    )
    with (
        listen() as listener,
        running([sys.executable, "-c", program, "echo-client", "--port", port_of(listener)]) as client,
    ):
        assert client.stdout is not None
        read_until(client.stdout.fileno(), b"quit): ")
        client.send_signal(signal.SIGINT)
        done = finish(client)
    assert (done.returncode, done.stderr) == (130, b"")


def test_interrupted_dialogue(echo_port: str) -> None:
    """Ctrl-C ends a dialogue with status 130, and not a word."""
    with at_terminal("echo-client", "--port", echo_port) as (client, person):
        read_until(person, b"quit): ")
        os.write(person, b"\x03")
        assert client.wait(TIMEOUT) == 130
        assert read_to_end(person) == b"^C"


def test_interrupted_write(echo_port: str, much: Path) -> None:
    """An interrupt ends a client even while nobody takes its output."""
    reader, writer = os.pipe()
    words = command("echo-client", "--port", echo_port, "--stdin")
    try:
        with much.open("rb") as stdin, running(words, stdin=stdin, stdout=writer) as client:
            deadline = time.monotonic() + TIMEOUT
            while select.select([], [writer], [], 0)[1]:
                assert time.monotonic() < deadline, "the pipe does not fill"
                time.sleep(0.01)
            client.send_signal(signal.SIGINT)
            done = finish(client)
            assert (done.returncode, done.stderr) == (130, b"")
    finally:
        os.close(reader)
        os.close(writer)
