"""A chat in 30 lines, in which a client that stops receiving delays no other.

Each line that a client sends goes to all. The obvious loop over the members, with ``await member.send_all(line)``,
waits for the slowest client, and so everybody waits. `Connection.push` never waits: with ``max_unsent``, any task may
push, and a client with more unsent bytes than that is disconnected.

Run it; Ann talks, Bob listens, and Carl receives nothing::

    python examples/6b_chat.py

Note how Carl's unsent bytes grow, when he is disconnected, and how long Ann's lines take to reach Bob meanwhile.

Or chat yourself: run the server in one terminal (Ctrl-C stops it), and chat in two or more others::

    python examples/6b_chat.py 9194
    nc 127.0.0.1 9194
"""

import functools
import logging
import socket
import sys

import trio

from trioproto import Connection, serve_listeners, serve_until_signal

# The server: from here …
MAX_LINE = 1000  # bytes
MAX_UNSENT = 100_000  # bytes per client


async def read_line(connection: Connection) -> str:
    """Receive one line, and remove control characters, which could manipulate a terminal."""
    line = await connection.receive_until(b"\n", max_bytes=MAX_LINE)
    return "".join(filter(str.isprintable, line.decode(errors="replace")))


def tell(members: set[Connection], text: str) -> None:
    """Push a line to all. This never waits for a client."""
    for member in members:
        member.push(text.encode() + b"\n")


async def chat(members: set[Connection], stream: trio.abc.Stream) -> None:
    """Serve one client: ask for a name, then send each line to all, until the client leaves or the server stops."""
    async with Connection(stream, idle_timeout=3600, request_timeout=30, max_unsent=MAX_UNSENT) as connection:
        connection.push(b"Your name?\n")
        name = await read_line(connection)
        members.add(connection)
        tell(members, f"{name} is here.")
        try:
            async for line in connection.requests(read_line):
                tell(members, f"{name}: {line}")
        finally:
            members.remove(connection)
            tell(members, f"{name} has left.")


# … to here. The rest is the demonstration.

BUFFER_SIZE = 4096  # bytes, of the kernel's buffers; by default, they would hold megabytes for Carl


async def join(address: tuple[str, int], name: str) -> Connection:
    """Join the chat, and wait until everybody has been notified."""
    connecting = trio.socket.socket()
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
    await connecting.connect(address)
    member = Connection(trio.SocketStream(connecting))  # for `read_line`
    await member.send_all(name.encode() + b"\n")
    await hear(member, f"{name} is here.")
    return member


async def hear(member: Connection, start: str) -> None:
    """Receive lines until one begins with ``start``; print which members leave meanwhile."""
    while not (line := await read_line(member)).startswith(start):
        if line.endswith("has left."):
            print(f"   to everybody: {line}")


async def demonstrate() -> None:
    """Have Ann say 200 lines; print how long they take to reach Bob, and how many bytes are unsent to Carl."""
    members: set[Connection] = set()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)  # connections inherit it
    address = listener.socket.getsockname()
    shutdown = trio.Event()
    handler = functools.partial(chat, members)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(serve_listeners, handler, [listener], shutdown=shutdown))
        carl, ann, bob = [await join(address, name) for name in ("Carl", "Ann", "Bob")]

        print("Ann says 200 lines of 900 bytes. Bob receives them; Carl receives nothing.\n")
        print("   line   reached Bob after    unsent to Carl")
        slowest = 0.0
        for number in range(1, 201):
            began = trio.current_time()
            await ann.send_all(f"{number:<899}\n".encode())
            await hear(bob, "Ann: ")
            seconds = trio.current_time() - began
            slowest = max(slowest, seconds)
            if number % 20 == 0:
                unsent = max(member.unsent for member in members)  # Carl's, while he is connected
                print(f"   {number:4}   {1000 * seconds:14.1f} ms   {unsent:8} bytes")
            await read_line(ann)  # her own line, which goes to her, too
        print(f"\nBob has received every line, the slowest after {1000 * slowest:.1f} ms.")

        shutdown.set()
        async for _ in bob:
            pass
        print("The server stops: Bob has received end of stream.")
        for member in (ann, bob, carl):
            await member.aclose()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="   the server logs: %(message)s")
    try:
        if sys.argv[1:]:
            trio.run(serve_until_signal, functools.partial(chat, set()), int(sys.argv[1]))
        else:
            trio.run(demonstrate)
    except OSError as error:
        sys.exit(f"6b_chat.py: {error}: choose another port")
