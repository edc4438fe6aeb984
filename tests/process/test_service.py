"""A server as a process: signals, and the order of things in a stop."""

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from trioproto.process.service import HANDSHAKE_SECONDS, serve_until_signal

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Events:
    """What happened, and when."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.times: list[float] = []

    def note(self, name: str) -> None:
        self.names.append(name)
        self.times.append(trio.current_time())


@pytest.fixture
def events() -> Events:
    """Nothing has happened so far."""
    return Events()


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """In the end, every signal has the handler that it had."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


async def run(events: Events, stop_takes: float = 2.0, at_the_start: signal.Signals | None = None) -> None:
    """Serve, and note what happens; send ``at_the_start`` to this process when the service is announced."""

    async def serve(shutdown: trio.Event) -> None:
        events.note("serving")
        try:
            await shutdown.wait()
            events.note("shutdown")
            await trio.sleep(stop_takes)
            events.note("done")
        except trio.Cancelled:
            events.note("cancelled")
            raise

    def announce() -> None:
        events.note("announced")
        if at_the_start is not None:
            os.kill(os.getpid(), at_the_start)

    async with contextlib.AsyncExitStack() as accepting:
        accepting.callback(events.note, "not accepting")
        await serve_until_signal(serve, accepting, announce)
    events.note("returned")


async def send(*numbers: signal.Signals) -> None:
    """Send signals to this process, after 5 seconds and then half a second apart."""
    await trio.sleep(5)
    for number in numbers:
        os.kill(os.getpid(), number)
        await trio.sleep(0.5)


@pytest.mark.parametrize("number", SIGNALS)
async def test_signal(number: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """At a signal accepting ends first, so that handshakes that had begun are queued before the server stops."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, number)
        await run(events)
    assert events.names == ["announced", "serving", "not accepting", "shutdown", "done", "returned"]
    stopping = 5 + HANDSHAKE_SECONDS
    assert events.times == pytest.approx([0, 0, 5, stopping, stopping + 2, stopping + 2])


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
async def test_second_signal(
    first: signal.Signals, second: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    """A second signal, whichever of them, ends the stop at once."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, first, second)
        await run(events, stop_takes=1000)
    assert events.names[-3:] == ["shutdown", "cancelled", "returned"]
    assert events.times[-2:] == pytest.approx([5.5, 5.5])


@pytest.mark.parametrize("number", SIGNALS)
async def test_signal_at_the_start(
    number: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    """Who reads the announcement may send a signal: from then on it stops the server, and does not kill it."""
    await run(events, at_the_start=number)
    assert events.names == ["announced", "serving", "not accepting", "shutdown", "done", "returned"]


async def test_no_signal(autojump_clock: trio.testing.MockClock) -> None:
    """A server that ends by itself ends the service."""

    async def serve(shutdown: trio.Event) -> None:
        await trio.sleep(3)
        assert not shutdown.is_set()

    await serve_until_signal(serve, contextlib.AsyncExitStack(), lambda: None)
    assert trio.current_time() == pytest.approx(3)


async def test_failure(autojump_clock: trio.testing.MockClock) -> None:
    """A server that fails ends the service with that error, in the nursery's group."""

    async def serve(shutdown: trio.Event) -> None:
        await trio.sleep(3)
        raise OSError("failed")

    with pytest.raises(ExceptionGroup) as caught:
        await serve_until_signal(serve, contextlib.AsyncExitStack(), lambda: None)
    assert caught.group_contains(OSError, match="failed")


async def test_announcement_that_fails(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """If nobody can be told where the service is, there is none."""

    async def serve(shutdown: trio.Event) -> None:
        await trio.lowlevel.checkpoint()
        events.note("serving")

    def announce() -> None:
        raise OSError("nobody reads this")

    with pytest.raises(ExceptionGroup) as caught:
        await serve_until_signal(serve, contextlib.AsyncExitStack(), announce)
    assert caught.group_contains(OSError, match="nobody reads this")
    assert events.names == []


async def test_cancellation(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """On cancellation, the server is cancelled."""
    with trio.move_on_after(3) as scope:
        await run(events)
    assert scope.cancelled_caught
    assert events.names == ["announced", "serving", "cancelled", "not accepting"]
    assert trio.current_time() == pytest.approx(3)
