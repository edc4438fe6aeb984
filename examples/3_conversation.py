"""A conversation on the wire: one op request, as TCP segments.

Captures a real exchange on loopback and draws it as a sequence chart, with time running downwards: the three-way
handshake, request and reply with the fields of the op protocol, the closing handshake. Sequence and acknowledgement
numbers are relative to the initial ones, as in Wireshark.

Run it (capturing needs root; scapy parses the packets; the SVG is written if you name a file for it)::

    .venv/bin/pip install -e '.[examples]'
    sudo .venv/bin/python examples/3_conversation.py [examples/conversation.svg]

Note the acknowledgements. They are often explained as ACK = SEQ + bytes + 1. In fact, ACK = SEQ + bytes; only a SYN or
a FIN adds one, because each counts like a byte (RFC 9293, section 3.4).
"""

import contextlib
import functools
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import attrs
import trio

from trioproto import op_handler, op_request, serve_tcp
from trioproto.op import Reply, Request

try:
    from scapy.layers.inet import IP, TCP
except ModuleNotFoundError:
    sys.exit("3_conversation.py: needs scapy; from a clone of trioproto: pip install -e '.[examples]'")

OPERANDS, OPERATOR = (12, -7, 1), "+"

ETH_P_IP = 0x0800  # <linux/if_ether.h>
SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>; Python does not define these two
SO_RCVBUFFORCE = 33

FLAGS = {"S": "SYN", "F": "FIN", "R": "RST", "P": "PSH", "A": "ACK"}
PHASES = ["Three-way handshake", "Request and reply", "Closing handshake"]
LESSON = (
    "An ACK is the number of the next expected byte: ACK = SEQ + bytes.",
    "There is no general + 1: only a SYN and a FIN count like one byte each.",
)


@attrs.frozen
class Segment:
    """One TCP segment of the conversation.

    Attributes:
        time: microseconds since the first one.
        from_client: whether the client sent it.
        flags: such as ``("SYN", "ACK")``.
        seq: the relative number of its first byte.
        ack: the relative number of the next byte that its sender expects; None without the flag.
        data: its payload.
    """

    time: int
    from_client: bool
    flags: tuple[str, ...]
    seq: int
    ack: int | None
    data: bytes

    @property
    def end(self) -> int:
        """The number after its last byte; SYN and FIN count one."""
        return self.seq + len(self.data) + ("SYN" in self.flags) + ("FIN" in self.flags)

    @property
    def label(self) -> str:
        """What Wireshark would show."""
        ack = "" if self.ack is None else f"  ack {self.ack}"
        data = f"  {len(self.data)} bytes" if self.data else ""
        return f"{' '.join(self.flags)}  seq {self.seq}{ack}{data}"

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The fields of the op protocol in it: each one's bytes and meaning."""
        if not self.data:
            return []
        if not self.from_client:
            return [(self.data.hex(" "), f"result {Reply.decode(self.data).result}")]
        request = Request.decode(self.data)
        operands = [self.data[start : start + 4].hex(" ") for start in range(1, len(self.data) - 1, 4)]
        return [
            (self.data[:1].hex(), f"count {len(request.operands)}"),
            *zip(operands, [f"operand {operand}" for operand in request.operands], strict=True),
            (self.data[-1:].hex(), f"operator {request.operator}"),
        ]


async def capture() -> list[Segment]:
    """Send one request to an op server on loopback, and return all segments of that connection."""
    with trio.socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)) as packets:
        # On loopback each packet is seen twice, leaving and arriving. A socket bound to ETH_P_IP, not to ETH_P_ALL,
        # receives only those that arrive (packet(7)).
        await packets.bind(("lo", ETH_P_IP))
        packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        with contextlib.suppress(PermissionError):  # optional: root in a container may lack the capability
            packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2**23)  # loopback may carry much other traffic
        async with trio.open_nursery() as nursery:
            serve = functools.partial(serve_tcp, op_handler, 0, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            server = listener.socket.getsockname()
            async with await trio.open_tcp_stream(*server) as stream:
                client = stream.socket.getsockname()
                await op_request(stream, OPERANDS, OPERATOR)
            segments: list[Segment] = []
            origin: dict[int, int] = {}  # for each port, its initial sequence number
            began = 0
            with trio.fail_after(5):
                while not _is_closed(segments):
                    packet, ancillary, _flags, _address = await packets.recvmsg(65536, 64)
                    tcp = IP(packet).getlayer(TCP)
                    if tcp is None or {tcp.sport, tcp.dport} != {client[1], server[1]}:
                        continue
                    seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
                    time = seconds * 10**9 + nanoseconds
                    began = began or time
                    origin.setdefault(tcp.sport, tcp.seq)
                    segments.append(
                        Segment(
                            time=(time - began) // 1000,
                            from_client=tcp.sport == client[1],
                            flags=tuple(name for letter, name in FLAGS.items() if letter in str(tcp.flags)),
                            seq=(tcp.seq - origin[tcp.sport]) % 2**32,
                            ack=(tcp.ack - origin[tcp.dport]) % 2**32 if "A" in str(tcp.flags) else None,
                            data=bytes(tcp.payload),
                        )
                    )
            nursery.cancel_scope.cancel()
    return segments


def _is_closed(segments: Sequence[Segment]) -> bool:
    acknowledged_ends = [
        end
        for end in segments
        if "FIN" in end.flags
        and any(segment.ack == end.end for segment in segments if segment.from_client != end.from_client)
    ]
    return len(acknowledged_ends) == 2  # one from each side


def explain(segment: Segment, before: Sequence[Segment]) -> str:
    """Return how the acknowledgement of ``segment`` is computed, or "" if it acknowledges nothing new."""
    last = max((other.ack or 0 for other in before if other.from_client == segment.from_client), default=0)
    if segment.ack is None or segment.ack == last:
        return ""
    new = [other for other in before if other.from_client != segment.from_client and last < other.end <= segment.ack]
    size = sum(len(other.data) for other in new)
    counted = [f"{size} bytes"] if size else []
    counted += [f"1 for the {flag}" for flag in ("SYN", "FIN") if any(flag in other.flags for other in new)]
    both = "FIN" in segment.flags and any("FIN" in other.flags for other in new)
    note = "; ACK and FIN in one segment" if both else ""
    return f"ack {segment.ack} = {new[0].seq} + {' + '.join(counted)}{note}"


def phases(segments: Sequence[Segment]) -> Iterator[tuple[str, list[tuple[Segment, str]]]]:
    """Yield each phase's name, and its segments with their explanations."""
    first_data = next(number for number, segment in enumerate(segments) if segment.data)
    first_end = next(number for number, segment in enumerate(segments) if "FIN" in segment.flags)
    bounds = [0, first_data, first_end, len(segments)]
    for name, start, end in zip(PHASES, bounds, bounds[1:], strict=False):
        yield name, [(segments[number], explain(segments[number], segments[:number])) for number in range(start, end)]


def draw_text(segments: Sequence[Segment]) -> Iterator[str]:
    """Yield the lines of the chart for a terminal of 80 columns."""
    inner = 67
    yield f"{'µs':>7}  client{'op server':>{inner - 4}}"
    for name, described in phases(segments):
        yield f"{'':9}│{'':{inner}}│"
        yield f"{'':9}│{f' {name} ':┄^{inner}}│"
        for segment, note in described:
            label = f" {segment.label} "
            arrow = f"─{label:─<{inner - 2}}▶" if segment.from_client else f"◀{label:─>{inner - 2}}─"
            yield f"{segment.time:7}  │{arrow}│"
            widths = [max(len(data), len(meaning)) for data, meaning in segment.fields]
            for row in zip(*segment.fields, strict=True):
                text = "   ".join(f"{cell:^{width}}" for cell, width in zip(row, widths, strict=True))
                yield f"{'':9}│{text:^{inner}}│"
            if note:
                yield f"{'':9}│{note:^{inner}}│"
    yield ""
    yield from LESSON


STYLE = """
    text { font: 14px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; text-anchor: middle; fill: #1f2328 }
    .title { font-size: 17px; font-weight: 600 }
    .who { font-weight: 600 }
    .phase { font-size: 12px; font-weight: 600; fill: #59636e; letter-spacing: .04em }
    .note, .time, .meaning { font-size: 12px; fill: #59636e }
    .label, .data { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 13px }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .band { fill: #f6f8fa }
    .life { stroke: #818b98; stroke-width: 1.5 }
    .client { fill: #0969da }
    .server { fill: #bc4c00 }
    line.client { stroke: #0969da; stroke-width: 1.8 }
    line.server { stroke: #bc4c00; stroke-width: 1.8 }
    .box { fill: #ffffff; stroke: #818b98 }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      .phase, .note, .time, .meaning { fill: #9198a1 }
      .card { fill: #0d1117; stroke: #3d444d }
      .band { fill: #151b23 }
      .life { stroke: #656c76 }
      .client { fill: #4493f8 }
      .server { fill: #f0883e }
      line.client { stroke: #4493f8 }
      line.server { stroke: #f0883e }
      .box { fill: #0d1117; stroke: #656c76 }
    }
"""


def draw_svg(segments: Sequence[Segment]) -> str:
    """Return the chart as an SVG, for light and dark pages."""
    width, left, right, slope = 860, 120, 740, 14
    middle = width // 2
    bands: list[str] = []
    shapes: list[str] = []

    def write(kind: str, x: float, y: float, text: str) -> None:
        shapes.append(f'<text xml:space="preserve" class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    question = f" {OPERATOR} ".join(str(operand) for operand in OPERANDS)
    write("title", middle, 36, f"An op request on the wire: {question}")
    write("who client", left, 72, "client")
    write("who server", right, 72, "op server")
    top = y = 84
    for name, described in phases(segments):
        band = y
        write("phase", middle, y + 20, name)
        y += 42
        for segment, note in described:
            start, end, side = (left, right, "client") if segment.from_client else (right, left, "server")
            back = -9 if segment.from_client else 9
            write("time", 62 if segment.from_client else width - 62, y + 14, f"{segment.time} µs")
            write("label", middle, y + 6, segment.label)
            shapes.append(
                f'<line class="{side}" x1="{start}" y1="{y + 10}" x2="{end + back}" y2="{y + 10 + slope}"/>'
                f'<path class="{side}" d="M{end} {y + 10 + slope} l{back} -5 v10 z"/>'
            )
            y += 34
            if segment.fields:
                boxes = [14 + 8 * max(len(data), len(meaning)) for data, meaning in segment.fields]
                x = middle - sum(boxes) / 2
                for box, (data, meaning) in zip(boxes, segment.fields, strict=True):
                    shapes.append(f'<rect class="box" x="{x:g}" y="{y}" width="{box}" height="24"/>')
                    write("data", x + box / 2, y + 17, data)
                    write("meaning", x + box / 2, y + 39, meaning)
                    x += box
                y += 46
            if note:
                write("note", middle, y + 8, note)
                y += 14
            y += 16
        bands.append(f'<rect class="band" x="16" y="{band}" width="{width - 32}" height="{y - band - 2}" rx="6"/>')
        y += 6
    lives = [f'<line class="life" x1="{x}" y1="{top}" x2="{x}" y2="{y - 8}"/>' for x in (left, right)]
    for line in LESSON:
        y += 20
        write("", middle, y, line)
    height = y + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"  <title>An op request on the wire</title>\n  <style>{STYLE}  </style>",
        f'  <rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        *(f"  {shape}" for shape in (*bands, *lives, *shapes)),
        "</svg>\n",
    ]
    return "\n".join(lines)


def main() -> None:
    """Capture the conversation, print its chart, and write the SVG if a file is named."""
    try:
        segments = trio.run(capture)
    except PermissionError:
        sys.exit("3_conversation.py: capturing packets needs root: run it with sudo")
    for line in draw_text(segments):
        print(line)
    for name in sys.argv[1:]:
        Path(name).write_text(draw_svg(segments), encoding="utf-8")


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("3_conversation.py: packet sockets exist only on Linux: run it there")
    main()
