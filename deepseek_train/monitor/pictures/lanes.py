"""What hid what: the compute and the communication lane of every rank, phase by phase, while one pair ran."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from deepseek_train.monitor import numbers
from deepseek_train.monitor.pictures.boxes import Box, box
from deepseek_train.monitor.pictures.palette import COLOURS, IDLE, NAMES
from deepseek_train.monitor.pictures.style import INK, dress, new_figure, save
from deepseek_train.schedule.overlap import Lane
from deepseek_train.schedule.rows import pairs, stack
from deepseek_train.schedule.timeline import PhaseSpan, Span, Timeline

_WIDTH = 15.0  # inches
_LANE = 0.34  # inches
_EXPOSED = "#c4122f"
_GAP = 0.35  # between ranks, in lanes
_FONT = 7.0  # points


@dataclass(frozen=True)
class _Row:
    rank: int
    place: float  # of its middle, in lanes from the top
    label: str
    phases: list[PhaseSpan]


def middle_chunks(timeline: Timeline, rank: int) -> tuple[Span, ...]:
    """The overlapped pair in the middle of ``rank``'s row; of a row without pairs the chunk in its middle; () of an
    empty row."""
    groups = pairs([span for span in timeline.spans if span.rank == rank])
    groups = [group for group in groups if len(group) == 2] or groups
    return groups[len(groups) // 2] if groups else ()


def draw_lanes(timeline: Timeline, path: Path, title: str = "Lanes", rank: int | None = None) -> Path:
    """Two rows for each rank, computation above and communication below (several where messages are under way at once),
    during ``middle_chunks`` of ``rank`` (default: the middle one of the ranks). A red line marks communication that no
    computation of its rank hid. ``timeline`` needs phases, and ``rank`` a span.
    """
    rank = timeline.num_ranks // 2 if rank is None else rank
    chunks = middle_chunks(timeline, rank)
    begin, end = min(c.start for c in chunks), max(c.end for c in chunks)
    rows = _rows(timeline, begin, end)
    bottom = rows[-1].place + 0.5
    figure = new_figure(_WIDTH, 1.4 + _LANE * bottom)
    axes = figure.add_subplot()
    names = " & ".join(f"{c.stage}{c.kind.value}{c.microbatch}" for c in chunks)
    dress(axes, f"{title}: {names} on rank {rank}, {_facts(timeline, rank, begin, end)}", "seconds", "")
    axes.set_xlim(begin, end)
    axes.set_ylim(bottom, -0.5)
    axes.set_yticks([row.place for row in rows], [row.label for row in rows])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    boxes: list[Box] = []
    colours: list[str] = []
    for row in rows:
        for phase in row.phases:
            start, stop = max(phase.start, begin), min(phase.end, end)
            boxes.append(box(start, stop - start, row.place - 0.42, 0.84))
            colours.append(COLOURS[phase.kind][phase.lane is Lane.COMPUTE])
            _write(axes, phase, start, stop, row.place, (_WIDTH - 2.0) * 72 / (end - begin))
    idle = [box(begin, end - begin, row.place - 0.42, 0.84) for row in rows]
    axes.add_collection(PolyCollection(idle, facecolors=IDLE, linewidths=0))
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="white", lw=0.5))
    _mark_exposed(axes, timeline, rows, begin, end)
    _legend(figure, timeline)
    return save(figure, path)


def _rows(timeline: Timeline, begin: float, end: float) -> list[_Row]:
    """From the top."""
    rows: list[_Row] = []
    place = 0.0
    for rank in range(timeline.num_ranks):
        phases = [p for p in timeline.phases if p.rank == rank and p.end > begin and p.start < end]
        for lane in Lane:
            label = f"rank {rank}  {lane.value}" if lane is Lane.COMPUTE else lane.value
            for number, row in enumerate(stack([p for p in phases if p.lane is lane]) or [[]]):
                rows.append(_Row(rank, place, label if number == 0 else "", row))
                place += 1.0
        place += _GAP
    return rows


def _facts(timeline: Timeline, rank: int, begin: float, end: float) -> str:
    exposed = timeline.exposed_communication(rank, begin, end)
    share = numbers.percent(exposed / (end - begin)) if end > begin else "-"
    return f"{numbers.duration(end - begin)}, exposed communication {numbers.duration(exposed)} ({share})"


def _write(
    axes: Axes, phase: PhaseSpan, start: float, stop: float, place: int, points_per_second: float
) -> None:
    """The longest name that fits into the box."""
    room = (stop - start) * points_per_second
    letter, number = phase.kind.value, phase.microbatch
    for text in (f"{phase.name} {letter} m{number}", f"{phase.name} {letter}", phase.name, phase.name[:1]):
        if 0.62 * _FONT * len(text) < room:
            ink = "white" if phase.lane is Lane.COMPUTE else INK
            centre = ((start + stop) / 2, place)
            axes.text(*centre, text, ha="center", va="center_baseline", fontsize=_FONT, color=ink)
            return


def _mark_exposed(axes: Axes, timeline: Timeline, rows: list[_Row], begin: float, end: float) -> None:
    """A line below the last row of each rank."""
    for rank in range(timeline.num_ranks):
        below = max(row.place for row in rows if row.rank == rank) + 0.46
        marks = [
            box(start, stop - start, below, 0.14)
            for start, stop in timeline.exposed_intervals(rank, begin, end)
        ]
        axes.add_collection(PolyCollection(marks, facecolors=_EXPOSED, linewidths=0))


def _legend(figure: Figure, timeline: Timeline) -> None:
    seen = {(phase.kind, phase.lane) for phase in timeline.phases}
    handles = []
    for kind, (light, dark) in COLOURS.items():
        if (kind, Lane.COMPUTE) in seen:
            handles.append(Patch(color=dark, label=f"{NAMES[kind]}, computed"))
        if (kind, Lane.COMMUNICATION) in seen:
            handles.append(Patch(color=light, label=f"{NAMES[kind]}, communicated"))
    handles += [Patch(color=_EXPOSED, label="communication not hidden"), Patch(color=IDLE, label="idle")]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
