"""The PROXY protocol: who is behind a proxy, whose headers are believed, and what hostile ones come to."""

import contextlib
import ipaddress
import logging
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme
from helpers import LIMIT, cuts, receive_to_end, reset
from hypothesis import given
from hypothesis import strategies as st
from processes import ANSWER, QUESTION, receive, serving

from trioproto import (
    Connection,
    IncompleteReadError,
    ProtocolError,
    ServerStats,
    receive_exactly,
    serve_listeners,
)
from trioproto.addresses import format_address
from trioproto.connection import FIRST_REQUEST_GRACE
from trioproto.limits import ClientLimit
from trioproto.process.proxy_protocol import (
    HeaderError,
    behind_proxies,
    check_v2_start,
    is_trusted,
    parse_v1,
    parse_v2,
    receive_header,
    trusted_network,
)
from trioproto.testing import fragmentations, fragmented_stream_pair
from trioproto.testing.network import Network, NetworkStream

Handler = Callable[..., Awaitable[object]]

# A second opinion on the format: headers as the specification's tables have them.

SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")


def v1(words: str) -> bytes:
    return f"PROXY {words}\r\n".encode()


def v2(version_and_command: int, family: int, block: bytes = b"") -> bytes:
    return SIGNATURE + bytes([version_and_command, family]) + struct.pack(">H", len(block)) + block


def block(source: str, port: int, target: str = "", target_port: int = 443) -> bytes:
    packed = ipaddress.ip_address(source).packed
    return packed + (ipaddress.ip_address(target).packed if target else packed) + struct.pack(">HH", port, target_port)


def unix_block(source: bytes) -> bytes:
    return source.ljust(108, b"\0") + b"/run/server.sock".ljust(108, b"\0")


LOCAL = v2(0x20, 0x00)
V4 = v2(0x21, 0x11, block("203.0.113.7", 56324))
V6 = v2(0x21, 0x21, block("2001:db8::7", 56324))
TLVS = b"\x03\0\x04abcd" + b"\x04\x01\x2c" + bytes(300)  # a checksum (which is wrong) and 300 bytes of padding

HEADERS = {
    v1("TCP4 203.0.113.7 192.0.2.1 56324 443"): ("203.0.113.7", 56324),
    v1("TCP4 255.255.255.255 255.255.255.255 65535 65535"): ("255.255.255.255", 65535),
    v1("TCP4 0.0.0.0 0.0.0.0 0 0"): ("0.0.0.0", 0),
    v1("TCP6 2001:DB8::7 ::1 56324 443"): ("2001:db8::7", 56324),
    v1("TCP6 " + 2 * (7 * "ffff:" + "ffff ") + "65535 65535"): (7 * "ffff:" + "ffff", 65535),
    v1("UNKNOWN"): None,
    v1("UNKNOWN " + 2 * (7 * "ffff:" + "ffff ") + "65535 65535"): None,  # 107 bytes, the longest
    v1("UNKNOWN \t\0\xff whatever \r or \n it is"): None,
    LOCAL: None,
    v2(0x20, 0x11, block("203.0.113.7", 56324)): None,
    v2(0x20, 0xFF, b"ignored"): None,
    V4: ("203.0.113.7", 56324),
    V6: ("2001:db8::7", 56324),
    v2(0x21, 0x12, block("203.0.113.7", 56324)): ("203.0.113.7", 56324),
    v2(0x21, 0x22, block("2001:db8::7", 56324)): ("2001:db8::7", 56324),
    v2(0x21, 0x11, block("203.0.113.7", 56324) + TLVS): ("203.0.113.7", 56324),
    v2(0x21, 0x21, block("2001:db8::7", 56324) + bytes(65535 - 36)): ("2001:db8::7", 56324),
    v2(0x21, 0x00): None,
    v2(0x21, 0x00, TLVS): None,
    v2(0x21, 0x01, b"abc"): None,
    v2(0x21, 0x10, block("203.0.113.7", 56324)): None,
    v2(0x21, 0x31, unix_block(b"/run/client.sock")): "/run/client.sock",
    v2(0x21, 0x32, unix_block(b"/run/client\xff.sock")): "/run/client\udcff.sock",
    v2(0x21, 0x31, unix_block(b"/" + 107 * b"x")): "/" + 107 * "x",
    v2(0x21, 0x31, unix_block(b"")): "",
    v2(0x21, 0x31, unix_block(b"/run/client.sock\0rest")): "/run/client.sock",
    v2(0x21, 0x31, unix_block(b"\0abstract")): b"\0abstract",
}

NONSENSE = [
    # Version 1: exactly one space each, no leading zeros, nothing left out or added.
    v1("TCP4 203.0.113.7 192.0.2.1  56324 443"),
    v1("TCP4  203.0.113.7 192.0.2.1 56324 443"),
    v1("TCP4 203.0.113.7 192.0.2.1 56324 443 "),
    v1("TCP4 203.0.113.7 192.0.2.1 56324 443 5"),
    v1("TCP4 203.0.113.7 192.0.2.1 56324"),
    v1("TCP4 203.0.113.7 192.0.2.1 056324 443"),
    v1("TCP4 203.0.113.7 192.0.2.1 65536 443"),
    v1("TCP4 203.0.113.7 192.0.2.1 1 65536"),
    v1("TCP4 203.0.113.7 192.0.2.1 -1 443"),
    v1("TCP4 203.0.113.7 192.0.2.1 +1 443"),
    v1("TCP4 203.0.113.7 192.0.2.1 1_0 443"),
    v1("TCP4 203.0.113.007 192.0.2.1 56324 443"),
    v1("TCP4 203.0.113.256 192.0.2.1 56324 443"),
    v1("TCP4 203.0.113.7 192.0.2.256 56324 443"),
    v1("TCP4 203.0.113 192.0.2.1 56324 443"),
    v1("TCP4 2001:db8::7 ::1 56324 443"),
    v1("TCP6 203.0.113.7 192.0.2.1 56324 443"),
    v1("TCP6 2001:db8::7::1 ::1 56324 443"),
    v1("TCP6 fe80::1%eth0 ::1 56324 443"),
    v1("TCP6 fe80::1%\x1b[31m ::1 56324 443"),
    v1("TCP6 [2001:db8::7] ::1 56324 443"),
    v1("TCP5 203.0.113.7 192.0.2.1 56324 443"),
    v1("tcp4 203.0.113.7 192.0.2.1 56324 443"),
    v1("UDP4 203.0.113.7 192.0.2.1 56324 443"),
    v1("UNKNOWNS 1"),
    v1("          "),
    b"PROXYTCP4 203.0.113.7 192.0.2.1 56324 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443\n\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443\r\r\n",
    b"PROXY TCP4 203.0.113.7\r192.0.2.1 56324 443\r\n",
    b"PROXY\r\n\r\n\r\n\r\n\r\n",
    b"PROXY UNKNOWN\n" + 300 * b"x",
    b"PROXY UNKNOWN " + 300 * b"x" + b"\r\n",
    b"PROXY UNKNOWN " + 92 * b"x" + b"\r\n",  # 108 bytes, one too many
    b"PROXY UNKNOWN " + 91 * b"x" + b"\r\r\n",
    # Version 2: another signature, version or command, no such family or protocol, too short for its family.
    b"\r\n\r\n\0\r\nQUIT\r\x20\x00\0\0",
    b"\r\n\r\n\0" + 300 * b"x",
    v2(0x10, 0x00),
    v2(0x30, 0x00),
    v2(0x01, 0x11, block("203.0.113.7", 56324)),
    v2(0x22, 0x11, block("203.0.113.7", 56324)),
    v2(0x2F, 0x11, block("203.0.113.7", 56324)),
    v2(0x21, 0x41, block("203.0.113.7", 56324)),
    v2(0x21, 0xF1, block("203.0.113.7", 56324)),
    v2(0x21, 0x13, block("203.0.113.7", 56324)),
    v2(0x21, 0x11, block("203.0.113.7", 56324)[:-1]),
    v2(0x21, 0x21, block("2001:db8::7", 56324)[:-1]),
    v2(0x21, 0x31, unix_block(b"/run/client.sock")[:-1]),
    v2(0x21, 0x11),
    # Something else.
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",  # TLS
    QUESTION,
    300 * b"\0",
    b"PROXX TCP4 203.0.113.7 192.0.2.1 56324 443\r\n",
]


def short(value: object) -> str:
    """Name a test after its data."""
    return repr(value)[:60]


async def be_reset(stream: trio.abc.Stream) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some(1)


# Headers.


@pytest.mark.parametrize(("header", "client"), HEADERS.items(), ids=short)
async def test_header_in_one_piece(header: bytes, client: object) -> None:
    """Each form of header names the client as the system would; nothing beyond it is taken."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(header + b"request")
    with trio.fail_after(LIMIT):
        assert await receive_header(receiver) == client
        assert await receive_exactly(receiver, 7) == b"request"


@given(st.sampled_from([header for header in HEADERS if len(header) < 1000]), cuts)
async def test_header_in_any_pieces(header: bytes, cuts: int | list[int]) -> None:
    """However a header is fragmented, it is the same, and what follows stays in the stream."""
    sender, receiver = fragmented_stream_pair(to_second=cuts)
    await sender.send_all(header + b"request")
    assert await receive_header(receiver) == HEADERS[header]
    assert await receive_exactly(receiver, 7) == b"request"


@pytest.mark.parametrize("header", [v1("UNKNOWN"), LOCAL])
async def test_shortest_headers_in_all_pieces(header: bytes) -> None:
    """Every way to cut the shortest headers, of each version, around their ends."""
    for tail in fragmentations(10):
        sender, receiver = fragmented_stream_pair(to_second=[len(header) + 5 - 10, *tail])
        await sender.send_all(header + b"hello")
        assert await receive_header(receiver) is None
        assert await receive_exactly(receiver, 5) == b"hello"


@pytest.mark.parametrize("data", NONSENSE, ids=short)
async def test_nonsense(data: bytes) -> None:
    """Whatever does not match the specification exactly is an error, without waiting for more."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(data)
    with trio.fail_after(LIMIT), pytest.raises(HeaderError) as caught:
        await receive_header(receiver)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@given(st.binary(max_size=300), cuts)
async def test_any_bytes(data: bytes, cuts: int | list[int]) -> None:
    """Whatever comes, it is an error or an end; nothing else happens."""
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11", SIGNATURE + b"\x21\x31\0\xd8"):
        sender, receiver = fragmented_stream_pair(to_second=cuts)
        await sender.send_all(start + data)
        await sender.aclose()
        with contextlib.suppress(HeaderError, IncompleteReadError):
            client = await receive_header(receiver)
            assert client is None or format_address(client).isprintable()


@pytest.mark.parametrize("header", [v1("TCP4 203.0.113.7 192.0.2.1 56324 443"), V4])
async def test_end_of_stream(header: bytes) -> None:
    """An end before the header is no header's error, and an end inside it is."""
    for size in range(len(header)):
        sender, receiver = trio.testing.memory_stream_pair()
        await sender.send_all(header[:size])
        await sender.send_eof()
        with pytest.raises(IncompleteReadError if size < 5 else HeaderError, match="end of stream after"):
            await receive_header(receiver)


async def test_checkpoint() -> None:
    """A header that is there already is a checkpoint all the same."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(V4)
    with trio.testing.assert_checkpoints():
        await receive_header(receiver)


@given(
    st.ip_addresses(v=4) | st.ip_addresses(v=6),
    st.integers(0, 65535),
    st.binary(max_size=50),
)
def test_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, tlvs: bytes) -> None:
    """Every address comes out as it went in, in both versions."""
    family, name = (0x11, "TCP4") if address.version == 4 else (0x21, "TCP6")
    header = v2(0x21, family, block(str(address), port) + tlvs)
    assert check_v2_start(header[:16]) == len(header) - 16
    found = parse_v2(header[:16], header[16:])
    assert isinstance(found, tuple)
    assert (ipaddress.ip_address(found[0]), found[1]) == (address, port)
    assert parse_v1(v1(f"{name} {address} {address} {port} 1")) == (str(address), port)


# Whose headers are believed.


@pytest.mark.parametrize(
    ("address", "networks", "trusted"),
    [
        (("10.1.2.3", 1), ["10.0.0.0/8"], True),
        (("10.1.2.3", 1), ["192.0.2.1", "10.0.0.0/8"], True),
        (("11.1.2.3", 1), ["10.0.0.0/8"], False),
        (("192.0.2.1", 1), ["192.0.2.1"], True),
        (("192.0.2.2", 1), ["192.0.2.1"], False),
        (("::ffff:10.1.2.3", 1, 0, 0), ["10.0.0.0/8"], True),
        (("::ffff:11.1.2.3", 1, 0, 0), ["10.0.0.0/8"], False),
        (("2001:db8::1", 1, 0, 0), ["2001:db8::/32"], True),
        (("2001:db9::1", 1, 0, 0), ["2001:db8::/32"], False),
        (("10.1.2.3", 1), ["::/0"], False),
        (("2001:db8::1", 1, 0, 0), ["0.0.0.0/0"], False),
        (("10.1.2.3", 1), ["unix"], False),
        ("", ["unix"], True),
        ("/run/proxy.sock", ["10.0.0.0/8", "unix"], True),
        (b"\0abstract", ["unix"], True),
        ("", ["0.0.0.0/0", "::/0"], False),
        (None, ["0.0.0.0/0", "::/0", "unix"], False),
    ],
)
def test_trusted_proxies(address: object, networks: list[str], trusted: bool) -> None:  # noqa: FBT001
    """A proxy is trusted if a network has its address; ``unix`` stands for all that come by UNIX sockets."""
    assert is_trusted(address, [trusted_network(network) for network in networks]) is trusted


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "proxy.example", "UNIX", "10.0.0.1:80"])
def test_what_is_no_network(text: str) -> None:
    """A network is an address or CIDR without host bits: a name, or a slip, is an error."""
    with pytest.raises(ValueError, match=r"."):
        trusted_network(text)


# Serving, in a network in memory.


PROXY, STRANGER = "10.0.0.1", "192.0.2.66"


async def name_peer(stream: trio.abc.Stream) -> None:
    """Answer each line with the client's address."""
    async with Connection(stream) as connection:
        async for _ in connection.requests(lambda connection: connection.receive_until(b"\n", max_bytes=10)):
            await connection.send_all(f"{connection.peer}\n".encode())


class Server:
    network: Network
    shutdown: trio.Event
    stats: ServerStats

    async def connect(self, source: str = PROXY) -> NetworkStream:
        return await self.network.connect("server", 9000, source=source)


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextlib.asynccontextmanager
async def proxied(
    handler: Handler = name_peer, header_timeout: float = 30, limit: ClientLimit | None = None
) -> AsyncIterator[Server]:
    """Serve around a block, for a proxy at 10.0.0.1; in the end, stop."""
    server = Server()
    server.network, server.shutdown = Network(seed=1, latency=0.0), trio.Event()
    listener = server.network.listen("server", 9000)
    behind = behind_proxies(handler, [trusted_network(PROXY)], header_timeout, limit)

    async def serve() -> None:
        server.stats = await serve_listeners(behind, [listener], shutdown=server.shutdown)

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield server
            server.shutdown.set()


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (V4, b"203.0.113.7:56324\n"),
        (V6, b"[2001:db8::7]:56324\n"),
        (v1("TCP6 2001:db8::7 ::1 56324 443"), b"[2001:db8::7]:56324\n"),
        (v2(0x21, 0x31, unix_block(b"/run/\x1b[31m\n.sock")), b"unix:/run/\\x1b[31m\\n.sock\n"),
        (v2(0x21, 0x31, unix_block(b"\0a\nb")), b"unix:@a\\nb\n"),
        (v2(0x21, 0x31, unix_block(b"")), b"unix\n"),
    ],
)
async def test_peer(header: bytes, name: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """`Connection.peer` is the client that the header names; what could forge a line of the log is escaped."""
    async with proxied() as server, await server.connect() as stream:
        await stream.send_all(header + b"\n")
        assert await receive_exactly(stream, len(name)) == name


@pytest.mark.parametrize("header", [LOCAL, v1("UNKNOWN"), v2(0x21, 0)])
async def test_proxy_itself(header: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """Where the header names nobody, the peer is the proxy with its own address."""
    async with proxied() as server, await server.connect() as stream:
        await stream.send_all(header + b"\n")
        name = f"{format_address(stream.local_address)}\n".encode()
        assert await receive_exactly(stream, len(name)) == name


async def complain(stream: trio.abc.Stream) -> None:
    async with Connection(stream) as connection:
        await connection.receive_some()
        raise ProtocolError("nonsense")


async def crash(stream: trio.abc.Stream) -> None:
    raise RuntimeError("a bug")


async def test_log_names_the_client(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """What the client does wrong, or a handler for it, is logged with the client's address."""
    for handler, line in (
        (complain, "203.0.113.7:56324 to server:9000: protocol error: nonsense"),
        (crash, "connection 1 from 203.0.113.7:56324 to server:9000: the handler crashed"),
    ):
        caplog.clear()
        async with proxied(handler) as server, await server.connect() as stream:
            await stream.send_all(V4 + b"\n")
            with contextlib.suppress(trio.BrokenResourceError):
                await receive_to_end(stream)
        assert warnings(caplog) == [line]


async def test_verbose_log(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """The log of each connection tells which of the proxy's is which client's."""
    async with proxied() as server, await server.connect() as stream:
        proxy = format_address(stream.local_address)
        await stream.send_all(V4 + b"\n")
        await stream.receive_some()
    assert caplog.messages[:2] == [
        f"connection 1 from {proxy} to server:9000",
        f"{proxy} to server:9000: a PROXY header names 203.0.113.7:56324",
    ]


async def test_stranger_is_refused(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Who is no trusted proxy is reset at once, header or not, with one warning; the proxy's clients are served."""
    async with proxied() as server:
        for data in (V4 + b"\n", b""):
            async with await server.connect(STRANGER) as stream:
                began = trio.current_time()
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(data)
                await be_reset(stream)
                assert trio.current_time() - began < 0.1
        async with await server.connect() as stream:
            await stream.send_all(V4 + b"\n")
            assert await stream.receive_some() == b"203.0.113.7:56324\n"
    assert [re.sub(r":\d{5}", "", line) for line in warnings(caplog)] == [
        f"{STRANGER} to server:9000: refused: not a trusted proxy"
    ] * 2
    assert (server.stats.accepted, server.stats.refused) == (3, 2)


@pytest.mark.parametrize("data", NONSENSE, ids=short)
async def test_nonsense_ends_one_connection(
    data: bytes, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no header is one warning, and a reset at once; another connection of the proxy's goes on."""
    async with proxied() as server, await server.connect() as good:
        await good.send_all(V4)
        async with await server.connect() as bad:
            began = trio.current_time()
            with contextlib.suppress(trio.BrokenResourceError):
                await bad.send_all(data)
            await be_reset(bad)
            assert trio.current_time() - began < 0.1
        await good.send_all(b"\n")
        assert await good.receive_some() == b"203.0.113.7:56324\n"
    [line] = warnings(caplog)
    assert line.startswith(format_address(bad.local_address) + " to server:9000: ")
    assert line.isprintable()
    assert server.stats.refused == server.stats.crashed == 0


async def dribble(stream: trio.abc.SendStream) -> None:
    """Send a byte a second: 28 in all."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        for byte in V4:
            await trio.sleep(1)
            await stream.send_all(bytes([byte]))


async def test_slow_header(autojump_clock: trio.testing.MockClock) -> None:
    """A header that is complete in time is one, however slowly it came."""
    async with proxied(header_timeout=30) as server, await server.connect() as stream:
        await dribble(stream)
        await stream.send_all(b"\n")
        assert await receive(stream, 18) == b"203.0.113.7:56324\n"


@pytest.mark.parametrize("begins", [False, True])
async def test_late_header(
    begins: bool,  # noqa: FBT001
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A header has so many seconds in all, whether or not some of it has come; then there is a warning, and a reset."""
    async with proxied(header_timeout=20) as server, await server.connect() as stream:
        began = trio.current_time()
        if begins:
            nursery.start_soon(dribble, stream)
        await be_reset(stream)
        assert trio.current_time() - began == pytest.approx(20, abs=0.1)
    name = format_address(stream.local_address)
    assert warnings(caplog) == [f"{name} to server:9000: timed out waiting for a PROXY header"]


@pytest.mark.parametrize("part", [b"", V4[:3], V4[:20]])
async def test_stop(part: bytes, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """A stop ends the wait for a header as it ends that for a first request: quietly, a second after the accept."""
    async with proxied() as server, await server.connect() as early:
        await trio.sleep(10)
        async with await server.connect() as new:
            for stream in (early, new):
                await stream.send_all(part)
            await trio.sleep(0.5)
            server.shutdown.set()
            began = trio.current_time()
            for stream, seconds in ((early, 0), (new, FIRST_REQUEST_GRACE - 0.5)):
                await be_reset(stream)
                assert trio.current_time() - began == pytest.approx(seconds, abs=0.1)
    assert warnings(caplog) == []


async def test_header_that_comes_in_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    """A client that connected just before the stop is served, if its header and first request come within a second."""
    async with proxied() as server, await server.connect() as stream:
        await trio.sleep(0.1)
        server.shutdown.set()
        await trio.sleep(0.1)
        await stream.send_all(V4)
        await trio.sleep(0.1)
        await stream.send_all(b"\n")
        assert await receive_to_end(stream) == b"203.0.113.7:56324\n"


async def hang_up(stream: NetworkStream) -> None:
    await stream.aclose()


async def break_off(stream: NetworkStream) -> None:
    stream.reset()
    await stream.aclose()


@pytest.mark.parametrize(
    ("data", "leave", "complaints"),
    [
        (b"", hang_up, []),
        (b"", break_off, []),
        (V4[:20], break_off, []),
        (b"PRO", hang_up, ["no PROXY header: end of stream after 3 of 5 bytes"]),
        (V4[:20], hang_up, ["incomplete PROXY header: end of stream after 4 of 12 bytes"]),
    ],
)
async def test_proxy_that_leaves(
    data: bytes,
    leave: Callable[[NetworkStream], Awaitable[None]],
    complaints: list[str],
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A proxy that just looks whether the port is open, or breaks off, is no news; half a header is a warning."""
    async with proxied() as server, await server.connect() as stream:
        await stream.send_all(data)
        await trio.sleep(1)
        await leave(stream)
        await trio.sleep(1)
    name = f"{format_address(stream.local_address)} to server:9000: "
    assert warnings(caplog) == [name + complaint for complaint in complaints]
    assert (server.stats.active, server.stats.crashed, server.stats.refused) == (0, 0, 0)


# The limit.


async def test_limit_is_the_clients(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Behind a proxy, a client is who the header names: each has its own limit, and the proxy none but its own."""
    async with proxied(limit=ClientLimit(1)) as server, contextlib.AsyncExitStack() as stack:

        async def client(header: bytes) -> NetworkStream:
            stream = await stack.enter_async_context(await server.connect())
            await stream.send_all(header + b"\n")
            return stream

        streams = [await client(v1(f"TCP4 203.0.113.{number} 0.0.0.0 1 1")) for number in range(5)]
        streams.append(await client(LOCAL))
        for stream in streams:
            assert (await stream.receive_some()).endswith(b"\n")
        for _ in range(2):
            await be_reset(await client(v1("TCP4 203.0.113.0 0.0.0.0 2 2")))
        await streams[0].aclose()
        await trio.sleep(10)
        again = await client(v1("TCP4 203.0.113.0 0.0.0.0 3 3"))
        assert await again.receive_some() == b"203.0.113.0:3\n"
    assert warnings(caplog) == ["203.0.113.0 has 1 connections, the maximum for one client: more are refused"]
    assert (server.stats.accepted, server.stats.refused) == (9, 2)


async def test_connection_without_header_takes_no_clients_place(autojump_clock: trio.testing.MockClock) -> None:
    """As long as nobody knows whose they are, connections count for no client."""
    async with proxied(limit=ClientLimit(1)) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(await server.connect())
        async with await server.connect() as stream:
            await stream.send_all(LOCAL + b"\n")
            assert (await stream.receive_some()).endswith(b"\n")
    assert server.stats.refused == 0


# Serving on sockets.


@contextlib.asynccontextmanager
async def proxied_on_sockets(listener: trio.SocketListener, handler: Handler, *networks: str) -> AsyncIterator[None]:
    behind = behind_proxies(handler, [trusted_network(network) for network in networks], 30, None)
    shutdown = trio.Event()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_listeners, behind, [listener], shutdown=shutdown))
            yield
            shutdown.set()


@pytest.mark.parametrize("header", [V4, v1("TCP4 203.0.113.7 192.0.2.1 56324 443")])
async def test_tcp(header: bytes) -> None:
    """On a socket, what follows the header in the same segment is the client's first request, and none of it lost."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with proxied_on_sockets(listener, name_peer, "127.0.0.0/8"):
        async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
            await stream.send_all(header + b"\n\n\n")
            assert await receive(stream, 54) == 3 * b"203.0.113.7:56324\n"
        async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
            for byte in header + b"\n":
                await stream.send_all(bytes([byte]))
                await trio.lowlevel.checkpoint()
            assert await receive(stream, 18) == b"203.0.113.7:56324\n"


async def test_reset_on_a_socket(caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that resets the connection, as a health check may, is no news and no crash."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with proxied_on_sockets(listener, name_peer, "127.0.0.1"):
        stream = await trio.testing.open_stream_to_socket_listener(listener)
        await trio.testing.wait_all_tasks_blocked(0.02)
        reset(stream)
        await trio.testing.wait_all_tasks_blocked(0.02)
    assert warnings(caplog) == []
    assert any("waiting for a PROXY header: Connection reset by peer" in line for line in caplog.messages)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no UNIX sockets")
async def test_unix_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy on a UNIX socket is trusted if the operator says so, and only then."""
    for number, (network, trusted) in enumerate([("unix", True), ("0.0.0.0/0", False)]):
        path = tmp_path / str(number)
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(str(path))
        listening.listen()
        async with (
            proxied_on_sockets(trio.SocketListener(listening), name_peer, network),
            await trio.open_unix_socket(path) as stream,
        ):
            if trusted:
                await stream.send_all(V4 + b"\n")
                assert await receive(stream, 18) == b"203.0.113.7:56324\n"
            else:
                with contextlib.suppress(trio.BrokenResourceError):  # a UNIX socket knows no reset
                    assert await stream.receive_some() == b""
    assert warnings(caplog) == [f"unix to unix:{tmp_path}/1: refused: not a trusted proxy"]


# As a process.


def v4_from(host: str) -> bytes:
    return v2(0x21, 0x11, block(host, 56324))


async def ask(stream: trio.abc.Stream) -> None:
    await stream.send_all(QUESTION)
    assert await receive(stream, len(ANSWER)) == ANSWER


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_command_line(workers: str) -> None:
    """The options reach the servers, also through a supervisor: all networks, and the time that a header has."""
    options = ["--proxy-protocol=127.0.0.8", "--proxy-protocol=127.0.0.0/30", "--request-timeout=0.3"]
    complaints = [
        r"127\.0\.0\.1:\d+ to 127\.0\.0\.1:\d+: timed out waiting for a PROXY header",
        r"127\.0\.0\.9:\d+ to 127\.0\.0\.1:\d+: refused: not a trusted proxy",
        r"203\.0\.113\.1:56324 to 127\.0\.0\.1:\d+: protocol error: .*",
    ]
    async with serving("op", *options, f"--workers={workers}", complaints=complaints) as server:
        host, _, port = server.address.rpartition(":")
        connect = partial(trio.open_tcp_stream, host, int(port))
        async with await connect() as late:
            await be_reset(late)
        with contextlib.suppress(OSError):  # the reset may come before connecting is done
            async with await connect(local_address="127.0.0.9") as stranger:
                await be_reset(stranger)
        for local in ("127.0.0.1", "127.0.0.8"):
            async with await connect(local_address=local) as stream:
                await stream.send_all(v4_from("203.0.113.1"))
                await ask(stream)
                if local == "127.0.0.8":
                    await stream.send_all(b"\0")
                    assert await stream.receive_some() == b""
        server.stop()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no UNIX sockets")
async def test_command_line_on_a_unix_socket(tmp_path: Path) -> None:
    """With ``unix``, a proxy may connect to the UNIX socket."""
    async with serving("op", "--proxy-protocol=unix", where=["--unix", str(tmp_path / "socket")]) as server:
        async with await server.tcp() as stream:
            await stream.send_all(V4)
            await ask(stream)
        server.stop()


async def test_header_before_tls(tmp_path: Path) -> None:
    """The header comes before TLS; what TLS then complains of is the client's doing, and so is what is counted."""
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    options = ["--proxy-protocol=127.0.0.1", f"--tls-cert={tmp_path / 'server.pem'}", "--max-connections-per-client=1"]
    complaints = [
        r"203\.0\.113\.1:56324 to 127\.0\.0\.1:\d+: connection broken while waiting for a TLS handshake: .*",
        r"203\.0\.113\.1 has 1 connections, the maximum for one client: more are refused",
    ]
    async with serving("op", *options, complaints=complaints) as server:

        async def connect(client: str) -> trio.SocketStream:
            stream = await server.tcp()
            await stream.send_all(v4_from(client))
            return stream

        async with await connect("203.0.113.1") as stream:
            await stream.send_all(b"no TLS at all")
            await receive_to_end(stream)
        await server.logged("TLS handshake")
        async with contextlib.AsyncExitStack() as stack:
            for client in ("203.0.113.1", "203.0.113.2"):
                stream = await stack.enter_async_context(await connect(client))
                tls = trio.SSLStream(stream, trust, server_hostname="localhost")
                await ask(tls)
            async with await connect("203.0.113.1") as third:
                await be_reset(third)
        server.stop()
