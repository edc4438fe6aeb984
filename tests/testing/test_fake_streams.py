"""The fakes do what the tests that stand on them take for granted."""

import itertools
from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trioproto.testing import (
    breaking_stream,
    converse,
    fragmentations,
    fragmented_stream_pair,
    random_cuts,
    stalling_stream,
)

Stream = trio.abc.HalfCloseableStream


async def deliveries(sender: Stream, receiver: Stream, sent: bytes, max_bytes: int | None = None) -> list[bytes]:
    """Send ``sent`` and end of stream, and return what each receive gives."""
    await sender.send_all(sent)
    await sender.send_eof()
    received = []
    while chunk := await receiver.receive_some(max_bytes):
        received.append(bytes(chunk))
    return received


def test_random_cuts() -> None:
    """Random sizes are the same for the same seed, others for another, and between 1 and the largest."""
    sizes = list(itertools.islice(random_cuts(1, largest=5), 1000))
    assert sizes == list(itertools.islice(random_cuts(1, largest=5), 1000))
    assert sizes != list(itertools.islice(random_cuts(2, largest=5), 1000))
    assert set(sizes) == {1, 2, 3, 4, 5}


def test_fragmentations() -> None:
    """Every way of cutting occurs once."""
    assert sorted(fragmentations(4)) == [
        (1, 1, 1, 1),
        (1, 1, 2),
        (1, 2, 1),
        (1, 3),
        (2, 1, 1),
        (2, 2),
        (3, 1),
        (4,),
    ]
    assert list(fragmentations(1)) == [(1,)]


@given(length=st.integers(1, 10))
def test_fragmentations_are_whole(length: int) -> None:
    """There are 2 ** (length - 1) fragmentations, all different, and each adds up to the length."""
    every = list(fragmentations(length))
    assert len(set(every)) == len(every) == 2 ** (length - 1)
    assert {sum(sizes) for sizes in every} == {length}


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ((), [b"abcdefg"]),
        (2, [b"ab", b"cd", b"ef", b"g"]),
        ((1, 3), [b"a", b"bcd", b"efg"]),
        (itertools.cycle((1, 2)), [b"a", b"bc", b"d", b"ef", b"g"]),
    ],
)
async def test_cuts(cuts: int | tuple[int, ...], expected: list[bytes]) -> None:
    """Deliveries have the one size, or the sizes in turn and after the last one no more cuts."""
    sender, receiver = fragmented_stream_pair(to_second=cuts)
    assert await deliveries(sender, receiver, b"abcdefg") == expected


@pytest.mark.parametrize("to_first", [True, False])
async def test_cuts_each_direction(to_first: bool) -> None:  # noqa: FBT001 - a direction
    """Each direction has cuts of its own, none unless they are given."""
    first, second = fragmented_stream_pair(to_first=2) if to_first else fragmented_stream_pair(to_second=2)
    assert await deliveries(second, first, b"abc") == ([b"ab", b"c"] if to_first else [b"abc"])
    assert await deliveries(first, second, b"abc") == ([b"abc"] if to_first else [b"ab", b"c"])


async def test_receiving_less_than_a_delivery() -> None:
    """A receive that asks for less gets less; what is left of the delivery comes next, and no more with it."""
    sender, receiver = fragmented_stream_pair(to_second=3)
    assert await deliveries(sender, receiver, b"abcdefg", max_bytes=2) == [b"ab", b"c", b"de", b"f", b"g"]


@pytest.mark.parametrize(("max_bytes", "expected"), [(None, [b"abcde"]), (3, [b"abc", b"de"])])
async def test_stalling(max_bytes: int | None, expected: list[bytes], autojump_clock: trio.testing.MockClock) -> None:
    """A stalling stream gives its bytes, then not even end of stream; it still sends, and can be cancelled."""
    sender, receiver = trio.testing.memory_stream_pair()
    stalling = stalling_stream(receiver, 5)
    received = []
    with trio.move_on_after(3600) as scope:
        await sender.send_all(b"abcdefg")
        await sender.send_eof()
        while chunk := await stalling.receive_some(max_bytes):
            received.append(chunk)
    assert scope.cancelled_caught
    assert received == expected
    await stalling.send_all(b"still here")
    assert await sender.receive_some() == b"still here"


@pytest.mark.parametrize(("max_bytes", "expected"), [(None, [b"abcde"]), (3, [b"abc", b"de"])])
async def test_breaking(max_bytes: int | None, expected: list[bytes]) -> None:
    """A breaking stream gives its bytes, then breaks; it still sends."""
    sender, receiver = trio.testing.memory_stream_pair()
    breaking = breaking_stream(receiver, 5)
    received = []

    async def receive() -> None:
        while chunk := await breaking.receive_some(max_bytes):
            received.append(chunk)

    await sender.send_all(b"abcdefg")
    with pytest.raises(trio.BrokenResourceError):
        await receive()
    assert received == expected
    await breaking.send_all(b"still here")
    assert await sender.receive_some() == b"still here"


@pytest.mark.parametrize("fail", [stalling_stream, breaking_stream])
async def test_end_before_failure(fail: Callable[[Stream, int], Stream]) -> None:
    """A stream that ends before it was to fail just ends."""
    sender, receiver = trio.testing.memory_stream_pair()
    assert await deliveries(sender, fail(receiver, 5), b"abc") == [b"abc"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda stream: stream,
        lambda stream: stalling_stream(stream, 1),
        lambda stream: breaking_stream(stream, 1),
    ],
)
async def test_close(wrap: Callable[[Stream], Stream]) -> None:
    """Closing a fake closes the connection under it."""
    first, second = fragmented_stream_pair()
    await wrap(first).aclose()
    assert await second.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await second.send_all(b"anybody there?")
    with pytest.raises(trio.ClosedResourceError):
        await first.receive_some()


async def test_converse() -> None:
    """The handler gets the client's bytes as they are cut, then end of stream; its replies come back whole."""
    got = []

    async def handler(stream: Stream) -> None:
        async for chunk in stream:
            got.append(chunk)
            await stream.send_all(chunk.upper())

    assert await converse(handler, b"abcde", cuts=(1, 2)) == b"ABCDE"
    assert got == [b"a", b"bc", b"de"]


async def test_converse_with_a_hasty_handler() -> None:
    """A handler may end before it has received anything; what it sent still comes back."""

    async def refuse(stream: Stream) -> None:
        await stream.send_all(b"not today")

    async def close(stream: Stream) -> None:
        await stream.aclose()

    assert await converse(refuse, b"hello") == b"not today"
    for _ in range(50):  # whether the client has sent by then is up to Trio's scheduler
        assert await converse(close, b"hello") == b""


async def test_converse_with_a_handler_that_fails() -> None:
    """What the handler raises comes out."""

    async def handler(stream: Stream) -> None:
        await stream.receive_some()
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await converse(handler, b"hello")
    assert caught.group_contains(ZeroDivisionError)
