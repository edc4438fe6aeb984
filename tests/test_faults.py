"""Clients' faults, one by one, against real server processes. What `serving` checks after each is part of the test."""

import contextlib
import random
import resource
import socket
import ssl
from collections.abc import Callable, Iterator

import pytest
import trio
import trustme
from helpers import below, decode_by_the_table, request_bytes, reset
from processes import ANSWER, PEER, QUESTION, Server, paused, receive_all, serving

from trioproto.transport import transport_for

# How the log names a client, and the server that it is connected to.
CLIENT = f"{PEER} to {PEER}"

BOTH = pytest.mark.parametrize("protocol", ["echo", "op"])


CA = trustme.CA()


def tls_client(*, trusts: trustme.CA = CA, certificate_of: trustme.CA | None = CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    trusts.configure_trust(context)
    if certificate_of is not None:
        certificate_of.issue_cert("client").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def tls_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a server's options for TLS; it serves only clients with a certificate of `CA`."""
    room = tmp_path_factory.mktemp("tls")
    CA.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(room / "server.pem")
    CA.cert_pem.write_to_path(room / "ca.pem")
    return [f"--tls-cert={room / 'server.pem'}", f"--tls-client-ca={room / 'ca.pem'}"]


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Server]]


@pytest.fixture(params=["plain", "TLS"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """Run a server for a block, over plain TCP and over TLS: the same faults have the same consequences."""
    if request.param == "plain":
        return serving
    tls_options = request.getfixturevalue("tls_options")
    return lambda protocol, *options, **settings: serving(
        protocol, *tls_options, *options, tls=tls_client(), **settings
    )


@BOTH
async def test_resets(protocol: str, serve: Serve) -> None:
    """Clients that break off right after connecting, or in the middle of a request, harm nobody and are no news."""
    async with serve(protocol) as server, await server.connect() as neighbour:
        for said in (b"", QUESTION[:-1], QUESTION * 5000 + QUESTION[:-1]):
            for _ in range(20):
                stream = await server.connect()
                await stream.send_all(said)
                reset(stream)
            await server.answers(neighbour)


async def test_reset_before_accept() -> None:
    """A connection that is reset while it waits to be accepted harms nobody and is no news."""
    async with serving("op") as server:
        with paused(server.process.pid):
            for said in (b"", QUESTION):
                stream = await server.tcp()
                await stream.send_all(said)
                reset(stream)


@BOTH
async def test_half_close(protocol: str, serve: Serve) -> None:
    """A client that ends its side after its last request gets every reply, then end of stream."""
    async with serve(protocol) as server, await server.connect() as stream, trio.open_nursery() as nursery:

        async def ask() -> None:
            await stream.send_all(QUESTION * 20_000)
            await stream.send_eof()

        nursery.start_soon(ask)
        assert await receive_all(stream) == (QUESTION if protocol == "echo" else ANSWER) * 20_000


async def test_end_in_mid_request(serve: Serve) -> None:
    """A client that ends in the middle of a request gets the replies before it, and one line in the log."""
    half = f"{CLIENT}: end of stream in the middle of a request"
    async with serve("op", complaints=[half]) as server, await server.connect() as stream:
        await stream.send_all(QUESTION * 3 + QUESTION[:-1])
        await stream.send_eof()
        assert await receive_all(stream) == ANSWER * 3


@BOTH
async def test_client_that_never_reads(protocol: str, serve: Serve) -> None:
    """A client that sends and does not read takes no memory and holds up nobody; when it reads, all is there."""
    payloads = random.Random(1).randbytes(2 * 2**20)
    if protocol == "echo":
        requests = payloads
    else:
        requests = b"".join(b"\1" + payloads[at : at + 4] + b"+" for at in range(0, len(payloads), 4))
    with small_buffers() as listening:
        fd = listening.fileno()
        async with serve(protocol, where=[f"--fd={fd}"], pass_fds=[fd]) as server, await server.connect() as stream:
            below(stream).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            await server.answers_anew()
            before = server.memory()
            sent = await send_until_stuck(stream, requests)
            assert sent < len(requests)
            await server.answers_anew()
            assert server.memory() - before < 1024  # KiB

            async with trio.open_nursery() as nursery:

                async def send_rest() -> None:
                    await stream.send_all(requests[sent:])
                    await stream.send_eof()

                nursery.start_soon(send_rest)
                assert await receive_all(stream) == payloads


@contextlib.contextmanager
def small_buffers() -> Iterator[socket.socket]:
    """Listen such that the kernel holds little for each connection, because connections inherit these sizes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        yield listening


async def send_until_stuck(stream: trio.abc.Stream, data: bytes) -> int:
    """Send until nothing has been taken for a while, and return how much was."""
    below(stream).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    transport = transport_for(stream)  # after a cancellation, it can go on
    sent = 0
    while sent < len(data):
        with trio.move_on_after(0.3) as waiting:
            sent += await transport.send_some(memoryview(data)[sent:])
        if waiting.cancelled_caught:
            break
    return sent


async def test_slow_loris(serve: Serve) -> None:
    """Clients that dribble a request are ended when its time is over, each with a line; others are served meanwhile."""

    async def dribble(stream: trio.abc.Stream) -> None:
        for byte in request_bytes([1] * 255, "+"):
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.1)

    async def be_ended(stream: trio.abc.Stream) -> None:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(dribble, stream)
            assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()

    late = f"{CLIENT}: timed out waiting for the rest of a request"
    options = ["--request-timeout=0.5"]
    async with serve("op", *options, complaints=[late] * 10) as server, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(be_ended, await server.connect())
        for _ in range(10):
            await server.answers_anew()


async def test_idle_timeout(serve: Serve) -> None:
    """A client that asks nothing for too long is ended; that is no news."""
    async with serve("op", "--idle-timeout", "0.2") as server, await server.connect() as stream:
        await server.answers(stream)
        assert await stream.receive_some() == b""


async def test_reply_timeout(serve: Serve) -> None:
    """A client that takes no reply for too long is ended, with a line in the log."""
    late = f"{CLIENT}: timed out waiting for room for a reply"
    with small_buffers() as listening:
        where = [f"--fd={listening.fileno()}", "--idle-timeout=0.5"]
        serving_it = serve("op", where=where, pass_fds=[listening.fileno()], complaints=[late])
        async with serving_it as server, await server.connect() as stream:
            await send_until_stuck(stream, QUESTION * 500_000)
            await server.logged(late)


async def test_no_descriptors_left() -> None:
    """Clients that come when descriptors are short wait and are served in the end; one line says that it is so.

    Meanwhile those who are connected are served, also with bulk.
    """
    short = f"{PEER}: cannot accept: Too many open files; new connections wait"
    bulk = random.Random(2).randbytes(2**20)
    async with serving("echo", complaints=[short]) as server, contextlib.AsyncExitStack() as stack:
        first = await server.tcp()
        await server.answers(first)
        server.limit_descriptors(10)
        served = [await stack.enter_async_context(await server.tcp()) for _ in range(10)]
        for stream in served:
            await server.answers(stream)
        waiting = [await stack.enter_async_context(await server.tcp()) for _ in range(30)]
        await server.logged(short)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.send_all, bulk)
            received = bytearray()
            while len(received) < len(bulk):
                received += await first.receive_some()
            assert received == bulk
        for stream in [first, *served]:
            await stream.aclose()
        for stream in waiting:
            await server.answers(stream)
            await stream.aclose()
        await server.logged("accepting again")


async def test_random_payloads() -> None:
    """Whatever bytes come, a client gets what the protocol says, then end of stream, and never a reset."""
    chance = random.Random(3)
    good = request_bytes([1, 2, 3], "*")
    payloads = [good * chance.randrange(4) + chance.randbytes(chance.randint(1, 2000)) for _ in range(40)]
    payloads += [request_bytes([chance.randrange(2**31)], chr(chance.randrange(128))) for _ in range(40)]
    understood = [decode_by_the_table(payload) for payload in payloads]
    complaints = [
        f"{CLIENT}: protocol error: .*" if malformed else f"{CLIENT}: end of stream in the middle of a request"
        for _, unfinished, malformed in understood
        if malformed or unfinished
    ]
    async with serving("op", complaints=complaints) as server:
        for payload, (replies, _, _) in zip(payloads, understood, strict=True):
            async with await server.tcp() as stream:
                await stream.send_all(payload)
                await stream.send_eof()
                assert await receive_all(stream) == replies


@pytest.mark.parametrize("bad", [b"\0", b"\1\0\0\0\0/"], ids=["count", "operator"])
async def test_malformed_request_behind_good_ones(bad: bytes, serve: Serve) -> None:
    """Fifty replies that are owed arrive, then end of stream, whatever more the client has sent and still sends."""
    malformed = f"{CLIENT}: protocol error: .*"
    async with serve("op", complaints=[malformed]) as server, await server.connect() as stream:
        await stream.send_all(QUESTION * 50 + bad + b"more" * 50_000)
        await server.logged(malformed)
        await stream.send_all(b"and more" * 500_000)
        assert await receive_all(stream) == ANSWER * 50


async def test_more_clients_than_places() -> None:
    """With more clients than --max-connections, no more are served at once, none is refused, and all are in the end."""
    async with serving("op", "--max-connections", "4") as server, trio.open_nursery() as nursery:
        holding = [await server.tcp() for _ in range(4)]
        for stream in holding:
            await server.answers(stream)
        late = [await server.tcp() for _ in range(40)]
        for stream in late:
            await stream.send_all(QUESTION)
        with trio.move_on_after(0.2) as nobody_else:
            await late[0].receive_some()
        assert nobody_else.cancelled_caught

        async def take_turn(stream: trio.SocketStream) -> None:
            async with stream:
                assert await stream.receive_some() == ANSWER

        for stream in late:
            nursery.start_soon(take_turn, stream)
        for stream in holding:
            await server.answers(stream)
            await stream.aclose()


async def test_thousands_of_idle_connections() -> None:
    """Two thousand idle connections take little memory each, and the others are served as ever."""
    count = 2000
    with descriptors(count + 100):
        async with serving("op", "--max-connections", str(count + 10)) as server, contextlib.AsyncExitStack() as stack:
            await server.answers_anew()
            before = server.memory()
            for number in range(count):
                stream = await stack.enter_async_context(await server.tcp())
                if number % 100 == 0:  # the accept loop has caught up
                    await server.answers(stream)
            await server.answers_anew()
            each = (server.memory() - before) / count
            assert each < 10  # KiB, with coverage measured too
            await stack.aclose()


@contextlib.contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Allow this process, and those that it starts, that many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this system allows {hard} descriptors, and {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_tls_client_that_says_nothing(tls_options: list[str]) -> None:
    """A client that never shakes hands is ended when the time for it is over, with one line in the log."""
    late = f"{CLIENT}: timed out waiting for a TLS handshake"
    tls_options = [*tls_options, "--request-timeout=0.5"]
    async with serving("op", *tls_options, tls=tls_client(), complaints=[late]) as server, await server.tcp() as stream:
        await server.answers_anew()
        assert await receive_all(stream) == b""


async def test_tls_client_that_speaks_plain(tls_options: list[str]) -> None:
    """A client that speaks plain to a TLS server is ended, with one line in the log."""
    broken = f"{CLIENT}: connection broken while waiting for a TLS handshake: .*"
    async with serving("op", *tls_options, tls=tls_client(), complaints=[broken] * 2) as server:
        for said in (QUESTION * 10, b"GET / HTTP/1.1\r\n\r\n"):
            async with await server.tcp() as stream:
                await stream.send_all(said)
                with contextlib.suppress(trio.BrokenResourceError):
                    await receive_all(stream)


@pytest.mark.parametrize(
    "context",
    [tls_client(trusts=trustme.CA()), tls_client(certificate_of=None), tls_client(certificate_of=trustme.CA())],
    ids=["trusts others", "no certificate", "certificate of others"],
)
async def test_tls_client_with_wrong_certificates(tls_options: list[str], context: ssl.SSLContext) -> None:
    """Where either side does not accept the other's certificate, nothing is served, and one line says so."""
    broken = f"{CLIENT}: connection broken while waiting for a TLS handshake: .*"
    async with serving("op", *tls_options, tls=tls_client(), complaints=[broken]) as server:
        stream = trio.SSLStream(await server.tcp(), context, server_hostname="localhost")
        with pytest.raises(trio.BrokenResourceError):
            await server.answers(stream)
        await trio.aclose_forcefully(stream)
