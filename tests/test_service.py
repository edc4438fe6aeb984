"""A server as a process: signals, and the order of things in a stop."""

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from trioproto.service import HANDSHAKE_SECONDS, serve_until_signal

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Events:
    """What happened, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def note(self, what: str) -> None:
        self.seen.append((what, trio.current_time()))


@pytest.fixture
def events() -> Events:
    """Nothing happened so far."""
    return Events()


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """In the end, every signal has the handler that it had."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


async def run(events: Events, stop_takes: float = 2.0, kill_itself: signal.Signals | None = None) -> None:
    """Serve, and note what happens."""

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
        if kill_itself is not None:
            os.kill(os.getpid(), kill_itself)

    async with contextlib.AsyncExitStack() as accepting:
        accepting.callback(events.note, "not accepting")
        await serve_until_signal(serve, accepting, announce)
        events.note("returned")


async def send(*numbers: signal.Signals, at: float = 5.0) -> None:
    """Send signals to this process, half a second apart."""
    await trio.sleep(at)
    for number in numbers:
        os.kill(os.getpid(), number)
        await trio.sleep(0.5)


@pytest.mark.parametrize("number", SIGNALS)
async def test_signal(number: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """At a signal, accepting ends first, so that begun handshakes are queued when the server is told to stop."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, number)
        await run(events)
    assert [what for what, _ in events.seen] == [
        "announced",
        "serving",
        "not accepting",
        "shutdown",
        "done",
        "returned",
    ]
    assert [when for _, when in events.seen] == pytest.approx(
        [0, 0, 5, 5 + HANDSHAKE_SECONDS, 7 + HANDSHAKE_SECONDS, 7 + HANDSHAKE_SECONDS]
    )


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
async def test_second_signal(
    first: signal.Signals, second: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    """A second signal, of whichever kind, ends the stop at once."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, first, second)
        await run(events, stop_takes=1000)
    assert events.seen[-2:] == [("cancelled", pytest.approx(5.5)), ("returned", pytest.approx(5.5))]


@pytest.mark.parametrize("number", SIGNALS)
async def test_signal_at_the_start(
    number: signal.Signals, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    """Who reads the announcement may send a signal: from then on it stops the server, and does not kill it."""
    await run(events, kill_itself=number)
    assert [what for what, _ in events.seen][-3:] == ["shutdown", "done", "returned"]


async def test_no_signal(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """A server that ends by itself, ends the service."""

    async def serve(shutdown: trio.Event) -> None:
        await trio.sleep(3)
        assert not shutdown.is_set()

    await serve_until_signal(serve, contextlib.AsyncExitStack(), lambda: None)
    assert trio.current_time() == pytest.approx(3)


async def test_failure(autojump_clock: trio.testing.MockClock) -> None:
    """A server that fails, ends the service with that error, in the nursery's group."""

    async def serve(shutdown: trio.Event) -> None:
        await trio.sleep(3)
        raise OSError("failed")

    with pytest.raises(ExceptionGroup) as caught:
        await serve_until_signal(serve, contextlib.AsyncExitStack(), lambda: None)
    assert caught.group_contains(OSError, match="failed")


async def test_announcement_that_fails(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """If it cannot be told where the service is, there is none."""

    async def serve(shutdown: trio.Event) -> None:
        events.note("serving")

    def announce() -> None:
        raise OSError("nobody listens")

    with pytest.raises(ExceptionGroup) as caught:
        await serve_until_signal(serve, contextlib.AsyncExitStack(), announce)
    assert caught.group_contains(OSError, match="nobody listens")
    assert events.seen == []


async def test_cancellation(events: Events, autojump_clock: trio.testing.MockClock) -> None:
    """On cancellation, the server is cancelled."""
    with trio.move_on_after(3) as scope:
        await run(events)
    assert scope.cancelled_caught
    assert ("cancelled", pytest.approx(3)) in events.seen
