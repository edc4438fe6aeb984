"""One send is not one receive.

TCP carries bytes, not messages: what was sent in one piece may arrive in several. This runs the echo client that
everybody writes first, with one send and one receive, beside a correct one. Both talk to the same echo server over
in-memory streams that fragment what they deliver, so that what happens on a network occasionally happens here every
time.

Run it::

    python examples/1_short_reads.py

Note the answers of the first client: too short, and from then on mixed up with the rest of earlier answers.
"""

from collections.abc import Awaitable, Callable

import trio

from trioproto import echo_handler, receive_exactly
from trioproto.testing import Cuts, fragmentations, fragmented_stream_pair

MESSAGES = [b"How are you?", b"And you?", b"Goodbye."]
BUFFER_SIZE = 1024

Client = Callable[[trio.abc.Stream, bytes], Awaitable[bytes]]


async def broken_client(stream: trio.abc.Stream, message: bytes) -> bytes:
    """One send, one receive: treats whatever has arrived so far as the whole answer."""
    await stream.send_all(message)
    return bytes(await stream.receive_some(BUFFER_SIZE))


async def correct_client(stream: trio.abc.Stream, message: bytes) -> bytes:
    """Receive exactly as many bytes as were sent."""
    await stream.send_all(message)
    return await receive_exactly(stream, len(message))


async def ask(client: Client, messages: list[bytes], cuts: Cuts) -> list[bytes]:
    """Return the answers that the client gets from an echo server, on one connection that fragments them."""
    stream, served = fragmented_stream_pair(to_first=cuts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_handler, served)
        async with stream:
            return [await client(stream, message) for message in messages]


async def main() -> None:
    """Show three answers of each client, then count how many fragmentations of one answer each gets right."""
    print("Three messages to an echo server. Its answers arrive 5 bytes at a time.\n")
    broken = await ask(broken_client, MESSAGES, cuts=5)
    correct = await ask(correct_client, MESSAGES, cuts=5)
    print(f"{'sent':16}{'one send, one receive':31}receive until complete")
    for message, first, second in zip(MESSAGES, broken, correct, strict=True):
        print(f"{message.decode():16}{_verdict(first, message):31}{_verdict(second, message)}")

    message = b"0123456789"
    every_way = list(fragmentations(len(message)))
    print(f"\nOne answer of {len(message)} bytes, fragmented in each of {len(every_way)} possible ways:\n")
    for name, client in [("one send, one receive", broken_client), ("receive until complete", correct_client)]:
        right = [cuts for cuts in every_way if await ask(client, [message], cuts) == [message]]
        note = " (the unfragmented one)" if right == [(len(message),)] else ""
        print(f"  {name:28}right in {len(right):3} of {len(every_way)}{note}")


def _verdict(answer: bytes, message: bytes) -> str:
    return f"{answer.decode():16}{'right' if answer == message else 'WRONG'}"


if __name__ == "__main__":
    trio.run(main)
