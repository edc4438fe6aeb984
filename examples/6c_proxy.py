"""A TCP proxy in 30 lines: each direction is one `Connection.relay`.

A proxy has to end connections correctly. A client that has half-closed its connection may still be waiting for the
answer, so the proxy passes on the end of each direction separately. A connection without data in either direction times
out. When one side breaks, the other is reset, because what was relayed may be incomplete. And a graceful stop ends the
direction from the client, but lets an answer that is under way arrive.

Run it; three times, a client asks a slow server, through the proxy, how many bytes it has sent::

    python examples/6c_proxy.py

Note the answer that arrives after the client's half-close, the idle client, and the answer that arrives while the proxy
is stopping.

If the target cannot be reached, one line is logged, and the client gets end of stream. If your protocol has a message
for that, as HTTP has status 502, push it to the client where that line is logged.

Or put it in front of a server of your own; this listens on port 9195 (Ctrl-C stops it)::

    python examples/6c_proxy.py 9195 example.org 80
"""

import functools
import logging
import sys

import trio

from trioproto import Connection, serve_tcp, serve_until_signal
from trioproto.addresses import failure_reason

log = logging.getLogger(__name__)

# The proxy: from here …
IDLE_TIMEOUT = 300.0  # seconds
CONNECT_TIMEOUT = 10.0


async def proxy(target: tuple[str, int], stream: trio.abc.Stream, *, idle_timeout: float = IDLE_TIMEOUT) -> None:
    """Serve one client: connect to the target, and relay both directions until both have ended."""
    async with Connection(stream, idle_timeout=idle_timeout) as client:
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                upstream = await trio.open_tcp_stream(*target)
        except (OSError, trio.TooSlowError) as error:
            reason = failure_reason(error) or "timed out"
            log.warning("%s: cannot connect to %s port %d: %s", client.peer, *target, reason)
            return
        async with Connection(upstream, idle_timeout=idle_timeout) as server, trio.open_nursery() as nursery:
            nursery.start_soon(client.relay, server)
            nursery.start_soon(server.relay, client)


# … to here. The rest is the demonstration.

THINKING = 0.5  # seconds that the server takes for an answer


async def count(stream: trio.abc.Stream) -> None:
    """Count what a client sends until end of stream, and send it the count."""
    async with Connection(stream) as connection:
        total = 0
        async for data in connection:
            total += len(data)
        await trio.sleep(THINKING)
        await connection.send_all(f"{total} bytes".encode())


async def ask(address: tuple[str, int], *, half_close: bool = True) -> None:
    """Send 5 bytes, half-close or not, and print what comes back, and when."""
    began = trio.current_time()

    def say(what: str) -> None:
        print(f"   {trio.current_time() - began:.1f} s   {what}")

    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"hello")
        say("the client sends 5 bytes")
        if half_close:
            await stream.send_eof()
            say("the client half-closes the connection")
        try:
            async for answer in stream:
                say(f"the client receives '{answer.decode()}'")
            say("the client receives end of stream")
        except trio.BrokenResourceError:
            say("the connection is reset")


async def demonstrate() -> None:
    """Print what three clients of the proxy see."""
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        (server,) = await nursery.start(functools.partial(serve_tcp, count, 0, host="127.0.0.1"))
        handler = functools.partial(proxy, server.socket.getsockname(), idle_timeout=1.0)
        async with trio.open_nursery() as proxying:
            serve = functools.partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
            (listener,) = await proxying.start(serve)
            address = listener.socket.getsockname()

            print("A client that half-closes the connection still gets its answer:\n")
            await ask(address)
            print("\nA connection without data in either direction times out after 1 second:\n")
            await ask(address, half_close=False)
            print("\nThe proxy stops while the server prepares the answer:\n")
            proxying.start_soon(ask, address)
            await trio.sleep(THINKING / 2)
            print("           the stop begins")
            shutdown.set()
        print("\nThe proxy has stopped.")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    try:
        match sys.argv[1:]:
            case []:
                trio.run(demonstrate)
            case [port, host, target_port]:
                handler = functools.partial(proxy, (host, int(target_port)))
                trio.run(serve_until_signal, handler, int(port))
            case _:
                sys.exit("usage: python examples/6c_proxy.py [PORT HOST PORT]")
    except OSError as error:
        sys.exit(f"6c_proxy.py: {error}: choose another port")
