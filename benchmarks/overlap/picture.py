"""The sweep as a picture: how much of a pair's time nothing is computed, over communication / compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.ticker import PercentFormatter

from benchmarks.overlap.times import TRACE_EXPOSED, TRACE_RATIO
from deepseek_train.monitor.pictures.style import INK, dress, new_figure, save

_COLOURS = {"paired": "#23907f", "in sequence": "#ea8a2c"}


class Point(Protocol):
    """One row of the results."""

    @property
    def order(self) -> str: ...
    @property
    def ratio(self) -> float: ...
    @property
    def exposed(self) -> float: ...
    @property
    def exposed_least(self) -> float: ...
    @property
    def exposed_most(self) -> float: ...
    @property
    def exposed_on_paper(self) -> float: ...


def draw_sweep(points: Sequence[Point], path: Path, title: str) -> Path:
    """Dots: measured medians, with the range of all samples; lines: the two lanes on paper."""
    figure = new_figure(8.0, 4.6)
    axes = figure.add_subplot()
    dress(axes, title, "communication / compute of a pair", "share of the time in which nothing is computed")
    for order, colour in _COLOURS.items():
        mine = sorted((p for p in points if p.order == order), key=lambda p: p.ratio)
        ratios = [p.ratio for p in mine]
        axes.plot(
            ratios, [p.exposed_on_paper for p in mine], color=colour, lw=1.2, label=f"{order}, on paper"
        )
        ranges = (
            [p.exposed - p.exposed_least for p in mine],
            [p.exposed_most - p.exposed for p in mine],
        )
        measured = [p.exposed for p in mine]
        axes.errorbar(
            ratios, measured, ranges, color=colour, fmt="o", ms=5, capsize=3, label=f"{order}, measured"
        )
    axes.plot([TRACE_RATIO], [TRACE_EXPOSED], "*", color=INK, ms=11, label="DeepSeek's published trace")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)
