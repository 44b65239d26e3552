"""How evenly the experts of each MoE layer are used over training.

Shapes: L MoE layers, S training steps whose loads were kept, E routed experts, C columns of a heatmap (groups
of consecutive kept steps, averaged). Load is relative: tokens of an expert / mean tokens per expert, 1 is
perfect. MaxVio is the busiest expert's load - 1 ("Auxiliary-Loss-Free Load Balancing Strategy", equation 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from deepseek_train.monitor.imbalance import EVEN
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.monitor.pictures.style import FAINT, INK, dress, new_figure, save

_MAX_COLUMNS = 240
_MAX_EXPERT_PANELS = 4

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LoadHistory:
    """``edges_C1``: where columns begin and end, in steps (half a step before, so step k is inside)."""

    layers: tuple[int, ...]
    edges_C1: Array
    load_LCE: Array
    max_violation_LC: Array


def load_history(steps: Sequence[StepMetrics]) -> LoadHistory | None:
    """Averages the kept loads into columns; None without a step that holds loads."""
    kept = [step for step in steps if step.expert_load]
    if not kept:
        return None
    layers = tuple(sorted(kept[-1].expert_load))
    groups = np.array_split(np.arange(len(kept)), min(_MAX_COLUMNS, len(kept)))
    starts = [group[0] for group in groups]
    edges_C1 = np.array([kept[i].step for i in starts] + [kept[-1].step + 1], dtype=float) - 0.5
    loads, violations = [], []
    for layer in layers:
        counts_SE = np.array([step.expert_load[layer] for step in kept], dtype=float)
        load_SE = counts_SE / np.maximum(counts_SE.mean(axis=1, keepdims=True), 1e-9)
        size_C = np.diff([*starts, len(kept)])
        loads.append(np.add.reduceat(load_SE, starts, axis=0) / size_C[:, None])
        violations.append(np.add.reduceat(load_SE.max(axis=1) - 1, starts) / size_C)
    return LoadHistory(layers, edges_C1, np.array(loads), np.array(violations))


def draw_max_violation(load: LoadHistory, path: Path) -> Path:
    """MaxVio of the worst layer and the layers' mean; below, with two layers or more, a heatmap row each.

    Both on a logarithmic scale, which shows late, small differences beside early, large ones; what lies below its
    bottom is drawn there. Dashed: where a layer counts as even (``imbalance.EVEN``).
    """
    num_layers = len(load.layers)
    rows_height = min(0.45 * num_layers, 1.6 + 0.1 * num_layers) if num_layers > 1 else 0.0
    figure = new_figure(9.0, 3.0 + rows_height)
    heights = (2.0, rows_height) if num_layers > 1 else (1.0,)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    dress(panels[0], "Expert imbalance (MaxVio)", "", "busiest expert / mean - 1")
    panels[-1].set_xlabel("step", fontsize=9, color=INK)
    values = load.max_violation_LC
    bottom = max(float(values.min()) * 0.8, 0.01)
    top = max(float(values.max()) * 1.3, 2 * EVEN)
    middles_C = (load.edges_C1[:-1] + load.edges_C1[1:]) / 2
    lines = {"mean of layers": ("#444a8f", values.mean(0))}
    if num_layers > 1:
        lines["worst layer"] = ("#c4473a", values.max(0))
    for name, (colour, values_C) in lines.items():
        label = name if num_layers > 1 else f"layer {load.layers[0]}"
        mark = "o" if len(values_C) == 1 else None  # a line of one point is invisible
        panels[0].plot(
            middles_C, values_C.clip(bottom), color=colour, linewidth=1.3, marker=mark, label=label
        )
    panels[0].set_xlim(load.edges_C1[0], load.edges_C1[-1])
    panels[0].axhline(EVEN, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    panels[0].set_yscale("log")
    panels[0].set_ylim(bottom, top)
    _plain_log(panels[0].yaxis)
    panels[0].grid(axis="y", color=FAINT, linewidth=0.6)
    panels[0].legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if num_layers > 1:
        dress(panels[1], "", "step", "MoE layer")
        clipped_LC, colours = values.clip(bottom), LogNorm(bottom, top)
        mesh = _heatmap(panels[1], load.edges_C1, clipped_LC, load.layers, "magma", colours)
        bar = _colour_bar(figure, mesh, panels[1], "MaxVio", extend="neither")
        _plain_log(bar.ax.yaxis)
    return save(figure, path)


def draw_expert_load(load: LoadHistory, path: Path) -> Path:
    """Load of every expert, a panel for each of at most four layers spread over the depth of the model."""
    picked = np.unique(
        np.linspace(0, len(load.layers) - 1, min(_MAX_EXPERT_PANELS, len(load.layers))).round()
    )
    figure = new_figure(9.0, 0.6 + 2.2 * len(picked))
    panels = figure.subplots(len(picked), 1, sharex=True, squeeze=False)[:, 0]
    experts = tuple(range(load.load_LCE.shape[2]))
    for panel, index in zip(panels, picked.astype(int), strict=True):
        last = panel is panels[-1]
        dress(panel, f"Expert load, layer {load.layers[index]}", "step" if last else "", "expert")
        # blue: starved, white: the mean, red: overloaded; three times the mean is already as red as it gets
        norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=3.0)
        mesh = _heatmap(panel, load.edges_C1, load.load_LCE[index].T, experts, "RdBu_r", norm)
        _colour_bar(figure, mesh, panel, "load / mean")
    return save(figure, path)


def _heatmap(
    axes: Axes, edges_C1: Array, values_RC: Array, names: tuple[int, ...], colours: str, norm: Normalize
) -> QuadMesh:
    """Rows R from the top, ticks named ``names``."""
    mesh = axes.pcolormesh(edges_C1, np.arange(len(names) + 1) - 0.5, values_RC, cmap=colours, norm=norm)
    axes.invert_yaxis()
    stride = -(-len(names) // 12)
    axes.set_yticks(range(0, len(names), stride), [str(name) for name in names[::stride]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return mesh


def _plain_log(axis: Axis) -> None:
    """Ticks 0.1, 0.2, 0.5, 1, 2 on a logarithmic axis, and none between."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _colour_bar(
    figure: Figure, mesh: QuadMesh, axes: Axes, label: str, extend: Literal["max", "neither"] = "max"
) -> Colorbar:
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.04, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return bar
