"""Plots latencies as an SVG or PNG file. Requires the extra ``bench``.

Import this only to plot: importing Matplotlib takes longer than the rest of the command's start.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from trioproto.bench.load import Load, Measurement
from trioproto.bench.report import PERCENTILES, description, format_time, rows

_ROWS = 120
# Colours that are readable on white and on black.
_GREY = "#808080"
_BLUE = "#3987d6"
_ORANGE = "#d9730d"


def write_plot(path: Path, load: Load, measurement: Measurement) -> None:
    """Plot the distribution of latencies to ``path``, as SVG or PNG by its suffix.

    The background is transparent, and the colours are readable on light and on dark pages.

    Raises:
        OSError: if it cannot be written.
    """
    with mpl.rc_context(
        {
            "text.color": _GREY,
            "axes.edgecolor": _GREY,
            "axes.labelcolor": _GREY,
            "xtick.color": _GREY,
            "ytick.color": _GREY,
        }
    ):
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="latency", ylabel="requests")
        axes.set_title(description(load), loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda latency, _: format_time(latency))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if bars := rows(measurement.latencies, _ROWS):
            lower, upper, counts = zip(*bars, strict=True)
            axes.stairs(counts, [lower[0], *upper], fill=True, color=_BLUE)
            # A range of at least a factor of 5 has two ticks. Leave room above and on the right for the percentiles.
            left, right = lower[0], max(upper[-1], lower[0] * 5)
            axes.set_xlim(left, right * (right / left) ** 0.15)
            axes.set_ylim(0, max(counts) * 1.6)
            # Each line ends at its label, lower than the one before, so that no line crosses a label.
            for number, (name, percent) in enumerate(PERCENTILES.items()):
                latency, height = measurement.percentile(percent), 0.97 - 0.07 * number
                axes.axvline(latency, ymax=height, color=_ORANGE, linewidth=1)
                axes.annotate(
                    f" {name} {format_time(latency)}",
                    (latency, height),
                    xycoords=("data", "axes fraction"),
                    verticalalignment="top",
                    fontsize="small",
                )
        figure.savefig(path, transparent=True)
