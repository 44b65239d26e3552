"""Two panels: losses, and how far each is from BF16's."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.loss_gap.report import BF16, FP8, GOAL, SHORT, gaps_along, mean_gaps, twin_of, window_of
from benchmarks.loss_gap.training import Curve
from deepseek_train.monitor.pictures.loss import smooth
from deepseek_train.monitor.pictures.style import FAINT, INK, count_ticks, dress, new_figure, save

_COLOURS = {FP8: "#e2733d", BF16: "#2f6fdb"}


def draw(curves: Mapping[str, Curve], path: Path) -> Path:
    """PNG of the long runs; other seeds are thin."""
    runs = {name: curve for name, curve in curves.items() if not name.startswith(SHORT)}
    figure = new_figure(9.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    below.axhline(0, color=INK, linewidth=0.8)
    for name, curve in runs.items():
        colour, width = _COLOURS[name.split(",")[0]], 1.6 if name in _COLOURS else 0.6
        tokens_S = np.arange(1, len(curve.losses) + 1) * curve.tokens_per_step
        above.plot(
            tokens_S,
            smooth(np.array(curve.losses)),
            color=colour,
            linewidth=width,
            linestyle="--" if name.startswith(FP8) else "-",
            label=f"{name}: held out {curve.held_out[-1][1]:.3f}",
        )
        twin = runs.get(twin_of(name))
        if twin is not None and twin is not curve:
            gaps_S = gaps_along(curve, twin, window_of(curve))
            below.plot(tokens_S[-len(gaps_S) :], gaps_S, color=colour, linewidth=0.6, label=name)
    mean_S = mean_gaps(runs)
    if mean_S is not None:
        below.plot(tokens_S[-len(mean_S) :], mean_S, color=_COLOURS[FP8], linewidth=1.8, label="fp8, mean")
    below.axhspan(-GOAL, GOAL, color=FAINT, alpha=0.5)
    title = (
        f"Gap, means over a tenth of the run: fp8 to bf16 of its seed, bf16 to its first; grey: +-{GOAL} %"
    )
    dress(above, "Training loss", "", "nats a token")
    dress(below, title, "tokens", "%")
    count_ticks(below)
    above.legend(frameon=False, fontsize=8)
    if below.lines[1:]:  # the first is zero
        below.legend(frameon=False, fontsize=8)
    return save(figure, path)
