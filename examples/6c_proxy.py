"""A TCP proxy in 30 lines: each direction is one `Connection.relay`.

What makes a proxy correct is how it ends. A client that has ended its side may still be waiting for the answer, so the
end of each direction is passed on by itself (a half-close). A connection on which nothing moves, either way, ends after
a while. One whose other side breaks is reset, because what was relayed may not be whole. And a graceful stop ends what
the client sends, but lets the answer that is under way arrive.

Run it; a client asks a slow server how many bytes it has sent, through the proxy, three times::

    python examples/6c_proxy.py

Look at the answer that comes though the client has ended its side, at the client that says nothing, and at the answer
that comes though the proxy is already stopping.

Or put it in front of a server of yours; this listens on port 9195 (Ctrl-C stops it)::

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
    """Serve one client: connect to the target, and relay both ways until both have ended their sides."""
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


# … to here. What follows is the demonstration.

THINKING = 0.5  # seconds, that the server takes for an answer


async def count(stream: trio.abc.Stream) -> None:
    """Tell a client how many bytes it has sent. That is known when it has ended its side."""
    async with Connection(stream) as connection:
        total = 0
        async for data in connection:
            total += len(data)
        await trio.sleep(THINKING)
        await connection.send_all(f"{total} bytes".encode())


async def ask(address: tuple[str, int], *, ends_its_side: bool = True) -> None:
    """Send 5 bytes, end this side or not, and print what comes back, and when."""
    began = trio.current_time()

    def say(what: str) -> None:
        print(f"   {trio.current_time() - began:.1f} s   {what}")

    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"hello")
        say("the client sends 5 bytes")
        if ends_its_side:
            await stream.send_eof()
            say("the client ends its side")
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

            print("A client that ends its side still gets its answer:\n")
            await ask(address)
            print("\nOne that says nothing more, and is sent nothing, is let go after 1 second:\n")
            await ask(address, ends_its_side=False)
            print("\nThe proxy stops while the server thinks:\n")
            proxying.start_soon(ask, address)
            await trio.sleep(THINKING / 2)
            print("           the proxy is told to stop")
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
