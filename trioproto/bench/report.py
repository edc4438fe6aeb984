"""Reports of a measurement: progress, table, text plot, JSON. Requires the extra ``bench``."""

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import plotext  # type: ignore[import-untyped]
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
from tqdm import tqdm

from trioproto.addresses import format_address
from trioproto.bench.load import WRONG_REPLY, Load, Measurement

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
# Above this share of busy time, a load generator may limit the rate.
_BUSY = 0.9
_TERMINAL_ROWS = 16
# A plot's rows are wider than the histogram's buckets, which are up to 0.1 % wide, so that no row is empty only because
# no bucket begins in it.
_ROW_RATIO = 1.01


@contextlib.contextmanager
def progress(load: Load) -> Iterator[Callable[[Measurement], object]]:
    """Show a progress bar and the current rate on standard error while the block runs, if that is a terminal.

    Yields:
        A function to call with the measurement so far.
    """
    before = Measurement()
    with tqdm(
        total=load.duration,
        desc=load.protocol,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n:.1f}/{total:.1f} s{postfix}",
        disable=sys.stderr is None or not sys.stderr.isatty(),  # None: it was closed when Python started
        leave=False,
        # Redraw on each call of `show`, which are rare enough.
        mininterval=0,
        miniters=0,
        dynamic_ncols=True,
    ) as bar:

        def show(measurement: Measurement) -> None:
            nonlocal before
            seconds = measurement.seconds - before.seconds
            if seconds > 0:
                rate = (measurement.answered - before.answered) / seconds
                bar.set_postfix_str(f"{rate:,.0f}/s, {measurement.errors.total():,} errors", refresh=False)
                bar.update(min(seconds, load.duration - bar.n))
                before = measurement

        yield show


def table(load: Load, measurement: Measurement) -> str:
    """Return the load and its results as lines that fit into 80 columns."""
    percentiles = [measurement.percentile(percent) for percent in PERCENTILES.values()]
    lines = [
        description(load),
        "",
        f"{'seconds':12}{measurement.seconds:>13.1f}",
        f"{'answered':12}{measurement.answered:>13,}",
        f"{'unanswered':12}{measurement.unanswered:>13,}",
        f"{'rate':12}{measurement.rate:>13,.0f} requests/s",
        f"{'errors':12}{measurement.errors.total():>13,}",
        *(f"{'':12}{count:>13,} {what}" for what, count in measurement.errors.most_common()),
        "",
        f"{'latency':12}" + "".join(f"{name:>13}" for name in PERCENTILES),
        f"{'':12}" + "".join(f"{format_time(latency):>13}" for latency in percentiles),
    ]
    if measurement.busy > _BUSY:
        lines += [
            "",
            f"A load generator was busy {measurement.busy:.0%} of the time and may have limited the rate.",
            f"Try --processes {load.processes + 1}, if there are enough processors.",
        ]
    return "\n".join(lines)


def failure(load: Load, measurement: Measurement) -> str | None:
    """Return why the measurement is not valid for ``load``'s protocol; None if it is valid."""
    where = format_address((load.host, load.port))
    if wrong := measurement.errors[WRONG_REPLY]:
        what = f"{wrong:,} replies from {where} are wrong"
    elif not measurement.answered:
        what = f"{where} answered no request"
    else:
        return None
    return f"{what}; is an {load.protocol} server running there?"


def description(load: Load) -> str:
    """Describe the load in two lines."""
    pace = "closed loop" if load.rate is None else f"open loop of {load.rate:,.10g} requests/s"
    message = "bytes" if load.protocol == "echo" else "operands"
    return (
        f"{load.protocol} at {format_address((load.host, load.port))}, {pace}\n"
        f"connections {load.connections}, depth {load.depth}, {message} {load.size}, processes {load.processes}"
    )


def format_time(seconds: float) -> str:
    """Format a time with three significant digits."""
    if seconds >= 1:
        value, unit = seconds, "s"
    elif seconds >= 1e-3:  # noqa: PLR2004
        value, unit = seconds * 1e3, "ms"
    else:
        value, unit = seconds * 1e6, "µs"
    digits = max(0, 2 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{digits}f} {unit}"


def rows(latencies: HdrHistogram, most: int) -> list[tuple[float, float, int]]:
    """Divide the range of recorded latencies into at most ``most`` rows, for a plot.

    Returns:
        For each row, its lower and upper edge in seconds, and its count, which may be 0. Each row begins where the
        previous one ends, and all are equally wide on a logarithmic scale.
    """
    buckets = [
        (bucket.value_iterated_to / 1e9, bucket.count_at_value_iterated_to)
        for bucket in latencies.get_recorded_iterator()
    ]
    if not buckets:
        return []
    lowest, highest = buckets[0][0], buckets[-1][0]
    rows = max(1, min(most, math.floor(math.log(highest / lowest) / math.log(_ROW_RATIO))))
    ratio = max(_ROW_RATIO, (highest / lowest) ** (1 / rows))
    counts: Counter[int] = Counter()
    for latency, count in buckets:
        row = math.ceil(math.log(latency / lowest) / math.log(ratio)) - 1
        # The lowest belongs to the first row, and the highest to the last, however their logarithms were rounded.
        counts[min(max(0, row), rows - 1)] += count
    return [(lowest * ratio**row, lowest * ratio ** (row + 1), counts[row]) for row in range(rows)]


def terminal_plot(latencies: HdrHistogram, width: int) -> str:
    """Return the distribution of ``latencies`` as a text bar chart, ``width`` columns wide; empty without latencies.

    A row counts the latencies up to its own that are above that of the previous row.
    """
    bars = rows(latencies, _TERMINAL_ROWS)
    if not bars:
        return ""
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, len(bars))
    figure.axes(active=False)
    counts = [count for _, _, count in bars]
    figure.draw(figure.bar(range(len(bars)), counts, orientation="horizontal", width=0.1))
    figure.ruler("x").ticks([], [])
    ruler = figure.ruler("y")
    ruler.ticks(range(len(bars)), [f"{format_time(edge):>8} {count:>12,} " for _, edge, count in bars])
    ruler.direction(-1)
    text: str = figure.build().string(colorless=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def write_json(path: Path, load: Load, measurement: Measurement, *, interrupted: bool) -> None:
    """Write the load and all results to ``path`` as one JSON object; times are in seconds.

    ``histogram`` is the distribution of latencies for HdrHistogram's tools: in nanoseconds, in the compressed format
    V2, in base64.

    Raises:
        OSError: if it cannot be written.
    """
    report = {
        "load": attrs.asdict(load),
        "interrupted": interrupted,
        "seconds": measurement.seconds,
        "rate": measurement.rate,
        "answered": measurement.answered,
        "unanswered": measurement.unanswered,
        "errors": measurement.errors,
        "latency": {name: measurement.percentile(percent) for name, percent in PERCENTILES.items()},
        "histogram": measurement.latencies.encode().decode(),
        "histogram_unit": "nanoseconds",
        "busy": measurement.busy,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
