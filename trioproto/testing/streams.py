"""In-memory streams for tests of protocols: with fragmented deliveries, that stall, or that break.

To test a handler with every fragmentation of what a client sends::

    @pytest.mark.parametrize("cuts", list(fragmentations(len(REQUEST))))
    async def test_fragmented(cuts):
        assert await converse(handler, REQUEST, cuts) == REPLY
"""

import contextlib
import itertools
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator

import attrs
import trio
import trio.testing

Cuts = int | Iterable[int]
"""How to split deliveries: one size in bytes for all, or their sizes in order, after which they are not split."""


def random_cuts(seed: int, largest: int = 16) -> Iterator[int]:
    """Yield random sizes from 1 to ``largest`` forever; the same ones for the same ``seed``."""
    chance = random.Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        yield chance.randint(1, largest)


def fragmentations(length: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to split ``length`` bytes into deliveries: ``2 ** (length - 1)`` ways.

    Args:
        length: 1 or more; tests are quick up to about 12.
    """
    for cut_here in itertools.product([False, True], repeat=length - 1):
        places = [0, *(place for place, cut in enumerate(cut_here, 1) if cut), length]
        yield tuple(end - start for start, end in itertools.pairwise(places))


def fragmented_stream_pair(
    to_first: Cuts = (), to_second: Cuts = ()
) -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
    """Create two connected in-memory streams with fragmented deliveries.

    Args:
        to_first: how to split what the first stream receives: the size in bytes, 1 or more, of each delivery, or their
            sizes in order, after which deliveries are not split. They may be infinite, as from `random_cuts`.
        to_second: the same for what the second stream receives.

    Returns:
        The two streams. One ``receive_some`` never returns more than the rest of the current delivery, as if later
        bytes had not arrived yet.
    """
    first, second = trio.testing.memory_stream_pair()
    return _with_receiving(first, _Cutting(first, _sizes(to_first))), _with_receiving(
        second, _Cutting(second, _sizes(to_second))
    )


def stalling_stream(stream: trio.abc.HalfCloseableStream, after: int) -> trio.abc.HalfCloseableStream:
    """Wrap ``stream`` so that it delivers ``after`` bytes and then nothing more, not even end of stream.

    Receiving then waits until it is cancelled, as from a silent peer. Sending is not affected.
    """
    return _with_receiving(stream, _Failing(stream, after, trio.sleep_forever))


def breaking_stream(stream: trio.abc.HalfCloseableStream, after: int) -> trio.abc.HalfCloseableStream:
    """Wrap ``stream`` so that it delivers ``after`` bytes and then breaks.

    Receiving then raises `trio.BrokenResourceError`, as after a reset. Sending is not affected.
    """

    async def break_off() -> None:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError(f"broken on purpose after {after} bytes")

    return _with_receiving(stream, _Failing(stream, after, break_off))


async def converse(
    handler: Callable[[trio.abc.HalfCloseableStream], Awaitable[object]], sent: bytes, cuts: Cuts = ()
) -> bytes:
    """Run ``handler`` as a server for one client, and return everything that the client receives.

    The client sends ``sent``, then end of stream, and receives until the handler ends the connection. There is no
    time-out: use `trio.fail_after` for a handler that might not end.

    Args:
        handler: serves a stream, as for `trioproto.serve_tcp`. It need not close the stream.
        sent: what the client sends.
        cuts: how to split that into deliveries to the handler: their size, or their sizes in order, as for
            `fragmented_stream_pair`.

    Raises:
        ExceptionGroup: with what ``handler`` raises.

    On cancellation, the handler is cancelled, too.
    """
    client, served = fragmented_stream_pair(to_second=cuts)
    received = bytearray()

    async def serve() -> None:
        async with served:
            await handler(served)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with contextlib.suppress(trio.BrokenResourceError):  # the handler may end before it has received everything
            await client.send_all(sent)
            await client.send_eof()
        async for chunk in client:
            received += chunk
    return bytes(received)


def _sizes(cuts: Cuts) -> Iterator[float]:
    if isinstance(cuts, int):
        return itertools.repeat(cuts)
    return itertools.chain(cuts, itertools.repeat(math.inf))


@attrs.define(eq=False)
class _Cutting(trio.abc.ReceiveStream):
    _stream: trio.abc.ReceiveStream
    _sizes: Iterator[float]
    _left: float = 0  # of the current delivery

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self._left = self._left or next(self._sizes)
        most = min(math.inf if max_bytes is None else max_bytes, self._left)
        data = await self._stream.receive_some(None if most == math.inf else int(most))
        self._left -= len(data)
        return bytes(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


@attrs.define(eq=False)
class _Failing(trio.abc.ReceiveStream):
    _stream: trio.abc.ReceiveStream
    _left: int  # bytes before the failure
    _fail: Callable[[], Awaitable[object]]

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._left == 0:
            await self._fail()
        most = self._left if max_bytes is None else min(max_bytes, self._left)
        data = await self._stream.receive_some(most)
        self._left -= len(data)
        return bytes(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


def _with_receiving(
    stream: trio.abc.HalfCloseableStream, receiving: trio.abc.ReceiveStream
) -> trio.abc.HalfCloseableStream:
    return trio.StapledStream(stream, receiving)
