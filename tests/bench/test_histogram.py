"""`Histogram`: bounded in memory, precise to 1 %."""

import itertools
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproto.bench.histogram import Histogram

LATENCIES = st.lists(st.floats(min_value=1e-6, max_value=3600), min_size=1, max_size=200)


def recorded(latencies: list[float]) -> Histogram:
    histogram = Histogram()
    for latency in latencies:
        histogram.record(latency)
    return histogram


@given(LATENCIES, st.integers(1, 1000))
def test_percentile(latencies: list[float], per_mille: int) -> None:
    """A percentile is the nearest-rank one, never less and at most 1 % more."""
    rank = math.ceil(Fraction(per_mille, 1000) * len(latencies))
    exact = sorted(latencies)[rank - 1]
    percentile = recorded(latencies).percentile(per_mille / 10)
    assert exact * (1 - 1e-9) <= percentile <= exact * (1.01 + 1e-9)


def test_percentile_of_many() -> None:
    """The rank is exact where floating point is not: 99.9 % of 41000 is 40959."""
    histogram = Histogram()
    histogram.record(0.001, 40959)
    histogram.record(1.0, 41)
    assert histogram.percentile(99.9) == pytest.approx(0.001, rel=0.011)


@given(LATENCIES)
def test_maximum(latencies: list[float]) -> None:
    """The maximum is exact, and so is the count."""
    histogram = recorded(latencies)
    assert histogram.percentile(100) == histogram.maximum == max(latencies)
    assert histogram.count == len(latencies)


@given(LATENCIES, LATENCIES)
def test_add(first: list[float], second: list[float]) -> None:
    """Two histograms added are the histogram of everything."""
    histogram = recorded(first)
    histogram.add(recorded(second))
    assert histogram == recorded(first + second)


@given(LATENCIES)
def test_json(latencies: list[float]) -> None:
    """A histogram survives JSON."""
    histogram = recorded(latencies)
    assert Histogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram


@given(LATENCIES, st.integers(1, 50))
def test_rows(latencies: list[float], most: int) -> None:
    """Rows are no more than asked for, adjoin, and hold everything: each within its edges."""
    rows = recorded(latencies).rows(most)
    assert len(rows) <= most
    assert all(row[1] == following[0] for row, following in itertools.pairwise(rows))
    for lower, upper, count in rows:
        within = [x for x in latencies if lower * (1 + 1e-9) < x <= upper * (1 - 1e-9)]
        nearly = [x for x in latencies if lower * (1 - 1e-9) < x <= upper * (1 + 1e-9)]
        assert len(within) <= count <= len(nearly)


def test_beyond_the_range() -> None:
    """Latencies that no bucket is meant for are counted: none at all in the first, days in the last."""
    histogram = recorded([0.0, 86400.0])
    assert histogram.percentile(50) == 1e-6
    assert histogram.percentile(100) == 86400.0


def test_empty() -> None:
    """A histogram of nothing has percentiles of 0 and no rows."""
    assert Histogram().percentile(99) == 0
    assert Histogram().rows(10) == []
