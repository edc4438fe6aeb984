"""A histogram of latencies: whatever their number, the same few kilobytes, and 1 % of precision.

The idea is HdrHistogram's: buckets whose width grows with the value, so that the relative error is the same for
microseconds and for minutes.
"""

import math
from collections.abc import Iterator
from typing import Any, Self

import attrs

# The upper edge of the first bucket, in seconds, and of each further one as a multiple of the one before.
_FIRST = 1e-6
_RATIO = 1.01
_LOG_RATIO = math.log(_RATIO)
# The last bucket but one ends above one hour; the last takes whatever is longer.
_BUCKETS = 2214


@attrs.define
class Histogram:
    """Counts of latencies, in buckets.

    Attributes:
        count: how many latencies were recorded.
        maximum: the longest of them in seconds, exactly; 0 as long as there is none.
        counts: how many are in each bucket.
    """

    count: int = 0
    maximum: float = 0.0
    counts: list[int] = attrs.Factory(lambda: [0] * _BUCKETS)

    def record(self, latency: float, count: int = 1) -> None:
        """Record ``latency``, in seconds and 0 or more, ``count`` times."""
        index = math.ceil(math.log(latency / _FIRST) / _LOG_RATIO) if latency > _FIRST else 0
        self.counts[min(index, _BUCKETS - 1)] += count
        self.count += count
        self.maximum = max(self.maximum, latency)

    def add(self, other: "Histogram") -> None:
        """Record everything that ``other`` has recorded."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.count += other.count
        self.maximum = max(self.maximum, other.maximum)

    def percentile(self, percent: float) -> float:
        """Return the latency, in seconds, that ``percent`` % of those recorded did not exceed.

        Args:
            percent: above 0, up to 100, to one decimal place.

        Returns:
            The upper edge of the bucket that holds it: never less than it was, and at most 1 % more (for those
            shorter than 1 µs, 1 µs). 0 if nothing was recorded.
        """
        # In whole numbers: 99.9 has no exact float, and its error would be enough to take the next rank.
        rank = math.ceil(self.count * round(percent * 10) / 1000)
        below = 0
        for edge, count in self.buckets():
            below += count
            if below >= rank:
                return min(edge, self.maximum)
        return 0.0

    def buckets(self) -> Iterator[tuple[float, int]]:
        """Yield each bucket that holds something, in order: its upper edge in seconds, and its count."""
        for index, count in enumerate(self.counts):
            if count:
                yield _edge(index) if index < _BUCKETS - 1 else self.maximum, count

    def rows(self, most: int) -> list[tuple[float, float, int]]:
        """Return the range of what was recorded in at most ``most`` rows, for a plot.

        Returns:
            For each row its lower and its upper edge in seconds, and its count, which may be 0. A row begins where
            the one before ends, and all are equally wide on a logarithmic scale.
        """
        filled = [index for index, count in enumerate(self.counts) if count]
        if not filled:
            return []
        first, last = filled[0], filled[-1]
        size = math.ceil((last - first + 1) / most)
        return [
            (_edge(start - 1), _edge(start + size - 1), sum(self.counts[start : start + size]))
            for start in range(first, last + 1, size)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        counts = [[index, count] for index, count in enumerate(self.counts) if count]
        return {"maximum": self.maximum, "counts": counts}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the histogram whose `to_json` gave ``data``."""
        histogram = cls(maximum=data["maximum"])
        for index, count in data["counts"]:
            histogram.counts[index] = count
            histogram.count += count
        return histogram


def _edge(index: int) -> float:
    return _FIRST * math.exp(index * _LOG_RATIO)
