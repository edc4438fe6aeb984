"""TLS on the command line, as its user would use it."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from commands import run

TIMEOUT = 30.0
COMMAND = [sys.executable, "-m", "trioproto"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority, and certificates that it signed for a server and for a client."""
    directory = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(directory / "ca.pem")
    for name, identity in (("server", "127.0.0.1"), ("local", "localhost"), ("client", "someone@example.org")):
        cert = ca.issue_cert(identity)
        cert.private_key_pem.write_to_path(directory / f"{name}.key")
        cert.cert_chain_pems[0].write_to_path(directory / f"{name}.pem")
    return directory


@pytest.fixture(scope="module")
def port(files: Path) -> Iterator[str]:
    """The port of an echo server that serves only clients with a certificate."""
    options = f"--tls-cert {files}/server.pem --tls-key {files}/server.key --tls-client-ca {files}/ca.pem"
    with subprocess.Popen(
        [*COMMAND, "echo", "--port", "0", *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip().rpartition(":")[2]
        server.terminate()
        assert server.wait(TIMEOUT) == 0


def ask(port: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return run("echo-client", "--port", port, "--tls", *arguments, stdin=stdin)


def with_certificate(files: Path) -> list[str]:
    return f"--tls-ca {files}/ca.pem --tls-cert {files}/client.pem --tls-key {files}/client.key".split()


def failure(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line with which a command failed."""
    assert done.returncode == 1
    [line] = done.stderr.decode().splitlines()
    return line


def test_echo(files: Path, port: str) -> None:
    """A client that trusts the server's authority, and has a certificate that the server asks for, is served."""
    done = ask(port, *with_certificate(files), "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")


def test_pipe(files: Path, port: str) -> None:
    """``--stdin`` needs no half-close, which TLS does not have."""
    data = bytes(range(256)) * 4096
    words = [*COMMAND, "echo-client", "--port", port, "--tls", *with_certificate(files), "--stdin"]
    done = subprocess.run(words, input=data, capture_output=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_empty_pipe(files: Path, port: str) -> None:
    """``--stdin`` without any input is done at once."""
    done = ask(port, *with_certificate(files), "--stdin")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(("name", "status"), [("local", 0), ("server", 1)])
def test_unix_socket(files: Path, name: str, status: int, tmp_path: Path) -> None:
    """On a UNIX socket, which has no host, the server's certificate must name localhost."""
    path = tmp_path / "socket"
    options = f"--tls-cert {files}/{name}.pem --tls-key {files}/{name}.key --unix {path}"
    with subprocess.Popen(
        [*COMMAND, "op", *options.split()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        words = f"op-client --unix {path} --tls --tls-ca {files}/ca.pem 1 2 +"
        done = run(*words.split())
        server.terminate()
        assert server.wait(TIMEOUT) == 0
    if status == 0:
        assert (done.returncode, done.stdout) == (0, b"3\n")
    else:
        assert re.search("CERTIFICATE_VERIFY_FAILED.*ostname.*; look at the server's log", failure(done))


def test_unknown_authority(port: str) -> None:
    """A server whose certificate nobody known has signed is a failure that says so."""
    assert re.search("CERTIFICATE_VERIFY_FAILED.*; to trust it, pass --tls-ca", failure(ask(port, "hello")))


def test_client_without_certificate(files: Path, port: str) -> None:
    """A client without the certificate that the server asks for is not served."""
    assert "the connection to 127.0.0.1" in failure(ask(port, "--tls-ca", f"{files}/ca.pem", "hello"))


def test_client_files_that_are_none(port: str) -> None:
    """TLS files that a client cannot use are a failure that says what they must be."""
    assert "they must be readable PEM files" in failure(ask(port, "--tls-ca", "/no/such/file", "hello"))


def test_server_files_that_are_none(files: Path) -> None:
    """TLS files that a server cannot use are a failure that says what they must be."""
    done = run("op", "--port", "0", "--tls-cert", f"{files}/ca.pem")
    assert "they must be readable PEM files" in failure(done)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("op-client --tls-ca FILE 1 +", "--tls-ca needs --tls"),
        ("op-client --tls-cert FILE 1 +", "--tls-cert needs --tls"),
        ("op-client --tls --tls-key FILE 1 +", "--tls-key needs --tls-cert"),
        ("echo --tls-client-ca FILE", "--tls-client-ca needs --tls-cert"),
        ("echo --tls-key FILE", "--tls-key needs --tls-cert"),
    ],
)
def test_option_without_effect(words: str, complaint: str) -> None:
    """An option that would be without effect is refused: nobody shall believe to be safe who is not."""
    done = run(*words.split())
    assert done.returncode == 2
    assert complaint in done.stderr.decode()


def test_stop_does_not_wait_for_a_handshake(files: Path) -> None:
    """A client that never shakes hands does not hold a stop for the whole grace period."""
    options = f"--grace 3600 --tls-cert {files}/server.pem --tls-key {files}/server.key"
    with subprocess.Popen(
        [*COMMAND, "op", "--port", "0", *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().strip().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as silent:
            server.terminate()
            _, log = server.communicate(timeout=TIMEOUT)
            assert silent.recv(1) == b""
    assert server.returncode == 0
    assert f"to 127.0.0.1:{port}: timed out waiting for a TLS handshake" in log


def test_pipe_for_workers(files: Path, tmp_path: Path) -> None:
    """What can be read only once is no file for workers, each of which reads it: the server does not start.

    For one process it may well be a pipe, so that a key need not lie on the disk.
    """
    key = tmp_path / "key"
    os.mkfifo(key)
    line = failure(run("echo", "--port=0", "--workers=2", f"--tls-cert={files}/server.pem", f"--tls-key={key}"))
    assert f"cannot use the TLS files: '{key}' is a pipe or a device: only a file can be read again" in line
