"""Two panels: losses, and how far each is from BF16's."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.loss_gap.report import BF16, GOAL, SHORT, gaps_along
from benchmarks.loss_gap.training import Curve
from deepseek_train.monitor.pictures.loss import smooth
from deepseek_train.monitor.pictures.style import FAINT, INK, count_ticks, dress, new_figure, save

_COLOURS = {"fp8": "#e2733d", BF16: "#2f6fdb"}
_OTHERS = "#8a8f9c"


def draw(curves: Mapping[str, Curve], path: Path) -> Path:
    """PNG of the long runs."""
    runs = {name: curve for name, curve in curves.items() if not name.startswith(SHORT)}
    figure = new_figure(9.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    below.axhline(0, color=INK, linewidth=0.8)
    for name, curve in runs.items():
        tokens_S = np.arange(1, len(curve.losses) + 1) * curve.tokens_per_step
        smooth_S, colour = smooth(np.array(curve.losses)), _COLOURS.get(name, _OTHERS)
        thick = name in _COLOURS
        above.plot(
            tokens_S,
            smooth_S,
            color=colour,
            linewidth=1.6 if thick else 0.8,
            linestyle="--" if name == "fp8" else "-",
            zorder=3 if thick else 2,
            label=f"{name}, held out {curve.held_out[-1][1]:.3f}",
        )
        held_out = np.array(curve.held_out[:-1]).reshape(-1, 2)
        above.plot(
            held_out[:, 0] * curve.tokens_per_step, held_out[:, 1], "o", markersize=3, color=colour, alpha=0.6
        )
        twin = runs.get(BF16)
        if twin is not None and name != BF16:
            window = max(1, len(curve.losses) // 10)
            gaps_S = gaps_along(curve, twin, window)
            below.plot(
                tokens_S[-len(gaps_S) :], gaps_S, color=colour, linewidth=1.6 if thick else 0.8, label=name
            )
    below.axhspan(-GOAL, GOAL, color=FAINT, alpha=0.5)
    dress(above, "Training loss (dots: held out)", "", "nats a token")
    dress(below, f"Gap to bf16, means over a tenth of the run; grey: +-{GOAL} %", "tokens", "%")
    count_ticks(below)
    above.legend(frameon=False, fontsize=8)
    if below.lines[1:]:  # the first is zero
        below.legend(frameon=False, fontsize=8)
    return save(figure, path)
