"""`ReceiveBuffer`: bytes in the order in which they arrived, whatever is taken, given back or gone back to."""

import tracemalloc

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trioproto.buffer import ReceiveBuffer


def test_take() -> None:
    """Bytes are taken in the order in which they were put in, wherever the deliveries were cut."""
    buffer = ReceiveBuffer()
    for data in (b"he", b"l", b"lo world"):
        buffer.append(data)
    assert buffer.size == 11
    assert [buffer.take(n) for n in (0, 1, 5, 4)] == [b"", b"h", b"ello ", b"worl"]
    assert buffer.size == 1


def test_take_more_than_there_is() -> None:
    """Asking for more than there is takes all of it."""
    buffer = ReceiveBuffer()
    assert buffer.take(1) == b""
    buffer.append(b"hello")
    assert buffer.take(100) == b"hello"
    assert buffer.take(100) == b""
    assert buffer.size == 0


def test_take_returns_bytes() -> None:
    """What is taken is of type bytes, and stays the same, whatever happens to the buffer afterwards."""
    buffer = ReceiveBuffer()
    buffer.append(b"hello")
    buffer.take(1)
    buffer.append(b" world")
    taken = buffer.take(4)
    buffer.append(b"!")
    assert (type(taken), taken) == (bytes, b"ello")


def test_one_delivery_is_not_copied() -> None:
    """What one delivery brought is handed on as it is."""
    buffer = ReceiveBuffer()
    data = bytes(100_000)
    buffer.append(data)
    assert buffer.take(100_000) is data


def test_find() -> None:
    """A delimiter is found from the given byte on, both counted from the next byte to take; -1: there is none."""
    buffer = ReceiveBuffer()
    buffer.append(b"x\r\nkey: value\r")
    assert buffer.find(b"\r\n", 0) == 1
    assert buffer.find(b"\r\n", 1) == 1
    buffer.take(3)
    assert buffer.find(b"\r\n", 0) == -1
    buffer.append(b"\n")
    assert buffer.find(b"\r\n", 0) == 10
    assert buffer.find(b"\r\n", 11) == -1
    assert buffer.size == 12


def test_give_back() -> None:
    """What was taken too much is taken again, also if nothing is left of where it came from."""
    buffer = ReceiveBuffer()
    buffer.append(b"hello")
    buffer.give_back(buffer.take(5)[2:])
    assert buffer.take(5) == b"llo"
    buffer.append(b"hello world")
    buffer.give_back(buffer.take(5)[2:])
    assert buffer.take(100) == b"llo world"


def test_rewind() -> None:
    """Going back returns to the byte that was marked, with all that has arrived since."""
    buffer = ReceiveBuffer()
    buffer.append(b"before request")
    buffer.take(7)
    buffer.mark()
    assert buffer.take(100) == b"request"
    buffer.append(b" and more")
    assert buffer.take(4) == b" and"
    buffer.give_back(b"and")
    buffer.rewind()
    assert buffer.size == 16
    assert buffer.take(100) == b"request and more"


def test_unmark() -> None:
    """After `unmark`, what was taken is no longer kept, and there is nothing to go back to."""
    for taken in (2, 5):
        buffer = ReceiveBuffer()
        buffer.append(b"hello")
        buffer.mark()
        buffer.take(taken)
        buffer.unmark()
        buffer.rewind()
        assert buffer.take(100) == b"hello"[taken:]


def test_clear() -> None:
    """Dropping everything drops the mark, too."""
    buffer = ReceiveBuffer()
    buffer.append(b"hello")
    buffer.mark()
    buffer.take(2)
    buffer.clear()
    buffer.rewind()
    assert (buffer.size, buffer.take(100)) == (0, b"")


def test_memory_is_given_back() -> None:
    """What was taken does not stay in memory, also if the buffer never runs empty."""
    buffer = ReceiveBuffer()
    buffer.append(b"x")
    tracemalloc.start()
    try:
        for _ in range(200):
            buffer.append(bytes(50_000))
            buffer.take(50_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.size == 1
    assert peak < 1_000_000


class Model(RuleBasedStateMachine):
    """The buffer beside a plain `bytes` that holds the same."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ReceiveBuffer()
        self.left = b""
        self.since_mark: bytes | None = None  # what was taken since the mark
        self.last = b""  # what was taken last, and may be given back

    @rule(data=st.binary(min_size=1, max_size=20))
    def append(self, data: bytes) -> None:
        self.buffer.append(data)
        self.left += data

    @rule(n=st.integers(0, 25))
    def take(self, n: int) -> None:
        expected, self.left = self.left[:n], self.left[n:]
        assert self.buffer.take(n) == expected
        self.last = expected
        if self.since_mark is not None:
            self.since_mark += expected

    @rule(n=st.integers(1, 25))
    def give_back(self, n: int) -> None:
        data, self.last = self.last[-n:], self.last[:-n]
        if data:
            self.buffer.give_back(data)
            self.left = data + self.left
            if self.since_mark is not None:
                self.since_mark = self.since_mark[: -len(data)]

    @rule(delimiter=st.binary(min_size=1, max_size=2), start=st.integers(0, 25))
    def find(self, delimiter: bytes, start: int) -> None:
        assert self.buffer.find(delimiter, start) == self.left.find(delimiter, start)

    @precondition(lambda self: self.since_mark is None)
    @rule()
    def mark(self) -> None:
        self.buffer.mark()
        self.since_mark = self.last = b""

    @rule()
    def rewind(self) -> None:
        self.buffer.rewind()
        self.left = (self.since_mark or b"") + self.left
        self.since_mark = None
        self.last = b""

    @rule()
    def unmark(self) -> None:
        self.buffer.unmark()
        self.since_mark = None

    @rule()
    def clear(self) -> None:
        self.buffer.clear()
        self.left = self.last = b""
        self.since_mark = None

    @invariant()
    def size(self) -> None:
        assert self.buffer.size == len(self.left)


TestModel = Model.TestCase
TestModel.settings = settings(deadline=None, max_examples=50)
