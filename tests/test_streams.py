"""`receive_exactly`: exactly so many bytes, however they arrive."""

import pickle
from collections.abc import Callable

import pytest
import trio
import trio.testing
from helpers import cuts
from hypothesis import given
from hypothesis import strategies as st

from trioproto import IncompleteReadError, receive_exactly
from trioproto.testing import breaking_stream, fragmented_stream_pair, stalling_stream


@given(messages=st.lists(st.binary(max_size=100)), cuts=cuts)
async def test_messages_in_any_pieces(messages: list[bytes], cuts: int | list[int]) -> None:
    """Messages come out as they were sent, whether they arrive in many pieces or many in one."""
    sender, receiver = fragmented_stream_pair(to_second=cuts)
    await sender.send_all(b"".join(messages))
    assert [await receive_exactly(receiver, len(message)) for message in messages] == messages


async def test_leaves_what_follows() -> None:
    """Not a byte beyond the message is taken from the stream, though more has arrived."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(b"message" + b"what follows")
    assert await receive_exactly(receiver, 7) == b"message"
    assert await receiver.receive_some() == b"what follows"


async def test_waits_for_the_rest(autojump_clock: trio.testing.MockClock) -> None:
    """A message whose pieces are hours apart is waited for."""
    sender, receiver = trio.testing.memory_stream_pair()

    async def send_slowly() -> None:
        for byte in b"message":
            await trio.sleep(3600)
            await sender.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_slowly)
        assert await receive_exactly(receiver, 7) == b"message"
    assert trio.current_time() == pytest.approx(7 * 3600)


async def test_large_message() -> None:
    """A message may be larger than what one receive gives at most."""
    message = bytes(range(251)) * 4000
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(message + b"what follows")
    assert await receive_exactly(receiver, len(message)) == message
    assert await receiver.receive_some() == b"what follows"


async def test_result_is_bytes() -> None:
    """The result is of type bytes, also from streams that give a bytearray as Trio's memory streams do."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(b"message")
    assert type(await receive_exactly(receiver, 7)) is bytes


@pytest.mark.parametrize("break_off", [stalling_stream, breaking_stream])
async def test_nothing_needs_no_stream(
    break_off: Callable[[trio.abc.HalfCloseableStream, int], trio.abc.HalfCloseableStream],
    autojump_clock: trio.testing.MockClock,
) -> None:
    """No bytes are there at once, even when the stream has no more to give."""
    _, receiver = trio.testing.memory_stream_pair()
    with trio.fail_after(1):
        assert await receive_exactly(break_off(receiver, 0), 0) == b""


@pytest.mark.parametrize("n", [0, 1, 7])
async def test_is_a_checkpoint(n: int) -> None:
    """Each call is a checkpoint, so that a loop over calls can be cancelled and lets other tasks run."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(b"message")
    with trio.testing.assert_checkpoints():
        await receive_exactly(receiver, n)


async def test_negative_number() -> None:
    """A number of bytes below 0 is an error, and nothing is received."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(b"message")
    with pytest.raises(ValueError, match="-1"):
        await receive_exactly(receiver, -1)
    assert await receiver.receive_some() == b"message"


@given(message=st.binary(max_size=100), missing=st.integers(1, 2**40), cuts=cuts)
async def test_end_of_stream(message: bytes, missing: int, cuts: int | list[int]) -> None:
    """If the stream ends first, the error holds what had arrived, and how much should have."""
    sender, receiver = fragmented_stream_pair(to_second=cuts)
    await sender.send_all(message)
    await sender.send_eof()
    with pytest.raises(IncompleteReadError) as caught:
        await receive_exactly(receiver, len(message) + missing)
    assert caught.value.partial == message
    assert type(caught.value.partial) is bytes
    assert caught.value.expected == len(message) + missing
    assert caught.value.stream is receiver


def test_incomplete_read_error() -> None:
    """The error is an `EOFError`, says in words what happened, and survives pickling."""
    error = IncompleteReadError(b"mess", 7)
    assert isinstance(error, EOFError)
    assert str(error) == "end of stream after 4 of 7 bytes"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.partial, copy.expected, copy.stream) == (b"mess", 7, None)


async def test_broken_stream() -> None:
    """A connection that breaks is no end of stream: its own error passes through."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(b"message")
    with pytest.raises(trio.BrokenResourceError):
        await receive_exactly(breaking_stream(receiver, 4), 7)


async def test_cancellation(autojump_clock: trio.testing.MockClock) -> None:
    """A call that waits for bytes that never come can be cancelled."""
    sender, receiver = trio.testing.memory_stream_pair()
    await sender.send_all(b"message")
    with trio.move_on_after(1) as scope:
        await receive_exactly(stalling_stream(receiver, 4), 7)
    assert scope.cancelled_caught
