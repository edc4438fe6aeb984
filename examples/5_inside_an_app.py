"""Three servers inside an app: one nursery runs them, and one event stops them together.

The servers are echo, op, and one of the app's own: "shout", which sends back each line in capitals. Its handler uses
`trioproto.Connection`, as those of echo and op do, and gets its time-outs and the graceful stop from it.

Run it::

    python examples/5_inside_an_app.py

Note what SIGTERM does to four clients: the one that is between two requests is disconnected at once, two that are in
the middle of one may finish it and get their replies, and the one that never finishes is cancelled when the grace
period is over. Then the servers have returned, the nursery exits, and the app goes on.
"""

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

import trio

from trioproto import Connection, IncompleteReadError, echo_handler, op_handler, receive_exactly, serve_tcp
from trioproto.op import Reply, Request

GRACE_PERIOD = 1.0  # seconds; short, for the demonstration
MAX_LINE = 1000  # bytes; a longer line is a protocol error, so that no client can fill our memory


async def read_line(connection: Connection) -> bytes:
    """Receive one line: to this server, that is a request."""
    return await connection.receive_until(b"\n", max_bytes=MAX_LINE)


async def shout_handler(stream: trio.abc.Stream) -> None:
    """Send back each line in capitals, until the client ends the connection or the server stops."""
    async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
        async for line in connection.requests(read_line):
            await connection.send_all(line.upper() + b"\n")


async def app(*, task_status: trio.TaskStatus[dict[str, int]] = trio.TASK_STATUS_IGNORED) -> None:
    """Run all three servers until SIGTERM or Ctrl-C, and stop them; the nursery's ``start`` returns their ports."""
    shutdown = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            ports = {}
            for name, handler in [("echo", echo_handler), ("op", op_handler), ("shout", shout_handler)]:
                serve = functools.partial(
                    serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown, grace_period=GRACE_PERIOD
                )
                # `start` returns when the server listens.
                (listener,) = await nursery.start(serve)
                ports[name] = listener.socket.getsockname()[1]
            task_status.started(ports)
            await anext(signals)
            shutdown.set()
        # The nursery exits when all three have returned.


# End of the app. The rest is the demonstration: a client in each situation.


async def demonstrate() -> None:
    """Run the app, stop it while four clients are connected, and print what each sees and when."""
    began = trio.current_time()

    def say(who: str, what: str) -> None:
        print(f"{trio.current_time() - began:4.1f} s  {who:6} {what}")

    async with trio.open_nursery() as nursery:
        ports = await nursery.start(app)
        say("app", f"listens: {', '.join(ports)}")

        async def client(
            who: str,
            server: str,
            request: Sequence[bytes],
            reply_size: int,
            decode: Callable[[bytes], object],
            *,
            pause: float = 0.0,
            task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
        ) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", ports[server]) as stream:
                first, *rest = request
                await stream.send_all(first)
                say(who, f"to {server}: {first!r}")
                task_status.started()
                for piece in rest:
                    await trio.sleep(pause)
                    await stream.send_all(piece)
                    say(who, f"to {server}: {piece!r}, the rest")
                try:
                    while True:
                        reply = decode(await receive_exactly(stream, reply_size))
                        say(who, f"from {server}: {reply}")
                except IncompleteReadError:
                    say(who, "end of stream")

        def text(reply: bytes) -> str:
            return reply.decode().rstrip()

        def number(reply: bytes) -> int:
            return Reply.decode(reply).result

        whole = Request([40, 2], "+").encode()
        halves = whole[:5], whole[5:]
        line = b"well d", b"one\n"
        await nursery.start(client, "idle", "echo", [b"hello"], 5, text)
        await nursery.start(functools.partial(client, "busy", "op", halves, Reply.SIZE, number, pause=0.6))
        await nursery.start(functools.partial(client, "slow", "shout", line, len("WELL DONE\n"), text, pause=0.9))
        await nursery.start(client, "stuck", "op", halves[:1], Reply.SIZE, number)
        await trio.sleep(0.3)

        say("app", "receives SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(0.1)
        try:
            await trio.open_tcp_stream("127.0.0.1", ports["op"])
        except OSError:
            say("late", "cannot connect")
    say("app", "has stopped, and every connection has ended")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="        app    logs: %(message)s")
    trio.run(demonstrate)
