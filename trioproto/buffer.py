"""A receive buffer: bytes that have arrived and are not consumed yet. No I/O."""


class ReceiveBuffer:
    """Bytes that are appended at the end and taken from the start, in linear time for pieces of any size.

    If the data of one receive is taken whole, as is usual, it is not copied.

    Attributes:
        size: how many bytes can be taken.
    """

    __slots__ = ("_bytes", "_mark", "_position", "size")

    def __init__(self) -> None:
        self.size: int = 0
        self._bytes: bytes | bytearray = b""
        self._position = 0  # of the next byte to take
        self._mark: int | None = None  # position that `rewind` returns to

    def append(self, data: bytes) -> None:
        """Append ``data``."""
        kept = self._position if self._mark is None else self._mark
        if kept == len(self._bytes):
            self._bytes = data
        elif isinstance(self._bytes, bytearray):
            del self._bytes[:kept]
            self._bytes += data
        else:
            self._bytes = bytearray().join((memoryview(self._bytes)[kept:], data))
        self._position -= kept
        if self._mark is not None:
            self._mark = 0
        self.size += len(data)

    def take(self, n: int) -> bytes:
        """Remove and return the next ``n`` bytes, or all of them if there are fewer."""
        end = self._position + n
        if isinstance(self._bytes, bytes):
            data = self._bytes[self._position : end]  # no copy if it is all of them
        else:
            with memoryview(self._bytes) as view:
                data = bytes(view[self._position : end])
        self._position += len(data)
        self.size -= len(data)
        if not self.size and self._mark is None:
            self.clear()
        return data

    def find(self, delimiter: bytes, start: int) -> int:
        """Return how many bytes are before the first ``delimiter`` at or after byte ``start``; -1 if there is none."""
        found = self._bytes.find(delimiter, self._position + start)
        return -1 if found < 0 else found - self._position

    def give_back(self, data: bytes) -> None:
        """Put ``data``, the bytes that were taken last, back at the start."""
        start = self._position - len(data)
        if start >= 0 and self._bytes.startswith(data, start):
            self._position = start
        else:
            self._bytes = self._bytes[: self._position] + data + self._bytes[self._position :]
        self.size += len(data)

    def mark(self) -> None:
        """Mark the next byte, and keep what is taken from here on, for `rewind`."""
        self._mark = self._position

    def rewind(self) -> None:
        """Return to the marked byte."""
        if self._mark is not None:
            self.size += self._position - self._mark
            self._position = self._mark
            self._mark = None

    def unmark(self) -> None:
        """Remove the mark: what was taken need not be kept."""
        self._mark = None
        if not self.size:
            self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._bytes = b""
        self.size = 0
        self._position = 0
        self._mark = None
