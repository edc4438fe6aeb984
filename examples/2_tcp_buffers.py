"""Where the bytes are: TCP's buffers, observed on loopback.

Sending only moves bytes into the socket's output buffer in the kernel, and receiving takes them from the input buffer
of the other socket. TCP decides when they travel from one to the other. Every number printed here is counted, or read
from the kernel at that moment: ioctls SIOCOUTQ and SIOCINQ, socket options, TCP_INFO (tcp(7), Linux).

Run it::

    python examples/2_tcp_buffers.py

Note how the numbers add up in section 2: what was sent is in the output buffer or in the input buffer. Then note what
``close`` does to each of the two: the output buffer is still sent (3); unread input is lost (4), and then the output
buffer is lost, too (5).
"""

import errno
import fcntl
import os
import socket
import struct
import sys
import termios

import trio

BUFFER_SIZE = 32768  # small, so that it fills fast; by default, the kernel lets buffers grow to megabytes
SNDBUF = (socket.SOL_SOCKET, socket.SO_SNDBUF)
RCVBUF = (socket.SOL_SOCKET, socket.SO_RCVBUF)
DATA = os.urandom(1_000_000)

# A sender that could send nothing for this many seconds is blocked; the kernel delays no acknowledgement for longer.
PATIENCE = 0.3

# <linux/sockios.h>: these two are the terminal ioctls under other names.
SIOCINQ = termios.FIONREAD
SIOCOUTQ = termios.TIOCOUTQ

# Offsets of fields in struct tcp_info, <linux/tcp.h>: each is a u32.
TCPI_DATA_SEGS_OUT = 156
TCPI_SND_WND = 228


def in_output_buffer(stream: trio.SocketStream) -> int:
    """Return how many bytes the program has sent that the other side has not acknowledged yet."""
    return _ioctl(stream, SIOCOUTQ)


def in_input_buffer(stream: trio.SocketStream) -> int:
    """Return how many bytes have arrived that the program has not received yet."""
    return _ioctl(stream, SIOCINQ)


def segments_sent(stream: trio.SocketStream) -> int:
    """Return how many TCP segments with data this socket has sent."""
    return _tcp_info(stream, TCPI_DATA_SEGS_OUT)


def window(stream: trio.SocketStream) -> int:
    """Return how many more bytes the other side has said that it accepts: TCP's sliding window."""
    return _tcp_info(stream, TCPI_SND_WND)


def _ioctl(stream: trio.SocketStream, request: int) -> int:
    (number,) = struct.unpack("i", fcntl.ioctl(stream.socket.fileno(), request, bytes(4)))
    return int(number)


def _tcp_info(stream: trio.SocketStream, offset: int) -> int:
    info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (number,) = struct.unpack_from("I", info, offset)
    return int(number)


async def connect() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Return both ends of a TCP connection: one to send, and one to receive. Their buffers are small."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        listener.socket.setsockopt(*RCVBUF, BUFFER_SIZE)  # inherited by accepted sockets
        sender = await trio.open_tcp_stream(*listener.socket.getsockname())
        sender.socket.setsockopt(*SNDBUF, BUFFER_SIZE)
        return sender, await listener.accept()


async def send_until_blocked(sender: trio.SocketStream) -> int:
    """Send `DATA` until the kernel accepts no more, and return how many bytes it has accepted."""
    sent = 0
    while True:
        # socket.send(), not send_all(): if it is cancelled, it has sent nothing, so the count stays right.
        with trio.move_on_after(PATIENCE) as scope:
            sent += await sender.socket.send(DATA[sent : sent + 10_000])
        if scope.cancelled_caught:
            return sent


async def receive_the_rest(receiver: trio.SocketStream) -> tuple[bytes, str]:
    """Receive until the end, and return the bytes, and "end of stream" or the error's name."""
    received = bytearray()
    try:
        async for chunk in receiver:
            received += chunk
    except trio.BrokenResourceError as error:
        match error.__cause__:
            case OSError(errno=int(number)):
                return bytes(received), errno.errorcode[number]
            case _:
                raise
    return bytes(received), "end of stream"


async def sends_and_receives() -> None:
    """1: the number of sends says nothing about the number of receives."""
    title("1. n sends arrive as m receives")
    sender, receiver = await connect()
    async with sender, receiver:
        for _ in range(5):
            await sender.send_all(b"abc")
        await trio.sleep(PATIENCE)
        sizes = [len(await receiver.receive_some(65536))]
        row("5 sends of 3 bytes, no receive yet: segments", segments_sent(sender), "TCP_INFO")
        row(f"then receives, of {_list(sizes)} bytes", len(sizes))

    sender, receiver = await connect()
    async with receiver, trio.open_nursery() as nursery:

        async def send() -> None:
            async with sender:
                await sender.send_all(DATA[:200_000])
                await trio.sleep(PATIENCE)
                row("1 send of 200000 bytes: segments", segments_sent(sender), "TCP_INFO")

        nursery.start_soon(send)
        sizes = [len(chunk) async for chunk in receiver]
    row(f"receives, of {_list(sizes)} bytes", len(sizes))


async def blocked_sender() -> None:
    """2: when the receiver does not receive, the buffers fill, and then sending waits. Nothing overflows."""
    title("2. A sender blocks when the receiver does not receive")
    sender, receiver = await connect()
    async with sender, receiver:
        row("window at first: the receiver accepts", window(sender), "TCP_INFO")
        sent = await send_until_blocked(sender)
        row("sent, then blocked", sent, "counted")
        row("of these in the sender's output buffer", in_output_buffer(sender), "SIOCOUTQ")
        row("and in the receiver's input buffer", in_input_buffer(receiver), "SIOCINQ")
        row("window now: the receiver accepts", window(sender), "TCP_INFO")
        received = bytearray()
        while len(received) < sent:
            received += await receiver.receive_some()
        row(f"then received, {_compare(received, sent)}", len(received), "counted")
        row("window afterwards: the receiver accepts", window(sender), "TCP_INFO")


async def output_survives_close() -> None:
    """3: the kernel still sends what the program sent before it closed the socket."""
    title("3. The output buffer is still sent after close")
    sender, receiver = await connect()
    async with receiver:
        sent = await send_until_blocked(sender)
        row("sent", sent, "counted")
        row("in the output buffer when the sender closes", in_output_buffer(sender), "SIOCOUTQ")
        await sender.aclose()
        received, end = await receive_the_rest(receiver)
        row(f"received after close, {_compare(received, sent)}", len(received), "counted")
        row("and then", end)


async def unread_input_is_lost() -> None:
    """4: bytes that a program never received are discarded with its socket, and the peer gets a reset."""
    title("4. Unread input is lost at close")
    sender, receiver = await connect()
    async with sender:
        await sender.send_all(b"0123456789")
        await trio.sleep(PATIENCE)
        row("sent", 10, "counted")
        row("still in the sender's output buffer: all acknowledged", in_output_buffer(sender), "SIOCOUTQ")
        row("unread in the input buffer when the receiver closes", in_input_buffer(receiver), "SIOCINQ")
        await receiver.aclose()
        received, end = await receive_the_rest(sender)
        row("the sender receives", len(received), "counted")
        row("and then", end)


async def unread_input_discards_output() -> None:
    """5: the reset of 4 is sent instead of the rest of the output buffer, so 3 holds only without unread input."""
    title("5. Closing with unread input loses the output buffer, too")
    sender, receiver = await connect()
    async with receiver:
        sent = await send_until_blocked(sender)
        await receiver.send_all(b"!")
        await trio.sleep(PATIENCE)
        row("sent", sent, "counted")
        row("in the output buffer when the sender closes", in_output_buffer(sender), "SIOCOUTQ")
        row("unread in its input buffer", in_input_buffer(sender), "SIOCINQ")
        await sender.aclose()
        arrived = in_input_buffer(receiver)
        received, end = await receive_the_rest(receiver)
        row("arrived at the receiver", arrived, "SIOCINQ")
        row("of these received", len(received), "counted")
        row("and then", end)


async def main() -> None:
    """Print how large the buffers are, then what happens in them."""
    sender, receiver = await connect()
    async with sender, receiver:
        title("The buffers of this connection, in bytes")
        row(f"output buffer, {BUFFER_SIZE} requested", sender.socket.getsockopt(*SNDBUF), "SO_SNDBUF")
        row(f"input buffer, {BUFFER_SIZE} requested", receiver.socket.getsockopt(*RCVBUF), "SO_RCVBUF")
    await sends_and_receives()
    await blocked_sender()
    await output_survives_close()
    await unread_input_is_lost()
    await unread_input_discards_output()


def title(text: str) -> None:
    """Print the heading of a section."""
    print(f"\n{text}")


def row(label: str, value: object, source: str = "") -> None:
    """Print one observation, and the source of its number."""
    print(f"  {label:54}{value:>13}  {source}".rstrip())


def _compare(received: bytes | bytearray, sent: int) -> str:
    return "all as sent" if received == DATA[:sent] else "NOT as sent"


def _list(sizes: list[int]) -> str:
    shown = ", ".join(str(size) for size in sizes[:3])
    return shown + (", …" if len(sizes) > 3 else "")  # as many as fit on the line


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("2_tcp_buffers.py: reads numbers that only Linux has: run it on Linux")
    trio.run(main)
