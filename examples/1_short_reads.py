"""One send is not one receive.

TCP carries bytes, not messages: what was sent in one piece may arrive in several. This is the first echo client that
everybody writes, with one send and one receive, beside the mended one. Both talk to the same echo server over streams
in memory that cut their deliveries on purpose, so that what happens on a network now and then happens here every time.

Run it::

    python examples/1_short_reads.py

Look for the answers of the first client: too short, and from then on the leftovers of answers before.
"""

from collections.abc import Awaitable, Callable

import trio

from trioproto import echo_handler, receive_exactly
from trioproto.testing import Cuts, fragmentations, fragmented_stream_pair

MESSAGES = [b"How are you?", b"And you?", b"Goodbye."]
BUFFER_SIZE = 1024

Client = Callable[[trio.abc.Stream, bytes], Awaitable[bytes]]


async def broken_client(stream: trio.abc.Stream, message: bytes) -> bytes:
    """One send, one receive: takes whatever has arrived so far for the whole answer."""
    await stream.send_all(message)
    return bytes(await stream.receive_some(BUFFER_SIZE))


async def mended_client(stream: trio.abc.Stream, message: bytes) -> bytes:
    """Receives until as many bytes are there as were sent, and not one more."""
    await stream.send_all(message)
    return await receive_exactly(stream, len(message))


async def ask(client: Client, messages: list[bytes], cuts: Cuts) -> list[bytes]:
    """Return the client's answers from an echo server, on one connection whose deliveries to it are cut."""
    stream, served = fragmented_stream_pair(to_first=cuts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_handler, served)
        async with stream:
            return [await client(stream, message) for message in messages]


async def main() -> None:
    """Show three answers of each client, then count the right ones over every way of cutting one answer."""
    print("Three messages to an echo server. Its answers arrive 5 bytes at a time.\n")
    broken = await ask(broken_client, MESSAGES, cuts=5)
    mended = await ask(mended_client, MESSAGES, cuts=5)
    print(f"{'sent':16}{'one send, one receive':31}receive until all is there")
    for message, first, second in zip(MESSAGES, broken, mended, strict=True):
        print(f"{message.decode():16}{_verdict(first, message):31}{_verdict(second, message)}")

    message = b"0123456789"
    every_way = list(fragmentations(len(message)))
    print(f"\nOne answer of {len(message)} bytes, cut in each of the {len(every_way)} ways there are:\n")
    for name, client in [("one send, one receive", broken_client), ("receive until all is there", mended_client)]:
        right = [cuts for cuts in every_way if await ask(client, [message], cuts) == [message]]
        note = " (the one without a cut)" if right == [(len(message),)] else ""
        print(f"  {name:28}right in {len(right):3} of {len(every_way)}{note}")


def _verdict(answer: bytes, message: bytes) -> str:
    return f"{answer.decode():16}{'right' if answer == message else 'WRONG'}"


if __name__ == "__main__":
    trio.run(main)
