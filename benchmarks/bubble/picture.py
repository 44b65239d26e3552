"""Bars: what each implementation adds to its schedule's ideal bubble."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.bubble.report import CONTESTANTS, BubbleRow
from deepseek_train.monitor.pictures.style import INK, dress, new_figure, save

_COLOURS = {"ours": "#2f6fdb", "torch": "#e2733d", "deepspeed": "#8a8f9c"}
_WIDTH = 0.27


def draw(rows: Sequence[BubbleRow], path: Path) -> Path:
    """PNG with a panel for each number of micro-batches, at the longest chunk time measured."""
    longest = max(row.chunk_ms for row in rows)
    rows = [row for row in rows if row.chunk_ms == longest]
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    counts = sorted({row.microbatches for row in rows})
    figure = new_figure(9, 2.6 * len(counts))
    panels = figure.subplots(len(counts), 1, squeeze=False)[:, 0]
    for axes, count in zip(panels, counts, strict=True):
        for position, who in enumerate(CONTESTANTS):
            bars = {r.schedule: r for r in rows if r.microbatches == count and r.who == who}
            places = [schedules.index(name) + (position - 1) * _WIDTH for name in bars]
            heights = [row.excess for row in bars.values()]
            axes.bar(places, heights, 0.9 * _WIDTH, color=_COLOURS[who], label=who)
            for place, row in zip(places, bars.values(), strict=True):
                end = "bottom" if row.excess >= 0 else "top"
                axes.text(place, row.excess, f"{row.least:.3f}", ha="center", va=end, fontsize=6, color=INK)
        axes.axhline(0, color=INK, linewidth=0.8)
        ideals = {row.schedule: row.ideal for row in rows if row.microbatches == count}
        axes.set_xticks(
            range(len(schedules)), [f"{name}\nideal {ideals[name]:.3f}" for name in schedules], fontsize=7
        )
        dress(axes, f"{count} micro-batches, F = I = W = {longest:g} ms", "", "bubble above ideal")
    panels[0].legend(frameon=False, fontsize=8)
    return save(figure, path)
