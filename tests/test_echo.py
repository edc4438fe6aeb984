"""Echo over fakes: every fragmentation, and clients and servers that misbehave."""

import logging

import pytest
import trio
import trio.testing
from helpers import cuts
from hypothesis import given
from hypothesis import strategies as st

from trioproto import IncompleteReadError, echo_handler, echo_request
from trioproto.testing import breaking_stream, converse, fragmentations, fragmented_stream_pair, stalling_stream

# More than a receive gives at once, so that the echo needs several rounds.
LARGE = bytes(range(251)) * 1000


@given(sent=st.binary(max_size=500), cuts=cuts)
async def test_handler_in_any_pieces(sent: bytes, cuts: int | list[int]) -> None:
    """All bytes come back, and none else, however they arrive at the server."""
    assert await converse(echo_handler, sent, cuts) == sent


async def test_handler_in_all_pieces() -> None:
    """A short message comes back whole for every way of cutting it."""
    for sizes in fragmentations(8):
        assert await converse(echo_handler, b"message\n", sizes) == b"message\n"


@given(messages=st.lists(st.binary(max_size=100), max_size=10), to_client=cuts, to_server=cuts)
async def test_request_in_any_pieces(
    messages: list[bytes], to_client: int | list[int], to_server: int | list[int]
) -> None:
    """One request after the other gets its own echo, however the bytes arrive in either direction."""
    client, served = fragmented_stream_pair(to_first=to_client, to_second=to_server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_handler, served)
        assert [await echo_request(client, message) for message in messages] == messages
        await client.aclose()


async def test_handler_replies_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Each byte is echoed when it arrives; the server does not wait for more of them."""
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_handler, served)
        with trio.fail_after(1):
            for byte in b"message":
                await client.send_all(bytes([byte]))
                assert await client.receive_some() == bytes([byte])
        await client.aclose()


async def test_request_larger_than_all_buffers(autojump_clock: trio.testing.MockClock) -> None:
    """A message larger than everything that buffers it on the way is no deadlock, because both directions move."""
    client, served = trio.testing.lockstep_stream_pair()  # buffers nothing
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_handler, served)
        with trio.fail_after(1):
            assert await echo_request(client, LARGE) == LARGE
        await client.aclose()


async def test_client_that_never_reads(autojump_clock: trio.testing.MockClock) -> None:
    """No echoes pile up for a client that does not read them: it is not read from either."""
    client, served = trio.testing.lockstep_stream_pair()  # buffers nothing
    sent = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_handler, served)
        with trio.move_on_after(100) as scope:
            for _ in range(100):
                await client.send_all(b"message")
                sent += 1
        nursery.cancel_scope.cancel()
    assert scope.cancelled_caught
    assert sent == 1


async def test_handler_with_silent_client(autojump_clock: trio.testing.MockClock) -> None:
    """The handler passes cancellation on, and the client then sees the connection closed."""
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(b"message")
    with trio.move_on_after(1) as scope:
        await echo_handler(stalling_stream(served, 4))
    assert scope.cancelled_caught
    assert await client.receive_some() == b"mess"
    assert await client.receive_some() == b""


@pytest.mark.parametrize("after", [0, 4])
async def test_handler_with_breaking_client(after: int, caplog: pytest.LogCaptureFixture) -> None:
    """A client that breaks the connection ends the handler; that is no error, and logged for debugging only."""
    caplog.set_level(logging.DEBUG, "trioproto")
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(b"message")
    await echo_handler(breaking_stream(served, after))
    await client.send_eof()
    assert await client.receive_some() == b"mess"[:after]
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert "StapledStream: connection broken while waiting for a request: broken on purpose" in caplog.text


async def test_handler_with_client_that_takes_no_reply() -> None:
    """A client that is gone when its echo is sent ends the handler without an error."""
    client, served = trio.testing.memory_stream_pair()
    await client.send_all(b"message")
    await client.aclose()
    await echo_handler(served)
    with pytest.raises(trio.ClosedResourceError):
        await served.receive_some()


async def test_handler_lets_bugs_pass() -> None:
    """The handler hides no errors but those that a client causes."""
    _, served = trio.testing.memory_stream_pair()
    await served.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await echo_handler(served)


async def test_request_of_nothing() -> None:
    """An empty message has an empty echo."""
    client, _ = trio.testing.memory_stream_pair()
    assert await echo_request(client, b"") == b""


async def test_request_to_server_that_ends(autojump_clock: trio.testing.MockClock) -> None:
    """If the server ends the connection before all is echoed, the error itself is raised, not a group."""
    client, served = trio.testing.lockstep_stream_pair()

    async def serve() -> None:
        await served.send_all(await served.receive_some(4))
        await served.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with trio.fail_after(1), pytest.raises(IncompleteReadError) as caught:
            await echo_request(client, b"message")
    assert (caught.value.partial, caught.value.expected) == (b"mess", 7)


async def test_request_to_server_that_breaks() -> None:
    """If the connection breaks while the echo is received, the error itself is raised, not a group."""
    client, served = trio.testing.memory_stream_pair()
    await served.send_all(b"mess")
    with pytest.raises(trio.BrokenResourceError):
        await echo_request(breaking_stream(client, 4), b"message")


async def test_request_to_server_that_takes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """If the connection breaks while the message is sent, the error itself is raised, and at once."""
    client, served = trio.testing.memory_stream_pair()
    await served.aclose()
    with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):
        await echo_request(stalling_stream(client, 0), b"message")


async def test_request_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """A request to a server that has gone silent can be cancelled."""
    client, _ = trio.testing.memory_stream_pair()
    with trio.move_on_after(1) as scope:
        await echo_request(client, b"message")
    assert scope.cancelled_caught


async def test_request_on_a_closed_stream() -> None:
    """A request on a stream that is closed fails with that error itself, not with a group around it."""
    client, _ = trio.testing.memory_stream_pair()
    await client.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await echo_request(client, b"message")
