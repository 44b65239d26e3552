"""The loss curve. Shapes: S training steps."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_train.monitor.jsonl import History
from deepseek_train.monitor.pictures.style import FAINT, count_ticks, dress, new_figure, save

_TRAIN, _MTP, _VALIDATION, _SKIPPED = "#2f6fdb", "#9a6bd1", "#e0542f", "#c4122f"


def draw_loss(history: History, path: Path) -> Path:
    """Training and MTP loss (steps faint, smoothed bold), validation points and skipped steps over tokens.

    ``history`` needs one step or validation. The legend's figures are means of the last 20 steps.
    """
    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    dress(axes, "Loss", "tokens", "cross-entropy, nats per token")
    count_ticks(axes)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)

    tokens_S = np.array([s.tokens for s in history.steps], dtype=float)
    loss_S = np.array([s.loss for s in history.steps], dtype=float)
    mtp_S = np.array([np.nan if s.mtp_loss is None else s.mtp_loss for s in history.steps], dtype=float)
    for values_S, colour, label in ((mtp_S, _MTP, "MTP"), (loss_S, _TRAIN, "training")):
        seen_S = np.isfinite(values_S)
        if not seen_S.any():
            continue
        smooth_S = smooth(values_S[seen_S])
        axes.plot(tokens_S[seen_S], values_S[seen_S], color=colour, alpha=0.25, linewidth=0.8)
        final = f"{label}  {values_S[seen_S][-20:].mean():.3f}"
        marker = "o" if seen_S.sum() == 1 else None  # a line of one point is invisible
        axes.plot(tokens_S[seen_S], smooth_S, color=colour, linewidth=1.8, label=final, marker=marker)
    if history.evaluations:
        axes.plot(
            [e.tokens for e in history.evaluations],
            [e.loss for e in history.evaluations],
            color=_VALIDATION,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            label=f"validation  {history.evaluations[-1].loss:.3f}",
            zorder=4,
        )
    skipped = [s.tokens for s in history.steps if s.skipped]
    if skipped:
        bottom = axes.get_xaxis_transform()  # x in tokens, y as a share of the height
        axes.plot(
            skipped,
            [0.02] * len(skipped),
            transform=bottom,
            color=_SKIPPED,
            marker="x",
            linestyle="none",
            label=f"skipped steps  {len(skipped)}",
        )
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return save(figure, path)


def smooth(values_S: NDArray[np.float64], share: float = 0.04) -> NDArray[np.float64]:
    """Mean over a window of ``share`` of all steps (at least 9) around each step, so the curve does not lag.
    At the start, where the loss falls steeply, the window shrinks symmetrically; at the end it is cut."""
    index_S = np.arange(len(values_S))
    half_S = np.minimum(max(4, round(share * len(values_S) / 2)), index_S)
    begin_S, end_S = index_S - half_S, np.minimum(index_S + half_S + 1, len(values_S))
    sums = np.concatenate([[0.0], np.cumsum(values_S)])
    smooth_S: NDArray[np.float64] = (sums[end_S] - sums[begin_S]) / (end_S - begin_S)
    return smooth_S
