"""Three servers inside an app: one nursery that holds them, and one event that stops them together.

The servers are echo, op, and one of the app's own: "shout", which sends back each line in capitals. Its handler stands
on `trioproto.connection.Connection`, as those of echo and op do; that is all it takes to have time-outs and to take
part in the stop.

Run it::

    python examples/5_inside_an_app.py

Look at what SIGTERM does to four clients: the one that is between two requests is let go at once, two that are in the
middle of one may finish it and get their replies, and the one that never finishes is cut off when the grace period is
over. Then the servers have ended, the nursery is left, and the app goes on.
"""

import functools
import logging
import os
import signal
import sys

import trio

from trioproto import echo_handler, op_handler, serve_tcp
from trioproto.connection import Connection
from trioproto.op import Request

GRACE_PERIOD = 1.0  # seconds; an app that is not a demonstration would give more
MAX_LINE = 1000  # bytes; what is longer is cut off, so that no client can fill our memory


async def shout_handler(stream: trio.abc.Stream) -> None:
    """Send back each line in capitals, until the client ends the connection or the server stops."""
    unfinished = b""
    replies = b""
    async with Connection(stream, idle_timeout=300, request_timeout=30) as connection:
        # Replies out, the next bytes in. What `exchange` has to be told is whether a request is under way: a graceful
        # stop waits for the rest of a request, but not for a client that may send one some day.
        while data := await connection.exchange(replies, mid_request=bool(unfinished)):
            *lines, unfinished = (unfinished + data).split(b"\n")
            replies = b"".join(line[:MAX_LINE].upper() + b"\n" for line in lines)
            unfinished = unfinished[:MAX_LINE]


async def app(*, task_status: trio.TaskStatus[dict[str, int]] = trio.TASK_STATUS_IGNORED) -> None:
    """Run all three servers until SIGTERM or Ctrl-C, and then until they have ended; tell their ports."""
    shutdown = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            ports = {}
            for name, handler in [("echo", echo_handler), ("op", op_handler), ("shout", shout_handler)]:
                serve = functools.partial(
                    serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown, grace_period=GRACE_PERIOD
                )
                # `start` returns when the server listens, so the app never gets ahead of its servers.
                (listener,) = await nursery.start(serve)
                ports[name] = listener.socket.getsockname()[1]
            task_status.started(ports)
            await anext(signals)
            shutdown.set()
        # Here, all three have ended: that is what a nursery is.


# That was the app. What follows is the demonstration: a client in each situation.


async def demonstrate() -> None:
    """Run the app, stop it while four clients are there, and print who sees what and when."""
    began = trio.current_time()

    def say(who: str, what: str) -> None:
        print(f"{trio.current_time() - began:4.1f} s  {who:6} {what}")

    async with trio.open_nursery() as nursery:
        ports = await nursery.start(app)
        say("app", f"listens: {', '.join(ports)}")

        async def client(
            who: str,
            server: str,
            first: bytes,
            then: bytes,
            pause: float,
            *,
            task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
        ) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", ports[server]) as stream:
                await stream.send_all(first)
                say(who, f"to {server}: {first!r}")
                task_status.started()
                if then:
                    await trio.sleep(pause)
                    await stream.send_all(then)
                    say(who, f"to {server}: {then!r}, the rest of it")
                async for reply in stream:
                    say(who, f"from {server}: {bytes(reply)!r}")
                say(who, "end of stream")

        request = Request([40, 2], "+").encode()
        await nursery.start(client, "idle", "echo", b"hello", b"", 0)
        await nursery.start(client, "busy", "op", request[:5], request[5:], 0.6)
        await nursery.start(client, "slow", "shout", b"well d", b"one\n", 0.9)
        await nursery.start(client, "stuck", "op", request[:5], b"", 0)
        await trio.sleep(0.3)

        say("app", "is sent SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(0.1)
        try:
            await trio.open_tcp_stream("127.0.0.1", ports["op"])
        except OSError:
            say("late", "cannot connect any more")
    say("app", "has ended, and every connection with it")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="        app    logs: %(message)s")
    trio.run(demonstrate)
