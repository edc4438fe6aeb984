"""TLS: contexts from files, handshakes that fail, and closing without loss behind TLS."""

import contextlib
import logging
import os
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
import trustme
from cryptography.hazmat.primitives import serialization
from helpers import MemoryListener, int32_bytes, request_bytes

from trioproto import echo_handler, echo_request, op_handler, receive_exactly, serve_listeners
from trioproto.process.tls import client_context, server_context
from trioproto.transport import LINGER_SECONDS, LINGER_SILENCE

Stream = trio.abc.HalfCloseableStream
Tls = trio.SSLStream[Stream]
Handler = Callable[..., Awaitable[object]]

LIMIT = 20  # seconds, for a test on real sockets that would otherwise hang
ONE = request_bytes([1], "+")
MALFORMED = b"\x00"

# How the log names a client in memory, which has no address, and its server.
CLIENT = "SSLStream to MemoryListener"


@attrs.frozen
class Files:
    """Paths of PEM files."""

    ca: str
    cert: str  # of localhost
    key: str
    both: str  # the same two in one file
    client: str  # certificate and key of a client
    stranger: str  # the same, signed by another CA
    other_ca: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Make two authorities, and certificates."""
    directory = tmp_path_factory.mktemp("tls")

    def write(name: str, *blobs: trustme.Blob) -> str:
        path = directory / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return str(path)

    authority, other = trustme.CA(), trustme.CA()
    localhost = authority.issue_cert("localhost")
    client = authority.issue_cert("client.invalid")
    stranger = other.issue_cert("stranger.invalid")
    return Files(
        ca=write("ca.pem", authority.cert_pem),
        cert=write("cert.pem", *localhost.cert_chain_pems),
        key=write("key.pem", localhost.private_key_pem),
        both=write("both.pem", localhost.private_key_and_cert_chain_pem),
        client=write("client.pem", client.private_key_and_cert_chain_pem),
        stranger=write("stranger.pem", stranger.private_key_and_cert_chain_pem),
        other_ca=write("other_ca.pem", other.cert_pem),
    )


@pytest.fixture
def server(files: Files) -> ssl.SSLContext:
    """A server's context, for any client."""
    return server_context(files.cert, files.key, None)


@pytest.fixture
def client(files: Files) -> ssl.SSLContext:
    """A client's context that fits."""
    return client_context(files.ca, None, None)


# Contexts.


async def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str = "localhost") -> Tls:
    """Let both sides greet each other, and return the server's stream."""
    ours, theirs = trio.testing.memory_stream_pair()
    tls: Tls = trio.SSLStream(theirs, server, server_side=True)

    async def greet() -> None:
        async with trio.SSLStream(ours, client, server_hostname=name) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(greet)
        async with tls:
            assert await receive_exactly(tls, 5) == b"hello"
    return tls


@pytest.mark.parametrize("key_apart", [True, False])
async def test_server_certificate(key_apart: bool, files: Files, client: ssl.SSLContext) -> None:  # noqa: FBT001
    """A server's private key lies in a file of its own, or in that of the certificate."""
    server = server_context(files.cert, files.key, None) if key_apart else server_context(files.both, None, None)
    await shake_hands(client, server)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions(version: ssl.TLSVersion, client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Both sides speak TLS 1.2 and TLS 1.3."""
    client.maximum_version = client.minimum_version = version
    await shake_hands(client, server)


def test_old_versions(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Neither side speaks anything older than TLS 1.2."""
    assert client.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert server.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_no_renegotiation(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """In TLS 1.2, neither side lets the other begin a second handshake in the middle of a conversation."""
    for context, name in ((client, "localhost"), (server, None)):
        begun = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=name is None, server_hostname=name)
        assert begun.context.options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.parametrize(
    ("ca", "name"), [("other_ca", "localhost"), ("ca", "another.invalid"), (None, "localhost")], ids=str
)
async def test_client_checks_the_server(ca: str | None, name: str, files: Files, server: ssl.SSLContext) -> None:
    """A client talks to nobody whose certificate its CA has not signed, or names another host."""
    client = client_context(None if ca is None else getattr(files, ca), None, None)
    with pytest.raises(ExceptionGroup) as caught:
        await shake_hands(client, server, name)
    assert caught.group_contains(trio.BrokenResourceError)
    assert "certificate verify failed" in repr([error.__cause__ for error in caught.value.exceptions])


async def test_client_certificate(files: Files) -> None:
    """A server that was given a CA for its clients sees the certificate of each."""
    tls = await shake_hands(client_context(files.ca, files.client, None), server_context(files.both, None, files.ca))
    names = dict(tls.getpeercert())["subjectAltName"]
    assert names == (("DNS", "client.invalid"),)


def not_there(file: Path, files: Files) -> str:
    """Nothing."""
    return "cannot read FILE: No such file or directory"


def directory(file: Path, files: Files) -> str:
    """A directory."""
    file.mkdir()
    return "cannot read FILE: Is a directory"


def not_pem(file: Path, files: Files) -> str:
    """Something else."""
    file.write_text("not PEM")
    return "FILE has no certificate in PEM form|cannot use the private key in FILE: it has none in PEM form"


def damaged(file: Path, files: Files) -> str:
    """PEM that cannot be decoded."""
    lines = Path(files.key if file.name == "key" else files.cert).read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b"!" * 64, *lines[1:]]))
    return "FILE has no certificate in PEM form|cannot use the private key in FILE: .*"


@pytest.mark.parametrize("content", [not_there, directory, not_pem, damaged])
@pytest.mark.parametrize("wrong", ["ca", "cert", "key"])
def test_wrong_file(wrong: str, content: Callable[[Path, Files], str], files: Files, tmp_path: Path) -> None:
    """A file that is not there, or holds something else, is an `OSError` that names it, on both sides."""
    path = tmp_path / wrong
    complaint = content(path, files).replace("FILE", re.escape(repr(str(path))))
    named = {"ca": files.ca, "cert": files.cert, "key": files.key, wrong: str(path)}
    with pytest.raises(OSError, match=f"^({complaint})$"):
        server_context(named["cert"], named["key"], named["ca"])
    with pytest.raises(OSError, match=f"^({complaint})$"):
        client_context(named["ca"], named["cert"], named["key"])


def test_key_of_another_certificate(files: Files, tmp_path: Path) -> None:
    """A key that is not that of the certificate is an `OSError` that says so, even if it is of another kind."""
    for key_type in (trustme.KeyType.ECDSA, trustme.KeyType.RSA):
        key = tmp_path / "key.pem"
        trustme.CA().issue_cert("localhost", key_type=key_type).private_key_pem.write_to_path(key)
        with pytest.raises(OSError, match=f"the private key in {str(key)!r} is not that of the certificate in "):
            server_context(files.cert, str(key), None)


def test_no_key(files: Files) -> None:
    """A certificate's file that holds no key is an `OSError` that says so, if there is no other file for it."""
    with pytest.raises(OSError, match=f"cannot use the private key in {files.cert!r}: it has none in PEM form"):
        server_context(files.cert, None, None)


def test_encrypted_key(files: Files, tmp_path: Path) -> None:
    """A key that is encrypted is an `OSError` that says so; nobody is asked for its passphrase."""
    plain = serialization.load_pem_private_key(Path(files.key).read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key = tmp_path / "key.pem"
    key.write_bytes(
        plain.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
    )
    with pytest.raises(OSError, match=f"the private key in {str(key)!r} is encrypted: decrypt it"):
        server_context(files.cert, str(key), None)


def test_pipe_with_a_wrong_certificate(files: Files) -> None:
    """A pipe, which cannot be read again to find the error, does not hang."""
    reading, writing = os.pipe()
    os.write(writing, b"not PEM")
    os.close(writing)
    with pytest.raises(OSError, match=f"cannot use the certificate in .*{reading}.* or the private key in"):
        server_context(f"/dev/fd/{reading}", files.key, None)
    os.close(reading)


# Clients that fail to shake hands.


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, server: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[MemoryListener]:
    """Serve behind TLS. In the end, no handler may have crashed."""
    caplog.set_level(logging.INFO, "trioproto")
    listener = MemoryListener()
    shutdown = trio.Event()

    async def serve() -> None:
        endpoints = [trio.SSLListener(listener, server)]
        stats = await serve_listeners(handler, endpoints, shutdown=shutdown, grace_period=100)
        assert stats.crashed == 0

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield listener
            shutdown.set()


async def still_served(listener: MemoryListener, client: ssl.SSLContext) -> None:
    """Check that a client that does all right is served."""
    async with trio.SSLStream(listener.connect(), client, server_hostname="localhost") as stream:
        assert await echo_request(stream, b"hello") == b"hello"


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    """Return the one line that was logged: a warning without a traceback."""
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert "\n" not in record.getMessage()
    return record.getMessage()


@pytest.mark.parametrize("interval", [None, 0.4], ids=["silent", "dribbling"])
async def test_no_handshake(
    interval: float | None,
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A handshake may take as long as a request may, however it dribbles; its client costs one line in the log."""
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()

    async with serving(partial(echo_handler, idle_timeout=300, request_timeout=5), server, caplog) as listener:
        stream = listener.connect()
        async with trio.open_nursery() as nursery:
            if interval is not None:
                nursery.start_soon(dribble, stream, hello.read(), interval)
            assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()
        assert trio.current_time() == pytest.approx(5)
        await still_served(listener, client)
    assert one_warning(caplog) == f"{CLIENT}: timed out waiting for a TLS handshake"


async def dribble(stream: trio.abc.SendStream, data: bytes, interval: float) -> None:
    """Send ``data``, a byte after each ``interval`` seconds."""
    for byte in data:
        await trio.sleep(interval)
        await stream.send_all(bytes([byte]))


async def test_no_handshake_frees_the_place(server: ssl.SSLContext, autojump_clock: trio.testing.MockClock) -> None:
    """Once its time is over, a client that never shook hands is not waited for: it was sent nothing that it needs."""
    _, theirs = trio.testing.memory_stream_pair()
    await echo_handler(trio.SSLStream(theirs, server, server_side=True), request_timeout=5)
    assert trio.current_time() == pytest.approx(5)


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", ONE, bytes(100)])
async def test_plain_client(
    sent: bytes,
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client that does not speak TLS costs its connection, and one line in the log."""
    async with serving(partial(echo_handler, request_timeout=5), server, caplog) as listener:
        stream = listener.connect()
        await stream.send_all(sent)
        while await stream.receive_some():
            pass
        await still_served(listener, client)
    assert one_warning(caplog).startswith(f"{CLIENT}: connection broken while waiting for a TLS handshake: ")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("fault", ["no certificate", "a stranger's", "does not trust the server"])
async def test_wrong_certificate(
    fault: str,
    version: ssl.TLSVersion,
    files: Files,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client with the wrong certificate, or that rejects the server's, costs its connection, and one log line."""
    bad = {
        "no certificate": client_context(files.ca, None, None),
        "a stranger's": client_context(files.ca, files.stranger, None),
        "does not trust the server": client_context(files.other_ca, files.client, None),
    }[fault]
    bad.maximum_version = version
    good = client_context(files.ca, files.client, None)
    async with serving(echo_handler, server_context(files.both, None, files.ca), caplog) as listener:
        stream = trio.SSLStream(listener.connect(), bad, server_hostname="localhost")
        with pytest.raises(trio.BrokenResourceError):  # TLS 1.3 lets a client find out only when it receives
            await echo_request(stream, b"hello")
        await stream.aclose()
        await still_served(listener, good)
    assert one_warning(caplog).startswith(f"{CLIENT}: connection broken while waiting for a TLS handshake: ")


# Closing.


async def receive_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """Receive all there is until end of stream."""
    received = bytearray()
    async for chunk in stream:
        received += chunk
    return bytes(received)


async def test_closing_while_the_client_sends(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A malformed request while the client sends on: all replies arrive, and end of stream as TLS has it."""
    async with (
        serving(op_handler, server, caplog) as listener,
        trio.SSLStream(listener.connect(), client, server_hostname="localhost") as stream,
    ):
        await stream.send_all(ONE * 100 + MALFORMED)
        for _ in range(10):
            await trio.sleep(0.1)
            await stream.send_all(bytes(1000))
        assert await receive_to_end(stream) == int32_bytes(1) * 100
    assert one_warning(caplog) == f"{CLIENT}: protocol error: operand count is 0"


async def test_closing_on_a_socket(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """The same on a socket: no reset destroys what is on its way."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    shutdown = trio.Event()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                partial(serve_listeners, op_handler, [trio.SSLListener(listener, server)], shutdown=shutdown)
            )
            transport = await trio.testing.open_stream_to_socket_listener(listener)
            async with trio.SSLStream(transport, client, server_hostname="localhost") as stream:
                await stream.send_all(ONE * 1000 + MALFORMED)
                for _ in range(50):
                    await stream.send_all(bytes(10_000))
                    await trio.sleep(0.001)
                assert await receive_to_end(stream) == int32_bytes(1) * 1000
            shutdown.set()


@pytest.mark.parametrize("interval", [0.1, 1000])
async def test_closing_is_bounded(
    interval: float, client: ssl.SSLContext, server: ssl.SSLContext, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that does not say goodbye cannot keep the connection from closing, whether it sends or not."""
    ours, theirs = trio.testing.memory_stream_pair()
    stream = trio.SSLStream(ours, client, server_hostname="localhost")

    async def send_on() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(MALFORMED)
            while True:
                await trio.sleep(interval)
                await stream.send_all(b"more")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_on)
        await op_handler(trio.SSLStream(theirs, server, server_side=True))
        assert LINGER_SILENCE <= trio.current_time() <= LINGER_SECONDS + 0.1
        nursery.cancel_scope.cancel()


async def test_client_that_leaves(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client that says goodbye, or breaks the connection, between two requests is not waited for, nor logged."""
    async with serving(echo_handler, server, caplog) as listener:
        for goodbye in (True, False):
            stream = trio.SSLStream(listener.connect(), client, server_hostname="localhost")
            assert await echo_request(stream, b"hello") == b"hello"
            await (stream if goodbye else stream.transport_stream).aclose()
    assert trio.current_time() < 0.1
    assert caplog.messages == []


async def test_client_that_takes_no_reply(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A client that takes no byte of its reply costs its connection after ``idle_timeout``, and one log line."""
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # in which a server sends nothing on its own
    ours, theirs = trio.testing.lockstep_stream_pair()
    stream = trio.SSLStream(ours, client, server_hostname="localhost")
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(echo_handler, trio.SSLStream(theirs, server, server_side=True), idle_timeout=10))
            await stream.send_all(b"hello")
    assert trio.current_time() == pytest.approx(10 + LINGER_SECONDS, abs=LINGER_SECONDS)
    assert one_warning(caplog) == "SSLStream: timed out waiting for room for a reply"
