import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import MemoryListener

from trioproto import ServerStats

EXAMPLE = Path(__file__).parents[2] / "examples" / "4_game_tick.py"
example = runpy.run_path(str(EXAMPLE))

TICK = example["TICK"]


class SingleListener(trio.abc.Listener[trio.abc.Stream]):
    """Accepts one stream, and then waits forever."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._streams = [stream]

    async def accept(self) -> trio.abc.Stream:
        if not self._streams:
            await trio.sleep_forever()
        return self._streams.pop()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def tick(world: object, number: int) -> None:
    """Make one tick, as the server would."""
    await trio.testing.wait_all_tasks_blocked()
    await world.tick(ServerStats(accepted=0, active=0, crashed=0, uptime=number * TICK))  # type: ignore[attr-defined]
    await trio.testing.wait_all_tasks_blocked()


async def worlds(stream: trio.abc.ReceiveStream, received: list[int]) -> None:
    """Receive worlds, and append the numbers of their ticks to ``received``."""
    async for data in stream:
        received += map(int, re.findall(rb"tick (\d+)\n", data))


async def test_player_that_receives_nothing_delays_neither_the_tick_nor_other_players(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A player that receives gets every world; one that receives late gets the newest next, and none in between."""
    world = example["World"]()
    # Streams without any buffer: a send waits until the other side receives.
    quick, served_quick = trio.testing.lockstep_stream_pair()
    slow, served_slow = trio.testing.lockstep_stream_pair()
    quick_received: list[int] = []
    slow_received: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(example["play"], world, served_quick)
        nursery.start_soon(example["play"], world, served_slow)
        nursery.start_soon(worlds, quick, quick_received)
        for number in range(1, 6):
            await tick(world, number)
        assert trio.current_time() == 0
        assert quick_received == [1, 2, 3, 4, 5]

        nursery.start_soon(worlds, slow, slow_received)
        await tick(world, 6)
        await tick(world, 7)
        assert slow_received == [1, 6, 7]
        nursery.cancel_scope.cancel()


async def test_player_that_receives_nothing_is_disconnected(autojump_clock: trio.testing.MockClock) -> None:
    """A player that receives nothing for 10 seconds is disconnected; the others stay."""
    world = example["World"]()
    quick, served_quick = trio.testing.lockstep_stream_pair()
    _stuck, served_stuck = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(example["play"], world, served_quick)
        nursery.start_soon(worlds, quick, [])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(example["play"], world, served_stuck)
        for number in range(1, 10):
            await tick(world, number)
            await trio.sleep(1)
            assert set(world.players) == {"A", "B"}
        await trio.sleep(1.1)
        assert set(world.players) == {"A"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("key", [b"", b">"])
async def test_stop_ends_the_game_with_a_farewell(key: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """When the server stops, a player gets the last world, a farewell and end of stream, and the server returns."""
    world = example["World"]()
    listener = MemoryListener()
    player = listener.connect()
    shutdown = trio.Event()
    received = bytearray()
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["serve"], world, listener, shutdown)

            async def play() -> None:
                async for data in player:
                    received.extend(data)
                await player.aclose()

            nursery.start_soon(play)
            if key:
                await player.send_all(key)
            await trio.sleep(10.5 * TICK)
            shutdown.set()
            await trio.testing.wait_all_tasks_blocked()

    assert trio.current_time() < 11 * TICK
    assert received.endswith(b"\nThe game is over.\n")
    assert re.findall(rb"tick (\d+)\n", received)[-1] == b"10"
    assert world.players == {}


async def test_stop_does_not_wait_forever_for_a_player_that_receives_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The server returns within 10 seconds, even if a player never receives the last world."""
    world = example["World"]()
    _stuck, served = trio.testing.lockstep_stream_pair()
    shutdown = trio.Event()
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["serve"], world, SingleListener(served), shutdown)
            await trio.sleep(1.5 * TICK)
            shutdown.set()
    assert 1.5 * TICK < trio.current_time() <= 1.5 * TICK + 10


async def test_moves_are_made_by_ticks_one_step_each() -> None:
    """However fast a player sends, a tick moves it one step; it stops at walls, and other bytes are ignored."""
    world = example["World"]()
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(example["play"], world, served)
        await client.send_all(b">>>\n\xff?")
        await tick(world, 1)
        await tick(world, 2)
        assert (world.players["A"].x, world.players["A"].y) == (31, 4)
        for number in range(3, 10):
            await client.send_all(b"v")
            await tick(world, number)
        assert (world.players["A"].x, world.players["A"].y) == (31, 7)
        nursery.cancel_scope.cancel()


async def test_player_that_disconnects_leaves_the_field() -> None:
    """A player whose connection ends is removed from the world, without an error."""
    world = example["World"]()
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(example["play"], world, served)
        await tick(world, 1)
        assert "A" in world.draw()
        await client.aclose()
        await tick(world, 2)
    assert "A" not in world.draw()


async def test_27th_player_waits_for_a_letter() -> None:
    """When all 26 letters are taken, the next player waits until one leaves, and gets that one's letter."""
    world = example["World"]()
    with trio.fail_after(20):
        listener = await example["listen"](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(example["serve"], world, listener, trio.Event())
            address = listener.socket.getsockname()
            players = [await trio.open_tcp_stream(*address) for _ in range(26)]
            for player in players:
                await player.receive_some(1)
            late = await trio.open_tcp_stream(*address)
            with trio.move_on_after(3 * TICK) as waiting:
                await late.receive_some(1)
            assert waiting.cancelled_caught
            assert len(world.players) == 26

            letters = set(world.players)
            await players.pop().aclose()
            assert await late.receive_some(1)
            assert set(world.players) == letters

            for player in [*players, late]:
                await player.aclose()
            nursery.cancel_scope.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels buffer other amounts")
def test_example_shows_ticks_on_schedule_and_a_slow_player_that_skips_some() -> None:
    """Ticks come before anyone connects and while B pauses; A receives all worlds, B skips to the newest."""
    run = subprocess.run([sys.executable, EXAMPLE], check=True, capture_output=True, text=True, timeout=30)

    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +(\d+)(.*)$", run.stdout, re.MULTILINE)
    numbers = [int(row[0]) for row in rows]
    assert all(float(due) == int(number) * TICK <= float(came) for number, due, came, *_ in rows)
    assert [row[3] for row in rows[:2]] == ["0", "0"]
    assert "22" in [row[3] for row in rows]
    assert any("B (tick " in row[4] for row in rows)
    assert not any("A (tick " in row[4] for row in rows)
    received = {
        name: [
            number
            for first, last in re.findall(r"(\d+) to (\d+)", spans)
            for number in range(int(first), int(last) + 1)
        ]
        for name, spans in re.findall(r"^([AB]).* received ticks (.*)\.$", run.stdout, re.MULTILINE)
    }
    assert received["A"] == numbers[numbers.index(received["A"][0]) :]
    assert received["B"][-1] == numbers[-1]
    assert set(received["B"]) < set(numbers[numbers.index(received["B"][0]) :])
    assert run.stdout.endswith(".\nThe game is over.\n")
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_sigterm_ends_the_game_gracefully() -> None:
    """Run with a port, the game ends on SIGTERM, with its farewell and with exit status 0."""
    with subprocess.Popen([sys.executable, EXAMPLE, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            said = re.fullmatch(rb"to play: .*nc 127\.0\.0\.1 (\d+);.*\n", server.stdout.readline())
            assert said is not None
            with socket.create_connection(("127.0.0.1", int(said[1])), timeout=10) as player:
                player.sendall(b">")
                received = player.recv(10)
                server.send_signal(signal.SIGTERM)
                while data := player.recv(65536):
                    received += data
            _, err = server.communicate(timeout=10)
        finally:
            server.kill()

    assert received.endswith(b"\nThe game is over.\n")
    assert (server.returncode, err) == (0, b"")
