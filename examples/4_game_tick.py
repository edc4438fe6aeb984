"""A game server's tick: every player gets the world on schedule, whether anyone connects or not.

This is what a timeout on ``accept()`` is for. The game: players stand on a field, and send ``<``, ``>``, ``^`` or ``v``
to move. At each tick, every player moves by at most one step, and gets the world: the whole field, as text.

Run it; two players and a crowd play by themselves for 3 seconds, then the server stops::

    python examples/4_game_tick.py

Note the columns "due" and "came": nothing delays a tick, neither a crowd that connects at once nor player B, which
receives nothing for a while. Afterwards B gets the newest world, and not those that it missed. When the server stops,
A gets the last world, complete, then a farewell and end of stream.

Or play yourself: run the server in one terminal, and play in two or more others (Ctrl-C ends each)::

    python examples/4_game_tick.py 9192
    stty -icanon -echo; nc 127.0.0.1 9192; stty sane
"""

import functools
import itertools
import re
import signal
import socket
import string
import sys

import attrs
import trio

from trioproto import Connection, ServerStats, serve_listeners

TICK = 0.125  # seconds; its multiples are exact as floats
WIDTH, HEIGHT = 60, 8
STEPS = {"<": (-1, 0), ">": (1, 0), "^": (0, -1), "v": (0, 1)}
MAX_PLAYERS = 26  # one for each letter

# A player that receives nothing for this many seconds is disconnected, also when the server stops.
PATIENCE = 10.0

# How many unsent bytes one player may have. A world is about 500, and at most one world is ever unsent.
MAX_UNSENT = 4096

# Bytes. What waits in the kernel's buffers is outdated when it arrives, so a game asks for small ones. Linux allocates
# two to four times as much, and uses much of it for bookkeeping.
BUFFER_SIZE = 1024

CLEAR = "\x1b[2J\x1b[H"  # clears a terminal before the next world is drawn


@attrs.define
class Player:
    """A player's position, the step to take at the next tick, and the tick whose world was sent last."""

    connection: Connection
    x: int = WIDTH // 2
    y: int = HEIGHT // 2
    step: tuple[int, int] = (0, 0)
    sent: int = 0


class World:
    """The field. Keys are recorded as they arrive, but only a tick moves players."""

    def __init__(self) -> None:
        self.players: dict[str, Player] = {}
        self.number = 0

    def enter(self, connection: Connection) -> str:
        """Put a new player on the field, and return the player's letter."""
        letter = next(letter for letter in string.ascii_uppercase if letter not in self.players)
        self.players[letter] = Player(connection)
        return letter

    async def tick(self, stats: ServerStats) -> None:
        """Move every player, and push the new world to all. This never waits for a client."""
        self.number = int(stats.uptime / TICK)  # by the clock: if the machine stalls, ticks are skipped
        for player in self.players.values():
            player.x = min(max(player.x + player.step[0], 0), WIDTH - 1)
            player.y = min(max(player.y + player.step[1], 0), HEIGHT - 1)
            player.step = (0, 0)
        world = self.draw().encode()
        for player in self.players.values():
            # A player with an older world still unsent is skipped: a later tick has a newer one.
            if not player.connection.unsent:
                player.connection.push(world)
                player.sent = self.number
        await trio.lowlevel.checkpoint()

    def draw(self) -> str:
        """Return the world as text."""
        rows = [["."] * WIDTH for _ in range(HEIGHT)]
        for letter, player in self.players.items():
            rows[player.y][player.x] = letter
        return f"{CLEAR}tick {self.number}\n" + "".join(f"{''.join(row)}\n" for row in rows)


async def play(world: World, stream: trio.abc.Stream) -> None:
    """Serve one player: record the keys that arrive, until the player leaves or the server stops.

    Meanwhile, the tick pushes the worlds.
    """
    async with Connection(stream, idle_timeout=PATIENCE, max_unsent=MAX_UNSENT) as connection:
        letter = world.enter(connection)
        player = world.players[letter]
        try:
            async for data in connection:
                for key in data.decode(errors="replace"):
                    player.step = STEPS.get(key, player.step)
            connection.push(b"The game is over.\n")
        finally:
            del world.players[letter]


async def listen(port: int) -> trio.SocketListener:
    """Listen on 127.0.0.1, with a small output buffer for each connection."""
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)  # connections inherit it
    return listener


async def serve(world: World, listener: trio.abc.Listener[trio.abc.Stream], shutdown: trio.Event) -> None:
    """Serve the game until ``shutdown`` is set. The accept loop makes the ticks."""
    await serve_listeners(
        functools.partial(play, world),
        [listener],
        tick=TICK,
        on_tick=world.tick,
        max_connections=MAX_PLAYERS,
        shutdown=shutdown,
    )


# End of the server. The rest is the demonstration: a log of the ticks, and players.


class WatchedWorld(World):
    """Prints a line at each tick."""

    async def tick(self, stats: ServerStats) -> None:
        """Tick, and print when it was due, when it came, and which players still have an older world unsent."""
        behind = [
            f"{letter} (tick {player.sent})" for letter, player in self.players.items() if player.connection.unsent
        ]
        await super().tick(stats)
        due = self.number * TICK
        print(f"{self.number:5} {due:7.3f} {stats.uptime:7.3f} {len(self.players):8}  {', '.join(behind)}".rstrip())


async def player(port: int, keys: str, *, joins: float, sleeps: float = 0.0) -> str:
    """Play until the server stops: send keys twice as fast as the ticks, and receive worlds.

    Args:
        port: the server's.
        keys: what to send, over and over.
        joins: seconds until it connects.
        sleeps: seconds during which it then receives nothing.

    Returns:
        What was received.
    """
    await trio.sleep(joins)
    connecting = trio.socket.socket()
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
    await connecting.connect(("127.0.0.1", port))
    received = b""
    async with trio.SocketStream(connecting) as stream, trio.open_nursery() as nursery:

        async def press_keys() -> None:
            for key in itertools.cycle(keys):
                await stream.send_all(key.encode())
                await trio.sleep(TICK / 2)

        nursery.start_soon(press_keys)
        await trio.sleep(sleeps)
        async for data in stream:
            received += data
        nursery.cancel_scope.cancel()
    return received.decode()


def ticks(received: str) -> str:
    """Return the ticks whose worlds a player received, such as ``1 to 3, 7 to 8``."""
    numbers = [int(number) for number in re.findall(r"tick (\d+)\n", received)]
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{start} to {end}" for start, end in zip(starts, ends, strict=True))


async def demonstrate() -> None:
    """Play for 3 seconds, stop the server, and print what A and B received."""
    print(f"A tick every {TICK} seconds, even before anyone has connected.\n")
    print(" tick     due    came  players  older world still unsent")
    received = {}
    listener = await listen(0)  # 0: the kernel picks a port
    port = listener.socket.getsockname()[1]
    shutdown = trio.Event()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, WatchedWorld(), listener, shutdown)

        async def watch(name: str, keys: str, *, joins: float, sleeps: float = 0.0) -> None:
            received[name] = await player(port, keys, joins=joins, sleeps=sleeps)

        nursery.start_soon(functools.partial(watch, "A", ">", joins=0.3))
        nursery.start_soon(functools.partial(watch, "B", "<", joins=0.55, sleeps=1.9))
        for number in range(20):  # a crowd, all at once
            keys = "<>^v"[number % 4 :] + "<>^v"[: number % 3]
            nursery.start_soon(functools.partial(player, port, keys, joins=1.3))
        await trio.sleep(2.95)
        shutdown.set()
    # The server has stopped, and every player has received end of stream.

    print(f"\nA received ticks {ticks(received['A'])}.")
    print(f"B, which paused, received ticks {ticks(received['B'])}.")
    print("\nWhat A received last:\n\n" + received["A"].rpartition(CLEAR)[2], end="")


async def host(port: int) -> None:
    """Serve the game until SIGTERM or Ctrl-C, and then until every player has left."""
    try:
        listener = await listen(port)
    except OSError as error:
        sys.exit(f"4_game_tick.py: cannot listen on port {port}: {error.strerror}: choose another")
    port = listener.socket.getsockname()[1]
    print(f"to play: stty -icanon -echo; nc 127.0.0.1 {port}; stty sane", flush=True)
    shutdown = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, World(), listener, shutdown)
            await anext(signals)
            shutdown.set()


if __name__ == "__main__":
    try:
        if sys.argv[1:]:
            trio.run(host, int(sys.argv[1]))
        else:
            trio.run(demonstrate)
    except* KeyboardInterrupt:
        pass
