"""A bug that an in-memory network finds and fragmentation does not.

The server keeps one sum for all its clients. A request is "+" and a number of 2 bytes; the reply is the new sum, 4
bytes. The naive handler reads the sum, receives the number, and writes the sum back. While it waits for the number,
another client may change the sum, and that change is lost.

With one client this never happens, in any fragmentation. It takes two clients whose bytes arrive at varying times, and
`trioproto.testing.Network` simulates these on Trio's clock.

Run it::

    python examples/6d_network.py

Note the seed: the same seed fails the same way each time. The two handlers differ only in when they read the sum. No
other task runs between two checkpoints, so an update that must be atomic must not contain one.
"""

import functools
import random
from collections.abc import Awaitable, Callable

import trio
import trio.testing

from trioproto import Connection, receive_exactly, serve_listeners
from trioproto.testing import Network, converse, fragmentations

SEEDS = 100
ADDED = [1, 20, 300]  # by each of two clients


class Sum:
    """The sum that all clients share."""

    total = 0


async def receive_number(connection: Connection) -> int:
    """Receive the rest of a request."""
    return int.from_bytes(await connection.receive_exactly(2), "big")


async def add_naively(total: Sum, connection: Connection) -> bytes:
    """Receive a request and add its number. Wrong: there is a checkpoint between reading the sum and writing it."""
    await connection.receive_exactly(1)
    before = total.total
    total.total = before + await receive_number(connection)
    return total.total.to_bytes(4, "big")


async def add(total: Sum, connection: Connection) -> bytes:
    """Receive a request and add its number."""
    await connection.receive_exactly(1)
    number = await receive_number(connection)
    total.total += number
    return total.total.to_bytes(4, "big")


Add = Callable[[Sum, Connection], Awaitable[bytes]]


async def handler(add: Add, total: Sum, stream: trio.abc.Stream) -> None:
    """Serve one client."""
    async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
        async for reply in connection.requests(functools.partial(add, total)):
            connection.push(reply)


# End of the server. The rest looks for the bug: with one client in every fragmentation, then with two clients.


async def survives_fragmentation(add: Add) -> bool:
    """Return whether the replies to two requests are right in every fragmentation."""
    requests, replies = b"+\0\1+\0\2", b"\0\0\0\1\0\0\0\3"
    for cuts in fragmentations(len(requests)):
        if await converse(functools.partial(handler, add, Sum()), requests, cuts) != replies:
            return False
    return True


async def two_clients(add: Add, seed: int) -> int:
    """Have two clients add `ADDED` each, at times that the seed determines, and return the sum."""
    network, total = Network(seed), Sum()

    async def client(name: str) -> None:
        rng = random.Random(f"{seed} {name}")  # noqa: S311 - repeatable on purpose
        async with await network.connect("server", 1, source=name) as stream:
            for number in ADDED:
                await trio.sleep(rng.random())
                await stream.send_all(b"+" + number.to_bytes(2, "big"))
                await receive_exactly(stream, 4)

    async with trio.open_nursery() as server:
        server.start_soon(serve_listeners, functools.partial(handler, add, total), [network.listen("server", 1)])
        async with trio.open_nursery() as clients:
            clients.start_soon(client, "Ann")
            clients.start_soon(client, "Bob")
        server.cancel_scope.cancel()
    return total.total


def failing_seed(add: Add) -> int | None:
    """Return the first seed with which an addition is lost; None if there is none."""
    for seed in range(SEEDS):
        clock = trio.testing.MockClock(autojump_threshold=0)
        if trio.run(two_clients, add, seed, clock=clock) != 2 * sum(ADDED):
            return seed
    return None


def main() -> None:
    """Look for the bug in both handlers."""
    for function in (add_naively, add):
        fragments = "right" if trio.run(survives_fragmentation, function) else "wrong"
        seed = failing_seed(function)
        print(f"{function.__name__}: {fragments} in every fragmentation; ", end="")
        if seed is None:
            print(f"right with all of {SEEDS} seeds")
        else:
            lost = trio.run(two_clients, function, seed, clock=trio.testing.MockClock(autojump_threshold=0))
            print(f"with seed {seed}, two clients added {2 * sum(ADDED)}, and the sum is {lost}")


if __name__ == "__main__":
    main()
