"""The pipeline of one step, one row per rank, in the colours of the V3 report's figure 5."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from deepseek_train.monitor import numbers
from deepseek_train.monitor.pictures.boxes import Box, box, together
from deepseek_train.monitor.pictures.palette import COLOURS, IDLE, NAMES
from deepseek_train.monitor.pictures.style import INK, dress, new_figure, save
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.rows import Tones, pairs, share_time, tones
from deepseek_train.schedule.timeline import Span, Timeline

_WIDTH = 15.0  # inches
_ROW = 0.38  # inches


@dataclass
class _Shapes:
    """Rectangles with their colours, drawn together."""

    boxes: defaultdict[str, list[Box]] = field(default_factory=lambda: defaultdict(list))  # by colour
    frames: list[Box] = field(default_factory=list)


def draw_timeline(timeline: Timeline, path: Path, title: str = "Pipeline", unit: str = "seconds") -> Path:
    """Boxes are spans with their micro-batch's number where it fits; grey is idle; a dark frame holds the forward and
    the backward of an overlapped pair, one above the other where they really ran at the same time.

    ``path`` ends in .png or .svg. ``unit`` "" is for simulated times that are no seconds. ``timeline`` needs one span.
    """
    begin = min(span.start for span in timeline.spans)
    makespan = timeline.makespan()
    figure = new_figure(_WIDTH, 1.5 + _ROW * timeline.num_ranks)
    axes = figure.add_subplot()
    length = numbers.duration(makespan) if unit == "seconds" else f"makespan {makespan:.5g}"
    facts = f"{length}, bubble {numbers.percent(timeline.bubble_fraction())}"
    dress(axes, f"{title}: {facts}", unit or "time", "pipeline rank")
    axes.set_xlim(0, makespan)
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_ranks))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    two = tones(timeline)
    points_per_second = (_WIDTH - 1.0) * 72 / makespan
    idle = [box(0, makespan, rank - 0.42, 0.84) for rank in range(timeline.num_ranks)]
    axes.add_patch(together(idle, facecolor=IDLE, linewidth=0))
    shapes = _Shapes()
    for rank in range(timeline.num_ranks):
        for group in pairs([span for span in timeline.spans if span.rank == rank]):
            _place_group(axes, shapes, group, begin, two, points_per_second)
    edge = min(0.5, 0.02 * _WIDTH * 72 * timeline.num_ranks / len(timeline.spans))  # thin boxes, thin edges
    for colour, boxes in shapes.boxes.items():
        axes.add_patch(together(boxes, facecolor=colour, edgecolor="white", linewidth=edge))
    if shapes.frames:
        axes.add_patch(together(shapes.frames, facecolor="none", edgecolor=INK, linewidth=1.1))
    _legend(figure, {span.kind for span in timeline.spans}, two, bool(shapes.frames))
    return save(figure, path)


def _place_group(
    axes: Axes,
    shapes: _Shapes,
    group: tuple[Span, ...],
    begin: float,
    two: Tones,
    points_per_second: float,
) -> None:
    at_once = share_time(group)
    height = 0.42 if at_once else 0.84
    top = group[0].rank - 0.42
    for place, span in enumerate(group):
        bottom = top + (place * height if at_once else 0)
        x, width = span.start - begin, span.end - span.start
        shapes.boxes[COLOURS[span.kind][two.is_second(span)]].append(box(x, width, bottom, height))
        label = str(span.microbatch)
        size = min(6.5 if at_once else 8.0, 1.3 * width * points_per_second / len(label))
        if size >= 4.5:
            ink = "white" if two.is_second(span) else INK
            centre = (x + width / 2, bottom + height / 2)
            axes.text(*centre, label, ha="center", va="center_baseline", fontsize=size, color=ink)
    if group[0].paired:
        left, right = min(s.start for s in group), max(s.end for s in group)
        shapes.frames.append(box(left - begin, right - left, top, 0.84))


def _legend(figure: Figure, kinds: set[Kind], two: Tones, pairs_drawn: bool) -> None:
    handles = []
    for kind, (first, second) in COLOURS.items():
        if kind not in kinds:
            continue
        if two.used:
            handles += [Patch(color=first, label=f"{NAMES[kind]}, {two.names[0]}")]
            handles += [Patch(color=second, label=two.names[1])]
        else:
            handles.append(Patch(color=first, label=NAMES[kind]))
    if pairs_drawn:
        handles.append(Patch(facecolor="white", edgecolor=INK, linewidth=1.1, label="forward-backward pair"))
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
