"""The pipeline of one step, one row per rank, in the colours of the V3 report's figure 5."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from deepseek_train.monitor import numbers
from deepseek_train.monitor.pictures.style import INK, dress, new_figure, save
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.timeline import Span, Timeline

Box = tuple[tuple[float, float], ...]  # corners

_WIDTH = 15.0  # inches
_ROW = 0.38  # inches
_IDLE = "#e4e5ea"
# per kind: the direction that starts on the first rank, the one that starts on the last
_COLOURS = {
    Kind.FORWARD: ("#fdd09a", "#ea8a2c"),
    Kind.BACKWARD: ("#b9dfa6", "#4f9d45"),
    Kind.BACKWARD_INPUT: ("#a6e0d6", "#23907f"),
    Kind.BACKWARD_WEIGHT: ("#b3d0f5", "#3a73c4"),
}
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward for inputs",
    Kind.BACKWARD_WEIGHT: "backward for weights",
}


@dataclass
class _Shapes:
    """Rectangles with their colours, drawn together: thousands of single patches take seconds."""

    boxes: list[Box] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    frames: list[Box] = field(default_factory=list)


def draw_timeline(timeline: Timeline, path: Path, title: str = "Pipeline") -> Path:
    """Boxes are spans with their micro-batch's number where it fits; grey is idle; a dark frame holds the
    forward and the backward of an overlapped pair, one above the other while they run at the same time.

    ``timeline`` needs one span.
    """
    begin = min(span.start for span in timeline.spans)
    makespan = timeline.makespan()
    figure = new_figure(_WIDTH, 1.5 + _ROW * timeline.num_ranks)
    axes = figure.add_subplot()
    facts = f"{numbers.duration(makespan)}, bubble {numbers.percent(timeline.bubble_fraction())}"
    dress(axes, f"{title}: {facts}", "seconds", "pipeline rank")
    axes.set_xlim(0, makespan)
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_ranks))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    reverse = reverse_microbatches(timeline)
    points_per_second = (_WIDTH - 1.0) * 72 / makespan
    idle = [_box(0, makespan, rank - 0.42, 0.84) for rank in range(timeline.num_ranks)]
    axes.add_collection(PolyCollection(idle, facecolors=_IDLE, linewidths=0))
    shapes = _Shapes()
    for rank in range(timeline.num_ranks):
        for group in pairs([span for span in timeline.spans if span.rank == rank]):
            _place_group(axes, shapes, group, begin, reverse, points_per_second)
    edge = min(0.5, 0.02 * _WIDTH * 72 * timeline.num_ranks / len(timeline.spans))  # thin boxes, thin edges
    axes.add_collection(PolyCollection(shapes.boxes, facecolors=shapes.colours, edgecolors="white", lw=edge))
    axes.add_collection(PolyCollection(shapes.frames, facecolors="none", edgecolors=INK, lw=1.1))
    _legend(figure, {span.kind for span in timeline.spans}, bool(reverse), bool(shapes.frames))
    return save(figure, path)


def pairs(spans: Sequence[Span]) -> list[tuple[Span, ...]]:
    """Spans of one rank in order, the two halves of an overlapped pair together."""
    groups: list[tuple[Span, ...]] = []
    waiting: Span | None = None
    for span in spans:
        if not span.paired:
            groups.append((span,))
        elif waiting is None:
            waiting = span
        else:
            groups.append((waiting, span))
            waiting = None
    return groups if waiting is None else [*groups, (waiting,)]


def _place_group(
    axes: Axes,
    shapes: _Shapes,
    group: tuple[Span, ...],
    begin: float,
    reverse: frozenset[int],
    points_per_second: float,
) -> None:
    together = len(group) == 2 and min(s.end for s in group) > max(s.start for s in group)
    height = 0.42 if together else 0.84
    top = group[0].rank - 0.42
    for place, span in enumerate(group):
        bottom = top + (place * height if together else 0)
        x, width = span.start - begin, span.end - span.start
        shapes.boxes.append(_box(x, width, bottom, height))
        shapes.colours.append(_COLOURS[span.kind][span.microbatch in reverse])
        label = str(span.microbatch)
        size = min(6.5 if together else 8.0, 1.3 * width * points_per_second / len(label))
        if size >= 4.5:
            ink = "white" if span.microbatch in reverse else INK
            centre = (x + width / 2, bottom + height / 2)
            axes.text(*centre, label, ha="center", va="center_baseline", fontsize=size, color=ink)
    if group[0].paired:
        left, right = min(s.start for s in group), max(s.end for s in group)
        shapes.frames.append(_box(left - begin, right - left, top, 0.84))


def _box(x: float, width: float, bottom: float, height: float) -> Box:
    return ((x, bottom), (x + width, bottom), (x + width, bottom + height), (x, bottom + height))


def reverse_microbatches(timeline: Timeline) -> frozenset[int]:
    """Micro-batches that flow towards rank 0: their first stage is on a higher rank than their last."""
    ends: dict[int, tuple[Span, Span]] = {}
    for span in timeline.spans:
        first, last = ends.get(span.microbatch, (span, span))
        ends[span.microbatch] = (min(first, span, key=_stage), max(last, span, key=_stage))
    return frozenset(m for m, (first, last) in ends.items() if first.rank > last.rank)


def _stage(span: Span) -> int:
    return span.stage


def _legend(figure: Figure, kinds: set[Kind], two_directions: bool, pairs_drawn: bool) -> None:
    handles = []
    for kind, (down, up) in _COLOURS.items():
        if kind not in kinds:
            continue
        if two_directions:
            handles += [Patch(color=down, label=f"{_NAMES[kind]}, first rank to last")]
            handles += [Patch(color=up, label="last to first")]
        else:
            handles.append(Patch(color=down, label=_NAMES[kind]))
    if pairs_drawn:
        handles.append(Patch(facecolor="white", edgecolor=INK, linewidth=1.1, label="forward-backward pair"))
    handles.append(Patch(color=_IDLE, label="idle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
