"""SIGHUP: what can be read again is, and no connection is disturbed."""

import contextlib
import errno
import os
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
import trustme
from processes import ANSWER, QUESTION, Server, receive, serving

from trioproto.process.service import HANDSHAKE_SECONDS, run_until_signal
from trioproto.process.tls import client_context, server_context

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")

WORKERS = pytest.mark.parametrize("workers", [1, 2])
ENOUGH = 10  # connections, for each of two workers to get some of them


class Authority:
    """An authority, and PEM files with certificates that it signed.

    Attributes:
        ca: the file with its own certificate.
        server: the file with the certificate and key of localhost.
        client: the file with those of a client.
    """

    def __init__(self, directory: Path, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> None:
        directory.mkdir()
        authority = trustme.CA(key_type=key_type)
        self.ca, self.server, self.client = (str(directory / name) for name in ("ca", "server", "client"))
        authority.cert_pem.write_to_path(self.ca)
        for path, name in ((self.server, "localhost"), (self.client, "client.invalid")):
            authority.issue_cert(name, key_type=key_type).private_key_and_cert_chain_pem.write_to_path(path)

    def certificate(self) -> bytes:
        """The server's certificate as a client sees it."""
        pem = Path(self.server).read_text()
        begin = pem.index("-----BEGIN CERTIFICATE")
        return ssl.PEM_cert_to_DER_cert(
            pem[begin : pem.index("-----END CERTIFICATE") + len("-----END CERTIFICATE-----")]
        )


@attrs.frozen
class Files:
    """Two authorities, and the files of a server's command line, which have been the old one's so far."""

    old: Authority
    new: Authority
    cert: Path
    client_ca: Path

    def options(self) -> list[str]:
        """The server's options."""
        return [f"--tls-cert={self.cert}", f"--tls-client-ca={self.client_ca}"]

    def client(self, authority: Authority) -> ssl.SSLContext:
        """A client with a certificate that ``authority`` has signed; it trusts both authorities."""
        context = client_context(self.old.ca, authority.client, None)
        context.load_verify_locations(self.new.ca)
        return context

    def replace(self) -> None:
        """Put the new one's in the place of the old one's."""
        shutil.copy(self.new.server, self.cert)
        shutil.copy(self.new.ca, self.client_ca)


@pytest.fixture
def files(tmp_path: Path, request: pytest.FixtureRequest) -> Files:
    """The new authority's keys are of the same kind as the old one's, unless the test wants another."""
    new_keys = getattr(request, "param", trustme.KeyType.ECDSA)
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new", new_keys)
    cert, client_ca = tmp_path / "server.pem", tmp_path / "client_ca.pem"
    shutil.copy(old.server, cert)
    shutil.copy(old.ca, client_ca)
    return Files(old, new, cert, client_ca)


async def started(server: Server, workers: int) -> None:
    """Wait until each worker has loaded its files: after that, it wants signals."""
    for pid in await server.workers(workers) if workers > 1 else []:
        process = Path(f"/proc/{pid}")
        # Until it has become the worker's program, its signals are those of its parent.
        while "worker.py" not in (process / "cmdline").read_text():  # noqa: ASYNC110 - the kernel has no event for it
            await trio.sleep(0.01)
        while not caught(process / "status") & 1 << signal.SIGHUP - 1:  # noqa: ASYNC110
            await trio.sleep(0.01)


def caught(status: Path) -> int:
    """The signals that a process has handlers for, as bits."""
    return int(status.read_text().split("SigCgt:")[1].split()[0], 16)


async def reload(server: Server, workers: int) -> None:
    """Send SIGHUP, and wait until every process has heeded it."""
    server.process.send_signal(signal.SIGHUP)
    await server.logged("SIGHUP: reloaded")
    if workers > 1:
        await server.logged("standard input: reloaded", workers)


async def certificate(server: Server, context: ssl.SSLContext) -> bytes | None:
    """Ask once as a client with this context, and return the certificate that the server showed."""
    async with trio.SSLStream(await server.tcp(), context, server_hostname="localhost") as stream:
        await server.answers(stream)
        shown = stream.getpeercert(binary_form=True)
        assert shown is None or isinstance(shown, bytes)
        return shown


@pytest.mark.parametrize(
    ("workers", "files"),
    [(1, trustme.KeyType.ECDSA), (1, trustme.KeyType.RSA), (2, trustme.KeyType.RSA)],
    indirect=["files"],
)
async def test_certificates(workers: int, files: Files) -> None:
    """Who connects from then on sees the new certificate, and needs one that the new authority has signed.

    Its key may be of the same kind as the old one, or of another. A request that is under way gets its reply, and its
    connection goes on.
    """
    old, new = files.client(files.old), files.client(files.new)
    options = [f"--workers={workers}", *files.options()]
    complaint = ".* connection broken while waiting for a TLS handshake: .*"
    async with (
        serving("op", *options, tls=new, complaints=[complaint]) as server,
        trio.SSLStream(await server.tcp(), old, server_hostname="localhost") as under_way,
    ):
        await server.answers(under_way)
        await under_way.send_all(QUESTION[:-1])
        await started(server, workers)
        files.replace()
        await reload(server, workers)
        for _ in range(ENOUGH):
            assert await certificate(server, new) == files.new.certificate()
        with pytest.raises(trio.BrokenResourceError):
            await certificate(server, old)
        await under_way.send_all(QUESTION[-1:])
        assert await receive(under_way, len(ANSWER)) == ANSWER
        await server.answers(under_way)


@WORKERS
@pytest.mark.parametrize("wrong", ["cert", "client_ca"])
async def test_wrong_file(wrong: str, workers: int, files: Files) -> None:
    """A file that cannot be used is one line in the log. The old ones stay in force, even if the other one is new."""
    context = files.client(files.old)
    complaint = rf"SIGHUP: cannot reload: '{getattr(files, wrong)}' has no certificate in PEM form; nothing has changed"
    options = [f"--workers={workers}", *files.options()]
    async with serving("op", *options, tls=context, complaints=[complaint]) as server:
        await started(server, workers)
        files.replace()
        getattr(files, wrong).write_text("not PEM")
        server.process.send_signal(signal.SIGHUP)
        await server.logged("cannot reload")
        for _ in range(ENOUGH):
            assert await certificate(server, context) == files.old.certificate()


@WORKERS
@pytest.mark.parametrize(
    ("replacement", "complaint"),
    [
        pytest.param(None, "cannot read '{}': No such file or directory", id="gone"),
        pytest.param(os.mkfifo, "'{}' is a pipe or a device: .*", id="pipe"),
    ],
)
async def test_file_that_cannot_be_read_again(
    workers: int, replacement: Callable[[Path], None] | None, complaint: str, files: Files
) -> None:
    """A missing file is one log line. So is a pipe, which is not read: nobody may ever write to it."""
    context = files.client(files.old)
    complaint = rf"SIGHUP: cannot reload: {complaint.format(files.cert)}; nothing has changed"
    async with serving("op", f"--workers={workers}", *files.options(), tls=context, complaints=[complaint]) as server:
        await started(server, workers)
        files.cert.unlink()
        if replacement is not None:
            replacement(files.cert)
        server.process.send_signal(signal.SIGHUP)
        await server.logged("cannot reload")
        assert await certificate(server, context) == files.old.certificate()


@WORKERS
async def test_nothing_to_reload(workers: int) -> None:
    """Without TLS, SIGHUP is a line in the log, and nothing else; not even under load."""
    async with serving("op", f"--workers={workers}") as server, await server.connect() as stream:
        for number in range(1, 21):
            await stream.send_all(QUESTION[:-1])
            server.process.send_signal(signal.SIGHUP)
            await server.logged("INFO .* SIGHUP: nothing to reload", number)
            await stream.send_all(QUESTION[-1:])
            assert await receive(stream, len(ANSWER)) == ANSWER


async def test_signal_to_workers() -> None:
    """SIGHUP to all processes, as systemctl kill sends it, is heeded by the supervisor alone."""
    async with serving("op", "--workers=2") as server, await server.connect() as stream:
        await server.answers(stream)
        for pid in [*await server.workers(2), server.process.pid]:
            os.kill(pid, signal.SIGHUP)
        await server.logged("nothing to reload")
        await server.answers(stream)
        server.stop()
    assert sum("nothing to reload" in line for line in server.log) == 1


def test_sessions(tmp_path: Path) -> None:
    """A client cannot resume a session from before: its certificate may be one that is not to be trusted any more."""
    authority = Authority(tmp_path / "authority")
    context = server_context(authority.server, None, authority.ca)
    client = client_context(authority.ca, authority.client, None)
    session = shake_hands(client, context, None).session
    assert shake_hands(client, context, session).session_reused
    context.reload(authority.server, None, authority.ca)
    assert not shake_hands(client, context, session).session_reused


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLObject:
    """Shake hands in memory, and return the client's side."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs) * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    theirs.write(b"!")  # TLS 1.3 sends tickets after the handshake
    assert ours.read() == b"!"
    return ours


# In this process.


async def hang_up(reload: Callable[[], object], *numbers: signal.Signals) -> None:
    """Serve, with a ``reload`` of an app's own, while these signals come, a second and a half apart."""

    async def serve(listeners: list[trio.SocketListener], shutdown: trio.Event) -> None:
        await shutdown.wait()
        await trio.sleep(60)

    async def send() -> None:
        for number in numbers:
            await trio.sleep(1.5)
            os.kill(os.getpid(), number)

    @contextlib.asynccontextmanager
    async def nowhere() -> AsyncIterator[list[trio.SocketListener]]:
        yield []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await run_until_signal(serve, nowhere(), reload=reload)


async def test_in_a_stop(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """SIGHUP in a stop is no second signal: nothing is cut."""
    await hang_up(list, signal.SIGTERM, signal.SIGHUP)
    assert trio.current_time() == pytest.approx(1.5 + HANDSHAKE_SECONDS + 60)
    assert "cancelled" not in caplog.text


async def test_app_that_fails(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """What an app's ``reload`` raises ends nothing: an `OSError` is one line; a bug has its traceback."""
    errors = iter([FileNotFoundError(errno.ENOENT, "No such file", "x.pem"), ZeroDivisionError("a bug")])

    def reload() -> None:
        raise next(errors)

    await hang_up(reload, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
    assert caplog.messages == [
        "SIGHUP: cannot reload: [Errno 2] No such file: 'x.pem'; nothing has changed",
        "SIGHUP: cannot reload: a bug; nothing has changed",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [False, True]
